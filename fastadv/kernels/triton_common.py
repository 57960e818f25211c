# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""What several Triton kernels share: the launch, scalars, clamps, and Philox words."""

from typing import Any

import torch
import triton
import triton.language as tl


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **options: Any
) -> None:
    """Launch ``kernel`` on ``device``, also if it is not the current one. Every launch uses this.

    Without fused multiply-add a kernel rounds where the reference does, so that elementwise kernels
    equal it bit for bit (the reference run eagerly, not inside a compiled region).
    """
    options.setdefault("enable_fp_fusion", False)
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, **options)


@triton.jit
def scalar(value, pointer):
    """A float argument, or what its 0-dim tensor holds now."""
    if pointer is not None:
        value = tl.load(pointer).to(tl.float32)
    return value


@triton.jit
def scalar_of(value, pointer, stride, sample):
    """A float argument, or what its tensor holds now for ``sample``; ``stride`` is 0 if it holds
    one number for all."""
    if pointer is not None:
        value = tl.load(pointer + sample * stride).to(tl.float32)
    return value


@triton.jit
def clamp_nan(x, low, high):
    """min(max(x, low), high) that lets a NaN through, as torch.clamp does."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(g):
    """1, -1 or 0; sign(0) = sign(nan) = 0."""
    return tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0))


@triton.jit
def sign_or_nan(g):
    """1, -1 or 0, and NaN where ``g`` is not finite."""
    return sign(g) + (g - g)


@triton.jit
def sample_words(quad, row, seed, seed_ptr, offset, offset_ptr, stream_id):
    """Four words for each quad of the sample ``row``; the counter of ``philox.draw_counter``."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr)
    seed, offset = seed.to(tl.int64), offset.to(tl.int64)
    high = ((offset >> 32) & 0xFFFFFF) | (stream_id.to(tl.int64) << 24)
    zero = quad.to(tl.uint32) * 0
    c1 = zero + row.to(tl.uint32)
    c2 = zero + offset.to(tl.uint32)
    c3 = zero + high.to(tl.uint32)
    return tl.philox(seed, quad.to(tl.uint32), c1, c2, c3)


@triton.jit
def signed_unit(word):
    """A word as a float32 in [-1, 1): (word >> 8) * 2**-23 - 1, exact."""
    return (word >> 8).to(tl.float32) * 1.1920928955078125e-07 - 1.0


@triton.jit
def flatten_quads(a, b, c, d):
    """Four blocks (N,) as one block (4N,): a0 b0 c0 d0 a1 b1 ..."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0] * 4])
