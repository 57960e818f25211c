# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""One launch over a whole list of tensors (Triton).

The pointers are kernel arguments, so nothing is copied to the device and a captured graph stays
valid; the sizes are compile-time constants, so each model is one compilation. The tensors of a list
may differ in dtype (under autocast the images are float32 and the blocks bfloat16): a program
branches on the dtypes of its tensor, so one launch is still enough.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .layout import dense, laid_out_as

BLOCK, WARPS = 4096, 8


@triton.jit
def locate(SIZES: tl.constexpr, BLOCK: tl.constexpr):
    """Which tensor this program works on, and its block there: (which, block, size, first)."""
    program = tl.program_id(0)
    which = 0
    start = 0
    size = 0
    first = 0
    for i in tl.static_range(len(SIZES)):
        here = program >= first
        which = tl.where(here, i, which)
        start = tl.where(here, first, start)
        size = tl.where(here, SIZES[i], size)
        first += (SIZES[i] + BLOCK - 1) // BLOCK
    return which, program - start, size


@triton.jit
def is_kind(which, KINDS: tl.constexpr, KIND: tl.constexpr):
    """Whether tensor ``which`` has the dtype of tensor ``KIND``, the first with that dtype."""
    found = which == KIND
    for i in tl.static_range(len(KINDS)):
        if KINDS[i] == KIND:
            found = found | (which == i)
    return found


@triton.jit
def select(tensors, which, KINDS: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer ``tensors[which]``, typed as the tensors of ``KIND`` are; ``ALIGNED`` promises
    16-byte alignment of all."""
    address = tensors[KIND].to(tl.int64)
    for i in tl.static_range(len(KINDS)):
        if KINDS[i] == KIND:
            address = tl.where(which == i, tensors[i].to(tl.int64), address)
    pointer = address.to(tensors[KIND].dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def block_of(block, size, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """(places, mask) of a tensor's block; ``ALIGNED`` promises sizes divisible by 16."""
    place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return place, place < size


def kinds_of(*lists: Sequence[Tensor]) -> tuple[int, ...]:
    """For each position of the lists, the first position where all lists have the same dtypes."""
    dtypes = [tuple(t.dtype for t in together) for together in zip(*lists, strict=True)]
    return tuple(map(dtypes.index, dtypes))


def block_count(tensors: Sequence[Tensor]) -> int:
    """The number of programs that a launch over the list needs."""
    return sum(triton.cdiv(t.numel(), BLOCK) for t in tensors)


def flat_pairs(
    first: Sequence[Tensor], second: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Both lists without gaps, the second in the layout of the first; copies where needed."""
    models = tuple(dense(t) for t in first)
    return models, tuple(laid_out_as(t, m) for t, m in zip(second, models, strict=True))


def copy_back(originals: Sequence[Tensor], used: Sequence[Tensor]) -> None:
    """Copy what a launch wrote into copies back to the original tensors."""
    for original, copy in zip(originals, used, strict=True):
        if original is not copy:
            original.copy_(copy)
