# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""Sum of the n largest |z - z'| (Triton): exact, by radix selection instead of a sort.

The bits of non-negative float32 numbers have the order of the numbers, so the n-th largest distance
is found as an integer key: by bisection inside one program for a small batch, else digit by digit
with integer histograms (whose sums do not depend on the order of the atomics).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference_top_n import save_kept, top_n_backward
from .tickets import tickets
from .triton_common import launch

ONE_PROGRAM = 8192
BLOCK = 4096
BINS = 2048
LOW_DIGIT, HIGH_DIGIT = tl.constexpr(10), tl.constexpr(20)  # 31 bits as 11 + 10 + 10


@triton.jit
def _keys(z, z_adv, place, n):
    """(z - z', key of its absolute value); the key is -1 outside the batch."""
    inside = place < n
    a = tl.load(z + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(z_adv + place, mask=inside, other=0.0).to(tl.float32)
    key = tl.abs(a - b).to(tl.int32, bitcast=True)
    return a - b, tl.where(inside, key, -1)


@triton.jit
def _store_kept(kept, place, n, difference, taken):
    """The sub-gradient by z: sign(z - z') where the entry is among the n largest."""
    direction = tl.where(difference > 0, 1, tl.where(difference < 0, -1, 0))
    tl.store(kept + place, tl.where(taken, direction, 0).to(tl.int8), mask=place < n)


@triton.jit
def _small_kernel(z, z_adv, total, kept, n, wanted, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    difference, key = _keys(z, z_adv, place, n)
    threshold = wanted * 0
    for bit in range(31):
        candidate = threshold | (1 << (30 - bit))
        enough = tl.sum((key >= candidate).to(tl.int32), axis=0) >= wanted
        threshold = tl.where(enough, candidate, threshold)
    above = key > threshold
    equal = key == threshold
    ties = wanted - tl.sum(above.to(tl.int32), axis=0)
    largest = tl.sum(tl.where(above, tl.abs(difference), 0.0), axis=0)
    tl.store(total, largest + ties.to(tl.float32) * threshold.to(tl.float32, bitcast=True))
    if kept is not None:
        first_ties = equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= ties)
        _store_kept(kept, place, n, difference, above | first_ties)


@triton.jit
def _digit(histogram, wanted, BINS: tl.constexpr):
    """The digit of the ``wanted``-th largest, and its rank among the keys with that digit."""
    digit = tl.arange(0, BINS)
    count = tl.load(histogram + digit)
    at_least = tl.cumsum(count, axis=0, reverse=True)
    chosen = tl.sum((at_least >= wanted).to(tl.int32), axis=0) - 1
    above = tl.sum(tl.where(digit == chosen, at_least - count, 0), axis=0)
    return chosen, wanted - above


@triton.jit
def _histogram_kernel(
    z, z_adv, histograms, n, wanted,
    LEVEL: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, key = _keys(z, z_adv, place, n)
    match = key >= 0
    if LEVEL == 0:
        digit = key >> HIGH_DIGIT
    else:
        high, rank = _digit(histograms, wanted, BINS)
        if LEVEL == 1:
            match = match & ((key >> HIGH_DIGIT) == high)
            digit = (key >> LOW_DIGIT) & 1023
        else:
            middle, rank = _digit(histograms + BINS, rank, BINS)
            match = match & ((key >> LOW_DIGIT) == ((high << 10) | middle))
            digit = key & 1023
    counts = tl.histogram(tl.where(match, digit, 0), BINS, mask=match)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histograms + LEVEL * BINS + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _threshold(histograms, wanted, BINS: tl.constexpr):
    high, rank = _digit(histograms, wanted, BINS)
    middle, rank = _digit(histograms + BINS, rank, BINS)
    low, rank = _digit(histograms + 2 * BINS, rank, BINS)
    return (high << 20) | (middle << 10) | low, rank


@triton.jit
def _partial_kernel(
    z, z_adv, histograms, chosen, equals, sums, n, wanted,
    BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    place = program * BLOCK + tl.arange(0, BLOCK)
    difference, key = _keys(z, z_adv, place, n)
    threshold, ties = _threshold(histograms, wanted, BINS)
    tl.store(equals + program, tl.sum((key == threshold).to(tl.int32), axis=0))
    tl.store(sums + program, tl.sum(tl.where(key > threshold, tl.abs(difference), 0.0), axis=0))
    if program == 0:
        tl.store(chosen, threshold)
        tl.store(chosen + 1, ties)


@triton.jit
def _finish_kernel(
    z, z_adv, histograms, chosen, equals, sums, total, kept, n, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program == 0:  # nothing reads them any more
        bins = tl.arange(0, BINS)
        for level in tl.static_range(3):
            tl.store(histograms + level * BINS + bins, tl.zeros([BINS], tl.int32))
    other = tl.arange(0, BLOCKS)
    threshold, ties = tl.load(chosen), tl.load(chosen + 1)
    if program == 0:
        largest = tl.sum(tl.load(sums + other, mask=other < blocks, other=0.0), axis=0)
        tl.store(total, largest + ties.to(tl.float32) * threshold.to(tl.float32, bitcast=True))
    if kept is not None:
        place = program * BLOCK + tl.arange(0, BLOCK)
        difference, key = _keys(z, z_adv, place, n)
        equal = key == threshold
        before = tl.sum(tl.load(equals + other, mask=other < program, other=0), axis=0)
        first_ties = equal & (before + tl.cumsum(equal.to(tl.int32), axis=0) <= ties)
        _store_kept(kept, place, n, difference, (key > threshold) | first_ties)


class _TopN(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor, z_adv: Tensor, n: int) -> tuple[Tensor, Tensor]:
        return top_n_forward(z, z_adv, n)

    setup_context = staticmethod(save_kept)
    backward = staticmethod(top_n_backward)


def top_n_sum(z: Tensor, z_adv: Tensor, n: int) -> Tensor:
    """See ``reference.top_n_sum``."""
    if not (torch.is_grad_enabled() and (z.requires_grad or z_adv.requires_grad)):
        return top_n_forward(z, z_adv, n, False)[0]
    total: Tensor = _TopN.apply(z, z_adv, n)[0]
    return total


def top_n_forward(
    z: Tensor, z_adv: Tensor, n: int, want_kept: bool = True
) -> tuple[Tensor, Tensor]:
    """See ``reference_top_n.top_n_forward``."""
    if not 0 <= n <= z.numel():
        raise ValueError(f"n must be in 0..{z.numel()}, not {n}.")
    z, z_adv = z.contiguous(), z_adv.contiguous()
    size = z.numel()
    kept = torch.empty(z.shape if want_kept else (0,), dtype=torch.int8, device=z.device)
    if n == 0:
        return torch.zeros((), device=z.device), kept.zero_()
    total = torch.empty((), dtype=torch.float32, device=z.device)
    written = kept if want_kept else None
    if size <= ONE_PROGRAM:
        block = max(triton.next_power_of_2(size), 128)
        launch(
            _small_kernel, (1,), z, z_adv, total, written, size, n, device=z.device,
            BLOCK=block, num_warps=max(1, min(16, block // 256)),
        )  # fmt: skip
    else:
        _select_by_digits(z, z_adv, total, written, size, n)
    return total, kept


def _select_by_digits(
    z: Tensor, z_adv: Tensor, total: Tensor, kept: Tensor | None, size: int, n: int
) -> None:
    blocks = triton.cdiv(size, BLOCK)
    histograms = tickets(z.device, 3 * BINS)
    counters = torch.empty(blocks + 2, dtype=torch.int32, device=z.device)
    chosen, equals = counters[:2], counters[2:]
    sums = torch.empty(blocks, dtype=torch.float32, device=z.device)
    shared: dict[str, Any] = {"device": z.device, "BLOCK": BLOCK, "num_warps": 8}
    for level in range(3):
        launch(
            _histogram_kernel, (blocks,), z, z_adv, histograms, size, n,
            LEVEL=level, BINS=BINS, **shared,
        )  # fmt: skip
    launch(
        _partial_kernel, (blocks,), z, z_adv, histograms, chosen, equals, sums, size, n,
        BINS=BINS, **shared,
    )  # fmt: skip
    launch(
        _finish_kernel, (1 if kept is None else blocks,), z, z_adv, histograms, chosen, equals,
        sums, total, kept, size, blocks, BLOCKS=triton.next_power_of_2(blocks), BINS=BINS, **shared,
    )  # fmt: skip
