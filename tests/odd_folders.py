"""Folders of images as people have them, and worse, generated from a seed: a good one in which some
things are odd."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile_data import FORMATS, picture, png, tree

Change = Callable[[Path, random.Random], None]
NAMES = (
    "a b",
    "é",
    "-rf",
    "[red]x",
    "a\nb",
    "\x1b[2J",
    "..x",
    "CON",
    "x" * 200,
    "\udcff",
    "'\"$(x)",
)


def _image(folder: Path, rng: random.Random) -> Path:
    """One of the images of the tree in ``folder``, or a place for one if all are gone."""
    found = sorted(path for path in folder.rglob("*.png") if path.is_file())
    return rng.choice(found) if found else folder / "train" / "ant" / "0.png"


def _class(folder: Path, rng: random.Random) -> Path:
    place = folder / rng.choice(("train", "test")) / rng.choice(("ant", "bee"))
    place.mkdir(parents=True, exist_ok=True)
    return place


def empty_file(folder: Path, rng: random.Random) -> None:
    _image(folder, rng).write_bytes(b"")


def cut_off(folder: Path, rng: random.Random) -> None:
    file = _image(folder, rng)
    content = picture("png", (60, 40))
    file.write_bytes(content[: rng.randrange(len(content))])


def flipped(folder: Path, rng: random.Random) -> None:
    kind = rng.choice(list(FORMATS))
    content = bytearray(picture(kind, (40, 30)))
    for _ in range(rng.choice((1, 5, 30))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    (_class(folder, rng) / f"8.{kind}").write_bytes(bytes(content))


def huge(folder: Path, rng: random.Random) -> None:
    _image(folder, rng).write_bytes(png(rng.choice((9000, 2**31 - 1)), 9000, depth=1, colour=0))


def no_image(folder: Path, rng: random.Random) -> None:
    content = rng.choice((b"<html>", b"\0" * 999, b"GIF89a\x01\0\x01\0", os.urandom(300)))
    _image(folder, rng).write_bytes(content)


def other_suffix(folder: Path, rng: random.Random) -> None:
    name = rng.choice(("9.JPG", "9.txt", "Thumbs.db", ".DS_Store", "9", "9.png.part", "9.jpeg"))
    (_class(folder, rng) / name).write_bytes(picture(rng.choice(("png", "jpg"))))


def special(folder: Path, rng: random.Random) -> None:
    """A pipe, a socket, or links to a device, to nowhere, to itself or to a folder."""
    place = _class(folder, rng) / rng.choice(("p.png", "q.jpg", "r"))
    with contextlib.suppress(FileExistsError):
        kind = rng.randrange(6)
        if kind == 0:
            os.mkfifo(place)
        elif kind == 1:
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as made, _inside(place.parent):
                made.bind(place.name)
        else:
            place.symlink_to(("/dev/zero", "/nowhere", place, "..")[kind - 2])


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """In ``folder``: a socket's path must be short."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def deep(folder: Path, rng: random.Random) -> None:
    place = _class(folder, rng)
    for _ in range(rng.choice((3, 60))):
        place = place / "d"
    place.mkdir(parents=True, exist_ok=True)
    if rng.random() < 0.7:
        (place / "0.png").write_bytes(picture("png"))


def empty_class(folder: Path, rng: random.Random) -> None:
    (folder / rng.choice(("train", "test")) / "cat").mkdir(exist_ok=True, parents=True)


def class_of_the_test_set(folder: Path, rng: random.Random) -> None:
    place = folder / "test" / "dog"
    place.mkdir(exist_ok=True, parents=True)
    (place / "0.png").write_bytes(picture("png"))


def same_name(folder: Path, rng: random.Random) -> None:
    """The name of another file or class, in another place or in other letters."""
    source = _image(folder, rng)
    place = _class(folder, rng)
    place = place / rng.choice(("sub", "ant", "train", source.stem))
    place.mkdir(exist_ok=True)
    (place / source.name.upper()).write_bytes(picture("png"))
    (place / source.name).write_bytes(picture("png", seed=5))


def odd_name(folder: Path, rng: random.Random) -> None:
    name = rng.choice(NAMES)
    if rng.random() < 0.5:
        place = folder / "train" / name
        place.mkdir(exist_ok=True)
        name = "0"
    else:
        place = _class(folder, rng)
    good = picture("png") if rng.random() < 0.5 else b"no image"
    (place / f"{name}.png").write_bytes(good)


def lost(folder: Path, rng: random.Random) -> None:
    """A whole part or class is not there, or is a file."""
    place = rng.choice((folder / "train", folder / "test", _class(folder, rng)))
    shutil.rmtree(place, ignore_errors=True)
    if rng.random() < 0.3 and not os.path.lexists(place):
        place.parent.mkdir(exist_ok=True, parents=True)
        place.write_bytes(b"a file")


def circle(folder: Path, rng: random.Random) -> None:
    place = _class(folder, rng) / "up"
    if not os.path.lexists(place):
        place.symlink_to(rng.choice(("..", "../..", "../../..", "../bee")))


def other_size(folder: Path, rng: random.Random) -> None:
    size = rng.choice(((1, 1), (3, 400), (11, 8), (500, 500)))
    (_class(folder, rng) / "7.png").write_bytes(picture("png", size))


def unreadable(folder: Path, rng: random.Random) -> None:
    """For anyone but root."""
    rng.choice((_class(folder, rng), _image(folder, rng))).chmod(0)


CHANGES: tuple[Change, ...] = (
    *(empty_file, cut_off, cut_off, flipped, flipped, huge, no_image, other_suffix, special),
    *(deep, empty_class, class_of_the_test_set, same_name, odd_name, odd_name, lost, circle),
    *(other_size, unreadable),
)


def odd_folder(folder: Path, seed: int) -> list[str]:
    """Make a folder of images in which one to four things are odd; their names."""
    rng = random.Random(seed)
    tree(folder)
    chosen = rng.choices(CHANGES, k=rng.choice((1, 1, 2, 4)))
    for change in chosen:
        # One change may have made of a folder what another one needs as a folder.
        unfit = (NotADirectoryError, FileNotFoundError, IsADirectoryError, FileExistsError)
        with contextlib.suppress(*unfit):
            change(folder, rng)
    return [change.__name__ for change in chosen]


def snapshot(folder: Path) -> str:
    """A digest of everything in ``folder`` but fastadv's own cache, without following links."""
    digest = hashlib.sha256()
    for here, folders, files in os.walk(os.fsencode(folder)):
        folders.sort()
        if b".fastadv-cache" in folders:
            folders.remove(b".fastadv-cache")
        for name in sorted([*folders, *files]):
            path = os.path.join(here, name)
            found = os.lstat(path)
            digest.update(path + f"{found.st_mode} {found.st_size}".encode())
            if stat.S_ISREG(found.st_mode):
                with open(path, "rb") as file:
                    digest.update(file.read())
            elif stat.S_ISLNK(found.st_mode):
                digest.update(os.readlink(path))
    return digest.hexdigest()
