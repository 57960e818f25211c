"""The table of methods: a name, its parts, its hyper-parameters, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastadv.errors import unknown
from fastadv.parts import NONE, PARTS


@dataclass(frozen=True)
class Recipe:
    """One method. ``options`` are its parts' hyper-parameters where they differ from the parts'
    own defaults; ``training`` likewise the run's (epochs, learning rate, ...) in its publication;
    ``reported`` is the accuracy the source reports, in per cent.
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

    def parts(self) -> dict[str, str]:
        """Slot -> part name."""
        return {slot: getattr(self, slot) for slot in PARTS}


# How F+FGSM and APART train: short, with one triangular learning-rate cycle.
CYCLIC = {"epochs": 30, "lr": 0.2, "schedule": "triangular", "weight_decay": 2e-4}

METHODS: Mapping[str, Recipe] = {
    "standard": Recipe("no attack", "every paper's baseline", adversary=NONE),
    "fgsm": Recipe(
        "one step of eps from the image", "Goodfellow et al. 2015; APART, Fig. 1", adversary="fgsm"
    ),
    "fast": Recipe(
        "F+FGSM: one step of 1.25 eps from a random start",
        "Wong et al. 2020; APART, Table 1",
        adversary="fast",
        training=CYCLIC | {"weight_decay": 5e-4},
        reported="46.06 PGD-20 (PreActResNet-18, CIFAR-10)",
    ),
    "pgd": Recipe(
        "AT: PGD-10 adversarial training",
        "Madry et al. 2018; Rice et al. 2020; RWP, Table 2",
        reported="52.79 / 44.44 PGD-20 best / last (PreActResNet-18, CIFAR-10)",
    ),
    "trades": Recipe(
        "natural cross entropy + beta KL(f(x) || f(x')), the KL attacked",
        "Zhang et al. 2019; RWP, Table 4",
        objective="trades",
        options={"attack_objective": "kl", "attack_bn": "eval"},
        reported="56.33 PGD-20, 53.08 AutoAttack (WRN-34-10, CIFAR-10)",
    ),
    "awp": Recipe(
        "AT with weights perturbed per layer",
        "Wu et al. 2020; RWP, Table 2",
        weights="awp",
        reported="55.39 / 54.73 PGD-20 best / last (PreActResNet-18, CIFAR-10)",
    ),
    "rwp": Recipe(
        "AT with weights perturbed by samples of small loss",
        "RWP, Alg. 1 and Table 2",
        weights="rwp",
        reported="58.55 / 58.01 PGD-20 best / last (PreActResNet-18, CIFAR-10)",
    ),
    "advlc": Recipe(
        "PGD-10 without random start, the largest logit changes penalised",
        "AdvLC, Alg. 1 and Table 2",
        regularizer="advlc",
        options={"random_start": False, "reg_weight": 0.4},
        reported="48.73 / 45.11 AutoAttack best / last (PreActResNet-18, CIFAR-10)",
    ),
    "fgsm-plus": Recipe(
        "one step of learned size from a learned start",
        "APART, Sec. 4 and Table 4",
        adversary="fgsm-plus",
        training=CYCLIC,
    ),
    "apart": Recipe(
        "FGSM+ with a learned step inside every residual block",
        "APART, Alg. 1 and Table 1",
        adversary="apart",
        training=CYCLIC,
        reported="49.30 PGD-20, 82.45 clean (PreActResNet-18, CIFAR-10)",
    ),
}


def recipe(method: str) -> Recipe:
    """The recipe called ``method``; an unknown name is an error with the nearest one."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    return METHODS[method]


def methods() -> dict[str, str]:
    """Every method's name with one line that says what it is and where it comes from."""
    return {name: f"{row.summary} [{row.source}]" for name, row in METHODS.items()}
