# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""Crop and flip by index, and the inverse (Triton); all offsets have 64 bits."""

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
    check_windows,
    default_dtype,
    empty_windows,
)
from .triton_common import clamp_nan, launch, scalar, scalar_of, sign

BLOCK = 1024


@triton.jit
def _reflected(position, length):
    """Mirror at the border without repeating it."""
    period = tl.maximum(2 * (length - 1), 1)
    position = position % period
    position = tl.where(position < 0, position + period, position)
    return tl.where(position < length, position, period - position)


@triton.jit
def _begin(first, length, size: tl.constexpr, REFLECT: tl.constexpr):
    """Where a window of ``size`` begins, in 32 bits: however far outside it lies, it sees the same
    from the border, or from a whole period nearer."""
    if REFLECT:
        first = first % tl.maximum(2 * (length - 1), 1)
    else:
        first = tl.minimum(tl.maximum(first, -size), length)
    return first.to(tl.int32)


@triton.jit
def _window_places(
    index, top, left, flip, stride_n, stride_c, stride_h, stride_w, height, width,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr, REFLECT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(places in the window tensor, mask there, places in the store, mask there).

    The window's sides are constants, so that no division is one. ``LAST``: the window tensor is
    channels_last, and neighbouring elements of it are the channels of one pixel.
    """
    sample = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if LAST:
        c, pixel = element % C, element // C
    else:
        c, pixel = element // (H * W), element % (H * W)
    i, j = pixel // W, pixel % W
    j = tl.where(tl.load(flip + sample) != 0, W - 1 - j, j)
    y = _begin(tl.load(top + sample), height, H, REFLECT) + i
    x = _begin(tl.load(left + sample), width, W, REFLECT) + j
    inside = element < C * H * W
    if REFLECT:
        y, x = _reflected(y, height), _reflected(x, width)
        in_store = inside
    else:
        in_store = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    row = tl.load(index + sample).to(tl.int64)
    place = row * stride_n + c.to(tl.int64) * stride_c
    place += y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    return sample * (C * H * W) + element, inside, place, in_store


@triton.jit
def _crop_kernel(
    store, index, top, left, flip, out, fill,
    stride_n, stride_c, stride_h, stride_w, height, width,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr,
    BYTES: tl.constexpr, REFLECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    target, inside, place, in_store = _window_places(
        index, top, left, flip, stride_n, stride_c, stride_h, stride_w, height, width,
        C, H, W, LAST, REFLECT, BLOCK,
    )  # fmt: skip
    value = tl.load(store + place, mask=in_store, other=0).to(tl.float32)
    if BYTES:
        value = tl.div_rn(value, tl.full([BLOCK], 255.0, tl.float32))
    value = tl.where(in_store, value, fill)
    tl.store(out + target, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _crop_add_kernel(
    store, index, top, left, flip, x, out, window, scale, scale_ptr, eps, eps_ptr, eps_stride,
    low, high,
    stride_n, stride_c, stride_h, stride_w, height, width,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    target, inside, place, in_store = _window_places(
        index, top, left, flip, stride_n, stride_c, stride_h, stride_w, height, width,
        C, H, W, LAST, False, BLOCK,
    )  # fmt: skip
    value = tl.load(store + place, mask=in_store, other=0.0).to(tl.float32)
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
    ASCEND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    target, _, place, in_store = _window_places(
        index, top, left, flip, stride_n, stride_c, stride_h, stride_w, height, width,
        C, H, W, LAST, False, BLOCK,
    )  # fmt: skip
    if ok is not None:
        in_store = in_store & (tl.load(ok).to(tl.int32) + tl.zeros([BLOCK], tl.int32) != 0)
    value = tl.load(window + target, mask=in_store).to(tl.float32)
    if ASCEND:
        # w <- clamp(w + rate * sign(g), low, high)
        old = tl.load(store + place, mask=in_store).to(tl.float32)
        value = clamp_nan(old + sign(value) * scalar(rate, rate_ptr), low, high)
    tl.store(store + place, value.to(store.dtype.element_ty), mask=in_store)


def _geometry(store: Tensor) -> tuple[int, ...]:
    """The last arguments of the kernels: strides, height and width of the store."""
    return (*store.stride(), store.shape[2], store.shape[3])


def _sides(windows: Tensor) -> dict[str, Any]:
    """The constants of a launch over ``windows`` (B,C,h,w), dense in either layout."""
    channels, h, w = windows.shape[1:]
    last = not windows.is_contiguous()
    return {"C": channels, "H": h, "W": w, "LAST": last, "BLOCK": BLOCK}


def _dense(windows: Tensor) -> Tensor:
    """``windows`` (B,C,h,w) themselves if they are dense in either layout, else a copy."""
    last = windows.is_contiguous(memory_format=torch.channels_last)
    return windows if last else windows.contiguous()


def _where(*view: Tensor) -> tuple[Tensor, ...]:
    """index, top, left and flip as the kernels read them: contiguous, bool as bytes."""
    return tuple(_bytes(t).contiguous() for t in view)


def _bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype == torch.bool else t


def _grid(windows: Tensor) -> tuple[int, int]:
    return windows.shape[0], triton.cdiv(windows[0].numel(), BLOCK)


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
    out = empty_windows(store, index, size, dtype or default_dtype(store), channels_last)
    if out.numel():
        launch(
            _crop_kernel, _grid(out), store, *_where(index, top, left, flip), out, float(fill),
            *_geometry(store), device=store.device, **_sides(out),
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
    radius = float_or_rows("eps", eps, x)
    x = _dense(x)
    out, window = torch.empty_like(x), torch.empty_like(x)
    if out.numel():
        launch(
            _crop_add_kernel, _grid(x), store, *_where(index, top, left, flip), x, out, window,
            *float_or_pointer(scale, x.device), *radius, low, high, *_geometry(store),
            device=x.device, **_sides(x),
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
    if values.numel():
        launch(
            _write_kernel, _grid(values), store, *_where(*view), values,
            None if ok is None else _bytes(ok), *rate, *bounds, *_geometry(store),
            device=store.device, **_sides(values), ASCEND=ascend,
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
