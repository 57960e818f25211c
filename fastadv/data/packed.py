"""Folders decoded once: the packed cache of bytes that later runs read back.

A set of files becomes one ``.npy`` of uint8 (N,C,H,W). Its name is a hash over the files (name,
size, time of change) and the size decoded to, so that a changed folder never finds an old cache.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastadv.data.dataset import Dataset
from fastadv.data.decode import Format, common_format, decode, in_threads, unreadable
from fastadv.data.folders import ImageTree
from fastadv.errors import UserError

_VERSION = 1  # raise it when the same files would be decoded to other bytes


def read_tree(tree: ImageTree, cache: Path | None = None, image_size: int | None = None) -> Dataset:
    """The images of ``tree`` as a ``Dataset``, decoded or from the cache.

    ``image_size``: height and width; otherwise the most common size of the training images. Images
    of another size are scaled to cover it and cut around their centre, and a line says how many.
    ``cache``: the folder for the packed files; otherwise ``.fastadv-cache`` inside the tree, or in
    the user's cache folder when the tree cannot be written. Raises ``UserError`` for an unreadable
    image (named), and when the decoded images would not fit in memory.
    """
    folder = cache or _cache_folder(tree.root)
    console = Console(stderr=True)
    stamps = [_stamp(tree.root, file) for file in tree.train_files + tree.test_files]
    form, odd = _known_format(folder, tree, stamps, image_size)
    total = form.bytes_each * len(stamps)
    if total > _memory() // 2:
        raise UserError(
            f"{tree.name} would take {total / 1e9:.0f} GB decoded to {form.height}x{form.width}; "
            "stream it with --loader dali, or choose a smaller --image-size."
        )
    if odd:
        console.print(
            f"{odd} of {len(tree.train_files)} training images are not {form.height}x{form.width} "
            "and are scaled and cut to it."
        )
    n = len(tree.train_files)
    train = _packed(folder, tree.train_files, stamps[:n], form, "training", console)
    test = _packed(folder, tree.test_files, stamps[n:], form, "test", console)
    labels = torch.tensor(tree.train_labels), torch.tensor(tree.test_labels)
    return Dataset(tree.name, train, labels[0], test, labels[1], len(tree.classes))


def _stamp(root: Path, file: str) -> str:
    try:
        found = os.stat(file)
    except OSError as error:
        raise unreadable(file) from error
    return f"{os.path.relpath(file, root)}\0{found.st_size}\0{found.st_mtime_ns}\n"


def _key(stamps: list[str], *settings: object) -> str:
    digest = hashlib.sha256(repr((_VERSION, *settings)).encode())
    for stamp in stamps:
        digest.update(stamp.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _known_format(
    folder: Path, tree: ImageTree, stamps: list[str], image_size: int | None
) -> tuple[Format, int]:
    # Opening every file for its size costs as much as reading the cache, so it is kept too.
    path = folder / f"{_key(stamps[: len(tree.train_files)], 'format', image_size)}.npy"
    kept = _read_back(path, (4,), np.int64)
    if kept is None:
        form, odd = common_format(tree.train_files, image_size)
        kept = np.array([form.height, form.width, form.channels, odd], dtype=np.int64)
        _write(path, iter([kept]), kept.shape, np.int64)
    height, width, channels, odd = (int(number) for number in kept)
    return Format(height, width, channels), odd


def _packed(
    folder: Path, files: list[str], stamps: list[str], form: Format, part: str, console: Console
) -> Tensor:
    shape = (len(files), form.channels, form.height, form.width)
    path = folder / f"{_key(stamps, 'images', form)}.npy"
    images = _read_back(path, shape, np.uint8)
    if images is None:
        rows = in_threads(lambda file: decode(file, form), files)
        shown = track(rows, f"Decoding {part} images", len(files), console=console)
        _write(path, iter(shown), shape, np.uint8)
        images = _read_back(path, shape, np.uint8)
        if images is None:
            raise UserError(f"The image cache {path} cannot be read back; check that disk.")
    return torch.from_numpy(images)


def _read_back(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray | None:
    """The array in ``path``, or None when it is not there or not whole."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape and array.dtype == dtype else None


def _write(path: Path, rows: Iterator[np.ndarray], shape: tuple[int, ...], dtype: type) -> None:
    """Write ``rows`` after one another into the ``.npy`` file ``path``: aside, synced, renamed.

    Plain writes, not a memory map: on a full disk a map ends the process with a signal.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for row in rows:
                file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        why = "no space is left" if error.errno == errno.ENOSPC else str(error)
        raise UserError(
            f"The image cache cannot be written to {path.parent}: {why}; make room or choose "
            "another folder with --data-root."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _cache_folder(root: Path) -> Path:
    if os.access(root, os.W_OK):
        return root / ".fastadv-cache"
    return user_cache()


def user_cache() -> Path:
    """The folder for packed files of trees that are not to be written to."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastadv"


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
