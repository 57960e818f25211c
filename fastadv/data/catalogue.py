"""The names of the data sets, and the function that reads each of them."""

import os
from pathlib import Path

from fastadv.data.dataset import Dataset, limited
from fastadv.data.folders import ImageTree, list_folder, list_tiny_imagenet
from fastadv.data.npz import read_npz
from fastadv.data.packed import read_tree
from fastadv.data.small_sets import make_synthetic, read_digits
from fastadv.data.torchvision_sets import PUBLISHED, read_torchvision
from fastadv.errors import UserError, unknown
from fastadv.storage.printable import printable

_TREES = {
    "folder": list_folder,
    "tinyimagenet": list_tiny_imagenet,
    "imagenet": list_folder,
}
_PLAIN = ("digits", "synthetic", *PUBLISHED)
DATA_SETS = (*_PLAIN, *_TREES, "npz")


def load(
    name: str,
    root: str | Path | None = None,
    download: bool = False,
    limit: int | None = None,
    image_size: int | None = None,
    *,
    skip_broken: bool = False,
    begun: bool = False,
) -> Dataset:
    """The data set ``name``, completely in memory.

    ``name``: ``digits``, ``synthetic``, ``cifar10``, ``cifar100``, ``svhn``, ``folder:PATH``,
    ``tinyimagenet:PATH``, ``imagenet:PATH`` or ``npz:PATH``. ``root``: the folder of
    torchvision's data sets (``data`` by default), or of the packed cache of an image folder.
    ``limit``: use at most this number of training images, each class in proportion, always the same
    ones. ``image_size``: height and width in pixels to which images of a folder are decoded.
    ``skip_broken``: leave out images of a folder that cannot be decoded. ``begun``: as
    ``read_tree`` has it. Raises ``UserError`` for bad input.
    """
    kind, path = _parse(name)
    if kind in _TREES:
        tree = load_tree(name, root, image_size, skip_broken=skip_broken, begun=begun)
        return limited(tree[0], limit)
    if image_size is not None:
        raise UserError(f"--image-size is for folders of images; {kind} has a fixed size.")
    if kind == "npz":
        return limited(read_npz(path), limit)
    if kind == "digits":
        return limited(read_digits(), limit)
    if kind == "synthetic":
        return limited(make_synthetic(), limit)
    return limited(read_torchvision(kind, Path(root or "data"), download), limit)


def load_tree(
    name: str,
    root: str | Path | None = None,
    image_size: int | None = None,
    *,
    skip_broken: bool = False,
    begun: bool = False,
) -> tuple[Dataset, ImageTree]:
    """As ``load`` for a folder of image files, and the tree of the files that are its images."""
    size = usual_size(name, image_size)
    return read_tree(
        list_images(name), cache_folder(root), size, skip_broken=skip_broken, begun=begun
    )


def cache_folder(root: str | Path | None) -> Path | None:
    """The folder of what is kept about a tree, where the user's ``--data-root`` is ``root``."""
    return None if root is None else Path(root)


def usual_size(name: str, image_size: int | None) -> int | None:
    """``image_size``; if it is None, the default for ``name``: 224 for ImageNet."""
    return 224 if image_size is None and name.startswith("imagenet:") else image_size


def is_tree(name: str) -> bool:
    """True if ``name`` is a folder of image files, which DALI can stream."""
    return _parse(name)[0] in _TREES


def list_images(name: str) -> ImageTree:
    """The files and labels of ``folder:``, ``tinyimagenet:`` or ``imagenet:``, without decoding.

    Raises ``UserError`` for data sets that are not folders of image files.
    """
    kind, path = _parse(name)
    if kind not in _TREES:
        raise UserError(f"{name} is not a folder of image files; --loader device reads it.")
    return _TREES[kind](name, path)


def require_known(name: str) -> None:
    """Raise ``UserError`` unless ``name`` is one of ``DATA_SETS``, with a path if it needs one."""
    _parse(name)


def _parse(name: str) -> tuple[str, Path]:
    kind, colon, path = name.partition(":")
    if kind not in DATA_SETS:
        raise _as_path(name) or unknown("data set", kind, DATA_SETS)
    if kind in _PLAIN and colon:
        raise UserError(f"{kind} takes no path; set its folder with --data-root.")
    if kind not in _PLAIN and not path:
        raise UserError(f"{kind} needs a path: write {kind}:PATH.")
    return kind, Path(path).expanduser()


def _as_path(name: str) -> UserError | None:
    """The error for a path that was given alone, with the kind of data to put before it."""
    shown = printable(name)
    try:
        path = Path(name).expanduser()
        kind = "folder" if path.is_dir() else "npz" if path.is_file() else ""
    except (OSError, ValueError, RuntimeError):  # no name of a file, or of no user
        return None
    says_a_kind = ":" in name.partition(os.sep)[0]  # a misspelt one
    if not kind and not says_a_kind and (os.sep in name or name.startswith(("~", "."))):
        return UserError(
            f"{shown} is not there; write folder:PATH for a folder of images, npz:PATH for a file."
        )
    if not name or not kind or (kind == "npz" and path.suffix != ".npz"):
        return None
    held = "folder" if kind == "folder" else "file"
    return UserError(f"{shown} is a {held}, and data sets have a kind: write {kind}:{shown}.")
