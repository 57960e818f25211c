"""Crop and flip by index, and the inverse, in plain PyTorch: the references of ``crop_flip*``.

``store`` is (N,C,H,W). The window of sample b starts at row ``top[b]``, column ``left[b]`` of
store row ``index[b]``; ``flip[b]`` mirrors it left to right. It may reach outside the store by any
distance.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from .rows import per_sample

Padding = Literal["constant", "reflect"]


@torch.no_grad()
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
    """The windows (B,C,h,w), ``size`` = (h, w), in the ``channels_last`` layout if requested.

    ``dtype`` None is float32 for a uint8 store, and the dtype of a floating store.

    ``store`` uint8 (read as value/255) or floating; ``index``, ``top``, ``left`` (B,) int64,
    ``flip`` (B,) bool. Outside the store the value is ``fill`` (in [0,1] for uint8), or the store
    mirrored at its border (``padding="reflect"``). Raises ``ValueError`` for another padding, and
    for images without pixels.
    """
    check_pixels(store)
    dtype = dtype or default_dtype(store)
    wide = _store_compute_dtype(torch.promote_types(store.dtype, dtype))
    inside, values = _windows(store, index, top, left, flip, size, padding)
    values = values.to(wide) / 255 if store.dtype == torch.uint8 else values.to(wide)
    if padding == "constant":
        values = torch.where(inside[:, None], values, fill)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return values.to(dtype).contiguous(memory_format=layout)


@torch.no_grad()
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
    """(clamp(x + clamp(scale * w, -eps, eps), low, high), w), w being the windows of the store.

    ``store`` (floating) holds one perturbation per sample; outside the store w is 0. ``x``
    (B,C,h,w) are the augmented images, cropped at the same places; both results have the dtype and
    layout of ``x``. ``scale`` is a float or a 0-dim tensor; ``eps`` has the unit of the pixels, and
    is a number, a 0-dim tensor, or (B,), a radius for each sample. Raises ``ValueError`` for a
    store that is not floating, for another shape of ``eps``, and unless ``x`` has one window per
    index and the channels of the store. Li et al. 2020 (APART): the start point, from omega.
    """
    check_floating(store)
    check_windows(store, index, x)
    window = crop_flip(store, index, top, left, flip, (x.shape[2], x.shape[3]), store.dtype)
    wide = _store_compute_dtype(x.dtype)
    radius: Any = per_sample("eps", eps, x, wide)
    delta = (window.to(wide) * scale).clamp(-radius, radius)
    start = (x.to(wide) + delta).clamp(low, high).to(x.dtype)
    return start, torch.empty_like(x).copy_(window)


@torch.no_grad()
def crop_flip_write(
    store: Tensor,
    index: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    window: Tensor,
    ok: Tensor | None = None,
) -> None:
    """Write ``window`` (B,C,h,w) back to the pixels it was read from, in place, without the flip.

    The part outside the store is dropped; pixels of the store outside the window do not change.
    ``store`` is floating; ``index`` must not have duplicates, which are not detected. If ``ok``, a
    0-dim bool tensor, is False, the store does not change. Raises ``ValueError`` for a store that
    is not floating, and unless ``window`` has one window per index and the channels of the store.
    """
    inside, values = _at_store_pixels(store, index, top, left, flip, window)
    _write_rows(store, index, inside, values.to(store.dtype), ok)


@torch.no_grad()
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
    """w <- clamp(w + rate * sign(grad), low, high) in the window of each store row, in place.

    ``grad`` (B,C,h,w) has the position and orientation of the window; sign(0) = sign(NaN) = 0.
    ``rate``, a float or a 0-dim tensor, has the unit of the store. ``ok`` and the errors are those
    of :func:`crop_flip_write`. Li et al. 2020 (APART): the update of omega.
    """
    inside, values = _at_store_pixels(store, index, top, left, flip, grad)
    wide = _store_compute_dtype(store.dtype)
    sign = (values > 0).to(wide) - (values < 0).to(wide)
    updated = (store[index].to(wide) + sign * rate).clamp(low, high).to(store.dtype)
    _write_rows(store, index, inside, updated, ok)


def empty_windows(
    store: Tensor,
    index: Tensor,
    size: tuple[int, int],
    dtype: torch.dtype,
    channels_last: bool,
    **_values: object,
) -> Tensor:
    """An empty tensor like the result of :func:`crop_flip`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (index.shape[0], store.shape[1], *size)
    return torch.empty(shape, dtype=dtype, device=store.device, memory_format=layout)


def default_dtype(store: Tensor) -> torch.dtype:
    """The dtype of windows if none is requested."""
    return torch.float32 if store.dtype == torch.uint8 else store.dtype


def check_padding(padding: str) -> None:
    """Raise ``ValueError`` for an unknown padding."""
    if padding not in ("constant", "reflect"):
        raise ValueError(f"padding must be 'constant' or 'reflect', not {padding!r}.")


def check_floating(store: Tensor) -> None:
    """Raise ``ValueError`` for a store of integers, which cannot hold the results."""
    if not store.dtype.is_floating_point:
        raise ValueError(f"This store must be floating, not {store.dtype}.")


def check_pixels(store: Tensor) -> None:
    """Raise ``ValueError`` if the images of the store have no pixels."""
    if not store.shape[2] * store.shape[3]:
        raise ValueError(
            f"Images of {store.shape[2]}x{store.shape[3]} pixels have none to show; give others."
        )


def check_windows(store: Tensor, index: Tensor, windows: Tensor) -> None:
    """Raise ``ValueError`` unless there is one window (C,h,w) per index, with the channels of the
    store."""
    if windows.shape[:2] != (index.shape[0], store.shape[1]):
        raise ValueError(
            f"Windows of shape {tuple(windows.shape)} do not fit {index.shape[0]} rows of a store "
            f"of shape {tuple(store.shape)}: give one window for each row, with as many channels."
        )


def _store_compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _windows(
    store: Tensor,
    index: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    size: tuple[int, int],
    padding: str,
) -> tuple[Tensor, Tensor]:
    """(inside (B,h,w) bool, raw values (B,C,h,w)); values outside the store are arbitrary."""
    check_padding(padding)
    (h, w), (height, width) = size, store.shape[2:]
    column = torch.arange(w, device=store.device)
    ys = top[:, None] + torch.arange(h, device=store.device)
    xs = left[:, None] + torch.where(flip[:, None], w - 1 - column, column)
    inside = _inside(ys, height)[:, :, None] & _inside(xs, width)[:, None, :]
    if padding == "reflect":
        ys, xs = _reflected(ys, height), _reflected(xs, width)
    rows, columns = ys.clamp(0, height - 1), xs.clamp(0, width - 1)
    channel = torch.arange(store.shape[1], device=store.device)[None, :, None, None]
    sample = index[:, None, None, None]
    return inside, store[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _at_store_pixels(
    store: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, window: Tensor
) -> tuple[Tensor, Tensor]:
    """``window`` placed on whole rows of the store: (mask of its pixels (B,H,W), values
    (B,C,H,W))."""
    check_floating(store)
    check_windows(store, index, window)
    h, w = window.shape[2:]
    i = torch.arange(store.shape[2], device=store.device) - top[:, None]
    j = torch.arange(store.shape[3], device=store.device) - left[:, None]
    inside = _inside(i, h)[:, :, None] & _inside(j, w)[:, None, :]
    j = torch.where(flip[:, None], w - 1 - j, j)
    i, j = i.clamp(0, h - 1), j.clamp(0, w - 1)
    batch = torch.arange(window.shape[0], device=store.device)[:, None, None, None]
    channel = torch.arange(window.shape[1], device=store.device)[None, :, None, None]
    return inside, window[batch, channel, i[:, None, :, None], j[:, None, None, :]]


def _write_rows(
    store: Tensor, index: Tensor, inside: Tensor, values: Tensor, ok: Tensor | None
) -> None:
    if ok is not None:
        inside = inside & ok
    store.index_copy_(0, index, torch.where(inside[:, None], values, store[index]))


def _inside(position: Tensor, length: int) -> Tensor:
    return (position >= 0) & (position < length)


def _reflected(position: Tensor, length: int) -> Tensor:
    """Mirror at the border without repeating the border: -1 -> 1, length -> length - 2, ..."""
    period = max(2 * (length - 1), 1)
    position = position.remainder(period)
    return torch.where(position < length, position, period - position)
