"""Images that cannot be decoded are found before training, and left out or named.

Every file's header and end are read, and a file whose end is not that of its format is decoded as a
whole: cheap enough for a million files, and it finds what a download or a full disk cuts off. What
only decoding finds is noted here by whoever decodes. Flags of all files are kept in the tree's
cache, so that the next run asks no file again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from fastadv.data.decode import UnreadableImage, ends_early, in_threads, undecodable
from fastadv.data.folders import ImageTree
from fastadv.data.tree_cache import TreeCache
from fastadv.errors import UserError
from fastadv.storage.printable import printable

_DAMAGED, _DALI_FAILS = 1, 2  # flags of files; the second: Pillow decodes them
_NAMED = 3  # files named in a sentence
REPAIR = "repair or remove them"
LEAVE_OUT = "repair or remove them, or leave them out with --skip-broken"


class BrokenImages(UserError):
    """Images cannot be decoded: ``files``."""

    def __init__(self, sentence: str, files: Collection[str]) -> None:
        super().__init__(sentence)
        self.files = tuple(files)


def sound(
    tree: ImageTree, *, skip: bool, cache: Path | None = None, way_out: str = LEAVE_OUT
) -> ImageTree:
    """``tree`` without its broken images if ``skip``, otherwise ``tree``, which then has none.

    Raises ``UserError`` that names the first broken images, and ends with the ``way_out``, if there
    are any and ``skip`` is False, and if a class or the test set has no other image.
    """
    kept = TreeCache(tree, cache)
    flags = _flags(tree, kept)
    if flags is not None:  # a disk may have failed for a moment
        marked = np.flatnonzero(flags == _DAMAGED)
        every = tree.train_files + tree.test_files
        flags[marked] = [undecodable(every[row]) for row in marked]
    else:
        flags = _noted(kept, _looked(tree, _shows_it_is_broken))
    return _without(tree, flags, skip=skip, way_out=way_out)


def sound_to_the_last_pixel(
    tree: ImageTree, *, skip: bool, cache: Path | None = None, way_out: str = LEAVE_OUT
) -> ImageTree:
    """As ``sound``, after decoding every image; for a tree in which decoding met a broken one."""
    kept = TreeCache(tree, cache)
    flags = _noted(kept, _looked(tree, undecodable))
    return _without(tree, flags, skip=skip, way_out=way_out)


def note(tree: ImageTree, files: Collection[str], cache: Path | None = None) -> None:
    """Remember that ``files`` of ``tree`` cannot be decoded, for the runs that follow."""
    # `tree` may lack images that were broken before; only those of the whole one are asked for.
    known = tree.whole or tree
    kept = TreeCache(known, cache)
    every = known.train_files + known.test_files
    before = _flags(known, kept)
    kinds = {file: _DAMAGED if undecodable(file) else _DALI_FAILS for file in files}
    flags = np.array([kinds.get(file, 0) for file in every], dtype=np.uint8)
    _noted(kept, flags if before is None else np.maximum(flags, before))


def sentence(tree: ImageTree, files: Collection[str], way_out: str) -> str:
    """One sentence that names the first of ``files`` of ``tree``, with their reasons if known."""
    shown = [f"{printable(file)} ({_why(file)})" for file in list(files)[:_NAMED]]
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    count = len(tree.train_files) + len(tree.test_files)
    return (
        f"{len(files)} of {count:,} images of {printable(tree.name)} cannot be decoded: "
        f"{', '.join(shown)}{more}; {way_out}."
    )


def _flags(tree: ImageTree, kept: TreeCache) -> np.ndarray | None:
    return kept.read(_path(kept), (len(kept.stamps),), np.uint8)


def _path(kept: TreeCache) -> Path:
    return kept.path(kept.stamps, "broken")


def _noted(kept: TreeCache, flags: np.ndarray) -> np.ndarray:
    with suppress(UserError):  # a full disk: the next run looks again
        kept.write(_path(kept), iter([flags]), flags.shape, np.uint8)
    return flags


def _looked(tree: ImageTree, look: Callable[[str], bool]) -> np.ndarray:
    found: Iterator[bool] = in_threads(look, tree.train_files + tree.test_files)
    return np.fromiter(found, dtype=np.uint8)


def _shows_it_is_broken(file: str) -> bool:
    try:
        return ends_early(file) and undecodable(file)
    except UnreadableImage:
        return True


def _why(file: str) -> str:
    """Why ``file`` cannot be decoded, in few words."""
    try:
        if os.stat(file).st_size == 0:
            return "empty"
        cut_off = ends_early(file)
        if undecodable(file):
            return "cut off" if cut_off else "damaged"
    except OSError:
        return "missing"
    except UnreadableImage as error:
        return error.why
    return "not decoded by DALI, but by --loader device"


def _without(tree: ImageTree, flags: np.ndarray, *, skip: bool, way_out: str) -> ImageTree:
    if not flags.any():
        return tree
    split = len(tree.train_files)
    every = tree.train_files + tree.test_files
    broken = [every[row] for row in np.flatnonzero(flags).tolist()]
    if not skip:
        raise BrokenImages(sentence(tree, broken, way_out), broken)
    train = np.flatnonzero(flags[:split] == 0).tolist()
    test = np.flatnonzero(flags[split:] == 0).tolist()
    labels = [tree.train_labels[row] for row in train]
    empty = sorted(set(tree.train_labels) - set(labels))
    if empty or not test:
        what = f"the class {tree.classes[empty[0]]!r}" if empty else "the test set"
        raise BrokenImages(
            sentence(tree, broken, f"no image of {printable(what)} is left; repair them"), broken
        )
    said = sentence(tree, broken, "they are left out")
    return dataclasses.replace(
        tree,
        train_files=[tree.train_files[row] for row in train],
        train_labels=labels,
        test_files=[tree.test_files[row] for row in test],
        test_labels=[tree.test_labels[row] for row in test],
        broken=said,
        whole=tree,
    )
