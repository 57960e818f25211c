"""Folders decoded once: the packed cache of bytes that later runs read back.

A set of files becomes one ``.npy`` of uint8 (N,C,H,W). Its name is a hash over the files (name,
size, time of change) and the size decoded to, so that a changed folder never finds an old cache.
It is read only where its digest is the one this user wrote (``array_file.py``).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastadv.data.array_file import read_back, user_cache, write_rows
from fastadv.data.dataset import Dataset
from fastadv.data.decode import (
    Common,
    Format,
    common_format,
    decode,
    header,
    in_threads,
    unreadable,
)
from fastadv.data.folders import ImageTree
from fastadv.data.machine import machine_memory
from fastadv.errors import UserError
from fastadv.storage.printable import printable

_VERSION = 2  # increase it when the same files would be decoded to other bytes
_FOLDER = ".fastadv-cache"


def read_tree(tree: ImageTree, cache: Path | None = None, image_size: int | None = None) -> Dataset:
    """The images of ``tree`` as a ``Dataset``, decoded or from the cache.

    ``image_size``: height and width; otherwise the size of most training images. Images of another
    size are scaled to cover it and center-cropped. Messages report how many, and which files of
    the tree are ignored. ``cache``: the folder for the packed files; otherwise
    ``.fastadv-cache`` inside the tree, or in the user's cache folder if the tree is not
    writable. Raises ``UserError`` for an unreadable image (with its name), if no size is that of
    most images, and if the decoded images would not fit in memory.
    """
    folder = cache or _cache_folder(tree.root)
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    tell_left_out(tree, console)
    stamps = [_stamp(tree.root, file) for file in tree.train_files + tree.test_files]
    common, test_odd, test_coloured = _known_format(folder, tree, stamps, image_size)
    form = common.form
    total = form.bytes_each * len(stamps)
    if total > _memory() // 2:
        raise UserError(
            f"{printable(tree.name)} would take {total / 1e9:.0f} GB decoded to "
            f"{form.height}x{form.width}; stream it with --loader dali, or choose a smaller "
            "--image-size."
        )
    for odd, files, part in (
        (common.odd, tree.train_files, "training"),
        (test_odd, tree.test_files, "test"),
    ):
        if odd:
            console.print(
                f"{odd} of {len(files)} {part} images are not {form.height}x{form.width} "
                "and are scaled and cut to it."
            )
    if form.channels == 1 and test_coloured:
        console.print(
            f"{test_coloured} of {len(tree.test_files)} test images are coloured and become grey, "
            "as all training images are."
        )
    n = len(tree.train_files)
    train = _packed(folder, tree.train_files, stamps[:n], form, "training", console)
    test = _packed(folder, tree.test_files, stamps[n:], form, "test", console)
    labels = torch.tensor(tree.train_labels), torch.tensor(tree.test_labels)
    return Dataset(
        printable(tree.name),
        train,
        labels[0],
        test,
        labels[1],
        len(tree.classes),
        classes=tree.classes,
    )


def tell_left_out(tree: ImageTree, console: Console | None = None) -> None:
    """Report in one line the files of ``tree`` that are not read, if there are any."""
    if tree.left_out:
        console = console or Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        read = len(tree.train_files) + len(tree.test_files)
        console.print(f"{printable(tree.name)}: {read} images are read; left out: {tree.left_out}.")


def _stamp(root: Path, file: str) -> str:
    try:
        found = os.stat(file)
    except OSError as error:
        raise unreadable(file) from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{printable(file)} is not a regular file; remove it.")
    return f"{os.path.relpath(file, root)}\0{found.st_size}\0{found.st_mtime_ns}\n"


def _key(stamps: list[str], *settings: object) -> str:
    digest = hashlib.sha256(repr((_VERSION, *settings)).encode())
    for stamp in stamps:
        digest.update(stamp.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _known_format(
    folder: Path, tree: ImageTree, stamps: list[str], image_size: int | None
) -> tuple[Common, int, int]:
    """The training images' format, and how many test images differ in size or have colour."""
    # Opening every file for its size costs as much as reading the cache, so this is cached too.
    split = len(tree.train_files)
    path = folder / f"{_key(stamps, 'format', split, image_size)}.npy"
    kept = read_back(path, (7,), np.int64)
    if kept is None:
        common = common_format(tree.train_files, image_size)
        form, odd, coloured = common.form, 0, 0
        for height, width, is_grey in in_threads(header, tree.test_files):
            odd += (height, width) != (form.height, form.width)
            coloured += not is_grey
        found = [form.height, form.width, form.channels, common.odd, common.coloured, odd, coloured]
        kept = _write(path, iter([np.array(found, dtype=np.int64)]), (7,), np.int64)
    height, width, channels, odd, coloured, *tested = (int(number) for number in kept)
    return Common(Format(height, width, channels), odd, coloured), tested[0], tested[1]


def _packed(
    folder: Path, files: list[str], stamps: list[str], form: Format, part: str, console: Console
) -> Tensor:
    shape = (len(files), form.channels, form.height, form.width)
    path = folder / f"{_key(stamps, 'images', form)}.npy"
    images = read_back(path, shape, np.uint8)
    if images is None:
        rows = in_threads(lambda file: decode(file, form), files, form.bytes_each)
        shown = track(rows, f"Decoding {part} images", len(files), console=console)
        images = _write(path, iter(shown), shape, np.uint8)
    return torch.from_numpy(images)


def _write(
    path: Path, rows: Iterator[np.ndarray], shape: tuple[int, ...], dtype: type
) -> np.ndarray:
    try:
        written = write_rows(path, rows, shape, dtype)
    except OSError as error:
        why = "no space is left" if error.errno == errno.ENOSPC else str(error)
        raise UserError(
            f"The image cache cannot be written to {printable(path.parent)}: {printable(why)}; "
            "make room or choose another folder with --data-root."
        ) from error
    if written is None:
        raise UserError(f"The image cache {printable(path)} cannot be read back; check that disk.")
    return written


def _cache_folder(root: Path) -> Path:
    inside = root / _FOLDER
    # A link would redirect the writes to a place outside of the tree.
    if os.access(root, os.W_OK) and not inside.is_symlink():
        return inside
    return user_cache()


def _memory() -> int:
    return machine_memory()
