# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""The L2 step, projection and start (Triton): per-sample norms in a fixed order.

One program reads a sample of up to ``ONE_PROGRAM`` elements three times (the second and third time
from the cache). A larger sample is cut into parts, and each of the three passes is a launch.
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

# Eight warps: with a batch of 128 each multiprocessor of an H100 has one program, which must keep
# enough bytes in flight by itself.
BLOCK, WARPS = 2048, 8
ONE_PROGRAM = 16 * BLOCK
PART = 8 * BLOCK
GUARD = tl.constexpr(GRADIENT_GUARD)


@triton.jit
def _delta(x_adv, grad, x, place, inside, scale):
    """(x, x' + scale * g - x) of one block; without a gradient x' - x."""
    center = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    moved = tl.load(x_adv + place, mask=inside, other=0.0).to(tl.float32)
    if grad is not None:
        moved += tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * scale
    return center, moved - center


@triton.jit
def _squares(t, first, last, TRIPS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for trip in range(TRIPS):
        place = first + trip * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(t + place, mask=place < last, other=0.0).to(tl.float32)
        total += value * value
    return tl.sum(total, axis=0)


@triton.jit
def _delta_squares(
    x_adv, grad, x, first, last, scale, TRIPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    total = tl.zeros([BLOCK], tl.float32)
    for trip in range(TRIPS):
        place = first + trip * BLOCK + tl.arange(0, BLOCK)
        _, delta = _delta(x_adv, grad, x, place, place < last, scale)
        total += delta * delta
    return tl.sum(total, axis=0)


@triton.jit
def _write(
    x_adv, grad, x, out, first, last, scale, shrink, low, high,
    TRIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for trip in range(TRIPS):
        place = first + trip * BLOCK + tl.arange(0, BLOCK)
        inside = place < last
        center, delta = _delta(x_adv, grad, x, place, inside, scale)
        result = clamp_nan(center + delta * shrink, low, high)
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


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
def _l2_kernel(
    x_adv, grad, x, out, index, seed: tl.int64, seed_ptr, offset: tl.int64, offset_ptr,
    stream_id: tl.int64, alpha, alpha_ptr, alpha_stride, eps, eps_ptr, eps_stride, low, high, n,
    START: tl.constexpr, TRIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    shift = sample.to(tl.int64) * n
    x_adv, x, out = x_adv + shift, x + shift, out + shift
    if grad is not None:  # here, not in a function: Triton before 3.9 takes no None as an argument
        grad += shift
    alpha = scalar_of(alpha, alpha_ptr, alpha_stride, sample) + tl.zeros([], tl.float32)
    if START:
        row = tl.load(index + sample)
        alpha = alpha * unit_radius(row, seed, seed_ptr, offset, offset_ptr, stream_id)
    scale = alpha
    if grad is not None:
        scale = _gradient_scale(alpha, _squares(grad, 0, n, TRIPS, BLOCK))
    shrink = alpha * 0.0 + 1.0
    if not START:
        radius = scalar_of(eps, eps_ptr, eps_stride, sample)
        shrink = _shrink(_delta_squares(x_adv, grad, x, 0, n, scale, TRIPS, BLOCK), radius)
    _write(x_adv, grad, x, out, 0, n, scale, shrink, low, high, TRIPS, BLOCK)


@triton.jit
def _sum_of(partials, PARTS: tl.constexpr, PADDED: tl.constexpr):
    part = tl.arange(0, PADDED)
    return tl.sum(tl.load(partials + part, mask=part < PARTS, other=0.0), axis=0)


@triton.jit
def _part_kernel(
    x_adv, grad, x, out, partials, index, seed: tl.int64, seed_ptr, offset: tl.int64, offset_ptr,
    stream_id: tl.int64, alpha, alpha_ptr, alpha_stride, eps, eps_ptr, eps_stride, low, high, n,
    samples,
    WALK: tl.constexpr, START: tl.constexpr,
    PARTS: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr,
    TRIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, part = tl.program_id(0), tl.program_id(1)
    shift = sample.to(tl.int64) * n
    x_adv, x, out = x_adv + shift, x + shift, out + shift
    if grad is not None:  # here, not in a function: Triton before 3.9 takes no None as an argument
        grad += shift
    first, last = part * PART, tl.minimum(part * PART + PART, n)
    gradient_sums = partials + sample * PARTS
    delta_sums = gradient_sums + samples * PARTS
    if WALK == 0:
        tl.store(gradient_sums + part, _squares(grad, first, last, TRIPS, BLOCK))
    else:
        alpha = scalar_of(alpha, alpha_ptr, alpha_stride, sample) + tl.zeros([], tl.float32)
        if START:
            row = tl.load(index + sample)
            alpha = alpha * unit_radius(row, seed, seed_ptr, offset, offset_ptr, stream_id)
        scale = alpha
        if grad is not None:
            scale = _gradient_scale(alpha, _sum_of(gradient_sums, PARTS, PADDED))
        if WALK == 1:
            squares = _delta_squares(x_adv, grad, x, first, last, scale, TRIPS, BLOCK)
            tl.store(delta_sums + part, squares)
        else:
            shrink = alpha * 0.0 + 1.0
            if not START:
                radius = scalar_of(eps, eps_ptr, eps_stride, sample)
                shrink = _shrink(_sum_of(delta_sums, PARTS, PADDED), radius)
            _write(x_adv, grad, x, out, first, last, scale, shrink, low, high, TRIPS, BLOCK)


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
    if n <= ONE_PROGRAM:
        launch(
            _l2_kernel, (samples,), x_adv, grad, x, out, *settings, n, device=x.device,
            START=start, TRIPS=triton.cdiv(n, BLOCK), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        return out
    parts = triton.cdiv(n, PART)
    partials = torch.empty((2, samples, parts), dtype=torch.float32, device=x.device)
    # A start has no gradient and is not projected to a ball; a projection has no gradient.
    for walk in (0,) * (grad is not None) + (1,) * (not start) + (2,):
        launch(
            _part_kernel, (samples, parts), x_adv, grad, x, out, partials, *settings, n, samples,
            device=x.device, WALK=walk, START=start,
            PARTS=parts, PADDED=triton.next_power_of_2(parts), PART=PART,
            TRIPS=PART // BLOCK, BLOCK=BLOCK, num_warps=WARPS,
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
