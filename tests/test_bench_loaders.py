"""The rows of bench/loaders.py: what they divide by what, and what they cannot be made without."""

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
    found = list(loaders.rows(f"folder:{tmp_path}", 36, 8, torch.device("cpu"), 2, step=0.01))
    assert [(row["loader"], row["source"]) for row in found] == [
        ("device", "memory"),
        ("device", "files"),
        ("dali", "files"),
    ]
    for row in found:
        assert (row["config"]["images"], row["image_size"]) == (32, 16)
        assert row["step_ms"] == 80.0
        assert row["ms"]["count"] == 2
        assert row["of_step"] == pytest.approx(row["ms"]["median"] / 80, rel=1e-3, abs=1e-5)
        assert row["images_per_s"]["p10"] <= 8e3 / row["ms"]["median"] <= row["images_per_s"]["p90"]
