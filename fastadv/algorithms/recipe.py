"""One row of the table of methods, and the settings that several rows share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastadv.algorithms.slots import NONE, SLOTS


@dataclass(frozen=True)
class Recipe:
    """One method: the name of the part in each slot, and its settings.

    ``summary`` fits on one line of ``fastadv methods``; ``note`` adds what the line has no room
    for. ``source`` names the paper, equation and tables. ``options`` are the parts'
    hyper-parameters that differ from the parts' defaults; ``training`` are the settings of the run
    (epochs, learning rate, ...) in the publication. ``reported`` is the accuracy that the source
    reports, in per cent; ``elsewhere`` is the same for other data sets, networks and balls.
    """

    summary: str
    source: str
    adversary: str = "pgd"
    objective: str = "ce"
    target: str = "one-hot"
    regularizer: str = NONE
    weights: str = NONE
    averaging: str = NONE
    layers: str = "uniform"
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    reported: str = ""
    elsewhere: str = ""

    def what(self) -> str:
        """``summary``, followed by ``note`` if there is one."""
        return f"{self.summary} ({self.note})" if self.note else self.summary

    def parts(self) -> dict[str, str]:
        """Slot -> name of its part."""
        return {slot: getattr(self, slot) for slot in SLOTS}

    def all_options(self) -> dict[str, Any]:
        """``options``, and those that its parts take together (``beside``)."""
        return {**beside(self.parts()), **self.options}


# The training of F+FGSM and its successors: short, with one triangular cycle of the learning rate.
CYCLIC: dict[str, Any] = {"epochs": 30, "lr": 0.2, "schedule": "triangular", "weight_decay": 2e-4}
CYCLIC |= {"shortcut": "raw", "padding": "constant"}

# APART and ATTA train on images that are not normalized, with a grey border.
GREY: dict[str, Any] = {"padding": "grey", "normalize": False}

# The training of all methods of the AdvLC paper on CIFAR-10.
ADVLC: dict[str, Any] = {"epochs": 200, "batch_size": 100, "lr": 0.1, "schedule": "multistep"}
ADVLC |= {"weight_decay": 1e-4, "shortcut": "raw", "padding": "constant", "normalize": False}

# The training of TRADES and the methods built on it in the RWP paper. Its epochs count from 1; the
# learning rate drops at the beginning of the 100th and the 150th.
TRADES: dict[str, Any] = {"schedule": "multistep", "drops": (99 / 200, 149 / 200)}
TRADES |= {"padding": "constant", "normalize": False}

# The training of the memorization paper on CIFAR; ``run/presets.py`` has the one on SVHN.
MEMORIZATION: dict[str, Any] = {"model": "resnet18", "schedule": "multistep"}
MEMORIZATION |= {"padding": "constant", "normalize": False}

KL_ATTACK: dict[str, Any] = {"attack_objective": "kl", "attack_bn": "eval"}

# (objective, weights) -> the options of a perturbation of the weights that depend on the objective,
# in every recipe with these two parts. The published code counts epochs from 1 and perturbs from
# the 10th on.
_GENTLE: dict[str, Any] = {"gamma": 0.005, "warmup_epochs": 9}
_AFTER: dict[str, Any] = {"bn_passes": ("adversarial", "natural", "natural")}
BESIDE: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("trades", "awp"): _GENTLE | _AFTER,
    ("trades", "rwp"): _GENTLE | _AFTER,
    ("rst", "awp"): _GENTLE,
    ("rst", "rwp"): _GENTLE,
}

# (objective, target) -> options. The published code of the targets that follow the predictions of
# TRADES forwards x and x' once each.
_ONCE_EACH: dict[str, Any] = {"bn_passes": ("natural", "adversarial")}
FOLLOWED: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("trades", "self-adaptive"): _ONCE_EACH,
    ("trades", "temporal-ensembling"): _ONCE_EACH,
}


def beside(slots: Mapping[str, str]) -> dict[str, Any]:
    """The options that depend on two parts in ``slots`` together, whatever the recipe."""
    objective = slots["objective"]
    followed = FOLLOWED.get((objective, slots["target"]), {})
    # If both set an option, the weights part decides: its published code computes the loss.
    return {**followed, **BESIDE.get((objective, slots["weights"]), {})}
