"""``--schedule module:function``: the user's own learning rates."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_begun_with import SMALL, stopped
from test_resume import one_thread, same

from fastadv.errors import UserError
from fastadv.run import own_schedule
from fastadv.run.console import Console
from fastadv.run.finished import evaluate_run
from fastadv.run.own_schedule import OwnSchedule
from fastadv.run.request import RunRequest
from fastadv.run.schedules import Schedule, factor
from fastadv.run.train import resume, train
from fastadv.storage.trust import trusting

SOURCE = """
import math

def restarts(epoch, epochs):
    \"\"\"Cosine with restarts (SGDR): periods of 1, 2, 4, ... epochs.\"\"\"
    begin, length = 0, 1
    while epoch >= begin + length:
        begin, length = begin + length, 2 * length
    return 0.5 * (1 + math.cos(math.pi * (epoch - begin) / length))

def negative(epoch, epochs):
    return 1 - epoch

def infinite(epoch, epochs):
    return 1 / max(0.0, 2 - epoch) if epoch < 2 else math.inf

def words(epoch, epochs):
    return "0.1"

def zero(epoch, epochs):
    return 0.0

def alone(epoch):
    return 1.0

def fails(epoch, epochs):
    return [1.0, 0.5][int(epoch)]

calls = []

def remembers(epoch, epochs):
    calls.append(epoch)
    return len(calls)

rate = 0.1
"""


@pytest.fixture
def rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's."""
    (tmp_path / "rates_of_mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "rates_of_mine"
    sys.modules.pop("rates_of_mine", None)


def restarts(epoch: float) -> float:
    """Independent of the user's: in a list of the first periods."""
    begin = max(at for at in (0, 1, 3, 7) if at <= epoch)
    return (1 + math.cos(math.pi * (epoch - begin) / (begin + 1))) / 2


def test_the_rate_is_the_functions_at_the_epoch_of_each_update(rates: str) -> None:
    own = OwnSchedule(f"{rates}:restarts", 7)
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.4}])
    schedule = Schedule(optimizer, own.name, 28, cycle_momentum=True, epochs=7, own=own)
    for update in range(28):
        schedule(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4 * restarts(update / 4))
    warmed = factor(own.name, 2, 28, epochs=7, own=own, warmup=2.0)
    assert warmed == pytest.approx(restarts(0.5) * 3 / 8)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("negative", r"in epoch 1\.25 of 3 is -0\.25: a factor of the rate is finite and at least"),
        ("infinite", r"in epoch 2 of 3 is inf"),
        ("words", r"in epoch 0 of 3 is '0\.1', not a number"),
        ("zero", r"gives 0 in every epoch"),
        ("alone", r"failed \(TypeError.*called with the epoch, a float from 0, and the number"),
        ("fails", r"in epoch 2 of 3 failed \(IndexError"),
        ("remembers", r"in epoch 0 of 3 was 1 the first time and is not now"),
        ("rate", r"is a float, not a callable; name a function of the epoch"),
        ("restart", r"did you mean 'restarts'"),
        ("", r"A schedule of your own is written module:callable"),
    ],
)
def test_what_is_no_schedule_is_refused_before_training(rates: str, name: str, said: str) -> None:
    out = Path("run")
    with pytest.raises(UserError, match=said):
        train(RunRequest(**SMALL | {"epochs": 3}, schedule=f"{rates}:{name}", out=str(out)))  # type: ignore[arg-type]
    assert not out.exists()


def test_a_run_with_it_goes_on_bit_for_bit(rates: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "schedule": f"{rates}:restarts",
        "epochs": 3,
        "batch_size": 16,
        "lr": 0.3,
    }
    with one_thread():
        train(RunRequest(**SMALL | settings, out=str(tmp_path / "whole")), Console())
        out = stopped(tmp_path / "run", **settings)
        assert evaluate_run(str(out), "clean", limit=8).n == 8
        resume(str(out), Console())
    same(tmp_path / "whole", out)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    second = json.loads(lines[1])
    assert second["lr"] == pytest.approx(0.3 * restarts(1 + 2 / 3))


def test_its_code_is_compared_and_not_run_for_strangers(
    rates: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = stopped(tmp_path / "run", schedule=f"{rates}:restarts")
    copy = shutil.copytree(out, tmp_path / "copy")
    assert evaluate_run(str(copy), "clean", limit=8).n == 8  # which runs no schedule
    with pytest.raises(UserError, match=r"names code to run, schedule rates_of_mine:restarts"):
        resume(str(copy))
    with trusting(True):
        assert resume(str(copy), Console())["n"] == 16
    capsys.readouterr()
    code = tmp_path / "rates_of_mine.py"
    code.write_text(code.read_text() + "# edited\n")
    resume(str(out), Console())
    assert "source of the schedule" in " ".join(capsys.readouterr().out.split())


def test_the_command_takes_it_and_a_file_of_others_does_not(
    rates: str, tmp_path: Path, fastadv_command: Any
) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    done = fastadv_command("train", *words, "--schedule", f"{rates}:restarts", "--out", "run")
    assert done.code == 0
    assert f'schedule = "{rates}:restarts"' in Path("run/config.toml").read_text()
    Path("theirs.toml").write_text(f'schedule = "{rates}:restarts"\n')
    refused = fastadv_command("train", *words, "--config", "theirs.toml", "--out", "other")
    assert "names code to run, schedule rates_of_mine:restarts: add --trust-code" in refused.err
    assert "or name it as --schedule." in refused.err
    unknown = fastadv_command("train", "--schedule", "cosin")
    assert "did you mean 'cosine'" in unknown.err


def test_a_run_of_very_many_epochs_begins_as_soon_as_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    def noted(epoch: float, epochs: int) -> float:
        asked.append(epoch)
        return 1.0

    monkeypatch.setattr(own_schedule, "import_callable", lambda *_: noted)
    OwnSchedule("module:function", 3)
    assert asked[:12] == [place / 4 for place in range(12)]
    asked.clear()
    OwnSchedule("module:function", 10**9)
    assert len(asked) == 2 * own_schedule.MOST_LOOKS
    assert (asked[0], max(asked)) == (0.0, 10**9 * (1 - 1 / own_schedule.MOST_LOOKS))
