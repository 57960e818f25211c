"""Counter-based noise in plain PyTorch: Philox4x32-10 (Salmon et al., SC 2011).

A number depends on (seed, sample row, element, draw, stream) and on nothing else, so every device,
every batch order and every number of processes give the same noise for the same sample.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LOW_32 = 0xFFFFFFFF
LOW_24 = 0xFFFFFF
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
# Rounds in which a word may be smaller than the broadcast counter: each round mixes two words.
BROADCAST_ROUNDS = 3
# No sample reaches this quad (it would have 2**34 elements), so it is free for one draw per sample.
PER_SAMPLE_QUAD = LOW_32

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Sequence[Tensor | int], seed: Tensor | int) -> Words:
    """Ten rounds of Philox4x32 on broadcast counters.

    ``counter``: four int64 tensors (or ints) holding unsigned 32-bit values; ``seed``: the 64-bit
    key. Returns four int64 tensors of unsigned 32-bit values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & LOW_32, (seed >> 32) & LOW_32
    for number in range(ROUNDS):
        # Two's complement keeps the low 64 bits, so both halves of the product are right even
        # where the int64 product wraps.
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        mixed = _mixed_in_place if number >= BROADCAST_ROUNDS else _mixed
        c0, c2 = mixed(p1, c1, k0), mixed(p0, c3, k1)
        c1, c3 = p1, p0  # the high halves are removed where the words are read
        k0, k1 = (k0 + WEYL_0) & LOW_32, (k1 + WEYL_1) & LOW_32
    return c0, c1 & LOW_32, c2, c3 & LOW_32  # type: ignore[return-value]  # tensors by now


def _mixed(product: Tensor | int, word: Tensor | int, key: Tensor | int) -> Tensor | int:
    """The high half of ``product`` ^ ``word`` ^ ``key``, cut to 32 bits."""
    return ((product >> 32) ^ (word ^ key)) & LOW_32


def _mixed_in_place(product: Any, word: Any, key: Any) -> Any:
    """``_mixed`` with one allocation; ``product`` has the shape of the result."""
    return (product >> 32).bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(LOW_32)


def draw_counter(
    quad: Tensor | int, index: Tensor, offset: Tensor | int, stream: int
) -> tuple[Tensor | int, Tensor, Tensor | int, Tensor | int]:
    """The four counter words of a draw; ``stream`` shares the last with the high bits of offset."""
    high = (stream << 24) | ((offset >> 32) & LOW_24)
    return quad, index & LOW_32, offset & LOW_32, high


def sample_words(
    index: Tensor, elements: int, seed: Tensor | int, offset: Tensor | int, stream: int
) -> Words:
    """Words for the consecutive quads of each sample: four tensors (B, ceil(elements / 4))."""
    if not 0 <= stream < 256:
        raise ValueError(f"stream must be in 0..255, not {stream}.")
    quad = torch.arange((elements + 3) // 4, device=index.device)
    return philox(draw_counter(quad, index[:, None], offset, stream), seed)


def _in_sample_shape(parts: Sequence[Tensor], index: Tensor, shape: Sequence[int]) -> Tensor:
    flat = torch.stack(list(parts), dim=-1).flatten(1)
    # No copy if the number of elements is divisible by 4: then no word is cut off.
    return flat[:, : math.prod(shape)].reshape(index.shape[0], *shape).contiguous()


def empty_noise(
    index: Tensor,
    shape: Sequence[int],
    seed: Tensor | int,
    offset: Tensor | int,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """An empty tensor like the result of :func:`noise_uniform` and :func:`noise_normal`."""
    return index.new_empty((index.shape[0], *shape), dtype=dtype)


def noise_uniform(
    index: Tensor,
    shape: Sequence[int],
    seed: Tensor | int,
    offset: Tensor | int,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform noise in [-1, 1) for the samples ``index``; returns (B, *shape) of ``dtype``.

    ``index`` (B,) int64 holds the rows of the samples in the training set. ``seed`` (64 bits) and
    ``offset`` (56 bits, the number of the draw) are ints or 0-dim int64 tensors. ``stream`` in
    0..255 separates independent uses. The values are multiples of 2**-23, exact in float32, and
    then cast. Raises ``ValueError`` for a stream out of range. Philox4x32-10, Salmon et al. 2011.
    """
    words = sample_words(index, math.prod(shape), seed, offset, stream)
    parts = [(word >> 8).to(torch.float32).mul_(2.0**-23).sub_(1.0) for word in words]
    return _in_sample_shape(parts, index, shape).to(dtype)


def noise_normal(
    index: Tensor,
    shape: Sequence[int],
    seed: Tensor | int,
    offset: Tensor | int,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise for the samples ``index``; returns (B, *shape) of ``dtype``.

    The arguments and errors are those of :func:`noise_uniform`. Box-Muller transform of the same
    words.
    """
    w0, w1, w2, w3 = sample_words(index, math.prod(shape), seed, offset, stream)
    return _in_sample_shape((*_box_muller(w0, w1), *_box_muller(w2, w3)), index, shape).to(dtype)


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    # The logarithm needs (0, 1]: at zero the radius would be infinite.
    u = ((first >> 8) + 1).to(torch.float32) * 2.0**-24
    angle = (second >> 8).to(torch.float32) * (2.0 * math.pi * 2.0**-24)
    radius = torch.sqrt(-2.0 * torch.log(u))
    return radius * torch.cos(angle), radius * torch.sin(angle)


def sample_radius(
    index: Tensor, seed: Tensor | int, offset: Tensor | int, stream: int = 0
) -> Tensor:
    """One float32 number in [0, 1) per sample (B,), independent of the sample's elements."""
    counter = draw_counter(PER_SAMPLE_QUAD, index, offset, stream)
    return (philox(counter, seed)[0] >> 8).to(torch.float32) * 2.0**-24
