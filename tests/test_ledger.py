"""What is known of every image: rows that grow, are joined, and say what they do not know."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastadv.evaluation.ledger import ABSENT, OPEN, RIGHT, Ledger


def filled(**columns: list[int]) -> Ledger:
    ledger = Ledger()
    ledger.expect(range(len(columns["fooled_by"])))
    place = torch.arange(len(columns["fooled_by"]))
    ledger.put(place, **{name: torch.tensor(values) for name, values in columns.items()})
    return ledger


def test_rows_come_in_any_order_and_grow() -> None:
    ledger = Ledger()
    ledger.expect(range(2))
    ledger.put(torch.tensor([7, 3]), fooled_by=torch.tensor([RIGHT, 2]), label=torch.tensor([5, 6]))
    assert len(ledger) == 8
    assert ledger.rows["fooled_by"].tolist() == [OPEN, OPEN, ABSENT, 2, ABSENT, ABSENT, ABSENT, -1]
    assert ledger.known.tolist() == [False] * 3 + [True] + [False] * 3 + [True]
    assert ledger.right.tolist() == [False] * 7 + [True]
    assert np.isnan(ledger.rows["margin"]).all()
    assert ledger.rows["label"][[7, 3]].tolist() == [5, 6]


def test_an_image_that_was_fooled_is_not_forgotten() -> None:
    ledger = filled(fooled_by=[3, RIGHT])
    ledger.expect(range(2))
    assert ledger.rows["fooled_by"].tolist() == [3, RIGHT]


def test_what_is_packed_is_unpacked() -> None:
    ledger = filled(fooled_by=[0, OPEN, RIGHT], passed=[0, 2, 4], runs=[0, 1, 0])
    ledger.put(torch.arange(3), strength=torch.tensor([-float("inf"), 1 / 3, 2.0]).double())
    again = Ledger.unpacked(ledger.packed())
    assert again.packed() == ledger.packed()
    assert again.rows["strength"][2] == 2.0
    assert len(Ledger.unpacked(b"")) == 0
    with pytest.raises(ValueError, match="multiple"):
        Ledger.unpacked(b"abc")


def test_of_two_ledgers_each_row_is_the_one_that_knows_more() -> None:
    one = filled(
        fooled_by=[2, OPEN, OPEN, OPEN, OPEN], passed=[2, 0, 1, 3, 1], runs=[0, 0, 5, 0, 0]
    )
    other = filled(fooled_by=[OPEN, RIGHT, OPEN], passed=[4, 4, 1], runs=[9, 0, 6])
    for pair in ([one, other], [other, one]):
        rows = Ledger.union(pair).rows
        assert rows["fooled_by"].tolist() == [2, RIGHT, OPEN, OPEN, OPEN]
        assert rows["passed"].tolist() == [2, 4, 1, 3, 1]
        assert rows["runs"].tolist() == [0, 0, 6, 0, 0]
    assert one.rows["runs"].tolist() == [0, 0, 5, 0, 0]  # unchanged


def test_bounds_are_those_of_the_best_and_the_worst_end() -> None:
    ledger = filled(fooled_by=[0, RIGHT, OPEN, 1])
    # 1 right, 2 fooled; 1 open and 6 of 10 not seen: between 1/10 and 8/10.
    assert ledger.bounds(10) == (0.1, 0.8)
    assert Ledger().bounds(4) == (0.0, 1.0)


def test_another_label_is_noticed() -> None:
    ledger = filled(fooled_by=[RIGHT, RIGHT], label=[3, 4])
    ledger.put(torch.tensor([1]), label=torch.tensor([4]))
    with pytest.raises(ValueError, match="other images"):
        ledger.put(torch.tensor([0, 1]), label=torch.tensor([3, 5]))


def test_an_interruption_in_the_middle_of_a_row_gives_no_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C may come between any two columns."""
    columns = {
        "fooled_by": torch.tensor([1]),
        "passed": torch.tensor([1]),
        "runs": torch.tensor([0]),
        "margin": torch.tensor([-0.5]),
    }

    class Interrupting(np.ndarray):
        left = 0

        def __getitem__(self, name: object) -> object:
            if isinstance(name, str):
                Interrupting.left -= 1
                if Interrupting.left < 0:
                    raise KeyboardInterrupt
            return super().__getitem__(name)

    for moment in range(len(columns)):
        ledger = filled(fooled_by=[OPEN], passed=[0], runs=[2])
        ledger._rows = ledger._rows.view(Interrupting)
        Interrupting.left = moment
        with pytest.raises(KeyboardInterrupt):
            ledger.put(torch.tensor([0]), **columns)
        Interrupting.left = 1 << 30
        row = ledger.rows[0]
        assert row["fooled_by"] == OPEN
        # Never a search that is passed with runs of it to come.
        assert (row["passed"], row["runs"]) in {(0, 2), (0, 0), (1, 0)}
