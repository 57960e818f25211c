"""The operators in plain PyTorch, for any device and any floating dtype; the oracle in tests.

Half-precision inputs are computed in float32 and rounded once at the end, as the Triton kernels do;
float64 stays float64. Nothing here waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .philox import noise_normal, noise_uniform, sample_radius
from .rows import per_sample

HALF_TYPES = (torch.float16, torch.bfloat16)
GRADIENT_GUARD = 1e-10  # Rice et al. 2020, released code: g / (|g| + 1e-10)
DIRECTION_GUARD = 1e-20  # Wu et al. 2020, released code: |w| / (|d| + 1e-20)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic runs in: float32 for half types, else the type itself."""
    return torch.float32 if dtype in HALF_TYPES else dtype


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in HALF_TYPES else t


@torch.no_grad()
def linf_start(
    x: Tensor,
    eps: float | Tensor,
    index: Tensor,
    seed: Tensor | int,
    offset: Tensor | int,
    low: float = 0.0,
    high: float = 1.0,
    stream: int = 0,
) -> Tensor:
    """x' = clamp(x + eps*u, low, high), u ~ U[-1, 1) drawn per sample row; shape and dtype of x.

    ``x`` (B, ...) has pixels in [low, high], and ``eps`` has their unit; it is a number, a 0-dim
    tensor, or (B,), a radius for each sample (``ValueError`` for another shape). ``index`` (B,)
    int64 holds the rows of the samples in the training set. ``seed``, ``offset`` and ``stream`` are
    those of :func:`noise_uniform`, with its errors. Madry et al. 2018.
    """
    wide = _wide(x)
    radius = per_sample("eps", eps, x, wide.dtype)
    noise = noise_uniform(index, x.shape[1:], seed, offset, stream, wide.dtype)
    return (wide + noise.mul_(radius)).clamp_(low, high).to(x.dtype)


@torch.no_grad()
def linf_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """One ascent step: clamp(clamp(x' + alpha*sign(g), x - eps, x + eps), low, high).

    ``x_adv`` (x'), ``grad`` (g) and ``x`` (B, ...) have one shape; the result has the dtype of
    ``x_adv``. ``alpha`` and ``eps`` have the unit of the pixels; each is a number, a 0-dim tensor,
    or (B,), one for each sample (``ValueError`` for another shape). ``eps=inf`` and infinite bounds
    switch a clamp off. sign(0) = 0. Where the gradient is not finite the result is NaN, so that a
    failed step is not taken for a step without motion. Madry et al. 2018, Eq. 3.
    """
    center = _wide(x)
    size = per_sample("alpha", alpha, x, center.dtype)
    # In place on a new tensor, which saves three allocations on a CPU.
    moved = _sign(grad).to(center.dtype).mul_(size).add_(x_adv)
    return _into_ball_and_box(moved, center, eps, low, high).to(x_adv.dtype)


@torch.no_grad()
def linf_project(
    x_adv: Tensor, x: Tensor, eps: float | Tensor, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """clamp(clamp(x', x - eps, x + eps), low, high), the nearest point of the ball and the box.

    ``x_adv`` (x') and ``x`` (B, ...) have one shape; the result has the dtype of ``x_adv``. ``eps``
    is that of :func:`linf_step`.
    """
    return _into_ball_and_box(_wide(x_adv), _wide(x), eps, low, high).to(x_adv.dtype)


def _sign(gradient: Tensor) -> Tensor:
    """1, -1 or 0, and NaN where the gradient is not finite."""
    return gradient.sign().add_(gradient - gradient)


def _into_ball_and_box(
    moved: Tensor, center: Tensor, eps: float | Tensor, low: float, high: float
) -> Tensor:
    radius = per_sample("eps", eps, center, center.dtype)
    return moved.clamp(center - radius, center + radius).clamp_(low, high)


@torch.no_grad()
def l2_start(
    x: Tensor,
    eps: float | Tensor,
    index: Tensor,
    seed: Tensor | int,
    offset: Tensor | int,
    low: float = 0.0,
    high: float = 1.0,
    stream: int = 0,
) -> Tensor:
    """x' = clamp(x + r*eps*n/|n|, low, high), n ~ N(0, I), r ~ U[0, 1) per sample.

    The arguments and errors are those of :func:`linf_start`; ``eps`` is an L2 norm per sample. The
    radius is uniform, so the point is not uniform in the ball (Rice et al. 2020, released code).
    """
    wide = _wide(x)
    noise = noise_normal(index, x.shape[1:], seed, offset, stream, wide.dtype)
    radius = sample_radius(index, seed, offset, stream).to(wide.dtype)
    reach = _column(radius, x) * per_sample("eps", eps, x, wide.dtype)
    scale = reach / (_sample_norm(noise) + GRADIENT_GUARD)
    return (wide + noise * scale).clamp(low, high).to(x.dtype)


@torch.no_grad()
def l2_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """x' + alpha*g/|g| per sample, projected to |x' - x| <= eps, then clamped to [low, high].

    ``x_adv`` (x'), ``grad`` (g) and ``x`` (B, ...) have one shape; the result has the dtype of
    ``x_adv``. ``alpha`` and ``eps`` are L2 norms; each is a number, a 0-dim tensor, or (B,), one
    for each sample (``ValueError`` for another shape). A zero gradient moves nothing; one whose
    norm is not finite gives NaN. Rice et al. 2020.
    """
    center = _wide(x)
    wide_grad = grad.to(center.dtype)
    norm = _sample_norm(wide_grad)
    size = per_sample("alpha", alpha, x, center.dtype)
    # As torch divides a number by a tensor, so that numbers and tensors of them round alike.
    scale = (norm + GRADIENT_GUARD).reciprocal() * size + (norm - norm)
    moved = (wide_grad * scale).add_(x_adv)
    return _into_l2_ball(moved, center, eps).clamp(low, high).to(x_adv.dtype)


@torch.no_grad()
def l2_project(
    x_adv: Tensor, x: Tensor, eps: float | Tensor, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """x' projected to |x' - x| <= eps per sample by scaling x' - x, then clamped to [low, high].

    ``x_adv`` (x') and ``x`` (B, ...) have one shape; the result has the dtype of ``x_adv``. ``eps``
    is that of :func:`l2_step`.
    """
    return _into_l2_ball(_wide(x_adv), _wide(x), eps).clamp(low, high).to(x_adv.dtype)


def _into_l2_ball(moved: Tensor, center: Tensor, eps: float | Tensor) -> Tensor:
    delta = moved - center
    norm = _sample_norm(delta)
    radius = per_sample("eps", eps, center, center.dtype)
    shrink = torch.where(norm > radius, norm.reciprocal() * radius, torch.ones_like(norm))
    return delta.mul_(shrink).add_(center)


def _sample_norm(t: Tensor) -> Tensor:
    """The L2 norm of each sample, (B, 1, ...)."""
    return _column(torch.linalg.vector_norm(t.flatten(1), dim=1), t)


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (like.dim() - 1))


@torch.no_grad()
def perturb_weights(
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
    gamma: float | Tensor,
    scope: str = "tensor",
) -> None:
    """In place: v_i = gamma * |w_i| / |g_i| * g_i replaces the direction g_i, and w_i += v_i.

    ``weights`` (w) and ``directions`` (g) are lists of the same length, shapes and dtypes;
    ``gamma`` is a float or a 0-dim tensor. With ``scope`` "tensor" each tensor has its own ratio
    |w_i| / |g_i| (Wu et al. 2020, AWP, Eq. 9), with "global" all share the ratio of the norms over
    all tensors (Yu et al. 2022, RWP, released code). A v that is not finite becomes 0.
    Raises ``ValueError`` for an unknown scope or lists that do not match.
    """
    check_pairs(weights, directions)
    if scope not in ("tensor", "global"):
        raise ValueError(f"scope must be 'tensor' or 'global', not {scope!r}.")
    if not weights:
        return
    w_norms, g_norms = _norms(weights, scope), _norms(directions, scope)
    ratios = gamma * w_norms / (g_norms + DIRECTION_GUARD)
    for w, g, ratio in zip(weights, directions, ratios.unbind(), strict=True):
        # Rounded before the check, since a value that overflows the dtype is not finite either.
        g.copy_(_wide(g) * ratio).nan_to_num_(0.0, 0.0, 0.0)
        w.add_(g)


def _norms(tensors: Sequence[Tensor], scope: str) -> Tensor:
    norms = torch.stack([torch.linalg.vector_norm(_wide(t)) for t in tensors])
    return norms if scope == "tensor" else torch.linalg.vector_norm(norms).expand(len(tensors))


@torch.no_grad()
def restore_weights(
    weights: Sequence[Tensor], originals: Sequence[Tensor], v: Sequence[Tensor]
) -> None:
    """In place: w <- w0 + (w - fl(w0 + v)), fl being the rounding to the dtype of w.

    This is exactly w0 where nothing changed w after the perturbation, and exactly w where
    fl(w0 + v) is w0, so an update without a perturbation is kept bit for bit. ``weights`` (w),
    ``originals`` (w0, a copy from before) and ``v`` (the directions after :func:`perturb_weights`)
    are lists of the same length, shapes and dtypes. Raises ``ValueError`` if they differ.
    """
    check_pairs(weights, originals)
    check_pairs(weights, v)
    for w, w0, shift in zip(weights, originals, v, strict=True):
        perturbed = w0 + shift
        still = perturbed == w0
        restored = _wide(w0) + (_wide(w) - _wide(perturbed))
        w.copy_(torch.where(still, w, restored.to(w.dtype)))


def check_pairs(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` unless both lists hold tensors of the same shapes and dtypes."""
    if len(first) != len(second):
        raise ValueError(f"The lists hold {len(first)} and {len(second)} tensors; pair them up.")
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(
                f"A tensor of shape {tuple(a.shape)} and {a.dtype} cannot be paired with one of "
                f"shape {tuple(b.shape)} and {b.dtype}."
            )


def top_n_sum(z: Tensor, z_adv: Tensor, n: int) -> Tensor:
    """Sum of the ``n`` largest |z - z'| over the whole batch, a differentiable scalar.

    ``z`` and ``z_adv`` (z') are logits (B,C) of one shape. Among equal entries the one with the
    lowest flat index counts first. The sub-gradient is sign(z - z') with sign(0) = 0. The sum is
    float32, or float64 for float64 logits. Raises ``ValueError`` if ``n`` is not in 0..B*C.
    Li & Spratling 2023 (AdvLC), Eq. 6.
    """
    if not 0 <= n <= z.numel():
        raise ValueError(f"n must be in 0..{z.numel()}, not {n}.")
    distance = (_wide(z) - _wide(z_adv)).flatten().abs()
    largest = distance.detach().sort(descending=True, stable=True).indices[:n]
    return distance[largest].sum()


def trades_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(softmax p || softmax q) per sample: (B,C) and (B,C) logits -> (B,), differentiable.

    The result is float32, or float64 for float64 logits. The result and its gradients are finite
    for logits of +-1e4. Zhang et al. 2019 (TRADES), Eq. 5.
    """
    log_p = _wide(logits_p).log_softmax(1)
    log_q = _wide(logits_q).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def masked_ce(logits: Tensor, y: Tensor, c_min: float | Tensor) -> tuple[Tensor, Tensor]:
    """(the sum of the cross entropies that are <= c_min, divided by B; their number).

    ``logits`` (B,C); ``y`` (B,) int64 in 0..C-1 (the result for another label is undefined on a
    GPU); ``c_min``, a float or a 0-dim tensor, in nats. The first scalar is differentiable, the
    second is int64. A row whose loss is NaN is not counted, and its gradient is NaN.
    Yu et al. 2022 (RWP), Eq. 9.
    """
    loss = torch.nn.functional.cross_entropy(_wide(logits), y, reduction="none")
    kept = loss.detach() <= c_min
    return torch.where(kept, loss, 0.0).sum() / len(loss), kept.sum()


@torch.no_grad()
def block_signs(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The sign of each block's gradient, in its shape, dtype and layout.

    NaN where the gradient is not finite. Li et al. 2020 (APART), Alg. 1.
    """
    return [_sign(g) for g in gradients]


@torch.no_grad()
def block_noise(signs: Sequence[Tensor], alphas: Tensor) -> list[Tensor]:
    """alpha_b * s_b for each of the n blocks, in the shape, dtype and layout of s_b.

    ``signs`` (s) is a list of n tensors, ``alphas`` has shape (n,), in the unit of the blocks'
    inputs. Li et al. 2020 (APART), Alg. 1, line 4.
    """
    # A sign times the rounded step is the rounded product: no copy in float32 is needed.
    pairs = zip(signs, alphas.unbind(), strict=True)
    return [s * alpha.to(s.dtype) for s, alpha in pairs]


@torch.no_grad()
def block_step_gradients(gradients: Sequence[Tensor], signs: Sequence[Tensor]) -> Tensor:
    """d loss / d alpha_b = sum(g_b * s_b) for n blocks: (n,) float32, float64 for float64 blocks.

    ``gradients`` (g) and ``signs`` (s) are lists of n tensors of the same shapes. The sums run over
    the whole batch. The order of the kernel's sums does not change between runs. In a compiled
    region Inductor chooses the order, and values of half types computed in that region are summed
    before they are rounded. Li et al. 2020 (APART), Alg. 1.
    """
    # A product with a sign is exact in any precision; only the sum needs float32.
    pairs = zip(gradients, signs, strict=True)
    return torch.stack([(g * s).sum(dtype=compute_dtype(g.dtype)) for g, s in pairs])
