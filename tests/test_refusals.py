"""Every refused pair of parts is refused with its reason, and similar pairs are accepted."""

import pytest

from fastadv.algorithms.refusals import REFUSALS
from fastadv.algorithms.resolution import resolve
from fastadv.errors import UserError

# Words of the row's name -> plans it refuses, and plans that differ in one part and are built.
NONE = {"adversary": "none"}
CASES = {
    "none x objective trades": (
        [NONE | {"objective": "trades"}, NONE | {"objective": "rst"}],
        [NONE, {"objective": "trades"}],
    ),
    "shrink or flip_signs": (
        [NONE | {"shrink": 0.5}, NONE | {"flip_signs": 0.1}],
        [NONE | {"shrink": 0.0}, {"shrink": 0.5}],
    ),
    "none x regularizer advlc": (
        [NONE | {"regularizer": "advlc"}],
        [NONE | {"regularizer": "igr"}, {"regularizer": "advlc"}],
    ),
    "none x objective clean-mixed": (
        [NONE | {"objective": "clean-mixed"}, NONE | {"objective": "clean-subtracted"}],
        [{"objective": "clean-mixed"}],
    ),
    "objective gairat": (
        [{"objective": "gairat", "adversary": "fast"}, NONE | {"objective": "gairat"}],
        [{"objective": "gairat"}],
    ),
    "free x regularizer logitalign": (
        [{"adversary": "free", "regularizer": "logitalign"}],
        [{"adversary": "free", "regularizer": "advlc"}, {"regularizer": "logitalign"}],
    ),
    "target distillation": (
        [
            {"target": "distillation", "objective": objective}
            for objective in ("trades", "rst", "clean-mixed", "clean-subtracted")
        ],
        [{"target": "distillation"}, {"target": "label-smoothing", "objective": "trades"}],
    ),
    "target self-adaptive x objective": (
        [{"target": "self-adaptive", "objective": "clean-mixed"}],
        [{"target": "self-adaptive", "objective": "trades"}],
    ),
    "regularizer consistency": (
        [
            {"regularizer": "consistency", "target": "temporal-ensembling"},
            {"regularizer": "consistency", "adversary": "atta"},
            {"regularizer": "consistency", "adversary": "apart"},
        ],
        [{"regularizer": "consistency", "adversary": "apart", "learned_start": False}],
    ),
    "x adversary free": (
        [
            {"target": "temporal-ensembling", "adversary": "free"},
            {"target": "self-adaptive", "adversary": "free", "replays": 2},
        ],
        [
            {"target": "temporal-ensembling", "adversary": "free", "replays": 1},
            {"target": "label-smoothing", "adversary": "free"},
        ],
    ),
}


def row_of(words: str) -> tuple[str, str]:
    (found,) = [(name, reason) for name, _, reason in REFUSALS if words in name]
    return found


def test_every_row_has_a_few_cases():
    assert sorted(row_of(words)[0] for words in CASES) == sorted(name for name, *_ in REFUSALS)
    assert len(REFUSALS) <= 25


@pytest.mark.parametrize("words", CASES)
def test_a_refused_pair_says_why(words):
    name, reason = row_of(words)
    refused, built = CASES[words]
    for options in refused:
        with pytest.raises(UserError) as told:
            resolve("pgd", options)
        assert str(told.value) == f"{name} cannot be combined: {reason}"
    for options in built:
        resolve("pgd", options)
