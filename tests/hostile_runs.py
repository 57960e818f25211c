"""Malicious run folders and checkpoints, made from a seed by changing a good one."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CANARY = "canary_of_strangers"  # a module that leaves a file when it is imported
FILES = ("config.toml", "last.pt", "best.pt", "metrics.jsonl", "summary.json", "averaged.pt")


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


def _checkpoint(
    values: Any, records: dict[str, bytes] | None = None, *, deflate: bool = False
) -> bytes:
    """An archive as torch writes it, with these pickled values."""
    file = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", kind) as archive:
        archive.writestr(
            "archive/data.pkl", values if isinstance(values, bytes) else pickle.dumps(values, 2)
        )
        for name, content in (records or {}).items():
            archive.writestr(f"archive/{name}", content)
        archive.writestr("archive/version", b"3\n")
    return file.getvalue()


class _Storage:
    def __init__(self, key: str, count: int) -> None:
        self.key, self.count = key, count


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            return ("storage", torch.FloatStorage, value.key, "cpu", value.count)
        return None


class _Tensor:
    def __init__(self, storage: _Storage, shape: Any, strides: Any, offset: int = 0) -> None:
        self.made = (storage, offset, shape, strides, False, None)

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.made


def _tensor(shape: Any, strides: Any, count: int, size: int, offset: int = 0) -> bytes:
    """A checkpoint with one tensor that claims this of a record of ``size`` bytes."""
    out = io.BytesIO()
    value = {"model": {"w": _Tensor(_Storage("0", count), shape, strides, offset)}, "checksum": "0"}
    _Pickler(out, 2).dump(value)
    return _checkpoint(out.getvalue(), {"data/0": bytes(size)})


def checkpoints(draw: random.Random, witness: Path) -> Callable[[], bytes]:
    """One way to write a checkpoint that harms a program that trusts it."""
    touch = f"touch {witness}"
    huge = draw.choice([1 << 33, 1 << 40, (1 << 62) - 1])
    calls = [
        Call(os.system, touch), Call(exec, f"open({str(witness)!r}, 'w')"),
        Call(__import__, CANARY),
        Call(eval, f"open({str(witness)!r}, 'w')"), Call(os.mkdir, str(witness)),
        Call(getattr, os, "system"), Call(torch.hub.load, "x", "y"), Call(Path, "/"),
    ]  # fmt: skip
    return draw.choice(
        [
            lambda: pickle.dumps({"model": draw.choice(calls)}),
            lambda: _checkpoint({"model": draw.choice(calls), "checksum": "0"}),
            lambda: _checkpoint(draw.choice(calls)),
            lambda: _tensor((huge,), (1,), huge, 16),
            lambda: _tensor((huge,), (0,), 4, 16),
            lambda: _tensor((4, huge), (1, 0), 4, 16),
            lambda: _tensor((2, 2), (huge, 1), 4, 16),
            lambda: _tensor((4,), (1,), 4, 16, offset=huge),
            lambda: _tensor((-4,), (1,), 4, 16),
            lambda: _tensor((4,), (-1,), 4, 16),
            lambda: _checkpoint({"model": {}}, {"data/0": bytes(1 << 26)}, deflate=True),
            lambda: _checkpoint(b"\x80\x02" + b"r" + struct.pack("<I", 0xFFFFFF00) + b"N."),
            lambda: _checkpoint(b"\x80\x04\x8d" + struct.pack("<Q", huge) + b"x."),
            lambda: _checkpoint(b"(" * 200_000 + b"l."),
            lambda: _checkpoint(_nested(60)),
            lambda: _checkpoint({"model": {}, "checksum": float("nan")}),
            lambda: b"PK\x03\x04" + bytes(draw.randrange(256) for _ in range(400)),
            lambda: b"",
            lambda: bytes(draw.randrange(256) for _ in range(draw.randrange(1, 3000))),
        ]
    )


def _nested(depth: int) -> Any:
    value: Any = [0]
    for _ in range(depth):
        value = [value, value]  # short in a file, endless to traverse
    return {"model": value, "checksum": "0"}


def settings(draw: random.Random, witness: Path) -> str:
    """A line of config.toml with an absurd value."""
    return draw.choice(
        [
            f'model = "{CANARY}:net"', 'model = "http.server:test"', 'model = "os:abort"',
            f'teachers = "{witness}"', 'method = 3', 'method = "\\u001b[2J[red]x[/]"',
            "width = 100000000", "depth = 10000000", "batch_size = 1000000000000", "epochs = -1",
            "seed = 1" + "0" * 4000, "lr = nan", "lr = inf", "eps = 1e999", "x = " + "[" * 20_000,
            'data = "folder:/dev"', 'data = "npz:/dev/zero"', 'data_root = "/proc"', "device = 7",
            'out = "/tmp/elsewhere"', "download = 1", "[options]\nsteps = 1000000000000",
            "options = 3", "[options]\ngamma = nan", 'unlabelled = "/dev/zero"', "image_size = 0",
            "checkpoint_minutes = -1e300", 'select_attack = "pgd-99999999999"', "\x00", "\ud800",
            'test_attacks = "' + "pgd-1," * 100_000 + '"', "limit = -5", "nesterov = 2",
        ]
    )  # fmt: skip


def harm(folder: Path, seed: int, witness: Path) -> str:
    """Change the run in ``folder`` and return how. ``witness`` must never be created."""
    draw = random.Random(seed)
    outside = witness.with_name("outside.txt")
    name = draw.choice(FILES)
    path = folder / name
    way = draw.choice(["checkpoint", "config", "link", "special", "text", "bytes", "partial"])
    if way == "checkpoint":
        for file in draw.sample(["last.pt", "best.pt", "averaged.pt"], 2):
            (folder / file).write_bytes(checkpoints(draw, witness)())
    elif way == "config":
        lines = (folder / "config.toml").read_text().splitlines()
        line = settings(draw, witness)
        key = line.partition(" = ")[0]
        kept = [old for old in lines if not old.startswith((key + " =", "# checksum"))]
        text = "\n".join([line, *kept] if "[" not in line[:1] else [*kept[:-6], line]) + "\n"
        (folder / "config.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    elif way in ("link", "partial"):
        place = path if way == "link" else path.with_name(path.name + ".partial")
        place.unlink(missing_ok=True)
        place.symlink_to(draw.choice([outside, Path("/dev/zero"), folder, witness, place]))
    elif way == "special":
        path.unlink(missing_ok=True)
        draw.choice([lambda: os.mkfifo(path), lambda: path.mkdir()])()
    elif way == "text":
        text = draw.choice(
            ["[" * 300_000, '{"epoch":' * 100_000, "\udcff", '{"epoch": 1e999}\n' * 3, "nan", "[]",
             '{"a": ' + "9" * 100_000 + "}", "\x1b]0;owned\x07", '{"epoch": "x"}\n']
        )  # fmt: skip
        for file in ("metrics.jsonl", "summary.json"):
            (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    else:
        content = bytearray(path.read_bytes() if path.exists() else b"x" * 99)
        for _ in range(draw.randrange(1, 9)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(bytes(content[: draw.choice([len(content), len(content) // 2])]))
    return f"{seed}: {way} {name}"
