# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""Perturb a list of weights by normalised directions, and undo it (Triton).

Three launches perturb and one restores, for any number of tensors. The order of the sums of squares
depends on the shapes alone, so every run gives the same bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import aligned, float_or_pointer
from .reference import DIRECTION_GUARD, check_pairs
from .triton_common import launch, scalar
from .triton_lists import (
    BLOCK,
    WARPS,
    block_count,
    block_of,
    copy_back,
    flat_pairs,
    is_kind,
    kinds_of,
    locate,
    select,
)

CHUNK = 1024
GUARD = tl.constexpr(DIRECTION_GUARD)


@triton.jit
def _squares_kernel(
    weights, directions, partials, blocks,
    SIZES: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    which, block, size = locate(SIZES, BLOCK)
    place, inside = block_of(block, size, BLOCK, ALIGNED)
    program = tl.program_id(0)
    for kind in tl.static_range(len(KINDS)):
        if KINDS[kind] == kind and is_kind(which, KINDS, kind):
            w_place = select(weights, which, KINDS, kind, ALIGNED) + place
            g_place = select(directions, which, KINDS, kind, ALIGNED) + place
            w = tl.load(w_place, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(g_place, mask=inside, other=0.0).to(tl.float32)
            tl.store(partials + program, tl.sum(w * w, axis=0))
            tl.store(partials + blocks + program, tl.sum(g * g, axis=0))


@triton.jit
def _ratios_kernel(
    partials, ratios, gamma, gamma_ptr, blocks,
    BOUNDS: tl.constexpr, TOGETHER: tl.constexpr, TRIPS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0)
    first = 0
    last = blocks
    if not TOGETHER:
        for i in tl.static_range(len(BOUNDS) - 1):
            first = tl.where(which == i, BOUNDS[i], first)
            last = tl.where(which == i, BOUNDS[i + 1], last)
    w_squares = tl.zeros([CHUNK], tl.float32)
    g_squares = tl.zeros([CHUNK], tl.float32)
    for trip in range(TRIPS):
        place = first + trip * CHUNK + tl.arange(0, CHUNK)
        inside = place < last
        w_squares += tl.load(partials + place, mask=inside, other=0.0)
        g_squares += tl.load(partials + blocks + place, mask=inside, other=0.0)
    w_norm = tl.sqrt_rn(tl.sum(w_squares, axis=0))
    g_norm = tl.sqrt_rn(tl.sum(g_squares, axis=0))
    # gamma * |w| / (|g| + guard)
    tl.store(ratios + which, tl.div_rn(scalar(gamma, gamma_ptr) * w_norm, g_norm + GUARD))


@triton.jit
def _perturb_kernel(
    weights, directions, ratios,
    SIZES: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    which, block, size = locate(SIZES, BLOCK)
    place, inside = block_of(block, size, BLOCK, ALIGNED)
    ratio = tl.load(ratios + which)
    for kind in tl.static_range(len(KINDS)):
        if KINDS[kind] == kind and is_kind(which, KINDS, kind):
            w_place = select(weights, which, KINDS, kind, ALIGNED) + place
            g_place = select(directions, which, KINDS, kind, ALIGNED) + place
            v = tl.load(g_place, mask=inside).to(tl.float32) * ratio
            # Rounded before the check: what overflows the dtype is not finite either.
            v = v.to(g_place.dtype.element_ty).to(tl.float32)
            v = tl.where(tl.abs(v) < float("inf"), v, 0.0)
            w = tl.load(w_place, mask=inside).to(tl.float32) + v
            tl.store(g_place, v.to(g_place.dtype.element_ty), mask=inside)
            tl.store(w_place, w.to(w_place.dtype.element_ty), mask=inside)


@triton.jit
def _restore_kernel(
    weights, originals, shifts,
    SIZES: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    which, block, size = locate(SIZES, BLOCK)
    place, inside = block_of(block, size, BLOCK, ALIGNED)
    for kind in tl.static_range(len(KINDS)):
        if KINDS[kind] == kind and is_kind(which, KINDS, kind):
            w_place = select(weights, which, KINDS, kind, ALIGNED) + place
            w0_place = select(originals, which, KINDS, kind, ALIGNED) + place
            v_place = select(shifts, which, KINDS, kind, ALIGNED) + place
            w = tl.load(w_place, mask=inside).to(tl.float32)
            w0 = tl.load(w0_place, mask=inside).to(tl.float32)
            v = tl.load(v_place, mask=inside).to(tl.float32)
            # w <- w0 + (w - fl(w0 + v)), fl rounding as the perturbation did; w where nothing
            # moved it
            perturbed = (w0 + v).to(w_place.dtype.element_ty).to(tl.float32)
            restored = tl.where(perturbed == w0, w, w0 + (w - perturbed))
            tl.store(w_place, restored.to(w_place.dtype.element_ty), mask=inside)


def perturb_weights(
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
    gamma: float | Tensor,
    scope: str = "tensor",
) -> None:
    """See ``reference.perturb_weights``."""
    check_pairs(weights, directions)
    if scope not in ("tensor", "global"):
        raise ValueError(f"scope must be 'tensor' or 'global', not {scope!r}.")
    if not weights:
        return
    device = weights[0].device
    w, g = flat_pairs(weights, directions)
    blocks = block_count(w)
    partials = torch.empty((2, blocks), dtype=torch.float32, device=device)
    ratios = torch.empty(len(w), dtype=torch.float32, device=device)
    sizes = {
        "SIZES": tuple(t.numel() for t in w),
        "KINDS": kinds_of(w),
        "BLOCK": BLOCK,
        "ALIGNED": aligned(w, g),
        "num_warps": WARPS,
    }
    bounds = tuple(block_count(w[:i]) for i in range(len(w) + 1))
    together = scope == "global"
    longest = blocks if together else max(block_count([t]) for t in w)
    launch(_squares_kernel, (blocks,), w, g, partials, blocks, device=device, **sizes)
    launch(
        _ratios_kernel, (len(w),), partials, ratios, *float_or_pointer(gamma, device), blocks,
        device=device, BOUNDS=bounds, TOGETHER=together, TRIPS=triton.cdiv(longest, CHUNK),
        CHUNK=CHUNK,
    )  # fmt: skip
    launch(_perturb_kernel, (blocks,), w, g, ratios, device=device, **sizes)
    _written(weights, w)
    _written(directions, g)


def restore_weights(
    weights: Sequence[Tensor], originals: Sequence[Tensor], v: Sequence[Tensor]
) -> None:
    """See ``reference.restore_weights``."""
    check_pairs(weights, originals)
    check_pairs(weights, v)
    if not weights:
        return
    w, w0 = flat_pairs(weights, originals)
    _, shifts = flat_pairs(w, v)
    launch(
        _restore_kernel, (block_count(w),), w, w0, shifts, device=w[0].device,
        SIZES=tuple(t.numel() for t in w), KINDS=kinds_of(w), BLOCK=BLOCK,
        ALIGNED=aligned(w, w0, shifts), num_warps=WARPS,
    )  # fmt: skip
    _written(weights, w)


@torch.no_grad()
def _written(tensors: Sequence[Tensor], used: Sequence[Tensor]) -> None:
    """Copy back what was not changed in place, and tell autograd that the tensors changed."""
    copy_back(tensors, used)
    torch.autograd.graph.increment_version(list(tensors))
