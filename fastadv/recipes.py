"""The table of methods: a name, its parts, its hyper-parameters, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping

from fastadv.errors import unknown
from fastadv.parts import NONE
from fastadv.recipe_row import ADVLC, CYCLIC, GENTLE, KL_ATTACK, Recipe
from fastadv.recipes_labels import LABELS
from fastadv.recipes_smoothness import SMOOTHNESS

__all__ = ["METHODS", "Recipe", "methods", "recipe"]

METHODS: Mapping[str, Recipe] = {
    "standard": Recipe("no attack", "every paper's baseline", adversary=NONE),
    "fgsm": Recipe(
        "one step of eps from the image", "Goodfellow et al. 2015; APART, Fig. 1", adversary="fgsm"
    ),
    "fast": Recipe(
        "F+FGSM: one step of 1.25 eps from a random start",
        "Wong et al. 2020; APART, Table 2",
        adversary="fast",
        training=CYCLIC | {"weight_decay": 5e-4},
        reported="83.81 clean, 46.06 PGD-20 (PreActResNet-18, CIFAR-10)",
    ),
    "fgsm-r": Recipe(
        "one step of eps from a random start",
        "AdvLC, Sec. 4.1 and Fig. 2",
        adversary="fgsm-r",
        training=ADVLC,
    ),
    "fgsm-n": Recipe(
        "FGSM on noisy images, the ball around the noisy image",
        "AdvLC, Sec. 5.1 and Table 1",
        adversary="fgsm-n",
        training=ADVLC,
        reported="41.77 / 34.19 AutoAttack best / last, 83.51 / 83.72 clean "
        "(PreActResNet-18, CIFAR-10)",
    ),
    "n-fgsm": Recipe(
        "one step of eps from noise of 2 eps, not projected",
        "de Jorge et al. 2022",
        adversary="n-fgsm",
        training=CYCLIC | {"weight_decay": 5e-4},
    ),
    "free": Recipe(
        "Free-8: each batch updates weights and perturbation 8 times from one backward each",
        "Shafahi et al. 2019; APART, Tables 2 and 3 (ImageNet, Table 5: Free-4, replays=4)",
        adversary="free",
        training={"epochs": 10, "lr": 0.04, "schedule": "triangular", "weight_decay": 5e-4},
        reported="81.64 clean, 47.37 PGD-20 (PreActResNet-18, CIFAR-10)",
    ),
    "atta-1": Recipe(
        "one step from the perturbation the last epoch left",
        "Zheng et al. 2020 (ImageNet, APART, Table 5: ATTA-2, steps=2)",
        adversary="atta",
        training=CYCLIC,
    ),
    "atta-3": Recipe(
        "three steps from the perturbation the last epoch left",
        "Zheng et al. 2020",
        adversary="atta",
        options={"steps": 3},
        training=CYCLIC,
    ),
    "atta-10": Recipe(
        "ten steps from the perturbation the last epoch left",
        "Zheng et al. 2020; APART, Tables 2 and 3",
        adversary="atta",
        options={"steps": 10},
        training=CYCLIC,
        reported="82.10 clean, 49.03 PGD-20 (PreActResNet-18, CIFAR-10)",
    ),
    "pgd": Recipe(
        "AT: PGD-10 adversarial training",
        "Madry et al. 2018; Rice et al. 2020; RWP, Table 1; RAT, Table 1",
        reported="52.79 / 44.44 PGD-20 best / last (PreActResNet-18, CIFAR-10); "
        "56.10 PGD-20, 52.60 AutoAttack (WRN-34-10)",
    ),
    "pgd-zero": Recipe(
        "PGD-10 from the image itself",
        "AdvLC, Table 1 (PGD10)",
        options={"random_start": False},
        training=ADVLC,
        reported="46.50 / 40.42 AutoAttack best / last (PreActResNet-18, CIFAR-10)",
    ),
    "pgd-eval": Recipe(
        "PGD-10 attacking with BatchNorm's running statistics",
        "Memorization, Table 2 (PGD-AT)",
        options={"attack_bn": "eval"},
        reported="52.64 / 44.92 PGD-10, 47.74 / 41.84 AutoAttack best / last (ResNet-18, CIFAR-10)",
    ),
    "pgd-shrunk": Recipe(
        "PGD-20, the perturbation shrunk by half (option shrink)",
        "AdvLC, Sec. 4.3 and Fig. 4b",
        options={"steps": 20, "random_start": False, "shrink": 0.5},
        training=ADVLC,
    ),
    "pgd-flipped": Recipe(
        "PGD-20, the sign of a quarter of the perturbation flipped (option flip_signs)",
        "AdvLC, Sec. 4.3 and Fig. 4c",
        options={"steps": 20, "random_start": False, "flip_signs": 0.25},
        training=ADVLC,
    ),
    "trades": Recipe(
        "natural cross entropy + beta KL(f(x) || f(x')), the KL attacked",
        "Zhang et al. 2019; RWP, Table 2",
        objective="trades",
        options=KL_ATTACK,
        reported="84.65 clean, 56.33 PGD-20, 53.08 AutoAttack (WRN-34-10, CIFAR-10)",
    ),
    "awp": Recipe(
        "AT with weights perturbed per layer",
        "Wu et al. 2020; RWP, Table 1",
        weights="awp",
        reported="55.39 / 54.73 PGD-20 best / last (PreActResNet-18, CIFAR-10); "
        "58.14 PGD-20, 54.04 AutoAttack (WRN-34-10)",
    ),
    "awp-loss-range": Recipe(
        "AWP, its direction from samples whose adversarial loss lies in loss_range",
        "RWP, Fig. 1c",
        weights="awp",
        options={"loss_range": (0.0, 1.5)},
    ),
    "rwp": Recipe(
        "AT with weights perturbed by samples of small loss",
        "RWP, Alg. 1 and Table 1",
        weights="rwp",
        reported="58.55 / 58.01 PGD-20 best / last (PreActResNet-18, CIFAR-10); "
        "62.87 PGD-20, 54.61 AutoAttack (WRN-34-10)",
    ),
    "trades-awp": Recipe(
        "TRADES with weights perturbed per layer",
        "Wu et al. 2020; RWP, Table 2",
        objective="trades",
        weights="awp",
        options=KL_ATTACK | GENTLE,
        reported="85.36 clean, 59.27 PGD-20, 56.17 AutoAttack (WRN-34-10, CIFAR-10)",
    ),
    "trades-rwp": Recipe(
        "TRADES with weights perturbed by samples of small loss (no published code runs)",
        "RWP, Table 2",
        objective="trades",
        weights="rwp",
        options=KL_ATTACK | GENTLE,
        reported="86.14 clean, 60.45 PGD-20, 57.20 AutoAttack (WRN-34-10, CIFAR-10)",
    ),
    "rat-lr": Recipe(
        "AT whose layer groups 3 and 4 keep the initial learning rate",
        "RAT, Alg. 1, Sec. 3.3 and Table 1",
        layers="rat-lr",
        reported="51.57 / 49.07 PGD-20, 46.89 / 45.35 AutoAttack best / last "
        "(PreActResNet-18, CIFAR-10)",
    ),
    "rat-wp": Recipe(
        "AT with the weights of layer groups 3 and 4 perturbed",
        "RAT, Eq. 6, Sec. 3.3 and Table 1",
        weights="awp",
        options={"groups": ("3", "4")},
        reported="54.85 / 53.98 PGD-20, 49.19 / 48.24 AutoAttack best / last "
        "(PreActResNet-18, CIFAR-10)",
    ),
    "at-fix-lr-k": Recipe(
        "AT whose layer groups k keep the initial learning rate (option layer_groups)",
        "RAT, Fig. 3a",
        layers="fixed-lr",
        options={"layer_groups": ("4",)},
    ),
    "at-fix-param-k": Recipe(
        "AT whose layer groups k never learn (option layer_groups)",
        "RAT, Fig. 2a",
        layers="frozen",
        options={"layer_groups": ("4",)},
    ),
    "at-awp-k": Recipe(
        "AT with the weights of layer groups k perturbed (option groups)",
        "RAT, Fig. 4a",
        weights="awp",
        options={"groups": ("4",)},
    ),
    "trades-awp-k": Recipe(
        "TRADES with the weights of layer groups k perturbed (option groups)",
        "RAT, Sec. 3.3 (released code)",
        objective="trades",
        weights="awp",
        options=KL_ATTACK | GENTLE | {"groups": ("3", "4")},
    ),
    "swa": Recipe(
        "AT, the mean of the weights over the second half of the run evaluated",
        "Izmailov et al. 2018; RAT, Table 4",
        averaging="swa",
        reported="52.14 / 51.53 PGD-20 best / last (PreActResNet-18, CIFAR-10)",
    ),
    "advlc": Recipe(
        "PGD-10 without random start, the largest logit changes penalised",
        "AdvLC, Alg. 1 and Table 1",
        regularizer="advlc",
        options={"random_start": False, "reg_weight": 0.4},
        reported="48.73 / 45.11 AutoAttack best / last (PreActResNet-18, CIFAR-10)",
    ),
    "fgsm-plus": Recipe(
        "one step of learned size from a learned start",
        "APART, Sec. 3.2 and Table 6 (APART without layer-wise perturbation)",
        adversary="fgsm-plus",
        training=CYCLIC,
        reported="83.30 clean, 46.35 PGD-20 (PreActResNet-18, CIFAR-10)",
    ),
    "apart": Recipe(
        "FGSM+ with a learned step inside every residual block",
        "APART, Alg. 1 and Table 2",
        adversary="apart",
        training=CYCLIC,
        reported="82.45 clean, 49.30 PGD-20 (PreActResNet-18, CIFAR-10)",
    ),
    "apart-no-layers": Recipe(
        "APART without layer-wise perturbation: FGSM+",
        "APART, Table 6",
        adversary="apart",
        options={"layerwise": False},
        training=CYCLIC,
        reported="83.30 clean, 46.35 PGD-20 (PreActResNet-18, CIFAR-10)",
    ),
    "apart-no-start": Recipe(
        "APART without perturbation initialisation: every sample starts at its image",
        "APART, Table 6",
        adversary="apart",
        options={"learned_start": False},
        training=CYCLIC,
        reported="82.00 clean, 48.40 PGD-20 (PreActResNet-18, CIFAR-10)",
    ),
    **LABELS,
    **SMOOTHNESS,
}


def recipe(method: str) -> Recipe:
    """The recipe called ``method``; an unknown name is an error with the nearest one."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    return METHODS[method]


def methods() -> dict[str, str]:
    """Every method's name with one line that says what it is and where it comes from."""
    return {name: f"{row.summary} [{row.source}]" for name, row in METHODS.items()}
