# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""The guard around an update: is everything finite, which fault is the first, and what must not
count is put back (Triton).

One launch each, for lists of up to ``LISTED`` tensors. Where the update counts, ``put_back_unless``
reads one flag and nothing else.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference_guard
from .layout import aligned, are_alike, is_dense
from .reference import check_pairs
from .tickets import tickets
from .triton_common import launch
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

# Tensors of one launch: two pointers each, of the 4096 bytes that a kernel's arguments may take.
LISTED = 192


@triton.jit
def _not_finite_kernel(
    tensors, before, found, counts, programs,
    SIZES: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    which, block, size = locate(SIZES, BLOCK)
    place, inside = block_of(block, size, BLOCK, ALIGNED)
    bad = 0
    for kind in tl.static_range(len(KINDS)):
        if KINDS[kind] == kind and is_kind(which, KINDS, kind):
            now = select(tensors, which, KINDS, kind, ALIGNED) + place
            x = tl.load(now, mask=inside, other=0.0).to(tl.float32)
            here = (tl.abs(x) < float("inf")) == 0
            if before is not None:
                then = select(before, which, KINDS, kind, ALIGNED) + place
                old = tl.load(then, mask=inside, other=0.0).to(tl.float32)
                here = here & (tl.abs(old) < float("inf"))
            bad = tl.max(here.to(tl.int32), axis=0)
    if bad != 0:
        tl.atomic_add(counts + 1, 1, sem="relaxed")
    # The program that arrives last tells the result and leaves both counters 0.
    if tl.atomic_add(counts, 1, sem="acq_rel") == programs - 1:
        tl.store(found, tl.load(counts + 1, cache_modifier=".cg") != 0)
        tl.store(counts, 0)
        tl.store(counts + 1, 0)


@triton.jit
def _put_back_kernel(
    tensors, copies, ok,
    SIZES: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    if tl.load(ok) == 0:
        which, block, size = locate(SIZES, BLOCK)
        place, inside = block_of(block, size, BLOCK, ALIGNED)
        for kind in tl.static_range(len(KINDS)):
            if KINDS[kind] == kind and is_kind(which, KINDS, kind):
                source = select(copies, which, KINDS, kind, ALIGNED) + place
                home = select(tensors, which, KINDS, kind, ALIGNED) + place
                tl.store(home, tl.load(source, mask=inside), mask=inside)


@triton.jit
def _record_kernel(
    bad_step, kind, update, signs, ok, fine, unfit, RECORDED: tl.constexpr,
):  # fmt: skip
    counts = tl.full((), True, tl.int1)
    if ok is not None:
        counts = tl.load(ok) != 0
    any_bad = tl.full((), False, tl.int1)
    first = tl.full((), -1, tl.int32)
    for i in tl.static_range(len(RECORDED)):
        if signs[i] is not None:
            sign = tl.load(signs[i])
            if signs[i].dtype.element_ty.is_floating():
                bad = (tl.abs(sign) < float("inf")) == 0
            else:
                bad = sign != 0
            any_bad = any_bad | bad
            if RECORDED[i]:
                first = tl.where(bad & (first < 0), i, first)
    none_before = tl.load(bad_step) < 0
    if (first >= 0) & none_before & counts:
        tl.store(kind, first.to(tl.int64))
        tl.store(bad_step, tl.load(update))
    good = counts & none_before & (any_bad == 0)
    tl.store(fine, good)
    tl.store(unfit, tl.where(good, 0.0, 1.0))


def not_finite(tensors: Sequence[Tensor], before: Sequence[Tensor] | None = None) -> Tensor:
    """See ``reference_guard.not_finite``."""
    if before is not None:
        check_pairs(tensors, before)
    elif any(not is_dense(tensor) for tensor in tensors):
        tensors = [tensor.contiguous() for tensor in tensors]
    found = [
        _not_finite(tensors[at : at + LISTED], None if before is None else before[at : at + LISTED])
        for at in range(0, len(tensors), LISTED)
    ]
    return found[0] if len(found) == 1 else torch.stack(found).any()


def _not_finite(tensors: Sequence[Tensor], before: Sequence[Tensor] | None) -> Tensor:
    now, then = tuple(tensors), None
    if before is not None:
        now, then = flat_pairs(tensors, before)
    device, programs = now[0].device, block_count(now)
    found = torch.empty((), dtype=torch.bool, device=device)
    if not programs:
        return found.fill_(False)
    launch(
        _not_finite_kernel, (programs,), now, then, found, tickets(device, 2), programs,
        device=device, SIZES=tuple(t.numel() for t in now), KINDS=kinds_of(now), BLOCK=BLOCK,
        ALIGNED=aligned(now, () if then is None else then), num_warps=WARPS,
    )  # fmt: skip
    return found


def put_back_unless(tensors: Sequence[Tensor], copies: Sequence[Tensor], ok: Tensor) -> None:
    """See ``reference_guard.put_back_unless``."""
    check_pairs(tensors, copies)
    # Where the layouts differ a copy would be needed, also for an update that counts.
    places = range(len(tensors))
    alike = [i for i in places if is_dense(tensors[i]) and are_alike(copies[i], tensors[i])]
    for at in range(0, len(alike), LISTED):
        chosen = alike[at : at + LISTED]
        _put_back_unless(tuple(tensors[i] for i in chosen), tuple(copies[i] for i in chosen), ok)
    others = sorted({*places} - {*alike})
    if others:
        rest = [tensors[i] for i in others], [copies[i] for i in others]
        reference_guard.put_back_unless(*rest, ok)


def _put_back_unless(tensors: tuple[Tensor, ...], copies: tuple[Tensor, ...], ok: Tensor) -> None:
    programs = block_count(tensors)
    if not programs:
        return
    launch(
        _put_back_kernel, (programs,), tensors, copies, ok, device=tensors[0].device,
        SIZES=tuple(t.numel() for t in tensors), KINDS=kinds_of(tensors), BLOCK=BLOCK,
        ALIGNED=aligned(tensors, copies), num_warps=WARPS,
    )  # fmt: skip
    # Autograd is told that the tensors changed.
    torch.autograd.graph.increment_version(tensors)


def record_fault(
    bad_step: Tensor,
    kind: Tensor,
    update: Tensor,
    signs: Sequence[Tensor | None],
    recorded: Sequence[bool],
    ok: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``reference_guard.record_fault``."""
    device = bad_step.device
    fine = torch.empty((), dtype=torch.bool, device=device)
    unfit = torch.empty((), dtype=torch.float32, device=device)
    launch(
        _record_kernel, (1,), bad_step, kind, update, tuple(signs), ok, fine, unfit, device=device,
        RECORDED=tuple(recorded), num_warps=1,
    )  # fmt: skip
    return fine, unfit
