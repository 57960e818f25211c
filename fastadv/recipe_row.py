"""One row of the table of methods, and the settings that many rows share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastadv.parts import NONE, PARTS


@dataclass(frozen=True)
class Recipe:
    """One method. ``options`` are its parts' hyper-parameters where they differ from the parts'
    own defaults; ``training`` likewise the run's (epochs, learning rate, ...) in its publication;
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
    reported: str = ""
    elsewhere: str = ""

    def parts(self) -> dict[str, str]:
        """Slot -> part name."""
        return {slot: getattr(self, slot) for slot in PARTS}


# How F+FGSM and APART train: short, with one triangular learning-rate cycle.
CYCLIC: dict[str, Any] = {"epochs": 30, "lr": 0.2, "schedule": "triangular", "weight_decay": 2e-4}

# How AdvLC trains everything on CIFAR-10.
ADVLC: dict[str, Any] = {"epochs": 200, "batch_size": 100, "lr": 0.1, "schedule": "piecewise"}
ADVLC |= {"weight_decay": 1e-4, "padding": "constant"}

# How the memorization paper trains on CIFAR; on SVHN see ``presets``.
MEMORIZATION: dict[str, Any] = {"model": "resnet18", "padding": "constant"}

KL_ATTACK: dict[str, Any] = {"attack_objective": "kl", "attack_bn": "eval"}
# Weight perturbations of TRADES; published epochs count from 1 and begin to perturb with the 10th.
GENTLE: dict[str, Any] = {"gamma": 0.005, "warmup_epochs": 9}
