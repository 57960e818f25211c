"""The output of ``fastadv bench``: whole names, and values shared by all rows only once."""

import io

import pytest
from rich.console import Console

from fastadv.benchmark.table import rate_table, step_table


def steps(*names):
    spread = {"median": 5.0, "p10": 4.0, "p90": 6.0}
    config = {"batch_size": 64}
    common = {"kind": "step", "ms": spread, "images_per_s": 9.0, "config": config}
    return [common | {"name": f"fastadv {name}"} for name in names]


def printed(table):
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    return out.getvalue()


@pytest.mark.parametrize("make", [step_table, rate_table])
def test_shared_words_are_in_the_title(make):
    table = make(steps("pgd bf16 eager", "pgd:attack_bn=eval bf16 eager"))
    assert table.title.endswith(", bf16 eager")
    assert list(table.columns[0].cells) == ["pgd", "pgd:attack_bn=eval"]


def test_what_differs_stays_beside_its_row():
    table = step_table(steps("pgd bf16 eager", "pgd bf16 compiled"))
    assert table.title == "training steps"
    assert list(table.columns[0].cells) == ["pgd bf16 eager", "pgd bf16 compiled"]


def test_a_single_row_keeps_its_method():
    assert list(step_table(steps("pgd bf16 eager")).columns[0].cells) == ["pgd"]


def test_long_names_are_folded_not_cut():
    assert "…" not in printed(step_table(steps("fgsm-n-advlc-squared-l2 bf16 eager")))
