"""What a run shows: rows of at most 80 columns, one line per minute in a log, the time left."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import rich.console
from test_begun_with import SMALL

from fastadv.printing.terminal import Terminal
from fastadv.run import epoch_progress as progress_module
from fastadv.run.console import Console
from fastadv.run.epoch_progress import epoch_progress
from fastadv.run.epoch_table import AGAIN, EpochTable
from fastadv.run.request import RunRequest
from fastadv.run.time_left import TimeLeft
from fastadv.run.train import train

LINE: dict[str, Any] = {"epoch": 9, "loss": 1.40752, "lr": 0.019, "train_accuracy_percent": 35.21}
LINE |= {"val_clean_percent": 100.0, "val_pgd-10_percent": 1.4, "val_n": 144}
LINE |= {"train_clean_percent": 99.0, "train_pgd-10_percent": 51.0, "train_n": 1000}


def test_a_row_stands_below_its_heads() -> None:
    table = EpochTable(200, {"val": 144}, "pgd-10")
    above, below = table.heads()
    row = table.row(LINE, 3725, 61)
    assert above == "                           train  val, % of 144"
    assert below == "  epoch     loss       lr      %  clean  pgd-10      time      left"
    assert row == "  9/200   1.4075   0.0190   35.2  100.0     1.4   1:02:05      1:01"
    assert len(row) == len(below)
    assert table.heads() == []


@pytest.mark.parametrize("attack", ["pgd-10", "quick", "clean", "apgd-ce+apgd-t+fab-t+square"])
@pytest.mark.parametrize("train", [{}, {"train": 12_345}])
@pytest.mark.parametrize("epochs", [1, 30, 99_999])
def test_no_row_is_wider_than_80_columns(attack: str, train: dict[str, int], epochs: int) -> None:
    table = EpochTable(epochs, {"val": 10_000} | train, attack)
    line = {"epoch": epochs, "loss": 123456.7, "lr": 1e-7, "train_accuracy_percent": 100.0}
    for name in ("val", *train):
        line |= {f"{name}_{each}_percent": 100.0 for each in ("clean", attack)}
    heads = table.heads()
    row = table.row(line, 359_999, 359_999)
    assert len(heads) == 2
    assert max(map(len, [*heads, row])) <= 80
    assert len(row) == len(heads[1])
    assert row.split()[:3] == [f"{epochs}/{epochs}", "1.2e+05", "1.0e-07"]


def test_an_epoch_that_was_not_evaluated_leaves_its_columns_empty() -> None:
    table = EpochTable(200, {"val": 144}, "pgd-10")
    row = table.row({"epoch": 1, "loss": 1.0, "lr": 0.1}, 5, None)
    assert row == "  1/200   1.0000   0.1000                            0:05"


def test_the_heads_come_again() -> None:
    table = EpochTable(200, {"val": 144}, "pgd-10")
    due = []
    for _ in range(2 * AGAIN):
        due.append(bool(table.heads()))
        table.row(LINE, 1, 1)
    assert [place for place, heads in enumerate(due) if heads] == [0, AGAIN]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_that_of_the_batches_and_then_of_whole_epochs() -> None:
    clock = Clock()
    left = TimeLeft(10, 20, now=clock)
    assert left.after(0, 0) is None
    clock.now += 10  # half of the first epoch
    assert left.after(0, 10) == pytest.approx(10 + 9 * 20)
    assert not left.knows_evaluation
    clock.now += 20  # ... the other half, and 10 seconds of evaluation
    left.epoch_ends(1)
    assert left.knows_evaluation
    assert left.after(1, 0) == pytest.approx(9 * 30)
    clock.now += 12
    assert left.after(1, 12) == pytest.approx(9 * 30 - 12)


def test_a_run_that_continues_counts_from_where_it_began() -> None:
    clock = Clock()
    left = TimeLeft(10, 20, done=4, within=10, now=clock)
    clock.now += 5
    assert left.after(4, 15) == pytest.approx(5 * 20 / 5 * 5.25)
    clock.now += 10
    left.epoch_ends(5)  # half an epoch in 15 seconds
    assert left.after(5, 0) == pytest.approx(5 * 30)


def test_a_log_file_gets_a_line_a_minute_and_never_more(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(progress_module.time, "monotonic", clock)
    out, read = io.StringIO(), []
    console = rich.console.Console(file=out, width=80)
    left = TimeLeft(3, 100, now=clock)

    def loss() -> float:
        read.append(clock.now)
        return 1.5

    with epoch_progress(console, 3, left, 0, 0, 100) as tick:
        for _ in range(100):
            clock.now += 1.3
            tick(64, loss)
    found = out.getvalue().splitlines()
    assert found == [
        "epoch 1/3  batch 47/100  loss 1.5000  49 images/s  5:28 left + evaluation",
        "epoch 1/3  batch 94/100  loss 1.5000  49 images/s  4:27 left + evaluation",
    ]
    assert len(read) == 2


def test_the_bar_is_one_line_of_80_columns() -> None:
    clock = Clock()
    out = io.StringIO()
    options: dict[str, Any] = {
        "force_terminal": True,
        "color_system": None,
        "legacy_windows": False,
    }
    console = rich.console.Console(file=out, width=80, **options)
    left = TimeLeft(200, 5004, done=198, now=clock)
    with epoch_progress(console, 200, left, 198, 5000, 5004) as tick:
        clock.now += 300_000
        for _ in range(3):
            tick(12_345_678, lambda: 1.0)
    last = out.getvalue().split("epoch 199/200")[-1]
    assert "images/s" in last
    assert "left + evaluation" in last
    frames = re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", out.getvalue())
    assert max(map(len, frames)) <= 80
    assert not any(frame.strip() and not frame.startswith("epoch 199/200") for frame in frames)


def shown(monkeypatch: pytest.MonkeyPatch, out: Path, **settings: Any) -> tuple[str, list[Any]]:
    text = io.StringIO()
    request = RunRequest(**SMALL | settings, out=str(out))
    train(request, Console(Terminal(file=text, width=80, highlight=False)))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return text.getvalue(), lines


def test_all_that_a_run_prints_fits_80_columns_and_breaks_no_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / ("a-long-name-" * 10)
    text, lines = shown(monkeypatch, out, eval_train=20, eps_warmup=1.0, label_noise=0.1)
    path = f"{out}"
    assert f"run folder: {path}\n" in text or f"\n  {path}\n" in text
    others = [line for line in text.splitlines() if path not in line]
    assert max(map(len, others)) <= 80
    words = "fast on digits: adversary fgsm training images, linf eps 0.2 (from 0 over 1 epochs),"
    assert set(words.split()) <= set(text.split())
    last = next(line for line in text.splitlines() if line.strip().startswith("2/2"))
    for name in ("train_accuracy", "val_clean", "val_fgsm", "train_clean", "train_fgsm"):
        assert f"{lines[-1][f'{name}_percent']:.1f}" in last.split()
    assert lines[0]["eps"] == pytest.approx(0.2 * (1 - 1 / 1))  # one batch: the first update's
    assert lines[1]["eps"] == pytest.approx(0.2)
    assert all(line["images_per_second"] > 0 for line in lines)


def test_colours_are_off_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []
    for value in (None, "1"):
        if value is not None:
            monkeypatch.setenv("NO_COLOR", value)
        text = io.StringIO()
        Console(Terminal(file=text, force_terminal=True, color_system="truecolor")).warn("late")
        codes.append("\x1b[33m" in text.getvalue())
    assert codes == [True, False]
