"""One row of the table of methods, and the settings that many rows share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastadv.algorithms.slots import NONE, SLOTS


@dataclass(frozen=True)
class Recipe:
    """One method. ``options`` are its parts' hyper-parameters where they differ from the parts'
    own defaults; ``summary`` fits into a line of ``fastadv methods``, ``note`` is what to know
    beside it; ``training`` likewise the run's (epochs, learning rate, ...) in its publication;
    ``reported`` is the accuracy the source reports, in per cent; ``elsewhere`` the same for other
    data sets, networks and balls than the first one's.
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
        """``summary``, with ``note`` where there is one."""
        return f"{self.summary} ({self.note})" if self.note else self.summary

    def parts(self) -> dict[str, str]:
        """Slot -> part name."""
        return {slot: getattr(self, slot) for slot in SLOTS}

    def all_options(self) -> dict[str, Any]:
        """``options``, and what its target and weights take beside its objective."""
        return {**beside(self.parts()), **self.options}


# How F+FGSM and its successors train: short, with one triangular learning-rate cycle.
CYCLIC: dict[str, Any] = {"epochs": 30, "lr": 0.2, "schedule": "triangular", "weight_decay": 2e-4}
CYCLIC |= {"shortcut": "raw", "padding": "constant"}

# APART and ATTA see unscaled images whose border is grey.
GREY: dict[str, Any] = {"padding": "grey", "normalize": False}

# How AdvLC trains everything on CIFAR-10.
ADVLC: dict[str, Any] = {"epochs": 200, "batch_size": 100, "lr": 0.1, "schedule": "multistep"}
ADVLC |= {"weight_decay": 1e-4, "shortcut": "raw", "padding": "constant", "normalize": False}

# How TRADES and what is built on it train, in the RWP paper: epochs count from 1 there, and the
# 100th and 150th begin with the lower rate.
TRADES: dict[str, Any] = {"schedule": "multistep", "drops": (99 / 200, 149 / 200)}
TRADES |= {"padding": "constant", "normalize": False}

# How the memorization paper trains on CIFAR; on SVHN see ``presets``.
MEMORIZATION: dict[str, Any] = {"model": "resnet18", "schedule": "multistep"}
MEMORIZATION |= {"padding": "constant", "normalize": False}

KL_ATTACK: dict[str, Any] = {"attack_objective": "kl", "attack_bn": "eval"}

# What perturbed weights and an objective take together, in whichever recipe they meet:
# (objective, weights). Published epochs count from 1 and begin to perturb with the 10th.
_GENTLE: dict[str, Any] = {"gamma": 0.005, "warmup_epochs": 9}
_AFTER: dict[str, Any] = {"bn_passes": ("adversarial", "natural", "natural")}
BESIDE: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("trades", "awp"): _GENTLE | _AFTER,
    ("trades", "rwp"): _GENTLE | _AFTER,
    ("rst", "awp"): _GENTLE,
    ("rst", "rwp"): _GENTLE,
}

# Targets that follow TRADES' predictions were published with code that forwards x and x' once
# each: (objective, target).
_ONCE_EACH: dict[str, Any] = {"bn_passes": ("natural", "adversarial")}
FOLLOWED: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("trades", "self-adaptive"): _ONCE_EACH,
    ("trades", "temporal-ensembling"): _ONCE_EACH,
}


def beside(slots: Mapping[str, str]) -> dict[str, Any]:
    """The options that the parts in ``slots`` take together, whichever recipe brought them."""
    objective = slots["objective"]
    followed = FOLLOWED.get((objective, slots["target"]), {})
    # Perturbed weights decide where both have a say: their code computes the loss.
    return {**followed, **BESIDE.get((objective, slots["weights"]), {})}
