"""Lists folders of image files: the images and the class of each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fastadv.data.image_files import LeftOut, entries, image_files, image_suffixes, is_folder
from fastadv.errors import UserError
from fastadv.storage.printable import printable

_MOST_ANNOTATIONS = 2**26  # bytes; those of Tiny ImageNet have 400 kB


@dataclass(frozen=True)
class ImageTree:
    """The files of a data set, not yet decoded.

    ``train_files[i]`` has class ``train_labels[i]``, an index into ``classes``; likewise for
    test. Files are sorted, so that a row is the same image in every run. ``left_out`` describes the
    files that are ignored, or is "". ``broken`` is a sentence about images that are left out
    because they cannot be decoded, or "", and ``whole`` the tree with them (None: none is).
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    train_files: list[str]
    train_labels: list[int]
    test_files: list[str]
    test_labels: list[int]
    left_out: str = ""
    broken: str = ""
    whole: ImageTree | None = None


def list_folder(name: str, root: Path) -> ImageTree:
    """``root/train/<class>/**`` and ``root/test/<class>/**`` (or ``val``), classes named by folder.

    Sub-folders of a class belong to it. Raises ``UserError`` if a folder is missing or has no
    image, or if a test class has no training folder.
    """
    _need_folder(root, f"{printable(name)} cannot be read: there is no folder {printable(root)}.")
    train = root / "train"
    tests = [root / part for part in ("test", "val") if (root / part).is_dir()]
    if not train.is_dir() or not tests:
        raise UserError(
            f"{printable(root)} must hold train/ and test/ (or val/), each with a folder per "
            f"class; {'train/' if not train.is_dir() else 'test/ or val/'} is missing."
        )
    test, left_out = tests[0], LeftOut()
    classes = _class_names(train, left_out)
    tested = _class_names(test, left_out)
    strangers = sorted(set(tested) - set(classes))
    if strangers:
        raise UserError(
            f"{printable(test)} has the class folder {strangers[0]!r}, which is missing in "
            f"{printable(train)}."
        )
    train_files, train_labels = _images_by_class(train, classes, classes, left_out)
    test_files, test_labels = _images_by_class(test, classes, tested, left_out)
    if len(tests) > 1:
        left_out.others["whole folder val/, since there is a test/"] += 1
    return ImageTree(
        name,
        root,
        classes,
        train_files,
        train_labels,
        test_files,
        test_labels,
        left_out.sentence(),
    )


def list_tiny_imagenet(name: str, root: Path) -> ImageTree:
    """Tiny ImageNet's official layout: ``train/<wnid>/images/*`` and ``val/val_annotations.txt``.

    Classes are the sorted names of the training folders; the validation images are the test set.
    """
    _need_folder(root, f"{printable(name)} cannot be read: there is no folder {printable(root)}.")
    annotations, left_out = root / "val" / "val_annotations.txt", LeftOut()
    if not (root / "train").is_dir() or not annotations.is_file():
        raise UserError(
            f"{printable(root)} is not Tiny ImageNet's official layout (train/<class>/images/ and "
            "val/val_annotations.txt); a tree sorted by class is read with folder:PATH."
        )
    classes = _class_names(root / "train", left_out)
    train_files, train_labels = _images_by_class(
        root / "train", classes, classes, left_out, inner="images"
    )
    number = {c: i for i, c in enumerate(classes)}
    test_files, test_labels = [], []
    for line in sorted(_lines(annotations)):
        file, _, rest = line.partition("\t")
        label = number.get(rest.split("\t")[0])
        if label is None:
            raise UserError(
                f"{printable(annotations)} gives {file!r} a class that has no training folder."
            )
        if file != os.path.basename(file) or not file.lower().endswith(image_suffixes()):
            raise UserError(
                f"{printable(annotations)} names {file!r}, which is not an image of val/."
            )
        test_files.append(str(root / "val" / "images" / file))
        test_labels.append(label)
    if (root / "val" / "images").is_dir():
        more = set(image_files(root / "val" / "images", left_out)) - set(test_files)
        if more:
            left_out.others["without an annotation"] += len(more)
    return ImageTree(
        name,
        root,
        classes,
        train_files,
        train_labels,
        test_files,
        test_labels,
        left_out.sentence(),
    )


def _lines(file: Path) -> list[str]:
    try:
        if file.stat().st_size > _MOST_ANNOTATIONS:
            raise ValueError("it is too long")
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:  # also for text that is not UTF-8
        raise UserError(f"{printable(file)} cannot be read: {error}.") from error


def _need_folder(root: Path, message: str) -> None:
    if not root.is_dir():
        raise UserError(message)


def _class_names(folder: Path, left_out: LeftOut) -> tuple[str, ...]:
    names = []
    for entry in entries(folder):
        if is_folder(entry) and not entry.name.startswith("."):
            names.append(entry.name)
        elif entry.name.lower().endswith(image_suffixes()):
            left_out.others["outside the class folders"] += 1
    if not names:
        raise UserError(f"{printable(folder)} is empty; it must hold a folder of images per class.")
    return tuple(names)


def _images_by_class(
    folder: Path,
    classes: tuple[str, ...],
    present: tuple[str, ...],
    left_out: LeftOut,
    inner: str = "",
) -> tuple[list[str], list[int]]:
    files: list[str] = []
    labels: list[int] = []
    for name in present:
        here = folder / name / inner
        found = image_files(here, left_out) if here.is_dir() else []
        if not found:
            raise UserError(
                f"{printable(here)} holds no JPEG or PNG image, nor another of "
                f"{', '.join(image_suffixes())}; fill or remove this class."
            )
        files += found
        labels += [classes.index(name)] * len(found)
    return files, labels
