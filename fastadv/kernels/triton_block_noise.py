# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""APART's operators on the inputs of all blocks at once (Triton): signs, noise, step-size
gradients."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import aligned, dense
from .triton_common import launch, sign_or_nan
from .triton_lists import (
    BLOCK,
    WARPS,
    block_count,
    block_of,
    flat_pairs,
    is_kind,
    kinds_of,
    locate,
    select,
)

CHUNK = 1024


@triton.jit
def _scale_kernel(
    sources, results, alphas,
    SIZES: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    which, block, size = locate(SIZES, BLOCK)
    place, inside = block_of(block, size, BLOCK, ALIGNED)
    for kind in tl.static_range(len(KINDS)):
        if KINDS[kind] == kind and is_kind(which, KINDS, kind):
            result = select(results, which, KINDS, kind, ALIGNED) + place
            value = tl.load(select(sources, which, KINDS, kind, ALIGNED) + place, mask=inside)
            value = value.to(tl.float32)
            if alphas is None:
                value = sign_or_nan(value)
            else:
                value = value * tl.load(alphas + which).to(tl.float32)
            tl.store(result, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _dot_kernel(
    gradients, signs, partials,
    SIZES: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    which, block, size = locate(SIZES, BLOCK)
    place, inside = block_of(block, size, BLOCK, ALIGNED)
    for kind in tl.static_range(len(KINDS)):
        if KINDS[kind] == kind and is_kind(which, KINDS, kind):
            g_place = select(gradients, which, KINDS, kind, ALIGNED) + place
            s_place = select(signs, which, KINDS, kind, ALIGNED) + place
            g = tl.load(g_place, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(s_place, mask=inside, other=0.0).to(tl.float32)
            tl.store(partials + tl.program_id(0), tl.sum(g * s, axis=0))


@triton.jit
def _total_kernel(
    partials, totals, BOUNDS: tl.constexpr, TRIPS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    which = tl.program_id(0)
    first = 0
    last = 0
    for i in tl.static_range(len(BOUNDS) - 1):
        first = tl.where(which == i, BOUNDS[i], first)
        last = tl.where(which == i, BOUNDS[i + 1], last)
    total = tl.zeros([CHUNK], tl.float32)
    for trip in range(TRIPS):
        place = first + trip * CHUNK + tl.arange(0, CHUNK)
        total += tl.load(partials + place, mask=place < last, other=0.0)
    tl.store(totals + which, tl.sum(total, axis=0))


def _scaled(tensors: Sequence[Tensor], alphas: Tensor | None) -> list[Tensor]:
    sources = tuple(dense(t) for t in tensors)
    results = tuple(torch.empty_like(t) for t in sources)
    if sources:
        launch(
            _scale_kernel, (block_count(sources),), sources, results, alphas,
            device=sources[0].device, SIZES=tuple(t.numel() for t in sources),
            KINDS=kinds_of(sources), BLOCK=BLOCK, ALIGNED=aligned(sources, results),
            num_warps=WARPS,
        )  # fmt: skip
    return list(results)


def block_signs(gradients: Sequence[Tensor]) -> list[Tensor]:
    """See ``reference.block_signs``."""
    return _scaled(gradients, None)


def block_noise(signs: Sequence[Tensor], alphas: Tensor) -> list[Tensor]:
    """See ``reference.block_noise``."""
    if len(signs) != len(alphas):
        raise ValueError(f"{len(signs)} blocks need as many step sizes, not {len(alphas)}.")
    return _scaled(signs, alphas.detach().contiguous())


def block_step_gradients(gradients: Sequence[Tensor], signs: Sequence[Tensor]) -> Tensor:
    """See ``reference.block_step_gradients``; two launches."""
    g, s = flat_pairs(gradients, signs)
    device = g[0].device
    totals = torch.empty(len(g), dtype=torch.float32, device=device)
    blocks = block_count(g)
    partials = torch.empty(blocks, dtype=torch.float32, device=device)
    launch(
        _dot_kernel, (blocks,), g, s, partials, device=device,
        SIZES=tuple(t.numel() for t in g), KINDS=kinds_of(g, s), BLOCK=BLOCK,
        ALIGNED=aligned(g, s), num_warps=WARPS,
    )  # fmt: skip
    bounds = tuple(block_count(g[:i]) for i in range(len(g) + 1))
    longest = max(block_count([t]) for t in g)
    launch(
        _total_kernel, (len(g),), partials, totals, device=device, BOUNDS=bounds,
        TRIPS=triton.cdiv(longest, CHUNK), CHUNK=CHUNK,
    )  # fmt: skip
    return totals
