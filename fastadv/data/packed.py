"""Folders decoded once: the packed cache of bytes that later runs read back.

A set of files becomes one ``.npy`` of uint8 (N,C,H,W), an entry of the tree's cache
(``tree_cache.py``) under its files and the size decoded to.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from fastadv.data.broken import LEAVE_OUT, REPAIR, sound, sound_to_the_last_pixel
from fastadv.data.dataset import Dataset
from fastadv.data.decode import (
    Common,
    Format,
    UnreadableImage,
    common_format,
    decode,
    header,
    in_threads,
)
from fastadv.data.folders import ImageTree
from fastadv.data.tree_cache import TreeCache
from fastadv.engine.process.memory import machine_memory
from fastadv.errors import UserError
from fastadv.printing.terminal import Terminal
from fastadv.storage.printable import printable


def read_tree(
    tree: ImageTree,
    cache: Path | None = None,
    image_size: int | None = None,
    *,
    skip_broken: bool = False,
    begun: bool = False,
) -> tuple[Dataset, ImageTree]:
    """The images of ``tree`` as a ``Dataset``, decoded or from the cache, and the tree of the files
    that they are.

    ``image_size``: height and width; otherwise the size of most training images. Images of another
    size are scaled to cover it and center-cropped. Messages report how many, and which files of
    the tree are ignored. ``cache``: the folder for the packed files (``TreeCache``). Raises
    ``UserError`` for unreadable images (with their names) unless ``skip_broken`` leaves them out,
    if no size is that of most images, and if the decoded images would not fit in memory.
    ``begun``: for a run that has begun, which has said what is left out, and can leave out no more.
    """
    way_out = REPAIR if begun else LEAVE_OUT
    whole, tree = tree, sound(tree, skip=skip_broken, cache=cache, way_out=way_out)
    try:
        return _read(tree, cache, image_size, begun), tree
    except UnreadableImage:  # its header and its end are fine: there may be more like it
        tree = sound_to_the_last_pixel(whole, skip=skip_broken, cache=cache, way_out=way_out)
        return _read(tree, cache, image_size, begun), tree


def _read(tree: ImageTree, cache: Path | None, image_size: int | None, begun: bool) -> Dataset:
    console = _terminal()
    if not begun:
        tell_left_out(tree)
    kept = TreeCache(tree, cache)
    common, test_odd, test_coloured = _known_format(kept, tree, image_size)
    form = common.form
    total = form.bytes_each * len(kept.stamps)
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
    train = _packed(kept, tree.train_files, kept.stamps[:n], form, "training", console)
    test = _packed(kept, tree.test_files, kept.stamps[n:], form, "test", console)
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


def tell_left_out(tree: ImageTree) -> None:
    """Report in one line the files of ``tree`` that are not read, if there are any."""
    if tree.left_out:
        read = len(tree.train_files) + len(tree.test_files)
        tell(f"{printable(tree.name)}: {read} images are read; left out: {tree.left_out}.")
    if tree.broken:
        tell(tree.broken)


def tell(line: str) -> None:
    """Print ``line`` to the terminal's standard error."""
    _terminal().print(line)


def _terminal() -> Terminal:
    return Terminal(stderr=True, markup=False)


def _known_format(
    cache: TreeCache, tree: ImageTree, image_size: int | None
) -> tuple[Common, int, int]:
    """The training images' format, and how many test images differ in size or have colour."""
    # Opening every file for its size costs as much as reading the cache, so this is cached too.
    split = len(tree.train_files)
    path = cache.path(cache.stamps, "format", split, image_size)
    kept = cache.read(path, (7,), np.int64)
    if kept is None:
        common = common_format(tree.train_files, image_size)
        form, odd, coloured = common.form, 0, 0
        for height, width, is_grey in in_threads(header, tree.test_files):
            odd += (height, width) != (form.height, form.width)
            coloured += not is_grey
        found = [form.height, form.width, form.channels, common.odd, common.coloured, odd, coloured]
        kept = cache.write(path, iter([np.array(found, dtype=np.int64)]), (7,), np.int64)
    height, width, channels, odd, coloured, *tested = (int(number) for number in kept)
    return Common(Format(height, width, channels), odd, coloured), tested[0], tested[1]


def _packed(
    cache: TreeCache,
    files: list[str],
    stamps: list[str],
    form: Format,
    part: str,
    console: Terminal,
) -> Tensor:
    shape = (len(files), form.channels, form.height, form.width)
    path = cache.path(stamps, "images", form)
    images = cache.read(path, shape, np.uint8)
    if images is None:
        rows = in_threads(lambda file: decode(file, form), files, form.bytes_each)
        shown = track(rows, f"Decoding {part} images", len(files), console=console)
        images = cache.write(path, iter(shown), shape, np.uint8)
    return torch.from_numpy(images)


def _memory() -> int:
    return machine_memory()
