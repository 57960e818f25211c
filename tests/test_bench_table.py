"""The output of ``fastadv bench``: whole names, and values shared by all rows only once."""

import io

import pytest
from rich.console import Console

from fastadv.benchmark.running import SHOWN
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


SPREAD = {
    "median": 12345.6,
    "p10": 1.0,
    "p90": 2.0,
    "count": 9,
    "low95": 12000.0,
    "high95": 13000.0,
}
LONG = "fgsm-n-advlc-squared-l2:attack_bn=eval bf16 captured-eager"
CONFIG = {"batch_size": 512}
TIMES = {"config": CONFIG, "times": SPREAD, "ms": {"own": SPREAD, "pytorch": SPREAD}}
ROWS = [
    {
        "kind": "step", "name": f"fastadv {name}", "ms": SPREAD, "images_per_s": 123456.0,
        "config": CONFIG, "compile_s": 1234.5, "over_passes": SPREAD, "tflop_per_s": 1234.5,
        "of_matmul": 0.999, "of_copy": 0.999, "over_bound": 1.234, "peak_mib": 123456.0,
        "idle_share": 0.123,
    }
    for name in (LONG, "pgd bf16 compiled")
] + [
    {
        "kind": "pass", "name": f"pass: double backward {LONG}", "ms": SPREAD, "config": CONFIG,
        "bound_ms": 12345.6, "over_bound": 1.234,
    },
    {"kind": "operator", "name": "kernel: block_step_gradients", "size": "128x3x32x32",
     "backend": "reference", "ms": SPREAD},
    {"kind": "speedup", "peer": "torchattacks fp32 bn=train", "peer_bn": "train",
     "ours": f"fastadv {LONG}", "our_bn": "eval", **TIMES},
    {"kind": "fused norm", "ours": f"fastadv {LONG}", **TIMES},
]  # fmt: skip


@pytest.mark.parametrize("make", SHOWN)
def test_tables_have_80_columns_and_whole_numbers(make):
    text = printed(make(ROWS))
    lines = text.splitlines()
    assert len(lines) > 4
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    for whole in ("512", "12,346", "±4.1 %", "123,456", "reference", "compile"):
        if whole in text.replace("\n", ""):
            assert any(whole in line for line in lines), whole
    heads = " ".join(lines[:4]).split()
    known = {
        word for table in [make(ROWS)] for c in table.columns for word in str(c.header).split()
    }
    assert known <= set(heads), known - set(heads)
