"""The table of methods: name, parts, hyper-parameters and their source."""

from __future__ import annotations

import re

from fastadv.algorithms import plugins
from fastadv.algorithms.recipe import (
    ADVLC,
    ADVLC_SECTION_4,
    ATTACKED_FIRST,
    CYCLIC,
    GREY,
    LINF,
    MEMORIZATION,
    MEMORIZATION_ON_SVHN,
    RADIUS,
    RICE,
    RICE_WARM,
    ROTATED,
    SMALL_STEP,
    SMOOTH,
    STEP,
    TRADES,
    TRADES_ATTACK,
    OnData,
    Recipe,
    Variant,
    as_advlc_runs,
)
from fastadv.algorithms.recipes import fastat_training, publications
from fastadv.algorithms.recipes.distances import DISTANCES
from fastadv.algorithms.recipes.fast import FAST
from fastadv.algorithms.recipes.fastat import FASTAT
from fastadv.algorithms.recipes.guided import GUIDED
from fastadv.algorithms.recipes.labels import LABELS
from fastadv.algorithms.recipes.linearity import LINEARITY
from fastadv.algorithms.recipes.logged import with_clean, without_clean
from fastadv.algorithms.recipes.phased import PHASED
from fastadv.algorithms.recipes.priors import PRIORS
from fastadv.algorithms.recipes.radii import RADII
from fastadv.algorithms.recipes.smoothness import SMOOTHNESS
from fastadv.algorithms.slots import NONE
from fastadv.errors import UserError, brief, unknown

__all__ = ["METHODS", "Recipe", "methods", "recipe"]

# The SVHN settings of the RWP paper beside those of its code.
RWP_ON_SVHN = OnData(options=SMALL_STEP | {"warmup_epochs": 5, "c_min": 2.2}, where=LINF)

# What the error for a name that is near no other lists.
LISTED = ("fast", "pgd", "trades (`fastadv methods` lists all)")

METHODS: dict[str, Recipe] = {
    "standard": Recipe(
        "no attack",
        "every paper's baseline; AdvLC, Table 1",
        published=publications.CLEAN,
        adversary=NONE,
        training=ADVLC,
        reported="44.25 / 94.88 clean, 2.61 / 0.00 AutoAttack, most robust / last epoch "
        "(PreActResNet-18, CIFAR-10)",
        also=("natural", "clean", "standard training"),
    ),
    "fgsm": Recipe(
        "one step of eps from the image",
        "Goodfellow et al. 2015; APART, Fig. 1",
        published=publications.FGSM_CYCLIC,
        adversary="fgsm",
        training=CYCLIC | GREY,
        reported="44.36 PGD-20 after 20 epochs, 0.00 after 21 (PreActResNet-18, CIFAR-10)",
        variant="apart",
        variants={"fastat": fastat_training.FGSM},
        also=("FGSM-AT",),
    ),
    "fgsm-r": Recipe(
        "one step of eps from a random start",
        "AdvLC, Sec. 4.1 and Fig. 2",
        published=publications.FGSM_R,
        adversary="fgsm-r",
        training=ADVLC_SECTION_4,
    ),
    "fgsm-n": Recipe(
        "FGSM on noisy images, ball around those",
        "AdvLC, Sec. 5.1 and Table 1",
        published=publications.FGSM_N,
        adversary="fgsm-n",
        training=ADVLC,
        variant="paper",
        variants=as_advlc_runs(publications.FGSM_N),
        reported="41.77 / 34.19 AutoAttack best / last, 83.51 / 83.72 clean "
        "(PreActResNet-18, CIFAR-10)",
        also=("FGSM-N AT",),
    ),
    "pgd": Recipe(
        "AT: PGD-10 adversarial training",
        "Madry et al. 2018; Rice et al. 2020; RWP, Tables 1 and 2; RAT, Tables 1 to 4",
        published=publications.RICE,
        on_data=RICE,
        reported="52.79 / 44.44 (RAT: 52.31 / 44.45) PGD-20 best / last "
        "(PreActResNet-18, CIFAR-10)",
        elsewhere="PGD-20 best / last (RWP), PreActResNet-18: CIFAR-10 L2 69.15 / 65.93; SVHN "
        "53.36 / 44.49, L2 66.87 / 65.03; CIFAR-100 27.22 / 20.82, L2 41.33 / 35.27. WRN-34-10: "
        "CIFAR-10 86.07 clean, 56.10 PGD-20, 52.60 AutoAttack. (RAT) PreActResNet-18: CIFAR-10 L2 "
        "69.27 / 65.86; SVHN 53.10 / 44.12, L2 66.29 / 64.73; CIFAR-100 28.07 / 21.24, L2 "
        "41.38 / 35.34. WRN-34-10: CIFAR-10 55.57 / 47.37, L2 70.57 / 68.99; SVHN 55.57 / 47.11, "
        "L2 67.19 / 65.08; CIFAR-100 30.74 / 24.89, L2 44.05 / 41.22",
        variant="madry",
        variants={
            "fastat": fastat_training.PGD,
            "robust-overfitting": with_clean(publications.RICE),
            "rwp": without_clean(publications.PGD_BY_RWP),
        },
        also=("PGD-AT", "AT", "PGD-10", "vanilla AT"),
    ),
    "pgd-zero": Recipe(
        "PGD-10 from the image itself",
        "AdvLC, Tables 1 and 2 (PGD10)",
        published=publications.PGD_10,
        start="center",
        training=ADVLC,
        variant="paper",
        variants=as_advlc_runs(publications.PGD_10),
        reported="46.50 / 40.42 AutoAttack best / last, 83.40 / 83.58 clean "
        "(PreActResNet-18, CIFAR-10)",
        elsewhere="44.71 clean, 19.74 APGD-50 with 5 restarts (TinyImageNet)",
        also=("PGD10 AT",),
    ),
    "pgd-eval": Recipe(
        "PGD-10, attack in BatchNorm's eval mode",
        "Memorization, Tables 1, 2 and C.1 (PGD-AT)",
        published=publications.PGD_EVAL,
        options={"attack_bn": "eval"},
        training=MEMORIZATION,
        on_data=MEMORIZATION_ON_SVHN,
        reported="52.64 / 44.92 PGD-10, 47.74 / 41.84 AutoAttack best / last (ResNet-18, CIFAR-10)",
        elsewhere="PGD-10 best / last, ResNet-18: CIFAR-10 L2 69.05 / 65.96; SVHN 54.51 / 46.97; "
        "CIFAR-100 29.40 / 21.75. CIFAR-10: WRN-34-10 55.83 / 49.52; VGG-16 48.52 / 43.02",
        also=("PGD-AT",),
    ),
    "pgd-shrunk": Recipe(
        "PGD-20, perturbation halved",
        "AdvLC, Sec. 4.3 and Fig. 4b",
        published=publications.WEAKENED,
        note="option shrink",
        start="center",
        options={"steps": 20, "shrink": 0.5},
        training=ADVLC_SECTION_4,
    ),
    "pgd-flipped": Recipe(
        "PGD-20, a quarter of the signs flipped",
        "AdvLC, Sec. 4.3 and Fig. 4c",
        published=publications.WEAKENED,
        note="option flip_signs",
        start="center",
        options={"steps": 20, "flip_signs": 0.25},
        training=ADVLC_SECTION_4,
    ),
    "trades": Recipe(
        "CE(f(x), y) + beta KL(f(x) || f(x'))",
        "Zhang et al. 2019; RWP, Table 2; Memorization, Tables 1 and C.1",
        published=publications.TRADES_BY_RWP,
        note="the attack maximises the KL",
        objective="trades",
        attack_loss="kl",
        options=TRADES_ATTACK,
        training=TRADES,
        on_data=MEMORIZATION_ON_SVHN,
        reported="84.65 clean, 56.33 PGD-20, 53.08 AutoAttack (WRN-34-10, CIFAR-10)",
        elsewhere="PGD-10 best / last, ResNet-18: CIFAR-10 53.32 / 50.25, L2 70.22 / 66.07; SVHN "
        "59.50 / 57.04; CIFAR-100 29.93 / 27.70",
        variant="rwp",
        variants={
            "rwp-code": Variant(
                "RWP (released code)",
                "forwards x' before x, and x twice",
                options=ATTACKED_FIRST,
                published=publications.TRADES,
                reported="84.65 clean, 56.33 PGD-20, 53.08 AutoAttack (WRN-34-10, CIFAR-10)",
            ),
            "trades": Variant(
                "Zhang et al. 2019 (released code)",
                "76 epochs of a WRN-34-10 with eps 0.031 and steps of 0.007",
                training={"model": "wide_resnet34_10", "epochs": 76, "drops": (74 / 76,)}
                | {"weight_decay": 2e-4}
                | RADIUS,
                on_data=STEP,
                published=publications.TRADES_CODE,
                reported="84.92 clean, 56.61 PGD-20 (WRN-34-10, CIFAR-10, eps 0.031)",
            ),
            "memorization": Variant(
                "Memorization, Tables 1 and C.1",
                "a ResNet-18 by the memorization paper's code, which forwards x and x' once each "
                "and has robust_overfitting's steps in L2",
                options={"bn_passes": ("natural", "adversarial")}
                | {"l2_form": "robust-overfitting"},
                training=MEMORIZATION | {"drops": (100 / 200, 150 / 200)},
                published=publications.TRADES_AGAIN,
                reported="53.32 / 50.25 PGD-10 best / last (ResNet-18, CIFAR-10)",
            ),
        },
    ),
    "awp": Recipe(
        "AT, weights perturbed per layer",
        "Wu et al. 2020; RWP, Tables 1 and 2; RAT, Table 4",
        published=publications.AWP,
        weights="awp",
        on_data=RICE_WARM,
        reported="55.39 / 54.73 PGD-20 best / last (PreActResNet-18, CIFAR-10)",
        elsewhere="PGD-20 best / last, PreActResNet-18: CIFAR-10 L2 72.69 / 72.08; SVHN "
        "59.12 / 55.87, L2 72.57 / 67.73; CIFAR-100 30.71 / 30.28, L2 45.60 / 44.66. WRN-34-10: "
        "CIFAR-10 85.57 clean, 58.14 PGD-20, 54.04 AutoAttack",
        variant="paper",
        variants={
            "awp": with_clean(publications.AWP, late=True),
            "rwp": without_clean(publications.AWP_BY_RWP),
        },
        also=("AT-AWP",),
    ),
    "awp-loss-range": Recipe(
        "AWP along samples in a range of losses",
        "RWP, Fig. 1c",
        published=publications.AWP_LOSS_RANGE,
        note="option loss_range, of the adversarial loss",
        weights="awp",
        options={"loss_range": (0.0, 1.5)},
        on_data=RICE,
    ),
    "rwp": Recipe(
        "AT, weights perturbed by easy samples",
        "RWP, Alg. 1 and Tables 1 and 2",
        published=publications.RWP,
        note="easy: of small loss",
        weights="rwp",
        on_data=RICE_WARM | {"cifar100": OnData(ROTATED, {"c_min": 4.0})},
        reported="58.55 / 58.01 PGD-20 best / last (PreActResNet-18, CIFAR-10)",
        elsewhere="PGD-20 best / last, PreActResNet-18: CIFAR-10 L2 74.47 / 73.84; SVHN "
        "61.15 / 57.45, L2 73.35 / 69.48; CIFAR-100 31.17 / 30.64, L2 45.71 / 45.05. WRN-34-10: "
        "CIFAR-10 86.86 clean, 62.87 PGD-20, 54.61 AutoAttack",
        variant="rwp",
        variants={
            "paper": Variant(
                "RWP, Sec. 5.1",
                "on SVHN (Linf) c_min is 2.2 as the paper prints it, where its code has 1.7",
                on_data={"svhn": RWP_ON_SVHN},
                published=publications.RWP_PAPER,
            ),
            "rwp-log": without_clean(publications.RWP),
        },
        also=("AT-RWP",),
    ),
    "trades-awp": Recipe(
        "TRADES, weights perturbed per layer",
        "Wu et al. 2020; RWP, Table 2",
        published=publications.TRADES_AWP,
        objective="trades",
        weights="awp",
        attack_loss="kl",
        options=TRADES_ATTACK,
        training=TRADES,
        reported="85.36 clean, 59.27 PGD-20, 56.17 AutoAttack (WRN-34-10, CIFAR-10)",
    ),
    "trades-rwp": Recipe(
        "TRADES, weights perturbed by easy samples",
        "RWP, Table 2",
        published=publications.TRADES_RWP,
        note="easy: of small loss; no published code runs",
        objective="trades",
        weights="rwp",
        attack_loss="kl",
        options=TRADES_ATTACK,
        training=TRADES,
        reported="86.14 clean, 60.45 PGD-20, 57.20 AutoAttack (WRN-34-10, CIFAR-10)",
    ),
    "rat-lr": Recipe(
        "AT, layer groups 3,4 at the initial rate",
        "RAT, Alg. 1, Sec. 3.3 and Tables 1 to 4 (WRN-34-10: split=quarters)",
        published=publications.RAT_LR,
        note="initial learning rate",
        layers="rat-lr",
        on_data=RICE,
        reported="51.57 / 49.07 PGD-20, 46.89 / 45.35 AutoAttack best / last "
        "(PreActResNet-18, CIFAR-10)",
        elsewhere="PGD-20 best / last, PreActResNet-18: CIFAR-10 L2 68.97 / 68.21; SVHN "
        "53.32 / 43.41, L2 66.47 / 62.10; CIFAR-100 26.57 / 26.18, L2 38.31 / 37.76. WRN-34-10: "
        "CIFAR-10 55.50 / 47.32, L2 71.91 / 68.94; SVHN 55.34 / 46.81, L2 67.50 / 64.24; CIFAR-100 "
        "30.57 / 23.53, L2 44.43 / 40.42",
        variant="paper",
        variants={"layerwise": with_clean(publications.RAT_LR)},
    ),
    "rat-wp": Recipe(
        "AT, weights of layer groups 3,4 perturbed",
        "RAT, Eq. 6, Sec. 3.3 and Tables 1 to 4 (WRN-34-10: split=quarters)",
        published=publications.RAT_WP,
        weights="awp",
        options={"groups": ("3", "4")},
        on_data=RICE_WARM,
        reported="54.85 / 53.98 PGD-20, 49.19 / 48.24 AutoAttack best / last "
        "(PreActResNet-18, CIFAR-10)",
        elsewhere="PGD-20 best / last, PreActResNet-18: CIFAR-10 L2 70.77 / 69.49; SVHN "
        "57.91 / 54.32, L2 71.66 / 65.68; CIFAR-100 30.91 / 30.42, L2 45.23 / 44.93. WRN-34-10: "
        "CIFAR-10 58.92 / 58.23, L2 71.31 / 69.19; SVHN 58.48 / 54.92, L2 69.07 / 64.76; CIFAR-100 "
        "30.81 / 25.46, L2 46.12 / 44.64",
        variant="paper",
        variants={
            "layerwise": with_clean(publications.RAT_WP, late=True),
            "layer-wise-ro": without_clean(publications.RAT_WP_AGAIN),
        },
    ),
    "at-fix-lr-k": Recipe(
        "AT, layer groups k at the initial rate",
        "RAT, Fig. 3a",
        published=publications.FIXED_LR,
        note="initial learning rate, option layer_groups",
        layers="fixed-lr",
        options={"layer_groups": ("4",)},
        on_data=RICE,
        variant="paper",
        variants={"layerwise": with_clean(publications.FIXED_LR)},
    ),
    "at-fix-param-k": Recipe(
        "AT, layer groups k frozen",
        "RAT, Fig. 2a",
        published=publications.FROZEN,
        note="option layer_groups",
        layers="frozen",
        options={"layer_groups": ("4",)},
        on_data=RICE,
        variant="paper",
        variants={"layerwise": with_clean(publications.FROZEN)},
    ),
    "at-awp-k": Recipe(
        "AT, weights of layer groups k perturbed",
        "RAT, Fig. 4a",
        published=publications.AWP_K,
        note="option groups",
        weights="awp",
        options={"groups": ("4",)},
        on_data=RICE_WARM,
        variant="paper",
        variants={
            "layerwise": with_clean(publications.AWP_K_FIRST, late=True),
            "layer-wise-ro": without_clean(publications.AWP_K),
        },
    ),
    "trades-awp-k": Recipe(
        "TRADES, weights of groups k perturbed",
        "RAT, Sec. 3.3 (released code)",
        published=publications.TRADES_AWP_K,
        note="option groups",
        objective="trades",
        weights="awp",
        attack_loss="kl",
        options=TRADES_ATTACK | {"groups": ("3", "4")},
        training=TRADES,
    ),
    "swa": Recipe(
        "AT, weights averaged from epoch 55 on",
        "Izmailov et al. 2018; Chen et al. 2021; RAT, Table 4",
        published=publications.SMOOTHENING,
        note="of 200",
        averaging="swa",
        options={"average_start": 55 / 200},
        training=SMOOTH,
        on_data={"svhn": RICE["svhn"], "digits": OnData(options={"average_start": 0.5})},
        reported="52.14 / 51.53 PGD-20 best / last (PreActResNet-18, CIFAR-10)",
        also=("AT-SWA",),
    ),
    "advlc": Recipe(
        "PGD-10, largest logit changes penalised",
        "AdvLC, Alg. 1 and Table 1",
        published=publications.penalised(publications.PGD_10, 0.4),
        note="starts at the image",
        regularizer="advlc",
        start="center",
        options={"reg_weight": 0.4},
        training=ADVLC,
        variant="paper",
        variants=as_advlc_runs(publications.penalised(publications.PGD_10, 0.4)),
        reported="48.73 / 45.11 AutoAttack best / last, 81.16 / 82.23 clean "
        "(PreActResNet-18, CIFAR-10)",
        also=("PGD10+AdvLC",),
    ),
    **FAST,
    **DISTANCES,
    **PHASED,
    **LABELS,
    **SMOOTHNESS,
    **GUIDED,
    **PRIORS,
    **LINEARITY,
    **RADII,
    **FASTAT,
}


def recipe(method: str) -> Recipe:
    """The recipe called ``method``. Raises ``UserError`` for an unknown name, with the one that is
    written so but for capitals and hyphens, those that others call so (``Recipe.also``), those
    whose names contain it, or the nearest one."""
    if not isinstance(method, str):
        raise UserError(f"method is the name of a method, such as 'pgd', not {brief(method)}.")
    plugins.load_installed()
    if method in METHODS:
        return METHODS[method]
    ours = called_here(method)
    if len(ours) == 1:
        raise UserError(f"{method} is called {ours[0]!r} here: take that name.")
    if ours:
        raise UserError(f"{method} is called {_either(ours)} here; `fastadv methods` says which.")
    words = re.sub(r"[^a-z0-9]+", "-", str(method).lower()).strip("-")
    inside = [name for name in METHODS if f"-{words}-" in f"-{name}-"]
    if words and inside:
        raise UserError(f"No method is called {method!r} alone; take {_either(inside)}.")
    raise unknown("method", method, METHODS, listed=LISTED)


def called_here(method: str) -> list[str]:
    """The names here of what is written so but for capitals and hyphens, or what others call so."""
    asked = _letters(method)
    return [name for name, row in METHODS.items() if asked in map(_letters, (name, *row.also))]


def _letters(name: str) -> str:
    """``name`` without what people write differently: capitals, hyphens, spaces, and a plus that is
    not at the end (FGSM+ is not FGSM)."""
    lower = str(name).lower().strip()
    return "".join(filter(str.isalnum, lower)) + "+" * lower.endswith("+")


def _either(names: list[str]) -> str:
    return " or ".join(map(repr, names))


def methods() -> dict[str, str]:
    """Name of a method -> one line that says what it is, with its source."""
    plugins.load_installed()
    return {name: f"{row.what()} [{row.source}]" for name, row in METHODS.items()}
