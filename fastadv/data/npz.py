"""The user's own arrays: one ``.npz`` file with ``x_train, y_train, x_test, y_test``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastadv.data.dataset import Dataset
from fastadv.data.npz_file import Member, NotPlain, open_npz
from fastadv.engine.process.memory import machine_memory
from fastadv.errors import UserError
from fastadv.storage.printable import printable

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_CHANNELS = (1, 3, 4)
# More classes than ImageNet's are accepted only if there are as many images.
_CLASSES_WITHOUT_IMAGES = 1000


def read_npz(path: Path) -> Dataset:
    """The data set in the file ``path``.

    Images: uint8 0..255, uint16 0..65535 (divided by 257 and rounded), floats in [0,1] (rounded to
    1/255) or bools (black and white), as (N,C,H,W), (N,H,W,C) or (N,H,W) with 1, 3 or 4 channels;
    if both layouts fit, (N,C,H,W) is used. Labels: integers from 0 to the largest one in
    ``y_train``. Raises ``UserError`` for anything else.
    """
    if not path.is_file():
        raise UserError(
            f"There is no file {printable(path)}; npz:PATH names a file with {', '.join(_KEYS)}."
        )
    try:
        with open_npz(path, _KEYS) as arrays:
            return _dataset(path, arrays)
    except (NotPlain, OSError) as error:
        raise UserError(
            f"{printable(path)} is not a readable .npz file of plain arrays "
            f"({printable(str(error))}); write it with "
            "numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)."
        ) from error


def _dataset(path: Path, arrays: dict[str, Member]) -> Dataset:
    absent = [key for key in _KEYS if key not in arrays]
    if absent:
        raise UserError(
            f"{printable(path)} lacks {', '.join(absent)}; it must hold {', '.join(_KEYS)}."
        )
    held = sum(arrays[key].nbytes for key in _KEYS)
    if held > machine_memory() // 2:
        raise UserError(
            f"{printable(path)} would take {held / 1e9:.0f} GB, more than half of this machine's "
            "memory; keep fewer images in it."
        )
    labels = {key: _labels(key, arrays[key]) for key in ("y_train", "y_test")}
    if not len(labels["y_train"]):
        raise UserError(f"{printable(path)} holds no training images.")
    num_classes = int(labels["y_train"].max()) + 1
    if int(labels["y_train"].min()) != 0:
        raise UserError(
            f"y_train has labels from {int(labels['y_train'].min())} to {num_classes - 1}; "
            "classes must be counted from 0."
        )
    if num_classes > max(len(labels["y_train"]), _CLASSES_WITHOUT_IMAGES):
        raise UserError(
            f"y_train has labels up to {num_classes - 1} for {len(labels['y_train'])} images; "
            "classes must be counted from 0 without gaps."
        )
    return Dataset(
        f"npz:{printable(path)}",
        read_images("x_train", arrays["x_train"]),
        labels["y_train"],
        read_images("x_test", arrays["x_test"], sparse=True),
        labels["y_test"],
        num_classes,
    )


def read_images(key: str, member: Member, *, sparse: bool = False) -> Tensor:
    """Images (N,C,H,W) uint8 from the array ``member``, converted as in ``read_npz``.

    ``sparse``: skip the brightness check; a small set may have no bright pixel.
    """
    arrange, shape = _arrangement(key, member.shape)
    convert, brightest = _conversion(key, member.dtype)
    images: np.ndarray = np.empty(shape, np.uint8)
    done, top = 0, 0.0
    for block in member.blocks():
        top = max(top, float(block.max())) if block.size else top
        part = arrange(block)
        images[done : done + len(part)] = convert(part)
        done += len(part)
    if 0 < top < brightest and not sparse:
        raise UserError(
            f"{key} holds {member.dtype} of at most {top:g}, all but black; images of this type "
            f"reach {np.iinfo(member.dtype).max}. Store 0..255 as uint8, black and white as bool."
        )
    return torch.from_numpy(images)


def _arrangement(
    key: str, shape: tuple[int, ...]
) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[int, ...]]:
    """The function that brings rows to (n,C,H,W), and the shape of the whole array."""
    if len(shape) == 3:
        return lambda rows: rows[:, None], (shape[0], 1, *shape[1:])
    last = len(shape) == 4 and shape[1] not in _CHANNELS and shape[3] in _CHANNELS
    if last:
        return lambda rows: rows.transpose(0, 3, 1, 2), (shape[0], shape[3], *shape[1:3])
    if len(shape) != 4 or shape[1] not in _CHANNELS:
        raise UserError(
            f"{key} has shape {shape}; images are (N,C,H,W), (N,H,W,C) or (N,H,W) "
            "with 1, 3 or 4 channels."
        )
    return lambda rows: rows, shape


def _conversion(key: str, dtype: np.dtype) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """The function from pixels to bytes, and the minimum of the brightest pixel."""
    if dtype == np.uint8:
        return lambda pixels: pixels, 2
    if dtype == np.bool_:
        return lambda pixels: pixels.astype(np.uint8) * 255, 0
    if dtype.kind == "u" and dtype.itemsize == 2:
        return lambda pixels: (pixels.astype(np.uint32) + 128) // 257, 256
    if dtype.kind == "f":
        return lambda pixels: _bytes(key, pixels), 0
    raise UserError(
        f"{key} holds {dtype}; images must be uint8, uint16 or floats in [0,1]: where they lie in "
        "0..255 convert them with .astype('uint8'), in 0..65535 with .astype('uint16')."
    )


def _bytes(key: str, pixels: np.ndarray) -> np.ndarray:
    low, high = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 0.0)
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise UserError(
            f"{key} holds floats from {low:g} to {high:g}; images must lie in [0,1] "
            "(divide by 255, undo any normalisation) or be uint8."
        )
    wide = pixels.astype(np.promote_types(pixels.dtype, np.float32))
    return np.rint(wide * 255.0).astype(np.uint8)


def _labels(key: str, member: Member) -> Tensor:
    shape = member.shape
    column = len(shape) == 2 and shape[1] == 1  # Keras writes labels as a column
    if (len(shape) != 1 and not column) or member.dtype.kind not in "iu":
        raise UserError(
            f"{key} has shape {shape} and type {member.dtype}; "
            "labels are integers, one per image (N,)."
        )
    found = member.whole().reshape(math.prod(shape))
    if found.size and int(found.max()) > np.iinfo(np.int64).max:
        raise UserError(f"{key} has a label of {int(found.max())}; classes are counted from 0.")
    return torch.from_numpy(found.astype(np.int64))
