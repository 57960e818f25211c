"""Folders of JPEG and PNG files: which images there are and which class each belongs to."""

import os
from dataclasses import dataclass
from pathlib import Path

from fastadv.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class ImageTree:
    """The files of a data set, not yet decoded.

    ``train_files[i]`` has class ``train_labels[i]``, a position in ``classes``; the same for test.
    Files are in sorted order, so that a row means the same image in every run.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    train_files: list[str]
    train_labels: list[int]
    test_files: list[str]
    test_labels: list[int]


def list_folder(name: str, root: Path) -> ImageTree:
    """``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``val``), the class by its folder.

    Raises ``UserError`` where a folder is missing or empty, or a test class was never trained on.
    """
    _need_folder(root, f"{name} cannot be read: there is no folder {root}.")
    train = root / "train"
    test = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
    if not train.is_dir() or test is None:
        raise UserError(
            f"{root} must hold train/ and test/ (or val/), each with a folder per class; "
            f"{'train/' if not train.is_dir() else 'test/ or val/'} is missing."
        )
    classes = _class_names(train)
    strangers = sorted(set(_class_names(test)) - set(classes))
    if strangers:
        raise UserError(f"{test} has the class folder {strangers[0]!r}, which {train} has not.")
    train_files, train_labels = _images_by_class(train, classes)
    tested = tuple(c for c in classes if (test / c).is_dir())
    test_files, test_labels = _images_by_class(test, classes, tested)
    return ImageTree(name, root, classes, train_files, train_labels, test_files, test_labels)


def list_tiny_imagenet(name: str, root: Path) -> ImageTree:
    """Tiny ImageNet's official layout: ``train/<wnid>/images/*`` and ``val/val_annotations.txt``.

    Classes are the sorted names of the training folders; the validation images are the test set.
    """
    _need_folder(root, f"{name} cannot be read: there is no folder {root}.")
    annotations = root / "val" / "val_annotations.txt"
    if not (root / "train").is_dir() or not annotations.is_file():
        raise UserError(
            f"{root} is not Tiny ImageNet's official layout (train/<class>/images/ and "
            "val/val_annotations.txt); a tree sorted by class is read with folder:PATH."
        )
    classes = _class_names(root / "train")
    train_files, train_labels = _images_by_class(root / "train", classes, inner="images")
    number = {c: i for i, c in enumerate(classes)}
    test_files, test_labels = [], []
    for line in sorted(annotations.read_text().splitlines()):
        file, _, rest = line.partition("\t")
        label = number.get(rest.split("\t")[0])
        if label is None:
            raise UserError(f"{annotations} gives {file!r} a class that has no training folder.")
        test_files.append(str(root / "val" / "images" / file))
        test_labels.append(label)
    return ImageTree(name, root, classes, train_files, train_labels, test_files, test_labels)


def _need_folder(root: Path, message: str) -> None:
    if not root.is_dir():
        raise UserError(message)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(f"{folder} is empty; it must hold a folder of images per class.")
    return tuple(names)


def _images_by_class(
    folder: Path, classes: tuple[str, ...], present: tuple[str, ...] | None = None, inner: str = ""
) -> tuple[list[str], list[int]]:
    files, labels = [], []
    for name in classes if present is None else present:
        found = _image_files(folder / name / inner)
        files += found
        labels += [classes.index(name)] * len(found)
    return files, labels


def _image_files(folder: Path) -> list[str]:
    found = []
    if folder.is_dir():
        with os.scandir(folder) as entries:
            found = [
                entry.path
                for entry in entries
                if entry.name.lower().endswith(_SUFFIXES) and not entry.name.startswith(".")
            ]
    if not found:
        raise UserError(f"{folder} holds no JPEG or PNG image.")
    return sorted(found)
