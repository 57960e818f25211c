"""Every refused pair of parts is refused with its reason, and similar pairs are accepted."""

import inspect

import pytest

from fastadv.algorithms.contract import AttackLoss
from fastadv.algorithms.parts import PARTS
from fastadv.algorithms.resolution import resolve
from fastadv.errors import UserError

NONE = {"adversary": "none"}
FREE = {"adversary": "free"}
ATTA = {"adversary": "atta", "start": "stored"}
STARTS = sorted(PARTS["start"])


class Averaged(AttackLoss):
    """A loss of the whole batch, which restarts cannot compare."""


# (slot and part that refuse, reason) -> the other's slot, plans that are refused, and plans that
# differ in one part and are built.
CASES = {
    ("objective trades", "its KL is identically 0"): (
        "adversary",
        [NONE | {"objective": "trades"}],
        [NONE, {"objective": "trades"}],
    ),
    ("objective rst", "its KL is identically 0"): (
        "adversary",
        [NONE | {"objective": "rst"}],
        [{"objective": "rst"}],
    ),
    ("regularizer advlc", "the penalty is identically 0"): (
        "adversary",
        [NONE | {"regularizer": "advlc"}],
        [NONE | {"regularizer": "igr"}, {"regularizer": "advlc"}],
    ),
    ("objective mart", "MART's KL is identically 0"): (
        "adversary",
        [NONE | {"objective": "mart"}],
        [{"objective": "mart"}],
    ),
    ("objective ikl", "which are the same without an attack"): (
        "adversary",
        [NONE | {"objective": "ikl"}],
        [{"objective": "ikl"}],
    ),
    ("regularizer guided", "the square is identically 0"): (
        "adversary",
        [NONE | {"regularizer": "guided"}],
        [{"regularizer": "guided"}],
    ),
    ("regularizer nuclear", "the norm is identically 0"): (
        "adversary",
        [NONE | {"regularizer": "nuclear"}],
        [{"regularizer": "nuclear"}],
    ),
    ("adversary liet", "attacks one image per class, which is no sample"): (
        "this method",
        [{"adversary": "liet", "target": "self-adaptive"}],
        [{"adversary": "liet"}, {"adversary": "liet", "target": "label-smoothing"}],
    ),
    ("objective clean-mixed", "without an attack they are equal"): (
        "adversary",
        [NONE | {"objective": "clean-mixed"}],
        [{"objective": "clean-mixed"}],
    ),
    ("objective clean-subtracted", "without an attack they are equal"): (
        "adversary",
        [NONE | {"objective": "clean-subtracted"}],
        [{"objective": "clean-subtracted"}],
    ),
    ("objective gairat", "this adversary takes no such steps"): (
        "adversary",
        [{"objective": "gairat", "adversary": "fast"}, NONE | {"objective": "gairat"}],
        [{"objective": "gairat"}],
    ),
    ("regularizer logitalign", "no attack beside the outer pass's gradient"): (
        "adversary",
        [FREE | {"regularizer": "logitalign"}],
        [FREE | {"regularizer": "advlc"}, {"regularizer": "logitalign"}],
    ),
    ("target self-adaptive", "this objective fits two"): (
        "objective",
        [
            {"target": "self-adaptive", "objective": "clean-mixed"},
            {"target": "self-adaptive", "objective": "clean-subtracted"},
        ],
        [{"target": "self-adaptive", "objective": "trades"}],
    ),
    ("target self-adaptive", "the replays would give it several"): (
        "adversary",
        [FREE | {"target": "self-adaptive", "replays": 2}],
        [FREE | {"target": "self-adaptive", "replays": 1}],
    ),
    ("target temporal-ensembling", "the replays would give it several"): (
        "adversary",
        [FREE | {"target": "temporal-ensembling"}],
        [
            FREE | {"target": "temporal-ensembling", "replays": 1},
            FREE | {"target": "label-smoothing"},
        ],
    ),
    ("regularizer consistency", "would update its stored state in two different ways"): (
        "this method",
        [
            {"regularizer": "consistency", "target": "temporal-ensembling"},
            {"regularizer": "consistency", "start": "stored"},
            ATTA | {"regularizer": "consistency"},
            {"regularizer": "consistency", "adversary": "apart"},
        ],
        [
            {"regularizer": "consistency", "adversary": "apart", "learned_start": False},
            {"regularizer": "consistency", "start": "center"},
        ],
    ),
    ("adversary atta", "take start='stored'"): (
        "start",
        [{"adversary": "atta"}, ATTA | {"start": "center"}, ATTA | {"start": "none"}],
        [ATTA],
    ),
    ("adversary pgd", "restarts compare the loss of each sample"): (
        "attack_loss",
        [{"restarts": 2, "attack_loss": Averaged}],
        [{"attack_loss": Averaged}, {"restarts": 2, "attack_loss": "kl"}],
    ),
    ("adversary clean-first", "restarts compare the loss of each sample"): (
        "attack_loss",
        [{"adversary": "clean-first", "restarts": 2, "attack_loss": Averaged}],
        [{"adversary": "clean-first", "attack_loss": Averaged}],
    ),
    ("adversary friendly", "restarts compare the loss of each sample"): (
        "attack_loss",
        [{"adversary": "friendly", "restarts": 2, "attack_loss": Averaged}],
        [{"adversary": "friendly", "attack_loss": Averaged}],
    ),
    ("adversary random-eps-pgd", "restarts compare the loss of each sample"): (
        "attack_loss",
        [{"adversary": "random-eps-pgd", "restarts": 2, "attack_loss": Averaged}],
        [{"adversary": "random-eps-pgd", "attack_loss": Averaged}],
    ),
    ("regularizer helper", "there is nothing beyond it"): (
        "adversary",
        [NONE | {"regularizer": "helper"}],
        [{"regularizer": "helper"}],
    ),
    ("attack_loss kl", "the KL to f(x) has no gradient"): (
        "adversary",
        [
            {"attack_loss": "kl", "start": "center"},
            {"attack_loss": "kl", "start": "center", "restarts": 2},
            {"attack_loss": "kl", "adversary": "fgsm"},
            {"attack_loss": "kl", "adversary": "apart", "learned_start": False},
        ],
        [
            {"attack_loss": "ce", "start": "center"},
            {"attack_loss": "kl"},
            {"attack_loss": "kl", "start": "gaussian"},
            {"attack_loss": "kl", "start": "uniform", "adversary": "fgsm"},
            {"attack_loss": "kl", "adversary": "fgsm-n"},
            {"attack_loss": "kl", "adversary": "apart"},
        ],
    ),
    **{
        (f"start {start}", "this adversary begins where its own definition says"): (
            "adversary",
            [
                {"adversary": adversary, "start": start}
                for adversary in ("none", "free", "fgsm-plus", "apart")
            ],
            [
                {"adversary": adversary, "start": start}
                for adversary in ("pgd", "fgsm", "fgsm-r", "fast", "fgsm-n", "n-fgsm")
            ],
        )
        for start in STARTS
    },
}


# The reason that no plan of these parts reaches: none of our targets takes labels of any form.
OF_OTHERS = {("objective mart", "not by the loss of a target")}


def built(options):
    """``options`` with a new part for each part class."""
    return {name: value() if isinstance(value, type) else value for name, value in options.items()}


def test_every_reason_has_its_cases():
    """A part that states one more conflict needs one more case."""
    for slot, parts in PARTS.items():
        for name, part in parts.items():
            stated = inspect.getsource(part.conflicts).count("yield Conflict(")
            told = [who for who, _ in [*CASES, *OF_OTHERS] if who == f"{slot} {name}"]
            assert stated == len(told), f"{slot} {name}"


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_refused_pair_says_why(case):
    who, reason = case
    slot, refused, accepted = CASES[case]
    for options in refused:
        with pytest.raises(UserError) as told:
            resolve("pgd", built(options))
        text = str(told.value)
        other = options.get(slot, {"adversary": "pgd", "start": "none"}.get(slot, ""))
        if isinstance(other, type):
            other = other.__name__
        beside = "this method" if slot == "this method" else f"{slot} {other}"
        assert text.startswith(f"{who} x {beside} cannot be combined: "), text
        assert reason in text
        assert "\n" not in text
        assert text.endswith(".")
    for options in accepted:
        resolve("pgd", built(options))


@pytest.mark.parametrize("options", [{"shrink": 0.5}, {"flip_signs": 0.1}])
def test_without_an_attack_there_is_nothing_to_weaken(options):
    with pytest.raises(UserError, match="without an attack x' = x"):
        resolve("pgd", NONE | options)
    resolve("pgd", NONE | dict.fromkeys(options, 0.0))
    resolve("pgd", options)


@pytest.mark.parametrize("adversary", ["none", "free"])
def test_a_loss_that_no_step_follows_is_refused(adversary):
    with pytest.raises(UserError, match="takes none of its own: omit it"):
        resolve("pgd", {"adversary": adversary, "attack_loss": "kl"})
    for given in ({}, {"attack_loss": "kl"}):  # the recipe's was that of its attack
        plan = resolve("trades", {"adversary": "free", **given})
        assert "natural_logits_attack" not in plan.needs
