"""The tables of counted launches and bytes."""

import pytest
from bench_script import script

tables = script("count_tables")

GRAPHS = {
    "passes": {"nodes": 200, "kinds": {"convolution": 150, "copy": 50}},
    "end": {"nodes": 30, "kinds": {"copy": 30}},
    "optimizer": {"nodes": 4, "kinds": {"foreach": 4}},
}
PASSES = [
    {
        "pass": "ascend", "runs": 10, "launches": 137, "tiny": 67, "megabytes": 7696,
        "own_launches": 1, "own_megabytes": 25,
    }
]  # fmt: skip
STEPS = {
    "pgd at 512 eager": {"step": {"launches": 7, "kinds": {"copy": 4, "convolution": 3}}},
    "pgd at 512 captured": {
        "graphs": GRAPHS,
        "replayed step": {"launches": 5, "kinds": {"copy": 2, "other": 3}},
        "passes": PASSES,
    },
    "apart at 512 eager": {"step": {"launches": 9, "kinds": {"copy": 9}}},
}


def test_a_captured_step_has_launches_and_nodes() -> None:
    assert tables.launches_table(STEPS).splitlines()[2:] == [
        "| pgd at 512 eager | 7 |  |  |  |  |",
        "| pgd at 512 captured | 5 | 234 | 200 | 4 | 30 |",
        "| apart at 512 eager | 9 |  |  |  |  |",
    ]


def test_kinds_of_a_captured_step_are_those_of_its_nodes_and_launches() -> None:
    assert tables.kinds_table(STEPS).splitlines() == [
        "| kernels | pgd at 512 eager | pgd at 512 captured |",
        "|---|---:|---:|",
        "| convolution | 3 | 150 |",
        "| copy | 4 | 82 |",
        "| foreach | 0 | 4 |",
        "| other | 0 | 3 |",
        "| together | 7 | 239 |",
    ]


def test_bytes_of_generated_and_own_kernels_add_up() -> None:
    (row,) = tables.bytes_table(STEPS).splitlines()[2:]
    assert row == "| pgd at 512 | ascend | 10 | 137 | 67 | 7.70 | 1 | 0.03 | 7.72 |"


@pytest.mark.parametrize("table", ["launches_table", "kinds_table", "bytes_table"])
def test_without_counts_a_table_says_how_to_get_them(table: str) -> None:
    assert getattr(tables, table)({}) == tables.NONE_YET


def test_the_model_of_the_bytes_adds_up() -> None:
    """557,056 elements of BatchNorm at 8 tensors of 512 images and two bytes are 4.56 GB."""
    _, _, *rows, whole = tables.least_bytes_table().splitlines()
    assert rows[0] == "| BatchNorm | 557,056 | 3, 5 | 4.56 | 2, 3 | 2.85 |"
    assert whole == "| together |  |  | 5.47 |  | 3.52 |"
    found = [[float(row.split("|")[column]) for row in rows] for column in (4, 6)]
    assert sum(found[0]) == pytest.approx(5.47, abs=0.03)
    assert sum(found[1]) == pytest.approx(3.52, abs=0.03)
