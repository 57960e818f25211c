"""The tables in the documentation: made from rows, and from the newest run only."""

import copy
import re

import pytest
from bench_script import BENCH, script

from fastadv.algorithms.recipes.table import METHODS
from fastadv.benchmark.rows import read_rows
from fastadv.benchmark.setting import Setting
from fastadv.errors import UserError


def test_tables_show_the_newest_run_and_replace_only_their_marks():
    tables = script("tables")
    old, new = (copy.deepcopy(_rows(date)) for date in ("2026-01-01", "2026-02-01"))
    for row in new:
        if row["kind"] == "step":
            row["ms"]["median"] *= 2
    text = "before <!-- bench:speed -->stale<!-- /bench:speed --> after"
    written = tables.written_into(text, old + new)
    assert written.startswith("before <!-- bench:speed -->")
    assert written.endswith("<!-- /bench:speed --> after")
    assert "stale" not in written
    assert "| published fp32 | train | 2,000 |" in written
    assert "5.50x" in written
    assert "2026-02-01" in written
    assert "2026-01-01" not in written
    with pytest.raises(UserError, match="did you mean 'speed'"):
        tables.written_into(text.replace("speed", "sped"), old)


def _rows(date: str) -> list[dict]:
    common = {
        "run": date, "date": date, "device": "a CPU", "threads": 2, "torch": "2.13",
        "python": "3.11", "fastadv": "1", "commit": "abc", "command": "throughput.py",
        "config": Setting(width=4, batch_size=64).as_row(),
    }  # fmt: skip
    spread = {"p10": 1.0, "p90": 1.0, "count": 3}
    step_row = {"kind": "step", "method": "pgd", "attack_bn": "train", "images_per_s": 64.0}
    ours = step_row | {"by": "fastadv", "name": "fastadv pgd bf16 compiled"}
    peer_row = step_row | {"by": "published", "name": "published fp32"}
    ratio = {
        "kind": "speedup", "peer": "published fp32", "ours": "fastadv pgd bf16 compiled",
        "times": {"median": 5.5, **spread},
    }  # fmt: skip
    ours["ms"], peer_row["ms"] = {"median": 180.0, **spread}, {"median": 1000.0, **spread}
    return [row | common for row in (ours, peer_row, ratio)]


def test_minutes_to_a_robust_accuracy_count_to_the_first_epoch_that_reaches_it():
    robust = script("time_to_robust")
    lines = [
        {"epoch": 1, "train_seconds": 60.0},  # not judged
        {"epoch": 2, "train_seconds": 120.0, "test_pgd-20_percent": 44.0},
        {"epoch": 3, "train_seconds": 180.0, "test_pgd-20_percent": 46.0},
        {"epoch": 4, "train_seconds": 240.0, "test_pgd-20_percent": 45.0},
    ]
    assert robust.reached(lines, "test_pgd-20", 0.45) == {"epoch": 3, "minutes": 3.0}
    assert robust.reached(lines, "test_pgd-20", 0.5) == {"epoch": None, "minutes": None}
    told = robust.summary([{"minutes": 3.0}, {"minutes": None}, {"minutes": 5.0}], 0.45)
    assert (told["seeds"], told["reached"], told["mean_minutes"]) == (3, 2, 4.0)
    assert told["std_minutes"] == pytest.approx(2**0.5, abs=1e-3)


def test_the_table_in_the_docs_is_the_table_of_recipes_with_their_accuracies(fastadv_command):
    tables = script("tables")
    written = (BENCH.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [row for row in read_rows(BENCH / "results") if "kind" in row]
    printed = fastadv_command("methods", "--markdown").out
    assert tables.written_into(printed, rows) == written
    for name in METHODS:
        (line,) = [line for line in written.splitlines() if line.startswith(f"| `{name}` |")]
        assert re.search(r"\| \d+\.\d / \d+\.\d \|$", line), f"{name}: run bench/digits.py"


def test_the_status_of_a_recipe_is_its_newest_row():
    tables = script("tables")
    common = _rows("2026-01-01")[0] | {"kind": "digits", "epochs": 3, "given": {}}
    reached = {"clean": 0.9583, "pgd-20": 0.0111}
    old = common | {"method": "standard", "last": {"clean": 0.5, "pgd-20": 0.25}}
    new = old | {"last": reached, "date": "2026-02-01"}
    other = common | {"method": "pgd", "last": {"clean": 0.8167, "pgd-20": 0.3194}}
    lines = tables.recipes_table([new, old, other]).splitlines()
    assert "standard training reaches 95.8 / 1.1." in lines[0]
    ends = {line.split("`")[1]: line.rsplit(" | ", 1)[1] for line in lines if line[:3] == "| `"}
    assert ends["standard"] == "95.8 / 1.1 |"
    assert ends["pgd"] == "81.7 / 31.9 |"
    assert ends["trades"] == " |"
