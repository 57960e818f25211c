"""The cost of an update: its passes over one batch of images, counted by kind.

The order of the passes is in ``training/update.py``. The tests compare the count of every recipe
with the forward and backward passes of a real network.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fastadv.algorithms.contract import FORWARD, SHARED, TRAINING, UNITS, Pass
from fastadv.algorithms.plan import READ_BY_ATTACKS, Plan


@dataclass(frozen=True)
class Passes:
    """The passes of one update over the images of one batch from the loader; two views of each
    image are two passes.

    ``weights`` are the passes of the weights part alone, at their upper bound; ``others`` are all
    the rest.
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
    counts: Counter[Pass] = Counter()
    counts.update(_natural(plan))
    attack = _attack(plan)
    counts.update(attack)
    if plan.neighbor is not None:  # the same attack on a second image
        counts.update(attack)
        if plan.needs & READ_BY_ATTACKS:
            counts[Pass(FORWARD, plan.adversary.attack_bn)] += 1
    counts.update(_outer(plan))
    for part in plan.parts.values():
        if part not in (plan.adversary, plan.start, plan.weights):
            counts.update(part.extra_passes(plan.capabilities))
    weights = plan.weights
    own = Counter() if weights is None else weights.extra_passes(plan.capabilities)
    views = 2 if "second_view" in plan.needs else 1
    return Passes(_times(views, counts), _times(views, own))


def _times(factor: int, counts: Counter[Pass]) -> Counter[Pass]:
    # A part that changes the kind of a pass subtracts the old kind.
    return Counter({entry: factor * count for entry, count in counts.items() if count > 0})


def units(plan: Plan) -> int:
    """The cost of one update of ``plan`` in forward passes (``Passes.units``)."""
    return passes(plan).units


def _natural(plan: Plan) -> Counter[Pass]:
    """The forward passes for natural logits before the attack; two needs with the same mode of
    BatchNorm share one pass."""
    modes = plan.natural_modes
    return Counter({Pass(FORWARD, modes[need]) for need in plan.needs & modes.keys()})


def _attack(plan: Plan) -> Counter[Pass]:
    """The passes of the adversary and of its start over one batch of images."""
    if plan.shares_natural_forward:
        return Counter()
    own = plan.adversary.extra_passes(plan.capabilities)
    begun = Counter() if plan.start is None else plan.start.extra_passes(plan.capabilities)
    return own + begun


def _outer(plan: Plan) -> Counter[Pass]:
    """The pass over x_adv, and the pass over the ball's centre if a part compares the two; the
    forward passes for BatchNorm's statistics alone."""
    counts = Counter({Pass(TRAINING, "train"): 1})
    if "natural_logits_train" in plan.needs:
        kind = SHARED if plan.shares_natural_forward else TRAINING
        counts[Pass(kind, "train")] += 1
    repeated = plan.repeats_attacked and not plan.folds_repetition
    logged = int(repeated) + int(plan.ends_with_clean)
    return counts + Counter({Pass(FORWARD, "train"): logged})
