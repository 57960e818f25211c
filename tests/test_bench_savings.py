"""Each saving can be switched off in a step, and bench/savings.py times both sides."""

import importlib
import json
import sys

import pytest
from bench_script import BENCH, script

from fastadv.benchmark.setting import Setting

savings = script("savings")


@pytest.mark.parametrize("name", savings.SAVINGS)
def test_a_row_has_both_sides(name):
    method, network, take_away = savings.SAVINGS[name]
    row = savings.saving(Setting(network, 4, 8, 8), method, take_away, "fp32", 2)
    assert set(row["ms"]) == {"plain", "saving"}
    assert 0.1 < row["plain_over_saving"]["median"] < 10


def test_switching_a_saving_off_restores_the_plain_passes():
    step = savings.make_step(
        Setting("resnet18", 4, 8, 8), savings.parse_specs("pgd")[0], "fp32", "eager"
    )
    batch = Setting("resnet18", 4, 8, 8).batches(1)[0]
    step(batch.x, batch.y, batch.index)
    assert step.internals.net.copies.folds
    savings.unfolded(step)
    assert not step.internals.net.copies.folds


@pytest.mark.slow
def test_the_script_writes_a_row_of_each(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))  # its own processes import it by name
    script = importlib.import_module("savings")
    tiny = ["--width", "2", "--batch-size", "4", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["savings.py", *tiny, "--out", str(tmp_path)])
    script.main()
    (file,) = tmp_path.iterdir()
    found = [json.loads(line)["saving"] for line in file.read_text().splitlines()]
    freed = [script.FREED_MEMORY] * len(script.FREED_MEMORY_METHODS)
    assert found == [*script.SAVINGS, *freed]
