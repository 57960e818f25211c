"""Anybody's own arrays: one ``.npz`` file with ``x_train, y_train, x_test, y_test``."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastadv.data.dataset import Dataset
from fastadv.errors import UserError

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_CHANNELS = (1, 3, 4)


def read_npz(path: Path) -> Dataset:
    """The data set in the file ``path``.

    Images: uint8 0..255 or floats in [0,1] (rounded to 1/255), as (N,C,H,W), (N,H,W,C) or (N,H,W)
    with 1, 3 or 4 channels; where both readings fit, (N,C,H,W) is meant. Labels: whole numbers
    from 0 to the largest one in ``y_train``. Raises ``UserError`` for anything else.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}; npz:PATH names a file with {', '.join(_KEYS)}.")
    arrays = _read(path)
    absent = [key for key in _KEYS if key not in arrays]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}; it must hold {', '.join(_KEYS)}.")
    labels = {key: _labels(key, arrays[key]) for key in ("y_train", "y_test")}
    if not len(labels["y_train"]):
        raise UserError(f"{path} holds no training images.")
    num_classes = int(labels["y_train"].max()) + 1
    if int(labels["y_train"].min()) != 0:
        raise UserError(
            f"y_train has labels from {int(labels['y_train'].min())} to {num_classes - 1}; "
            "classes must be counted from 0."
        )
    return Dataset(
        f"npz:{path}",
        _images("x_train", arrays["x_train"]),
        labels["y_train"],
        _images("x_test", arrays["x_test"]),
        labels["y_test"],
        num_classes,
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with archive:
            return {key: archive[key] for key in _KEYS if key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is not a readable .npz file of plain arrays ({error}); write it with "
            "numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)."
        ) from error


def _images(key: str, array: np.ndarray) -> Tensor:
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in _CHANNELS and array.shape[3] in _CHANNELS:
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in _CHANNELS:
        raise UserError(
            f"{key} has shape {array.shape}; images are (N,C,H,W), (N,H,W,C) or (N,H,W) "
            "with 1, 3 or 4 channels."
        )
    if np.issubdtype(array.dtype, np.floating):
        array = _bytes(key, array)
    if array.dtype != np.uint8:
        raise UserError(
            f"{key} holds {array.dtype}; images must be uint8 or floats in [0,1], "
            "so convert them with .astype('uint8')."
        )
    return torch.from_numpy(np.ascontiguousarray(array))


def _bytes(key: str, array: np.ndarray) -> np.ndarray:
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise UserError(
            f"{key} holds floats from {low:g} to {high:g}; images must lie in [0,1] "
            "(divide by 255, undo any normalisation) or be uint8."
        )
    return np.rint(array * 255.0).astype(np.uint8)


def _labels(key: str, array: np.ndarray) -> Tensor:
    if array.ndim == 2 and array.shape[1] == 1:  # Keras writes labels as a column
        array = array[:, 0]
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"{key} has shape {array.shape} and type {array.dtype}; "
            "labels are whole numbers, one an image (N,)."
        )
    return torch.from_numpy(array.astype(np.int64))
