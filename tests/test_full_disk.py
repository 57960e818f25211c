"""Every write of a run can fail: one sentence, nothing good is lost, and resumed it is the same run."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_kept_checkpoints import require_same

from fastadv.errors import UserError
from fastadv.run.console import Console
from fastadv.run.request import RunRequest
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint

SETTINGS: dict[str, Any] = {
    "method": "fast", "width": 2, "epochs": 2, "limit": 48, "batch_size": 32, "mode": "eager",
    "select_attack": "clean", "test_attacks": "clean", "test_limit": 10, "lr": 0.5,
    "options": {"averaging": "ema"}, "keep": "best,last,previous,every-1",
}  # fmt: skip
FULL = OSError(errno.ENOSPC, "No space left on device")


class _Raw(io.FileIO):
    """A file in ``folder`` whose writes are counted."""

    before: Callable[[], None]

    def write(self, content: Any, /) -> int:
        self.before()
        return super().write(content)


@contextmanager
def failing(folder: Path, number: int, error: int) -> Iterator[list[str]]:
    """The ``number``-th call of the system that changes something in ``folder`` fails, and so do
    all that come after; the list has the calls until then. 0: none fails."""
    calls: list[str] = []

    def count(name: str, *paths: Any) -> None:
        if paths and not any(str(folder) in os.fsdecode(path) for path in paths):
            return
        calls.append(name)
        if number and len(calls) >= number:
            raise OSError(error, os.strerror(error))

    def counted(name: str, places: int) -> Callable[..., Any]:
        own = getattr(os, name)

        def call(*words: Any, **options: Any) -> Any:
            changes = name != "open" or words[1] & (os.O_WRONLY | os.O_RDWR)
            if changes and all(isinstance(word, (str, os.PathLike)) for word in words[:places]):
                count(name, *words[:places])
            return own(*words, **options)

        return call

    own_open = builtins.open

    def open_counted(file: Any, mode: str = "r", *words: Any, **options: Any) -> Any:
        if isinstance(file, int) and ("w" in mode or "a" in mode):
            place = os.readlink(f"/proc/self/fd/{file}")
            raw = _Raw(file, mode.replace("b", ""))
            raw.before = lambda: count("write", place)
            return io.BufferedWriter(raw)
        return own_open(file, mode, *words, **options)

    def sync(handle: int, own: Callable[[int], None] = os.fsync) -> None:
        count("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        own(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        patch.setattr(builtins, "open", open_counted)
        for name, places in (("open", 1), ("replace", 2), ("link", 2), ("mkdir", 1)):
            patch.setattr(os, name, counted(name, places))
        yield calls


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(RunRequest(**SETTINGS, out=str(out)), Console())
    return out


def good(folder: Path) -> dict[str, dict[str, Any]]:
    """The checkpoints in ``folder``; all are whole."""
    return {str(path): checkpoint.load(path) for path in folder.rglob("*.pt")}


def finish(out: Path) -> None:
    """Go on with the run in ``out``, or begin it."""
    if (out / "config.toml").exists():
        resume(str(out), Console())
    else:
        train(RunRequest(**SETTINGS, out=str(out)), Console())


def calls_of_a_run(folder: Path) -> int:
    with failing(folder, 0, errno.ENOSPC) as calls:
        train(RunRequest(**SETTINGS, out=str(folder / "run")), Console())
    shutil.rmtree(folder / "run")
    return len(calls)


def try_all(tmp_path: Path, whole: Path, numbers: Iterator[int], error: int) -> int:
    """The run ends at each of these writes, and is finished afterwards."""
    stopped = 0
    for number in numbers:
        out = tmp_path / "run"
        sentence = ""
        with failing(tmp_path, number, error) as calls:
            try:
                train(RunRequest(**SETTINGS, out=str(out)), Console())
            except UserError as caught:
                sentence = str(caught)
        if sentence:
            stopped += 1
            assert "\n" not in sentence
            words = ("No space left on the device", "Cannot write", "Cannot make the folder")
            assert sentence.startswith(words), (number, calls[-1], sentence)
        good(out)  # of the files that are there none is damaged
        finish(out)
        require_same(out, whole)
        leftovers = [path.name for path in out.rglob("*") if ".partial" in path.name]
        assert not leftovers, (number, calls[-1])
        assert not (out / "lock").exists()
        shutil.rmtree(out)
    return stopped


def test_some_writes_fail(tmp_path: Path, whole: Path) -> None:
    total = calls_of_a_run(tmp_path)
    assert total > 60
    assert try_all(tmp_path, whole, iter(range(1, total, total // 5)), errno.ENOSPC) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_every_write_fails_once(tmp_path: Path, whole: Path, error: int) -> None:
    total = calls_of_a_run(tmp_path)
    assert try_all(tmp_path, whole, iter(range(1, total + 1)), error) > total // 2
