# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""The L2 step, projection and start (Triton): per-sample norms in a fixed order.

A sample of up to ``ONE_PROGRAM`` elements is one program. It reads the sample once and holds it in
registers while the norm of the gradient, that of the step and the result follow from one another:
one launch. A larger sample is cut into parts, and each of the three is a launch, because a part
needs the sums of all others. Two programs for a small sample would need these launches as well, or
would have to wait for each other, to save a part of the time in which one reads a few kilobytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import float_or_rows, int_or_pointer, laid_out_as
from .reference import GRADIENT_GUARD
from .rows import check_rows
from .triton_common import clamp_nan, launch, scalar_of
from .triton_noise import noise_normal, unit_radius

ONE_PROGRAM = 16384  # half of it where Triton cannot know that a sample begins aligned
PART = 4096
EACH = 16  # elements of a thread
MOST_WARPS = 16  # more leave a thread fewer registers than three tensors and their places need
GUARD = tl.constexpr(GRADIENT_GUARD)


@triton.jit
def _gradient_scale(alpha, squares):
    # alpha / (|g| + guard): a zero gradient is multiplied by something finite, and one whose norm
    # is not finite by NaN
    return tl.div_rn(alpha, tl.sqrt_rn(squares) + GUARD) + (squares - squares)


@triton.jit
def _shrink(squares, eps):
    norm = tl.sqrt_rn(squares)
    # The other branch must not divide by the zero norm of a point at the centre.
    return tl.where(norm > eps, tl.div_rn(eps, tl.where(norm > eps, norm, 1.0)), 1.0)


@triton.jit
def _sum_of(partials, PARTS: tl.constexpr, PADDED: tl.constexpr):
    part = tl.arange(0, PADDED)
    return tl.sum(tl.load(partials + part, mask=part < PARTS, other=0.0), axis=0)


@triton.jit
def _l2_kernel(
    x_adv, grad, x, out, partials, index, seed: tl.int64, seed_ptr, offset: tl.int64, offset_ptr,
    stream_id: tl.int64, alpha, alpha_ptr, alpha_stride, eps, eps_ptr, eps_stride, low, high, n,
    samples,
    WALK: tl.constexpr, START: tl.constexpr,
    PARTS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``WALK`` 0 adds up the squares of the gradient, 1 those of the step, 2 writes the result. If
    there is one part, 2 does all three."""
    sample, part = tl.program_id(0), tl.program_id(1)
    shift = sample.to(tl.int64) * n
    place = part * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    gradient_sums = partials
    delta_sums = partials
    if PARTS > 1:
        gradient_sums += sample * PARTS
        delta_sums += (samples + sample) * PARTS
    g = tl.zeros([BLOCK], tl.float32)
    if grad is not None:
        g = tl.load(grad + shift + place, mask=inside, other=0.0).to(tl.float32)
    if WALK == 0:
        tl.store(gradient_sums + part, tl.sum(g * g, axis=0))
    else:
        center = tl.load(x + shift + place, mask=inside, other=0.0).to(tl.float32)
        moved = center
        if not START:
            moved = tl.load(x_adv + shift + place, mask=inside, other=0.0).to(tl.float32)
        alpha = scalar_of(alpha, alpha_ptr, alpha_stride, sample) + tl.zeros([], tl.float32)
        if START:
            row = tl.load(index + sample)
            alpha = alpha * unit_radius(row, seed, seed_ptr, offset, offset_ptr, stream_id)
        if grad is not None:
            if PARTS == 1:
                squares = tl.sum(g * g, axis=0)
            else:
                squares = _sum_of(gradient_sums, PARTS, PADDED)
            moved += g * _gradient_scale(alpha, squares)
        delta = moved - center
        if WALK == 1:
            tl.store(delta_sums + part, tl.sum(delta * delta, axis=0))
        else:
            if not START:
                if PARTS == 1:
                    squares = tl.sum(delta * delta, axis=0)
                else:
                    squares = _sum_of(delta_sums, PARTS, PADDED)
                delta *= _shrink(squares, scalar_of(eps, eps_ptr, eps_stride, sample))
            result = clamp_nan(center + delta, low, high)
            tl.store(out + shift + place, result.to(out.dtype.element_ty), mask=inside)


def _run(
    x_adv: Tensor,
    grad: Tensor | None,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    low: float,
    high: float,
    draw: tuple[Tensor, Tensor | int, Tensor | int, int] | None = None,
) -> Tensor:
    """One l2 operation; ``draw`` = (index, seed, offset, stream) makes it the random start."""
    step, radius = float_or_rows("alpha", alpha, x), float_or_rows("eps", eps, x)
    x_adv = _per_sample_dense(x_adv)
    x = laid_out_as(x, x_adv)
    grad = None if grad is None else laid_out_as(grad, x_adv)
    out = torch.empty_like(x_adv)
    if not out.numel():
        return out
    index, seed, offset, stream = draw or (None, 0, 0, 0)
    key = (*int_or_pointer(seed, x.device), *int_or_pointer(offset, x.device), stream)
    settings = (index, *key, *step, *radius, low, high)
    samples, n = x.shape[0], x[0].numel()
    start = draw is not None
    held = ONE_PROGRAM if n % 16 == 0 else ONE_PROGRAM // 2
    parts = 1 if n <= held else triton.cdiv(n, PART)
    block = PART if parts > 1 else max(triton.next_power_of_2(n), 128)
    partials, walks = None, [2]
    if parts > 1:
        partials = torch.empty((2, samples, parts), dtype=torch.float32, device=x.device)
        # A projection has no gradient, and a start is not projected to a ball.
        walks = [0] * (grad is not None) + [1] * (not start) + [2]
    for walk in walks:
        launch(
            _l2_kernel, (samples, parts), x_adv, grad, x, out, partials, *settings, n, samples,
            device=x.device, WALK=walk, START=start, PARTS=parts,
            PADDED=triton.next_power_of_2(parts), BLOCK=block,
            num_warps=min(max(block // (32 * EACH), 4), MOST_WARPS),
        )  # fmt: skip
    return out


def _per_sample_dense(t: Tensor) -> Tensor:
    """``t`` itself if each sample fills its own range of memory, else a contiguous copy."""
    channels_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return t if channels_last else t.contiguous()


def l2_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """See ``reference.l2_step``."""
    return _run(x_adv, grad, x, alpha, eps, low, high)


def l2_project(
    x_adv: Tensor, x: Tensor, eps: float | Tensor, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """See ``reference.l2_project``."""
    return _run(x_adv, None, x, 0.0, eps, low, high)


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
    """See ``reference.l2_start``."""
    check_rows("eps", eps, x)
    noise = noise_normal(index, x.shape[1:], seed, offset, stream)
    draw = (index.contiguous(), seed, offset, stream)
    return _run(x, noise, x, eps, 0.0, low, high, draw)
