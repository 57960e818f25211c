# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""Philox noise, and the L-infinity start, which draws its noise in the same pass (Triton)."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import float_or_rows, int_or_pointer, is_dense
from .philox import PER_SAMPLE_QUAD
from .triton_common import (
    clamp_nan,
    flatten_quads,
    launch,
    sample_words,
    scalar_of,
    signed_unit,
)

QUADS = 256
STEP = tl.constexpr(2.0 * math.pi * 2.0**-24)  # one step of a 24-bit turn, in radians
RADIUS_QUAD = tl.constexpr(PER_SAMPLE_QUAD)


@triton.jit
def unit_radius(row, seed, seed_ptr, offset, offset_ptr, stream_id):
    """One number in [0, 1) for the sample ``row``."""
    quad = tl.full([1], RADIUS_QUAD, tl.int64)
    word, _, _, _ = sample_words(quad, row, seed, seed_ptr, offset, offset_ptr, stream_id)
    return tl.sum((word >> 8).to(tl.float32) * 5.9604644775390625e-08, axis=0)


@triton.jit
def _cos_sin_of_turn(turn):
    """cos and sin of 2 pi * turn / 2**24, an integer; to an ulp, without float64 (tl.cos has it).

    The nearest quarter turn is taken off exactly; the rest, at most pi/4, goes into a series.
    """
    quarter = (turn + (1 << 21)) >> 22
    angle = (turn.to(tl.int32) - (quarter << 22).to(tl.int32)).to(tl.float32) * STEP
    t = angle * angle
    sin = angle * (1.0 + t * (-1.0 / 6 + t * (1.0 / 120 + t * (-1.0 / 5040 + t / 362880))))
    cos = 1.0 + t * (-0.5 + t * (1.0 / 24 + t * (-1.0 / 720 + t * (1.0 / 40320 - t / 3628800))))
    odd = (quarter & 1) != 0
    x, y = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((quarter + 1) & 2) != 0, -x, x), tl.where((quarter & 2) != 0, -y, y)


@triton.jit
def _box_muller(first, second):
    # The radius needs (0, 1]: a zero would be infinite.
    u = ((first >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt_rn(-2.0 * tl.log(u))
    cos, sin = _cos_sin_of_turn(second >> 8)
    return radius * cos, radius * sin


@triton.jit
def _noise_kernel(
    out, index, seed: tl.int64, seed_ptr, offset: tl.int64, offset_ptr, stream_id: tl.int64, n,
    NORMAL: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(index + sample)
    quad = tl.program_id(1).to(tl.int64) * QUADS + tl.arange(0, QUADS)
    w0, w1, w2, w3 = sample_words(quad, row, seed, seed_ptr, offset, offset_ptr, stream_id)
    if NORMAL:
        a, b = _box_muller(w0, w1)
        c, d = _box_muller(w2, w3)
        value = flatten_quads(a, b, c, d)
    else:
        value = signed_unit(flatten_quads(w0, w1, w2, w3))
    element = tl.program_id(1).to(tl.int64) * (QUADS * 4) + tl.arange(0, QUADS * 4)
    tl.store(out + sample * n + element, value.to(out.dtype.element_ty), mask=element < n)


@triton.jit
def _linf_start_kernel(
    x, out, index, seed: tl.int64, seed_ptr, offset: tl.int64, offset_ptr, stream_id: tl.int64,
    eps, eps_ptr, eps_stride, low, high, n, pixels, stride_c, stride_p,
    CONTIGUOUS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(index + sample)
    quad = tl.program_id(1).to(tl.int64) * QUADS + tl.arange(0, QUADS)
    w0, w1, w2, w3 = sample_words(quad, row, seed, seed_ptr, offset, offset_ptr, stream_id)
    noise = signed_unit(flatten_quads(w0, w1, w2, w3))
    element = tl.program_id(1).to(tl.int64) * (QUADS * 4) + tl.arange(0, QUADS * 4)
    place = element
    if not CONTIGUOUS:
        place = element // pixels * stride_c + element % pixels * stride_p
    place += sample * n
    inside = element < n
    # x' = clamp(x + eps * u, low, high)
    radius = scalar_of(eps, eps_ptr, eps_stride, sample)
    moved = tl.load(x + place, mask=inside).to(tl.float32) + noise * radius
    tl.store(out + place, clamp_nan(moved, low, high).to(out.dtype.element_ty), mask=inside)


def _noise(
    index: Tensor,
    shape: Sequence[int],
    seed: Tensor | int,
    offset: Tensor | int,
    stream: int,
    dtype: torch.dtype,
    normal: bool,
) -> Tensor:
    _check_stream(stream)
    out = torch.empty((index.shape[0], *shape), dtype=dtype, device=index.device)
    n = math.prod(shape)
    if out.numel():
        key = (*int_or_pointer(seed, out.device), *int_or_pointer(offset, out.device))
        grid = (index.shape[0], triton.cdiv(n, QUADS * 4))
        index = index.contiguous()
        launch(
            _noise_kernel, grid, out, index, *key, stream, n, device=out.device,
            NORMAL=normal, QUADS=QUADS,
        )  # fmt: skip
    return out


def noise_uniform(
    index: Tensor,
    shape: Sequence[int],
    seed: Tensor | int,
    offset: Tensor | int,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See ``philox.noise_uniform``."""
    return _noise(index, shape, seed, offset, stream, dtype, False)


def noise_normal(
    index: Tensor,
    shape: Sequence[int],
    seed: Tensor | int,
    offset: Tensor | int,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See ``philox.noise_normal``."""
    return _noise(index, shape, seed, offset, stream, dtype, True)


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
    """See ``reference.linf_start``."""
    _check_stream(stream)
    radius = float_or_rows("eps", eps, x)
    if not _is_samplewise(x):
        x = x.contiguous()
    out = torch.empty_like(x)
    if not x.numel():
        return out
    n = x[0].numel()
    contiguous = x.is_contiguous()
    channels = 1 if contiguous else x.shape[1]
    pixels = n // channels
    key = (*int_or_pointer(seed, x.device), *int_or_pointer(offset, x.device))
    launch(
        _linf_start_kernel, (x.shape[0], triton.cdiv(n, QUADS * 4)), x, out, index.contiguous(),
        *key, stream, *radius, low, high, n, pixels, 1, channels, device=x.device,
        CONTIGUOUS=contiguous, QUADS=QUADS,
    )  # fmt: skip
    return out


def _is_samplewise(x: Tensor) -> bool:
    """True if the kernel can address ``x`` without a copy: contiguous or channels_last."""
    return x.is_contiguous() or (
        x.dim() == 4 and is_dense(x) and x.is_contiguous(memory_format=torch.channels_last)
    )


def _check_stream(stream: int) -> None:
    if not 0 <= stream < 256:
        raise ValueError(f"stream must be in 0..255, not {stream}.")
