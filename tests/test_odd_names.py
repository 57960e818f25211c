"""Names with line ends, control codes, markup, or bytes that are no text: shown as escapes, and a
run with them can be read."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Outcome
from PIL import Image

from fastadv.run.config_file import from_bytes, to_toml
from fastadv.run.request import RunRequest
from fastadv.storage import files

Command = Callable[..., Outcome]

NAMES = {
    "line end": "a\nb",
    "control code": "a\x1b[2J\x1b]0;owned\x07b",
    "markup": "[red]a[bold] [x]",
    "no text": os.fsdecode(b"a\xff\xfeb"),
    "direction": "a\u202eb",
    "quotes": "a\"'\\b\u00e9",
}
SMALL = (
    *("--method", "fast", "--width", "2", "--epochs", "1", "--batch-size", "8", "--mode", "eager"),
    *("--select-attack", "clean", "--test-attacks", "clean", "--image-size", "8"),
)


def images(place: Path, name: str) -> None:
    """A data set of two classes, one with this name, whose files have it too."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for label in ("plain", name):
            folder = place / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(os.fsencode(folder / f"{name}{number}.png"))


def shows(outcome: Outcome, code: int = 0) -> str:
    """What a command showed, which can harm no terminal."""
    said = outcome.out + outcome.err
    assert outcome.code == code, said
    assert all(c == "\n" or c.isprintable() for c in said), ascii(said)
    said.encode()  # no lone surrogates
    return said


@pytest.mark.parametrize(
    "kind",
    [
        name if name in ("control code", "no text") else pytest.param(name, marks=pytest.mark.slow)
        for name in NAMES
    ],
)
def test_a_run_of_odd_names(kind: str, fastadv_command: Command, tmp_path: Path) -> None:
    name = NAMES[kind]
    images(tmp_path / f"data {name}", name)
    out = f"run {name}"
    data = f"folder:{tmp_path}/data {name}"
    said = shows(fastadv_command("train", *SMALL, "--data", data, "--out", out))
    assert "best epoch 1" in said
    assert (tmp_path / out / "summary.json").exists()
    if kind == "markup":
        assert name in said
    shows(fastadv_command("train", "--resume", out))
    shows(fastadv_command("train", "--config", f"{out}/config.toml", "--out", f"again {name}"))
    shows(fastadv_command("evaluate", out, "--attacks", "clean"))
    for form in ("markdown", "csv"):
        shows(fastadv_command("evaluate", out, "--attacks", "clean", "--format", form))
    shows(fastadv_command("export", out, "--out", f"{name}.safetensors"))
    assert (tmp_path / f"{name}.safetensors").exists()
    # mistakes name what they are about
    shows(fastadv_command("train", *SMALL, "--data", data, "--out", out), 2)
    shows(fastadv_command("train", *SMALL, "--data", f"folder:{tmp_path}/no {name}"), 2)
    shows(fastadv_command("train", *SMALL, "--data", name), 2)
    shows(fastadv_command("train", "--resume", f"no {name}"), 2)
    shows(fastadv_command("evaluate", f"no {name}"), 2)
    (tmp_path / out / "best.pt").write_bytes(b"x")
    shows(fastadv_command("export", out, "--out", "other.safetensors"), 2)
    (tmp_path / out / "summary.json").unlink()
    (tmp_path / out / "last.pt").unlink()
    shows(fastadv_command("train", "--resume", out))
    (tmp_path / f"data {name}" / "train" / name / f"{name}0.png").write_bytes(b"broken")
    shows(fastadv_command("train", *SMALL, "--data", data, "--out", "another"), 2)


@pytest.mark.parametrize(
    "text", [*NAMES.values(), "\0", "\x000041", "a\0dcffb", "\ud800\udfff", "\U0010ffff", ""]
)
def test_a_configuration_holds_any_name(text: str) -> None:
    written = to_toml(RunRequest(data=f"npz:{text}", out=text))
    found = from_bytes(written.encode(), Path("config.toml"))
    assert (found.data, found.out) == (f"npz:{text}", text)


# -- files that are written -----------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_an_exported_file_has_the_rights_that_the_user_wants(
    mask: int, fastadv_command: Command, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        with files.replaced(tmp_path / "model.safetensors") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o666 & ~mask


def test_export_replaces_nothing(fastadv_command: Command, tmp_path: Path) -> None:
    """Neither a device nor a pipe, nor a file or what a link names."""
    shows(
        fastadv_command("train", *SMALL[:-2], "--limit", "40", "--test-limit", "8", "--out", "run")
    )
    places: dict[str, Callable[[Path], Any]] = {
        "pipe.safetensors": os.mkfifo,
        "link.safetensors": lambda path: path.symlink_to(tmp_path / "target"),
        "dangling.safetensors": lambda path: path.symlink_to(tmp_path / "missing"),
        "file.safetensors": lambda path: path.write_bytes(b"mine"),
        "folder.safetensors": lambda path: path.mkdir(),
    }
    (tmp_path / "target").write_bytes(b"mine")
    for name, make in places.items():
        path = tmp_path / name
        make(path)
        before = os.lstat(path)
        assert "exists" in shows(fastadv_command("export", "run", "--out", path), 2)
        assert os.lstat(path).st_ino == before.st_ino
        assert os.lstat(path).st_mode == before.st_mode
    for device in ("/dev/null", "/dev/full"):
        said = shows(fastadv_command("export", "run", "--out", device, "--format", "torch"), 2)
        assert "exists" in said
        assert stat.S_ISCHR(os.stat(device).st_mode)
    assert (tmp_path / "target").read_bytes() == b"mine"
    assert not (tmp_path / "missing").exists()
