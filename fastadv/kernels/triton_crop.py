# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""Crop and flip by index, and the inverse (Triton).

A program computes a tile of one window, seen as a matrix: its rows of pixels, with the channels of
a pixel side by side in channels_last, else the rows of all channels. Everything about a place is
computed once per row or column of the tile; per element remain a sum and two tests.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import float_or_pointer, float_or_rows
from .reference_crop import (
    Padding,
    check_floating,
    check_padding,
    check_pixels,
    check_windows,
    default_dtype,
    empty_windows,
)
from .triton_common import clamp_nan, launch, scalar, scalar_of, sign

TILE = 4096  # bytes of the window tensor
COLUMNS = (8, 16, 32, 64, 128, 256)
# v / 255 = v * HIGH + v * LOW: the first product is exact in float32 and the second too small for
# its rounding to matter, so that the sum is rounded as the division is.
HIGH, LOW = tl.constexpr(257 / 2**16), tl.constexpr(1 / (255 * 2**16))


@triton.jit
def _reflected(position, length):
    """Mirror at the border without repeating it."""
    period = tl.maximum(2 * (length - 1), 1)
    position = position % period
    position = tl.where(position < 0, position + period, position)
    return tl.where(position < length, position, period - position)


@triton.jit
def _nearest(position, length):
    return tl.minimum(tl.maximum(position, 0), length - 1)


@triton.jit
def _begin(first, length, size: tl.constexpr, REFLECT: tl.constexpr):
    """Where a window of ``size`` begins, in 32 bits: however far outside it lies, it sees the same
    from the border, or from whole periods nearer."""
    if REFLECT:
        if (first < -(2**30)) | (first > 2**30):  # a division of 64 bits is a hundred instructions
            first = first % tl.maximum(2 * (length - 1), 1)
    else:
        first = tl.minimum(tl.maximum(first, -size), length)
    return first.to(tl.int32)


@triton.jit
def _window_places(
    store, index, top, left, flip, stride_n, stride_c, stride_h, stride_w, height, width,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr, REFLECT: tl.constexpr,
    LONG: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(places in the window tensor, which of them exist, pointers into the store, which of them are
    pixels of the window), all (ROWS, COLUMNS).

    Outside of the store a pointer is that of the nearest pixel, so that loads need no mask. The
    window's sides are constants, so that no division is one. ``LAST``: the window tensor is
    channels_last. A sample begins at a place of 64 bits; from there 32 are enough unless ``LONG``.
    """
    sample = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    if LAST:
        i, j, rows, length = row, column // C, H, W * C
    else:
        i, j, rows, length = row % H, column, C * H, W
    inside = (row < rows)[:, None] & (column < length)[None, :]
    j = tl.where(tl.load(flip + sample) != 0, W - 1 - j, j)
    y = _begin(tl.load(top + sample), height, H, REFLECT) + i
    x = _begin(tl.load(left + sample), width, W, REFLECT) + j
    if REFLECT:
        y, x = _reflected(y, height), _reflected(x, width)
        in_store = inside
    else:
        in_rows = (y >= 0) & (y < height) & (row < rows)
        in_columns = (x >= 0) & (x < width) & (column < length)
        in_store = in_rows[:, None] & in_columns[None, :]
        y, x = _nearest(y, height), _nearest(x, width)
    if LONG:
        row, y, x = row.to(tl.int64), y.to(tl.int64), x.to(tl.int64)
    y, x = y * stride_h, x * stride_w
    if LAST:
        x += column % C * stride_c
    else:
        y += tl.minimum(row // H, C - 1) * stride_c
    target = sample * (C * H * W) + (row[:, None] * length + column[None, :])
    begin = store + tl.load(index + sample).to(tl.int64) * stride_n
    # Triton 3.6 would let neighbouring threads take neighbouring rows, unless pairs of columns are
    # said to lie side by side; as they are said to have no alignment, none is accessed as a pair.
    place = tl.multiple_of(tl.max_contiguous(y[:, None] + x[None, :], [1, 2]), [1, 1])
    return target, inside, begin + place, in_store


@triton.jit
def _crop_kernel(
    store, index, top, left, flip, out, fill,
    stride_n, stride_c, stride_h, stride_w, height, width,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr,
    BYTES: tl.constexpr, REFLECT: tl.constexpr, LONG: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    target, inside, place, in_store = _window_places(
        store, index, top, left, flip, stride_n, stride_c, stride_h, stride_w, height, width,
        C, H, W, LAST, REFLECT, LONG, ROWS, COLUMNS,
    )  # fmt: skip
    value = tl.load(place).to(tl.float32)
    if BYTES:
        value = tl.fma(value, LOW, value * HIGH)
    value = tl.where(in_store, value, fill)
    tl.store(out + target, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _crop_add_kernel(
    store, index, top, left, flip, x, out, window, scale, scale_ptr, eps, eps_ptr, eps_stride,
    low, high,
    stride_n, stride_c, stride_h, stride_w, height, width,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr,
    LONG: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    target, inside, place, in_store = _window_places(
        store, index, top, left, flip, stride_n, stride_c, stride_h, stride_w, height, width,
        C, H, W, LAST, False, LONG, ROWS, COLUMNS,
    )  # fmt: skip
    value = tl.where(in_store, tl.load(place).to(tl.float32), 0.0)
    image = tl.load(x + target, mask=inside).to(tl.float32)
    # x0 = box(x + clamp(scale * w, -eps, eps))
    radius = scalar_of(eps, eps_ptr, eps_stride, tl.program_id(0).to(tl.int64))
    delta = clamp_nan(value * scalar(scale, scale_ptr), -radius, radius)
    start = clamp_nan(image + delta, low, high)
    tl.store(out + target, start.to(out.dtype.element_ty), mask=inside)
    tl.store(window + target, value.to(window.dtype.element_ty), mask=inside)


@triton.jit
def _write_kernel(
    store, index, top, left, flip, window, ok, rate, rate_ptr, low, high,
    stride_n, stride_c, stride_h, stride_w, height, width,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr,
    LONG: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASCEND: tl.constexpr,
):  # fmt: skip
    target, inside, place, in_store = _window_places(
        store, index, top, left, flip, stride_n, stride_c, stride_h, stride_w, height, width,
        C, H, W, LAST, False, LONG, ROWS, COLUMNS,
    )  # fmt: skip
    if ok is not None:
        in_store = in_store & (tl.load(ok).to(tl.int32) + tl.zeros([1, 1], tl.int32) != 0)
    value = tl.load(window + target, mask=inside).to(tl.float32)
    if ASCEND:
        # w <- clamp(w + rate * sign(g), low, high)
        old = tl.load(place).to(tl.float32)
        value = clamp_nan(old + sign(value) * scalar(rate, rate_ptr), low, high)
    tl.store(place, value.to(store.dtype.element_ty), mask=in_store)


def _launch(
    kernel: Any, windows: Tensor, store: Tensor, *arguments: Any, **constants: bool
) -> None:
    """Launch ``kernel`` over ``windows`` (B,C,h,w), which are dense in either layout."""
    channels, h, w = windows.shape[1:]
    last = not windows.is_contiguous()
    rows, length = (h, w * channels) if last else (channels * h, w)
    # The widest tile among those with the fewest columns outside of the matrix.
    columns = min(COLUMNS, key=lambda each: (triton.cdiv(length, each) * each, -each))
    height = min(TILE // windows.element_size() // columns, triton.next_power_of_2(rows))
    launch(
        kernel, (len(windows), triton.cdiv(rows, height), triton.cdiv(length, columns)),
        store, *arguments, *store.stride(), *store.shape[2:], device=store.device,
        C=channels, H=h, W=w, LAST=last, LONG=_is_long(store, windows), ROWS=height,
        COLUMNS=columns, **constants,
    )  # fmt: skip


def _is_long(store: Tensor, windows: Tensor) -> bool:
    """Whether places within a sample need more than 32 bits."""
    sides = zip(store.shape[1:], store.stride()[1:], strict=True)
    last = sum((size - 1) * stride for size, stride in sides)
    return bool(max(last, windows[0].numel()) >= 2**31)


def _dense(windows: Tensor) -> Tensor:
    """``windows`` (B,C,h,w) themselves if they are dense in either layout, else a copy."""
    last = windows.is_contiguous(memory_format=torch.channels_last)
    return windows if last else windows.contiguous()


def _where(*view: Tensor) -> tuple[Tensor, ...]:
    """index, top, left and flip as the kernels read them: contiguous, bool as bytes."""
    return tuple(_bytes(t).contiguous() for t in view)


def _bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype == torch.bool else t


def crop_flip(
    store: Tensor,
    index: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    size: tuple[int, int],
    dtype: torch.dtype | None = None,
    *,
    fill: float = 0.0,
    padding: Padding = "constant",
    channels_last: bool = False,
) -> Tensor:
    """See ``reference_crop.crop_flip``."""
    check_padding(padding)
    check_pixels(store)
    out = empty_windows(store, index, size, dtype or default_dtype(store), channels_last)
    if out.numel():
        _launch(
            _crop_kernel, out, store, *_where(index, top, left, flip), out, float(fill),
            BYTES=store.dtype == torch.uint8, REFLECT=padding == "reflect",
        )  # fmt: skip
    return out


def crop_flip_add(
    store: Tensor,
    index: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    x: Tensor,
    scale: float | Tensor,
    eps: float | Tensor,
    low: float = 0.0,
    high: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See ``reference_crop.crop_flip_add``."""
    check_floating(store)
    check_windows(store, index, x)
    check_pixels(store)
    radius = float_or_rows("eps", eps, x)
    x = _dense(x)
    out, window = torch.empty_like(x), torch.empty_like(x)
    if out.numel():
        _launch(
            _crop_add_kernel, x, store, *_where(index, top, left, flip), x, out, window,
            *float_or_pointer(scale, x.device), *radius, low, high,
        )  # fmt: skip
    return out, window


def _write(
    store: Tensor,
    view: tuple[Tensor, ...],
    values: Tensor,
    rate: tuple[float, Tensor | None],
    bounds: tuple[float, float],
    ok: Tensor | None,
    ascend: bool,
) -> None:
    check_floating(store)
    check_windows(store, view[0], values)
    values = _dense(values)
    if values.numel() and store.numel():
        _launch(
            _write_kernel, values, store, *_where(*view), values,
            None if ok is None else _bytes(ok), *rate, *bounds, ASCEND=ascend,
        )  # fmt: skip
    torch.autograd.graph.increment_version(store)


def crop_flip_write(
    store: Tensor,
    index: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    window: Tensor,
    ok: Tensor | None = None,
) -> None:
    """See ``reference_crop.crop_flip_write``."""
    _write(store, (index, top, left, flip), window, (0.0, None), (0.0, 0.0), ok, False)


def crop_flip_ascend(
    store: Tensor,
    index: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    grad: Tensor,
    rate: float | Tensor,
    low: float = -1.0,
    high: float = 1.0,
    ok: Tensor | None = None,
) -> None:
    """See ``reference_crop.crop_flip_ascend``."""
    pair = float_or_pointer(rate, store.device)
    _write(store, (index, top, left, flip), grad, pair, (low, high), ok, True)
