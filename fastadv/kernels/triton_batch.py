# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""A batch clipped to its ranges, and whether it was in them, in one launch (Triton)."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import dense, float_or_rows, laid_out_as
from .reference_guard import EDGE
from .tickets import tickets
from .triton_common import clamp_nan, launch, scalar_of

BLOCK, ROWS, WARPS = 4096, 256, 8
INSIDE = tl.constexpr(1 - EDGE)


@triton.jit
def _look_kernel(
    x, y, rows, x_out, y_out, rows_out, bad_x, bad_y, bad_rows, counts,
    low, high, least, most, classes, first_row, row_count, size: tl.int64, batch, programs,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    pixel = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    outside = inside & (((pixel >= least) & (pixel <= most)) == 0)
    pixel = clamp_nan(pixel, low, high)
    tl.store(x_out + place, pixel.to(x_out.dtype.element_ty), mask=inside)
    if tl.max(outside.to(tl.int32), axis=0) != 0:
        tl.atomic_add(counts + 1, 1, sem="relaxed")
    if program * ROWS < batch:
        at = program * ROWS + tl.arange(0, ROWS)
        there = at < batch
        if y is not None:
            label = tl.load(y + at, mask=there, other=0)
            wrong = there & ((label < 0) | (label >= classes))
            label = tl.minimum(tl.maximum(label, 0), classes - 1)
            tl.store(y_out + at, label, mask=there)
            if tl.max(wrong.to(tl.int32), axis=0) != 0:
                tl.atomic_add(counts + 2, 1, sem="relaxed")
        row = first_row + at.to(tl.int64)
        if rows is not None:
            row = tl.load(rows + at, mask=there, other=0)
        wrong = there & ((row < 0) | (row >= row_count))
        row = tl.minimum(tl.maximum(row, 0), row_count - 1)
        tl.store(rows_out + at, row, mask=there)
        if tl.max(wrong.to(tl.int32), axis=0) != 0:
            tl.atomic_add(counts + 3, 1, sem="relaxed")
    # The program that arrives last tells the results and leaves all counters 0.
    if tl.atomic_add(counts, 1, sem="acq_rel") == programs - 1:
        tl.store(bad_x, tl.load(counts + 1, cache_modifier=".cg") != 0)
        tl.store(bad_y, tl.load(counts + 2, cache_modifier=".cg") != 0)
        tl.store(bad_rows, tl.load(counts + 3, cache_modifier=".cg") != 0)
        for i in tl.static_range(4):
            tl.store(counts + i, 0)


@triton.jit
def _unmoved_kernel(
    x_adv, start, x, edge, eps_ptr, eps_stride, low, high, unmoved, size,
    BLOCK: tl.constexpr, TRIPS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    edge = scalar_of(edge, eps_ptr, eps_stride, image)
    if eps_ptr is not None:
        edge = edge.to(x.dtype.element_ty).to(tl.float32) * INSIDE
    edge = edge.to(x.dtype.element_ty).to(tl.float32)
    first = image.to(tl.int64) * size
    moved, out, free = 0, 0, 0
    for trip in range(TRIPS):
        at = trip * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        place = first + at
        begin = clamp_nan(tl.load(start + place, mask=inside, other=0.0).to(tl.float32), low, high)
        begin = begin.to(x.dtype.element_ty).to(tl.float32)
        end = tl.load(x_adv + place, mask=inside, other=0.0).to(tl.float32)
        center = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        away = tl.abs((begin - center).to(x.dtype.element_ty).to(tl.float32))
        far = away >= edge
        stuck = far | (begin <= low) | (begin >= high)
        moved = tl.maximum(moved, tl.max((inside & (end != begin)).to(tl.int32), axis=0))
        out = tl.maximum(out, tl.max((inside & far).to(tl.int32), axis=0))
        free = tl.maximum(free, tl.max((inside & (stuck == 0)).to(tl.int32), axis=0))
    rests = (out != 0) & (free == 0)
    tl.store(unmoved + image, (moved == 0) & (rests == 0))


def unmoved_images(
    x_adv: Tensor,
    start: Tensor,
    x: Tensor,
    eps: float | Tensor,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """See ``reference_guard.unmoved_images``."""
    value, rows, stride = float_or_rows("eps", eps, x)
    x_adv = x_adv if _one_after_another(x_adv) else x_adv.contiguous()
    start, x = laid_out_as(start, x_adv), laid_out_as(x, x_adv)
    unmoved = torch.empty(x.shape[0], dtype=torch.bool, device=x.device)
    size = x[0].numel()
    block = min(BLOCK, triton.next_power_of_2(size))
    launch(
        _unmoved_kernel, (x.shape[0],), x_adv, start, x, value * (1 - EDGE), rows, stride,
        low, high, unmoved, size, device=x.device, BLOCK=block, TRIPS=triton.cdiv(size, block),
        num_warps=4,
    )  # fmt: skip
    return unmoved


def _one_after_another(images: Tensor) -> bool:
    """True if each image fills a range of memory, one after another."""
    return images.is_contiguous() or images.is_contiguous(memory_format=torch.channels_last)


def look_at_batch(
    x: Tensor,
    y: Tensor | None,
    rows: Tensor | None,
    box: tuple[float, float],
    rounding: float,
    classes: int,
    first_row: int,
    row_count: int,
    bad: Sequence[Tensor],
    homes: Sequence[Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See ``reference_guard.look_at_batch``."""
    low, high = box
    x, batch, device = dense(x), x.shape[0], x.device
    y = None if y is None else y.contiguous()
    rows = None if rows is None else rows.contiguous()
    x_home, y_home, rows_home = homes
    x_out = torch.empty_like(x) if x_home is None else x_home
    y_out = None
    if y is not None:
        y_out = torch.empty_like(y) if y_home is None else y_home
    if rows_home is None:
        rows_home = torch.empty(batch, dtype=torch.int64, device=device)
    programs = max(triton.cdiv(x.numel(), BLOCK), triton.cdiv(batch, ROWS))
    launch(
        _look_kernel, (programs,), x, y, rows, x_out, y_out, rows_home, *bad,
        tickets(device, 4), low, high, low - rounding, high + rounding, classes, first_row,
        row_count, x.numel(), batch, programs, device=device, BLOCK=BLOCK, ROWS=ROWS,
        num_warps=WARPS,
    )  # fmt: skip
    return x_out, y_out, rows_home
