"""Every write of a run can fail: one sentence, nothing good is lost, resumed it is the same run."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kept_runs import require_same

from fastadv.errors import UserError
from fastadv.run import space
from fastadv.run.console import Console
from fastadv.run.onward import train_or_resume
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.run_folder import RunFolder
from fastadv.run.session import Session
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint

SETTINGS: dict[str, Any] = {
    "method": "fast", "width": 2, "epochs": 2, "limit": 48, "batch_size": 32, "mode": "eager",
    "select_attack": "clean", "test_attacks": "clean", "test_limit": 10, "lr": 0.5,
    "options": {"averaging": "ema"}, "keep": "best,last,previous,every-1",
}  # fmt: skip


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
    numbers = [*range(9, total, total // 3), total]  # the last one, when the summary is there
    assert try_all(tmp_path, whole, iter(numbers), errno.ENOSPC) >= 3


def test_the_sentence_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second epoch the folder becomes one that cannot be written to."""
    out = tmp_path / "a run"

    def read_only(self: RunFolder, line: dict[str, Any]) -> None:
        if line["epoch"] == 1:
            add(self, line)
            return
        with failing(out, 1, errno.EROFS):
            add(self, line)

    add = RunFolder.add_metrics
    monkeypatch.setattr(RunFolder, "add_metrics", read_only)
    with pytest.raises(UserError) as caught:
        train(RunRequest(**SETTINGS, out=str(out)), Console())
    assert str(caught.value) == (
        f"Cannot write {out}/metrics.jsonl: Read-only file system; what was saved before is "
        f"intact. Once it can be written, continue with: fastadv train --resume '{out}'"
    )


def test_room_is_asked_for_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, free = tmp_path / "run", [10**9]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    train(RunRequest(**SETTINGS, out=str(out)), Console())
    used = sum((out / name).stat().st_size for name in ("last.pt", "previous.pt", "best.pt"))
    shutil.rmtree(out)
    free[0] = used // 2
    with pytest.raises(UserError, match=r"will take about \d+ MB more, and 0 MB are free there"):
        train(RunRequest(**SETTINGS, out=str(out)), Console())
    assert not out.exists()
    free[0] = 2 * used + (1 << 20)
    train(RunRequest(**SETTINGS, out=str(out)), Console())


def test_room_is_asked_for_the_state_of_a_guarded_run(tmp_path: Path) -> None:
    def needed(**more: Any) -> int:
        request = RunRequest(**SETTINGS | more, out=str(tmp_path / "run"))
        session = Session.build(resolve_run(request))
        return space._needed(RunFolder(tmp_path / "run"), session)

    one = needed(keep="best,last,previous") - needed(keep="best,last")
    assert one > 10_000
    assert needed(guard_overfitting="back") - needed(guard_overfitting="stop") == one


@pytest.mark.parametrize("go_on", ["resume", "the same command"])
def test_what_a_kill_after_the_summary_left_is_removed(
    tmp_path: Path, whole: Path, go_on: str
) -> None:
    """The verdicts of the final test, but not those of an evaluation under way."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    passes = out / "evaluations.partial"
    for left in ([], ["0123.0"]):
        passes.mkdir(exist_ok=True)
        for name in ["89ab.run.0", "89ab.run.1", *left]:
            (passes / name).write_bytes(b"verdicts")
        if go_on == "resume":
            resume(str(out), Console())
        else:
            train_or_resume(RunRequest(**SETTINGS, out=str(out)), Console())
        found = sorted(path.name for path in passes.iterdir()) if passes.exists() else None
        assert found == (left or None)


@pytest.mark.slow
def test_the_screen_may_be_a_file_on_the_full_disk(tmp_path: Path) -> None:
    """The run goes on without its lines."""
    words = ["train", "--method", "fast", "--width", "2", "--epochs", "1", "--limit", "48"]
    words += ["--test-limit", "8", "--out", "run"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastadv", *words],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "step"),
    [(errno.ENOSPC, 5), (errno.EROFS, 29), (errno.EDQUOT, 31), (errno.EIO, 23)],
)
def test_many_writes_fail(tmp_path: Path, whole: Path, error: int, step: int) -> None:
    total = calls_of_a_run(tmp_path)
    assert try_all(tmp_path, whole, iter(range(1, total + 1, step)), error) > total // step // 2
