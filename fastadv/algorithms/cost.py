"""What an update costs: the passes it makes over one batch of images, counted by kind.

The order of the passes is in ``training/update.py``; the tests hold every recipe's count to the
forwards and backwards a network really sees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fastadv.algorithms.contract import Adversary
from fastadv.algorithms.plan import Plan

FORWARD = "forward"
INPUT_GRADIENT = "input gradient"
TRAINING = "training"
SHARED = "shared"
DOUBLE_BACKWARD = "double backward"

UNITS = {FORWARD: 1, INPUT_GRADIENT: 2, TRAINING: 3, SHARED: 4, DOUBLE_BACKWARD: 6}
"""Forward passes of the same work. A backward to the input costs one forward, one to the weights
too two. SHARED is one forward with first the one, then the other. DOUBLE_BACKWARD differentiates
an input gradient: each of its two products a layer has two derivatives, as costly each."""


class Pass(NamedTuple):
    """One kind of pass; ``bn`` is BatchNorm's mode in it, "train" or "eval"."""

    kind: str
    bn: str


@dataclass(frozen=True)
class Passes:
    """The passes of one update over as many images as the loader gives: two views of each image
    are two passes. ``weights`` are those of the weights part alone, at most (RWP stops early; a
    direction in the last layers alone does not go back to the first). A teacher's forward counts
    as one of the network's own."""

    others: Counter[Pass]
    weights: Counter[Pass]

    @property
    def counts(self) -> Counter[Pass]:
        """All of them, weight rounds counted in full."""
        return self.others + self.weights

    @property
    def units(self) -> int:
        """Forward passes of the same work."""
        return sum(UNITS[kind] * count for (kind, _), count in self.counts.items())


def passes(plan: Plan) -> Passes:
    """The passes of one update of ``plan`` with every part at work: warm-ups over, averages on."""
    counts = _before(plan) + _attack(plan) + _outer(plan) + _beside(plan)
    views = 2 if "second_view" in plan.needs else 1
    return Passes(_times(views, counts), _times(views, _weights(plan)))


def _times(factor: int, counts: Counter[Pass]) -> Counter[Pass]:
    return Counter({entry: factor * count for entry, count in counts.items()})


def units(plan: Plan) -> int:
    """``passes(plan).units``."""
    return passes(plan).units


def _before(plan: Plan) -> Counter[Pass]:
    """Natural logits that are looked at before the attack; two needs of one mode are one pass."""
    modes = {"natural_logits_eval": "eval", "natural_logits_attack": plan.adversary.attack_bn}
    return Counter({Pass(FORWARD, modes[need]) for need in plan.needs & modes.keys()})


def _attack(plan: Plan) -> Counter[Pass]:
    """The adversary's own passes, and those for a regularizer's neighbour."""
    if plan.slots["adversary"] in ("none", "free") or _shares_center(plan):
        return Counter()
    bn, restarts = plan.adversary.attack_bn, int(plan.options.get("restarts", 1))
    once = Counter({Pass(INPUT_GRADIENT, bn): _steps(plan) * restarts})
    once[Pass(FORWARD, bn)] += 2 * (restarts - 1)  # of each two points the worse is kept
    if plan.regularizer is None or not plan.regularizer.wants_neighbor:
        return once
    if "natural_logits_attack" in plan.needs:
        return once + once + Counter({Pass(FORWARD, bn): 1})
    return once + once


def _steps(plan: Plan) -> int:
    return int(plan.options.get("steps", 1))


def _shares_center(plan: Plan) -> bool:
    """Whether attack and outer pass share the forward of the ball's centre (``Update._joint``)."""
    adversary = plan.adversary
    able = type(adversary).joint_center is not Adversary.joint_center
    alike = adversary.attack_bn == "train" and adversary.attack_objective == "ce"
    return plan.shares_natural_forward and able and alike


def _outer(plan: Plan) -> Counter[Pass]:
    """The pass over x_adv, and the one over the ball's centre where a part compares the two."""
    name = plan.slots["regularizer"]
    counts = Counter({Pass(DOUBLE_BACKWARD if name == "igr" else TRAINING, "train"): 1})
    if "natural_logits_train" in plan.needs:
        counts[Pass(_center_kind(plan), "train")] += 1
    return counts


def _center_kind(plan: Plan) -> str:
    if _shares_center(plan):
        return SHARED
    if plan.slots["regularizer"] != "gradalign":
        return TRAINING
    if _steps(plan) > 1:
        return DOUBLE_BACKWARD
    return SHARED if _objective_reads_center(plan) else INPUT_GRADIENT


def _objective_reads_center(plan: Plan) -> bool:
    return "natural_logits_train" in plan.objective.requires()


def _beside(plan: Plan) -> Counter[Pass]:
    """Passes over further images: a regularizer's neighbours, a target's teachers."""
    counts: Counter[Pass] = Counter()
    if "teacher_logits" in plan.needs:
        counts[Pass(FORWARD, "eval")] += len(plan.options["kd_weights"]) - 1
    return counts + BESIDE.get(plan.slots["regularizer"], Counter())


BESIDE: Mapping[str, Counter[Pass]] = {
    "cure": Counter({Pass(DOUBLE_BACKWARD, "eval"): 2}),
    "gradalign": Counter({Pass(DOUBLE_BACKWARD, "train"): 1}),
    "logitalign": Counter({Pass(TRAINING, "train"): 1}),
}
"""What a regularizer forwards beside x_adv and the ball's centre, by its name."""


def _weights(plan: Plan) -> Counter[Pass]:
    if plan.weights is None:
        return Counter()
    rounds = int(plan.options.get("weight_steps", 1))
    counts = Counter({Pass(TRAINING, "train"): rounds})
    if _objective_reads_center(plan):
        counts[Pass(TRAINING, "train")] += rounds
    return counts
