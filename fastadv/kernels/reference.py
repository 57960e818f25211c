"""The plain PyTorch face of every kernel: any device, any floating dtype; the oracle in tests.

Half-precision inputs are computed in float32 and rounded once at the end, as the Triton kernels do;
float64 stays float64. Nothing here waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .philox import noise_normal, noise_uniform, sample_radius

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
    eps: float,
    index: Tensor,
    seed: Tensor | int,
    offset: Tensor | int,
    low: float = 0.0,
    high: float = 1.0,
    stream: int = 0,
) -> Tensor:
    """x' = clamp(x + eps*u, low, high) with u ~ U[-1, 1) drawn per sample row.

    ``x`` (B, ...) in pixels of [low, high]; ``index`` (B,) int64 rows of the training set;
    ``seed``, ``offset``, ``stream`` as :func:`noise_uniform`. Madry et al. 2018.
    """
    wide = _wide(x)
    noise = noise_uniform(index, x.shape[1:], seed, offset, stream, wide.dtype)
    return (wide + noise * eps).clamp(low, high).to(x.dtype)


@torch.no_grad()
def linf_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """One ascent step: clamp to the box of clamp(x' + alpha*sign(g), x - eps, x + eps).

    All tensors (B, ...) of one shape; ``alpha`` a float or a 0-dim tensor; sign(0) = 0, and NaN
    where the gradient is not finite: a step that cannot be taken must not look like one that was.
    ``eps=inf`` and infinite bounds switch a clamp off.
    Madry et al. 2018, Eq. 3.
    """
    center = _wide(x)
    # In place on what is fresh anyway: three allocations less on a CPU.
    moved = _sign(grad).to(center.dtype).mul_(alpha).add_(x_adv)
    return _into_ball_and_box(moved, center, eps, low, high).to(x_adv.dtype)


@torch.no_grad()
def linf_project(
    x_adv: Tensor, x: Tensor, eps: float, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """The point of the eps-ball around ``x`` and of the box nearest to ``x_adv``, both (B, ...)."""
    return _into_ball_and_box(_wide(x_adv), _wide(x), eps, low, high).to(x_adv.dtype)


def _sign(gradient: Tensor) -> Tensor:
    """1, -1 or 0, and NaN where the gradient is not finite."""
    return gradient.sign().add_(gradient - gradient)


def _into_ball_and_box(
    moved: Tensor, center: Tensor, eps: float, low: float, high: float
) -> Tensor:
    return moved.clamp(center - eps, center + eps).clamp(low, high)


@torch.no_grad()
def l2_start(
    x: Tensor,
    eps: float,
    index: Tensor,
    seed: Tensor | int,
    offset: Tensor | int,
    low: float = 0.0,
    high: float = 1.0,
    stream: int = 0,
) -> Tensor:
    """x' = clamp(x + r*eps*n/|n|, low, high), n ~ N(0, I), r ~ U[0, 1) per sample.

    Arguments as :func:`linf_start`. The radius is uniform, so the point is not uniform in the ball
    (Rice et al. 2020, released code).
    """
    wide = _wide(x)
    noise = noise_normal(index, x.shape[1:], seed, offset, stream, wide.dtype)
    radius = sample_radius(index, seed, offset, stream).to(wide.dtype)
    scale = radius * eps / (_sample_norm(noise) + GRADIENT_GUARD)
    return (wide + noise * _per_sample(scale, x)).clamp(low, high).to(x.dtype)


@torch.no_grad()
def l2_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """x' + alpha*g/|g| per sample, brought back to |x' - x| <= eps, then to the box.

    All tensors (B, ...) of one shape; a zero gradient moves nothing, one whose norm is not finite
    gives NaN. Rice et al. 2020.
    """
    center = _wide(x)
    wide_grad = grad.to(center.dtype)
    norm = _sample_norm(wide_grad)
    scale = alpha / (norm + GRADIENT_GUARD) + (norm - norm)
    moved = (wide_grad * _per_sample(scale, x)).add_(x_adv)
    return _into_l2_ball(moved, center, eps).clamp(low, high).to(x_adv.dtype)


@torch.no_grad()
def l2_project(x_adv: Tensor, x: Tensor, eps: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """x' - x scaled back to |x' - x| <= eps per sample, then the box; both (B, ...)."""
    return _into_l2_ball(_wide(x_adv), _wide(x), eps).clamp(low, high).to(x_adv.dtype)


def _into_l2_ball(moved: Tensor, center: Tensor, eps: float) -> Tensor:
    delta = moved - center
    norm = _sample_norm(delta)
    shrink = torch.where(norm > eps, eps / norm, torch.ones_like(norm))
    return delta.mul_(_per_sample(shrink, center)).add_(center)


def _sample_norm(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t.flatten(1), dim=1)


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (like.dim() - 1))


@torch.no_grad()
def perturb_weights(
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
    gamma: float | Tensor,
    scope: str = "tensor",
) -> None:
    """In place: v_i = gamma * |w_i| / |g_i| * g_i replaces the direction g_i, and w_i += v_i.

    ``scope`` "tensor" has one ratio per tensor (Wu et al. 2020, AWP, Eq. 9), "global" one ratio of
    the norms over all tensors together (Yu et al. 2022, RWP, released code). A non-finite v is 0.
    Raises ``ValueError`` for another scope or lists that do not match.
    """
    check_pairs(weights, directions)
    if scope not in ("tensor", "global"):
        raise ValueError(f"scope must be 'tensor' or 'global', not {scope!r}.")
    if not weights:
        return
    w_norms, g_norms = _norms(weights, scope), _norms(directions, scope)
    ratios = gamma * w_norms / (g_norms + DIRECTION_GUARD)
    for w, g, ratio in zip(weights, directions, ratios.unbind(), strict=True):
        # Rounded before the check: what overflows the dtype is not finite either.
        g.copy_(_wide(g) * ratio).nan_to_num_(0.0, 0.0, 0.0)
        w.add_(g)


def _norms(tensors: Sequence[Tensor], scope: str) -> Tensor:
    norms = torch.stack([torch.linalg.vector_norm(_wide(t)) for t in tensors])
    return norms if scope == "tensor" else torch.linalg.vector_norm(norms).expand(len(tensors))


@torch.no_grad()
def restore_weights(
    weights: Sequence[Tensor], originals: Sequence[Tensor], v: Sequence[Tensor]
) -> None:
    """In place: w <- w0 + (w - fl(w0 + v)); exactly w0 when nothing changed w since, and exactly
    w where fl(w0 + v) is w0: an update without a perturbation keeps its bits.

    ``weights``, ``originals`` (w0, a copy from before) and ``v`` (the directions after
    :func:`perturb_weights`) match pairwise. Raises ``ValueError`` where they do not.
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

    ``z``, ``z_adv`` (B,C) logits of one shape; of equal entries the lowest flat index counts first;
    the sub-gradient is sign(z - z'), sign(0) = 0. Li & Spratling 2023 (AdvLC), Eq. 6.
    Raises ``ValueError`` when ``n`` is not in 0..B*C.
    """
    if not 0 <= n <= z.numel():
        raise ValueError(f"n must be in 0..{z.numel()}, not {n}.")
    distance = (_wide(z) - _wide(z_adv)).flatten().abs()
    largest = distance.detach().sort(descending=True, stable=True).indices[:n]
    return distance[largest].sum()


def trades_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(softmax p || softmax q) per sample, (B,C) x (B,C) -> (B,), differentiable in both.

    Finite, with finite gradients, for logits of +-1e4. Zhang et al. 2019 (TRADES), Eq. 5.
    """
    log_p = _wide(logits_p).log_softmax(1)
    log_q = _wide(logits_q).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def masked_ce(logits: Tensor, y: Tensor, c_min: float | Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the cross entropies that are <= c_min, divided by B; how many there are).

    ``logits`` (B,C), ``y`` (B,) int64 in 0..C-1 (another label is undefined on a GPU), ``c_min`` a
    float or a 0-dim tensor. The first scalar is differentiable, the second is int64. A row whose
    loss is NaN is not counted, and its gradient is NaN. Yu et al. 2022 (RWP), Eq. 9.
    """
    loss = torch.nn.functional.cross_entropy(_wide(logits), y, reduction="none")
    kept = loss.detach() <= c_min
    return torch.where(kept, loss, 0.0).sum() / len(loss), kept.sum()


@torch.no_grad()
def block_signs(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The sign of each block's gradient, same dtype and layout; NaN where that is not finite."""
    return [_sign(g) for g in gradients]


@torch.no_grad()
def block_noise(signs: Sequence[Tensor], alphas: Tensor) -> list[Tensor]:
    """alpha_b * s_b for each block; ``alphas`` (n,). Li et al. 2020 (APART), Alg. 1, line 4."""
    # A sign times the rounded step is the rounded product, and passes over no wide copy.
    pairs = zip(signs, alphas.unbind(), strict=True)
    return [s * alpha.to(s.dtype) for s, alpha in pairs]


@torch.no_grad()
def block_step_gradients(gradients: Sequence[Tensor], signs: Sequence[Tensor]) -> Tensor:
    """d loss / d alpha_b = sum(g_b * s_b), (n,) float32 (float64 for float64 blocks).

    The sums run over the whole batch. The kernel's order does not change between runs; in a
    compiled region Inductor chooses it, and half types made there enter unrounded.
    """
    # A product with a sign is exact in any precision; only the sum must be wide.
    pairs = zip(gradients, signs, strict=True)
    return torch.stack([(g * s).sum(dtype=compute_dtype(g.dtype)) for g, s in pairs])
