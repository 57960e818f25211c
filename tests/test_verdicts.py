"""The file of verdicts: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastadv.errors import UserError
from fastadv.evaluation.verdicts import Verdicts

FACTS: dict[str, Any] = {
    "attack": "pgd-20",
    "norm": "linf",
    "eps": 0.2,
    "seed": 0,
    "weights": "w" * 32,
    "images": "i" * 32,
    "precision": "float32",
}
STAGES = ("clean", "apgd-ce", "square")


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    """Four images: one wrong before, two fooled, one right."""
    fooled_by = np.array([-1, 0, 1, 2], np.int16)
    return {
        "index": np.array([2, 3, 5, 9], np.int64),
        "label": np.array([0, 1, 1, 7], np.int64),
        "right": fooled_by < 0,
        "margin": np.array([0.5, np.nan, -0.25, -1], np.float32),
        "fooled_by": fooled_by,
    } | changes


def verdicts(**changes: Any) -> Verdicts:
    return Verdicts(**arrays(**changes), stages=STAGES, facts=FACTS)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pgd.npz"
    verdicts().write(path)
    found = Verdicts.read(path)
    for name, values in arrays().items():
        held = getattr(found, name)
        np.testing.assert_array_equal(held, values)
        assert held.dtype == values.dtype
    assert found.stages == STAGES
    assert found.facts == FACTS
    assert [each.name for each in tmp_path.iterdir()] == ["pgd.npz"]


def test_numpy_alone_reads_the_file(tmp_path: Path) -> None:
    verdicts().write(tmp_path / "pgd.npz")
    with np.load(tmp_path / "pgd.npz", allow_pickle=False) as file:
        assert file["right"].tolist() == [True, False, False, False]
        assert file["stages"].tolist() == list(STAGES)
        assert json.loads(file["facts"].item()) == FACTS


def test_counts_of_the_images() -> None:
    found = verdicts()
    assert len(found) == 4
    assert found.accuracy == 0.25
    assert found.fooled() == {"clean": 1, "apgd-ce": 1, "square": 1}
    # Wilson (1927) for 1 of 4, from the quadratic |p - 1/4| = z sqrt(p (1 - p) / 4).
    low, high = found.interval
    for end in (low, high):
        assert abs(end - 0.25) == pytest.approx(1.959963984540054 * (end * (1 - end) / 4) ** 0.5)
    assert low < 0.25 < high


def test_images_that_come_in_any_order_are_put_in_order() -> None:
    order = [3, 0, 2, 1]
    shuffled = {name: torch.from_numpy(values)[order] for name, values in arrays().items()}
    found = Verdicts.collected(shuffled, STAGES, FACTS)
    for name, values in arrays().items():
        np.testing.assert_array_equal(getattr(found, name), values)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"index": np.array([2, 3, 3, 9])}, "row twice"),
        ({"index": np.array([3, 2, 5, 9])}, "out of order"),
        ({"index": np.array([-1, 2, 5, 9])}, "below 0"),
        ({"label": np.array([0, -1, 1, 7])}, "negative class"),
        ({"label": np.array([0, 1, 1])}, "label is"),
        ({"right": np.array([1, 0, 0, 0])}, "right is int64"),
        ({"right": np.array([True, True, False, False])}, "contradict"),
        ({"margin": np.array([0, np.inf, 0, 0], np.float32)}, "not finite"),
        ({"fooled_by": np.array([-1, 0, 1, 3], np.int16)}, "none of 3"),
        ({"fooled_by": np.array([-2, 0, 1, 2], np.int16)}, "none of 3"),
        ({name: values[:0] for name, values in arrays().items()}, "no images"),
    ],
)
def test_verdicts_that_cannot_be_are_refused(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        verdicts(**changes)


@pytest.mark.parametrize(
    "facts",
    [
        *({k: v for k, v in FACTS.items() if k != name} for name in FACTS if name != "precision"),
        FACTS | {"eps": "0.2"},
        FACTS | {"eps": float("nan")},
        FACTS | {"seed": True},
        ["attack"],
    ],
)
def test_facts_must_say_what_was_evaluated(facts: Any) -> None:
    with pytest.raises(UserError, match=r"facts|eps"):
        Verdicts(**arrays(), stages=STAGES, facts=facts)


@pytest.mark.parametrize("stages", [(), ("a", "a", "b"), ("a", "", "b")])
def test_stages_are_names(stages: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="stage"):
        Verdicts(**arrays(), stages=stages, facts=FACTS)


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def stored(path: Path, **changes: Any) -> Path:
    """A file with ``changes``; None: that array is left out."""
    facts, stages = np.array([json.dumps(FACTS)]), np.array(STAGES)
    held = {**arrays(), "stages": stages, "facts": facts} | changes
    np.savez(path, **{name: values for name, values in held.items() if values is not None})
    return path


FOREIGN: dict[str, dict[str, Any]] = {
    "lacks margin": {"margin": None},
    "lacks facts": {"facts": None},
    "index is float64": {"index": np.array([2.0, 3, 5, 9])},
    "'O'": {"facts": np.array([Harmful()], object)},
    "label is int64": {"label": np.zeros((4, 1), np.int64)},
    "stages is int64": {"stages": np.array([1, 2, 3])},
    "facts is <U": {"facts": np.array(["x" * (1 << 19)])},
    "facts has 2": {"facts": np.array(["{}", "{}"])},
    "facts does not say": {"facts": np.array(["{}"])},
    "facts is no table": {"facts": np.array(["[]"])},
    "Expecting": {"facts": np.array(["{"])},
    "row twice": {"index": np.zeros(4, np.int64)},
}


@pytest.mark.parametrize("fault", FOREIGN)
def test_a_foreign_file_is_one_sentence(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="evaluate again") as refused:
        Verdicts.read(stored(tmp_path / "foreign.npz", **FOREIGN[fault]))
    assert fault in str(refused.value)
    assert capsys.readouterr().out == ""


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    whole = stored(tmp_path / "whole.npz").read_bytes()
    damaged = tmp_path / "damaged.npz"
    at = whole.index(np.array([2, 3, 5, 9], np.int64).tobytes())
    flipped = bytes([whole[at] ^ 4])
    for content in (b"", whole[: len(whole) // 2], whole[:at] + flipped + whole[at + 1 :]):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match="damaged or no file of verdicts"):
            Verdicts.read(damaged)
    damaged.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match="damaged or no file of verdicts"):
        Verdicts.read(damaged)


def test_a_header_that_asks_for_more_than_the_file_holds_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.npz"
    stored(tmp_path / "whole.npz")
    with zipfile.ZipFile(tmp_path / "whole.npz") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"(4,), ", b"(4000000000,), "))
    with pytest.raises(UserError, match="damaged or no file of verdicts"):
        Verdicts.read(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no file"):
        Verdicts.read(tmp_path / "missing.npz")
    with pytest.raises(UserError, match=r"damaged or no file|Cannot read"):
        Verdicts.read(tmp_path)
    with pytest.raises(UserError, match="Cannot write"):
        verdicts().write(tmp_path / "missing" / "pgd.npz")


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / "pgd.npz").symlink_to(target)
    verdicts().write(tmp_path / "pgd.npz")
    assert target.read_text() == "kept"
    assert len(Verdicts.read(tmp_path / "pgd.npz")) == 4
