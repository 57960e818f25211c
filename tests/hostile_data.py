"""Malicious images, folders and .npz files, made from a seed; run as a program it opens them.

``python hostile_data.py FOLDER FIRST COUNT`` makes and opens cases FIRST, FIRST + 1, ... and prints
a line of JSON for each: what happened, how long it took and how much memory it took at most.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import signal
import socket
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastadv.engine.process import memory

SECONDS = 20
CLASSES = ("ant", "bee")
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "ppm": "PPM"}
Case = Callable[[Path, random.Random], str]


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def picture(kind: str, size: tuple[int, int] = (10, 8), seed: int = 0) -> bytes:
    """A complete encoded image of ``size`` (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, FORMATS[kind])
    return out.getvalue()


def chunk(kind: bytes, content: bytes, length: int | None = None) -> bytes:
    """A chunk of a PNG; ``length`` may be wrong."""
    count = len(content) if length is None else length
    return struct.pack(">I", count) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    """A black PNG whose header claims this size; it holds 64 rows at most."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = 1 + min((width * channels * depth + 7) // 8, 2**20)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(3)) if colour == 3 else b""
    pixels = zlib.compress(bytes(row * min(height, 64)))
    whole = chunk(b"IHDR", head) + palette + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + whole


def whole_png(width: int, height: int) -> bytes:
    """A grey PNG that really has this many black pixels, in a few kilobytes."""
    coder = zlib.compressobj(9)
    rows = b"".join(coder.compress(bytes(width + 1)) for _ in range(height)) + coder.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tree(folder: Path, kind: str = "png") -> Path:
    """A valid folder of 6 training and 2 test images, to be damaged."""
    for part, count in (("train", 3), ("test", 1)):
        for name in CLASSES:
            place = folder / part / name
            place.mkdir(parents=True)
            for n in range(count):
                (place / f"{n}.{kind}").write_bytes(picture(kind, seed=n))
    return folder


def _spoil(folder: Path, content: bytes, name: str = "9.png") -> str:
    tree(folder)
    (folder / "train" / "bee" / name).write_bytes(content)
    return f"folder:{folder}"


def large_png(folder: Path, rng: random.Random) -> str:
    side = rng.choice((2**31 - 1, 2**16, 12000, 100_000))
    colour = rng.choice((0, 2, 3, 4, 6))
    return _spoil(folder, png(side, rng.choice((14000, 2**31 - 1)), colour=colour))


def large_other(folder: Path, rng: random.Random) -> str:
    """Another format whose header claims a large size."""
    kind = rng.choice(("jpg", "webp", "bmp", "ppm", "tif", "vp8x", "vp8l"))
    size = struct.pack("<I", 1000)
    if kind == "jpg":
        content = bytearray(picture("jpg"))
        place = content.index(b"\xff\xc0") + 5
        content[place : place + 4] = b"\xff\xfe\xff\xfe"
    elif kind == "webp":
        content = bytearray(picture("webp"))
        content[26:30] = b"\xff\x3f\xff\x3f"
    elif kind == "vp8x":
        content = bytearray(b"RIFF" + size + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4))
        content += b"\xff\xff\xff" * 2 + bytes(1000)
    elif kind == "vp8l":
        content = bytearray(b"RIFF" + size + b"WEBPVP8L" + size + b"\x2f\xff\xff\xff\xff")
        content += bytes(1000)
    elif kind == "bmp":
        content = bytearray(picture("bmp"))
        content[18:26] = struct.pack("<ii", 2**30, rng.choice((2**30, -(2**30))))
    elif kind == "ppm":
        content = bytearray(b"P6 99999999 99999999 255\n" + bytes(100))
    else:
        content = bytearray(picture("tif"))
        at = content.index(struct.pack("<HHI", 256, 4, 1))  # the width's entry
        content[at + 8 : at + 12] = struct.pack("<I", 2**31 - 1)
    return _spoil(folder, bytes(content), f"9.{kind if kind in FORMATS else 'webp'}")


def damaged(folder: Path, rng: random.Random) -> str:
    kind = rng.choice(list(FORMATS))
    content = bytearray(picture(kind, (40, 30), rng.randrange(99)))
    for _ in range(rng.choice((1, 4, 40))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    if rng.random() < 0.3:
        content = content[: rng.randrange(len(content))]
    return _spoil(folder, bytes(content), f"9.{kind}")


def hungry_png(folder: Path, rng: random.Random) -> str:
    """Chunks that claim a large length, or that inflate to one."""
    more = rng.choice(
        (
            chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26))),
            chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26))),
            chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2**26))),
            chunk(b"abCd", b"x" * 99, 2**31 - 1),
            chunk(b"tEXt", b"x" * 99, 2**32 - 1),
            chunk(b"eXIf", os.urandom(5000)),
            chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)),
        )
    )
    return _spoil(folder, png(10, 8, more=more))


def other_content(folder: Path, rng: random.Random) -> str:
    """Formats that Pillow opens by default; PostScript by running a program."""
    content = rng.choice(
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 8\n%%EndComments\nshowpage\n%%EOF\n",
            b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 99) + bytes(24) + b"%!PS-Adobe-3.0\n",
            b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(100),
            b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3) + bytes(99),
            b"\xd7\xcd\xc6\x9a" + bytes(100),
            b"SIMPLE  =                    T" + b" " * 50 + bytes(99),
            b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100),
            b"<svg xmlns='http://www.w3.org/2000/svg' width='99999' height='99999'/>",
            b"\x80\x04cposix\nsystem\n",
        )
    )
    return _spoil(folder, content, rng.choice(("9.png", "9.jpg", "9.tif")))


def no_file(folder: Path, rng: random.Random) -> str:
    """Something named a.png that is not a regular file, or another file replaced like that."""
    tree(folder)
    place = rng.choice((folder / "train" / "ant" / "a.png", folder / "test" / "bee" / "a.webp"))
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(place)
    elif kind == 1:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
            os.chdir(place.parent)
            made.bind(place.name)
            os.chdir("/")
    elif kind == 2:
        place.symlink_to("/dev/zero")
    elif kind == 3:
        place.symlink_to(place)
    elif kind == 4:
        place.symlink_to("/nowhere/at/all.png")
    else:
        place.mkdir()
        os.mkfifo(place / "b.png")
    return f"folder:{folder}"


def circles(folder: Path, rng: random.Random) -> str:
    tree(folder)
    inside = folder / "train" / "ant"
    if rng.random() < 0.5:
        (inside / "up").symlink_to(rng.choice(("..", ".", "../..", "../bee")))
    else:  # 2^25 ways through 25 folders
        for n in range(25):
            (inside / f"d{n}").mkdir()
        for n in range(24):
            for letter in "xy":
                (inside / f"d{n}" / letter).symlink_to(f"../d{n + 1}")
        (inside / "d24" / "a.png").write_bytes(picture("png"))
    return f"folder:{folder}"


def names(folder: Path, rng: random.Random) -> str:
    """Names with terminal escape codes; the file is damaged, so that messages name it."""
    tree(folder)
    evil = rng.choice(
        (b"\x1b]0;owned\x07", b"\x1b[2J\x1b[31m", b"a\nb", b"\xff\xfe", b"[red]x", b"\r0")
    )
    evil += "\u202egnp.exe".encode() if rng.random() < 0.3 else b""
    place = os.fsencode(folder / "train")
    if rng.random() < 0.5:
        os.mkdir(os.path.join(place, evil))
        place = os.path.join(place, evil)
    else:
        place = os.path.join(place, b"bee")
    suffix = rng.choice((b".png", b".png", b".\x1b[31m"))
    with open(os.path.join(place, evil + suffix), "wb") as file:
        file.write(b"no image")
    return f"folder:{folder}"


def planted(folder: Path, rng: random.Random) -> str:
    """A cache that is part of the folder."""
    tree(folder)
    cache, outside = folder / ".fastadv-cache", folder.parent / "outside"
    kind = rng.randrange(4)
    if kind == 0:
        cache.symlink_to(outside)
        return f"folder:{folder}"
    from fastadv.data import load

    load(f"folder:{folder}")
    found = sorted(cache.iterdir())
    for file in found:
        if kind == 1:  # other pixels, in the right shape
            content = bytearray(file.read_bytes())
            content[-1] ^= 255
            file.write_bytes(content)
        elif kind == 2:
            file.unlink()
            file.symlink_to(outside / "precious")
        else:
            file.unlink()
            os.mkfifo(file)
        (cache / f"{file.name}.{os.getpid()}.part").symlink_to(outside / "precious")
    return f"folder:{folder}"


def sparse(folder: Path, rng: random.Random) -> str:
    """A sparse file of 100 GB."""
    kind = rng.choice(("png", "webp", "jpg", "tif", "bmp"))
    content = picture(kind)
    if kind == "webp":
        content = content[:4] + struct.pack("<I", 2**32 - 1) + content[8:]
    name = _spoil(folder, content, f"9.{kind}")
    os.truncate(folder / "train" / "bee" / f"9.{kind}", 100 * 2**30)
    return name


def annotations(folder: Path, rng: random.Random) -> str:
    for name in CLASSES:
        place = folder / "train" / name / "images"
        place.mkdir(parents=True)
        (place / "0.png").write_bytes(picture("png"))
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "val" / "images" / "0.png").write_bytes(picture("png"))
    file = folder / "val" / "val_annotations.txt"
    kind = rng.randrange(5)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.write_bytes(b"0.png\tant\n")
        os.truncate(file, 100 * 2**30)
    elif kind == 2:
        file.write_bytes(os.urandom(500))
    else:
        other = rng.choice(("../../../outside/precious", "/dev/zero", "..", "\x1b[2J.png"))
        file.write_text(f"{other}\tant\n")
    return f"tinyimagenet:{folder}"


# -- .npz ------------------------------------------------------------------------------------------


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (12, 6, 7, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (4, 6, 7, 3), dtype=np.uint8),
        "y_test": np.arange(4) % 3,
    }


def npy(shape: object, content: bytes, descr: object = "|u1", order: object = False) -> bytes:
    """A ``.npy`` whose header may be wrong."""
    text = f"{{'descr': {descr!r}, 'fortran_order': {order!r}, 'shape': {shape!r}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + content


def _npz(folder: Path, packing: int = zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    folder.mkdir(parents=True)
    with warnings.catch_warnings(), zipfile.ZipFile(folder / "a.npz", "w", packing) as archive:
        warnings.simplefilter("ignore")
        for name, array in arrays().items():
            out = io.BytesIO()
            np.save(out, array)
            archive.writestr(f"{name}.npy", members.pop(name, out.getvalue()))
        for name, content in members.items():
            archive.writestr(name, content)
    return folder / "a.npz"


def lying_npz(folder: Path, rng: random.Random) -> str:
    """Headers that do not match the data, or that numpy would execute."""
    mark = folder.parent / "outside" / "ran"
    objects = pickle.dumps(np.array([Payload(mark)], dtype=object))
    evil = rng.choice(
        (
            npy((10**12, 32, 32, 3), bytes(100)),
            npy((2**62, 2**62, 4, 4), bytes(100)),
            npy((-1, 6, 7, 3), bytes(100)),
            npy((12, -6, -7, 3), bytes(12 * 6 * 7 * 3)),
            npy((0, 6, 7, 3), b""),
            npy((), b"\0"),
            npy((12, 6, 7, 3), bytes(12 * 6 * 7 * 3 + 1)),
            npy((12, 6, 7, 3), bytes(5)),
            npy((12, 6, 7, 3), bytes(12 * 6 * 7 * 3), order=True),
            npy((12, 6, 7, 3), bytes(12 * 6 * 7 * 3), order="yes"),
            npy((12,), objects, "|O"),
            npy((12,), objects, [("a", "|O")]),
            npy((12,), bytes(120), ("|u1", (10,))),
            npy((12,), bytes(100), "|V2147483647"),
            npy((1,), bytes(100), "<U500000000"),
            npy((12.0, 6), bytes(72)),
            npy("12", bytes(72)),
            b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + bytes(100),
            b"\x93NUMPY\1\0\xff\xff" + b"(" * 65535,
            b"\x93NUMPY\3\0" + bytes(100),
            objects,
            b"",
        )
    )
    return f"npz:{_npz(folder, **{rng.choice(('x_train', 'x_test', 'y_train')): evil})}"


def odd_npz(folder: Path, rng: random.Random) -> str:
    """Archives that are themselves harmful."""
    kind = rng.randrange(9)
    if kind == 0:  # another array of the same name
        path = _npz(folder, **{"x_train.npy": npy((1, 6, 7, 3), bytes(126))})
    elif kind == 1:
        path = _npz(folder, rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    elif kind == 2:  # many entries: a directory longer than the data
        path = _npz(folder, **{f"{n:0200}": b"" for n in range(8000)})
    elif kind == 3:  # inflates to 4 GB, and says it has 100 bytes
        path = _npz(folder, x_train=npy((4096, 1024, 1024, 1), bytes(100)))
    elif kind == 4:
        path = _npz(folder)
        content = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 5, 50))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == 5:
        path = _npz(folder)
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    elif kind == 6:
        path = _npz(folder)
        path.write_bytes(pickle.dumps(Payload(folder.parent / "outside" / "ran")))
    elif kind == 7:
        folder.mkdir(parents=True)
        path = folder / "a.npz"
        rng.choice((os.mkfifo, os.mkdir, lambda p: p.symlink_to("/dev/zero")))(path)
    else:  # every size of the first entry in the directory says 2^32 - 2
        path = _npz(folder)
        content = bytearray(path.read_bytes())
        at = content.index(b"PK\1\2")
        content[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2)
        path.write_bytes(content)
    return f"npz:{path}"


def values_npz(folder: Path, rng: random.Random) -> str:
    """Plain arrays that are not images or labels."""
    far = np.arange(12) % 3
    far[-1] = rng.choice((10**12, 2**62, -5, 999_999))
    changes: dict[str, np.ndarray] = rng.choice(
        (
            {"y_train": far},
            {"y_train": far.astype(np.uint64) + np.uint64(2**63)},
            {"x_train": np.full((12, 6, 7, 3), np.inf)},
            {"x_train": np.full((12, 6, 7, 3), 1j)},
            {"x_train": np.zeros((12, 6, 7, 3), "S9")},
            {"x_train": np.zeros((12, 1, 1, 1, 3), np.uint8)},
            {"y_test": np.array([0, 1, 2, 77])},
        )
    )
    folder.mkdir(parents=True)
    np.savez(folder / "a.npz", **{**arrays(), **changes})
    return f"npz:{folder / 'a.npz'}"


CASES: tuple[Case, ...] = (
    *(large_png, large_other, damaged, damaged, hungry_png, other_content, no_file, circles),
    *(names, planted, sparse, annotations, lying_npz, lying_npz, odd_npz, odd_npz, values_npz),
)


def main(home: Path, first: int, count: int) -> None:
    """Make and open the cases, one after another."""
    from fastadv.data import load
    from fastadv.errors import UserError
    from fastadv.run.pseudo_labels import read_pseudo_labelled

    def too_long(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    load(f"folder:{tree(home / 'warm')}")
    for number in range(first, first + count):
        rng = random.Random(number)
        case = CASES[number % len(CASES)]
        place = home / str(number)
        (place / "outside").mkdir(parents=True)
        (place / "outside" / "precious").write_text("precious")
        name = case(place / "tree", rng)
        before, began = _peak(reset=True), time.monotonic()
        signal.alarm(SECONDS)
        said = ""
        try:
            if name.startswith("npz:") and rng.random() < 0.2:
                read_pseudo_labelled(name[4:])
            found = load(name, image_size=None if name.startswith("npz:") else 8)
            outcome, said = "data", str(tuple(found.train_images.shape))
        except UserError as error:
            outcome, said = "sentence", str(error)
        except BaseException as error:
            outcome, said = type(error).__name__, repr(error)
        signal.alarm(0)
        facts = {
            "number": number,
            "case": case.__name__,
            "outcome": outcome,
            "said": said,
            "seconds": time.monotonic() - began,
            "grew": _peak() - before,
            "outside": sorted(os.listdir(place / "outside")),
            "precious": (place / "outside" / "precious").read_text(),
        }
        print(json.dumps(facts), flush=True)


def _peak(reset: bool = False) -> int:
    """Peak resident memory in bytes, since the last reset if the kernel supports it."""
    if reset:
        memory.forget_peak()
    return memory.peak() or 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
