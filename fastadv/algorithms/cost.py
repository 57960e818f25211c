"""The cost of an update: its passes over one batch of images, counted by kind.

The order of the passes is in ``training/update.py``. The tests compare the count of every recipe
with the forward and backward passes of a real network.
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
"""The cost of a pass in forward passes. A backward pass to the input costs one forward pass; a
backward pass to the input and the weights costs two. SHARED is one forward pass with both
backward passes, one after the other. DOUBLE_BACKWARD differentiates an input gradient: each of
the two products per layer has two derivatives, and each derivative costs as much as a product."""


class Pass(NamedTuple):
    """One kind of pass; ``bn`` is the mode of BatchNorm in it, "train" or "eval"."""

    kind: str
    bn: str


@dataclass(frozen=True)
class Passes:
    """The passes of one update over the images of one batch from the loader; two views of each
    image are two passes.

    ``weights`` are the passes of the weights part alone, ``others`` all the rest. ``weights`` is an
    upper bound: RWP can stop early, and the backward pass for a perturbation of the last layers
    does not reach the first ones. A forward pass of a teacher counts as one of the network.
    """

    others: Counter[Pass]
    weights: Counter[Pass]

    @property
    def counts(self) -> Counter[Pass]:
        """All passes, those of the weights part at their upper bound."""
        return self.others + self.weights

    @property
    def units(self) -> int:
        """The cost of all passes in forward passes (``UNITS``)."""
        return sum(UNITS[kind] * count for (kind, _), count in self.counts.items())


def passes(plan: Plan) -> Passes:
    """The passes of one update of ``plan`` with every part active: after all warm-ups, with the
    averages running."""
    counts = _before(plan) + _attack(plan) + _outer(plan) + _beside(plan)
    views = 2 if "second_view" in plan.needs else 1
    return Passes(_times(views, counts), _times(views, _weights(plan)))


def _times(factor: int, counts: Counter[Pass]) -> Counter[Pass]:
    return Counter({entry: factor * count for entry, count in counts.items()})


def units(plan: Plan) -> int:
    """The cost of one update of ``plan`` in forward passes (``Passes.units``)."""
    return passes(plan).units


def _before(plan: Plan) -> Counter[Pass]:
    """The forward passes for natural logits before the attack; two needs with the same mode of
    BatchNorm share one pass."""
    modes = {"natural_logits_eval": "eval", "natural_logits_attack": plan.adversary.attack_bn}
    return Counter({Pass(FORWARD, modes[need]) for need in plan.needs & modes.keys()})


def _attack(plan: Plan) -> Counter[Pass]:
    """The passes of the adversary, and those that attack a regularizer's second image."""
    if plan.slots["adversary"] in ("none", "free") or _shares_center(plan):
        return Counter()
    bn, restarts = plan.adversary.attack_bn, int(plan.options.get("restarts", 1))
    once = Counter({Pass(INPUT_GRADIENT, bn): _steps(plan) * restarts})
    once[Pass(FORWARD, bn)] += 2 * (restarts - 1)  # a restart compares the losses of two points
    if plan.regularizer is None or not plan.regularizer.wants_neighbor:
        return once
    if "natural_logits_attack" in plan.needs:
        return once + once + Counter({Pass(FORWARD, bn): 1})
    return once + once


def _steps(plan: Plan) -> int:
    return int(plan.options.get("steps", 1))


def _shares_center(plan: Plan) -> bool:
    """True if the attack and the outer pass share the forward pass of the ball's centre
    (``Regions.joint``)."""
    adversary = plan.adversary
    able = type(adversary).joint_center is not Adversary.joint_center
    alike = adversary.attack_bn == "train" and adversary.attack_objective == "ce"
    return plan.shares_natural_forward and able and alike


def _outer(plan: Plan) -> Counter[Pass]:
    """The pass over x_adv, and the pass over the ball's centre if a part compares the two."""
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
    """The passes of a regularizer over further images, and those of a target's teachers."""
    counts: Counter[Pass] = Counter()
    if "teacher_logits" in plan.needs:
        counts[Pass(FORWARD, "eval")] += len(plan.options["kd_weights"]) - 1
    return counts + BESIDE.get(plan.slots["regularizer"], Counter())


BESIDE: Mapping[str, Counter[Pass]] = {
    "cure": Counter({Pass(DOUBLE_BACKWARD, "eval"): 2}),
    "gradalign": Counter({Pass(DOUBLE_BACKWARD, "train"): 1}),
    "logitalign": Counter({Pass(TRAINING, "train"): 1}),
}
"""Name of a regularizer -> its passes beside those over x_adv and the ball's centre."""


def _weights(plan: Plan) -> Counter[Pass]:
    if plan.weights is None:
        return Counter()
    rounds = int(plan.options.get("weight_steps", 1))
    counts = Counter({Pass(TRAINING, "train"): rounds})
    if _objective_reads_center(plan):
        counts[Pass(TRAINING, "train")] += rounds
    return counts
