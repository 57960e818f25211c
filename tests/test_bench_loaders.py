"""The rows of bench/loaders.py: their ratios, and the rows that they need."""

import pytest
import torch
from test_bench_tables import script

from fastadv.errors import UserError

loaders = script("loaders")


def step(date: str, rate: float, **changes: object) -> dict:
    config = {"model": "preact_resnet18", "width": None, "image_size": 32, "batch_size": 64}
    config |= {name: changes.pop(name) for name in list(changes) if name in config}
    row = {"kind": "step", "by": "fastadv", "method": "pgd", "date": date, "config": config}
    return row | {"images_per_s": rate} | changes


def test_the_step_is_the_newest_of_the_published_network_in_its_faster_mode():
    rows = [
        step("2026-01-01", 400.0),
        step("2026-02-01", 20.0),
        step("2026-02-01", 25.0),
        step("2026-02-01", 300.0, method="fast"),
        step("2026-02-01", 300.0, by="published"),
        step("2026-02-01", 300.0, width=16),
        {"kind": "limits", "date": "2026-03-01"},
    ]
    assert loaders.step_of_an_image(rows) == 1 / 25
    with pytest.raises(UserError, match=r"run bench/throughput\.py first"):
        loaders.step_of_an_image(rows[3:])


def test_rows_of_a_small_tree(tmp_path):
    loaders.write_tree(tmp_path, 40, 16)
    found = list(loaders.rows(f"folder:{tmp_path}", 36, 8, torch.device("cpu"), 3, step=0.01))
    assert [(row["loader"], row["source"]) for row in found] == [
        ("device", "memory"),
        ("device", "files"),
        ("dali", "files"),
    ]
    for row in found:
        assert (row["config"]["images"], row["image_size"]) == (32, 16)
        assert row["step_ms"] == 80.0
        assert row["ms"]["count"] == 3
        assert row["of_step"] == pytest.approx(row["ms"]["median"] / 80, rel=1e-3, abs=1e-5)
        # Of three values the median of the rates is the rate of the median; both have 4 digits.
        assert row["images_per_s"]["median"] == pytest.approx(8e3 / row["ms"]["median"], rel=2e-3)


def test_tables_of_loaders_and_ratios_show_their_newest_rows(tmp_path):
    tables = script("tables")
    loaders.write_tree(tmp_path, 16, 16)
    found = list(loaders.rows(f"folder:{tmp_path}", 16, 8, torch.device("cpu"), 1, step=0.01))
    origin = dict.fromkeys(("torch", "python", "fastadv", "commit", "command"), "") | {
        "device": "a CPU", "threads": 2, "run": "a",
    }  # fmt: skip
    old = [row | origin | {"date": "2026-01-01", "of_step": 0.5} for row in found]
    new = [row | origin | {"date": "2026-02-01", "of_step": 0.0123} for row in found]
    table = tables.loaders_table(old + new)
    assert table.count("| 1.2 % |") == 3
    assert "50 %" not in table
    ratio = {"median": 1.21, "p10": 1.1, "p90": 1.3}
    steps = [
        step("2026-01-01", 9.0, width=width, method=method) | origin
        | {"name": method, "dtype": "bf16", "mode": "eager", "ms": {"median": 7.0}}
        | {"passes": {"training": 2}, "over_passes": ratio}
        for width, method in ((16, "free"), (None, "fast"))
    ]  # fmt: skip
    lines = tables.ratios_table(steps).splitlines()
    assert "| free | 16 | 64 | bf16 | eager | 2 training | 7 | 1.21 | 1.10-1.30 |" in lines
    assert "fast | published" in tables.ratios_table(steps)
    assert "free" not in tables.methods_table(steps)
