"""What a run takes where the user says nothing, per data set and method, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastadv.algorithms.recipe import BESIDE
from fastadv.algorithms.recipes.table import recipe
from fastadv.algorithms.resolution import choose_parts, known_options
from fastadv.run.defaults import DEFAULTS
from fastadv.run.origin import Origin
from fastadv.threat import USUAL_EPS


@dataclass(frozen=True)
class Preset:
    """Settings of a run on one data set. ``published``: a method's own published training
    settings (``Recipe.training``) come before these."""

    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    published: bool = True


_CIFAR = {
    "model": "preact_resnet18",
    "epochs": 200,
    "batch_size": 128,
    "lr": 0.1,
    "schedule": "piecewise",
    "weight_decay": 5e-4,
    "pad": 4,
    "flip": True,
    "padding": "reflect",
    "val_fraction": 0.02,
}

DATA: Mapping[str, Preset] = {
    "digits": Preset(
        "measured here: 8x8 images, where 0.2 of the range is what an 8/255 is to a photograph",
        {
            "model": "preact_resnet18",
            "width": 16,
            "epochs": 30,
            "batch_size": 64,
            "lr": 0.3,
            "schedule": "triangular",
            "weight_decay": 5e-4,
            "eps": 0.2,
            "pad": 0,
            "flip": False,
            "padding": "constant",
            "val_fraction": 0.1,
        },
        published=False,
    ),
    "cifar10": Preset("Rice et al. 2020; RWP, Sec. 4.1", _CIFAR),
    "cifar100": Preset(
        "RWP, Sec. 4.1 and its code, which pads black here", _CIFAR | {"padding": "constant"}
    ),
    "svhn": Preset(
        "Rice et al. 2020 (lr 0.01, no augmentation); RWP, Sec. 4.1",
        _CIFAR
        | {"lr": 0.01, "pad": 0, "flip": False, "padding": "constant"}
        | {"eval_alpha": 1 / 255},
    ),
    "imagenet": Preset(
        "the network of Wong et al. 2020; else as CIFAR-10",
        _CIFAR | {"model": "resnet50", "stem": "imagenet", "padding": "constant"},
    ),
}
OTHER = Preset("as CIFAR-10", _CIFAR | {"padding": "constant"})


# For every radius: the paper trains with 2/255 to 10/255 at these rates.
_LEARNED_STEPS = (
    {"epochs": 30, "batch_size": 128},
    {"step_size_lr": 5e-8, "step_size_decay": 400.0},
)
_LEARNED_ON_IMAGENET = ({"epochs": 15}, {"step_size_lr": 4e-9, "step_size_decay": 5000.0})
_LINF = {"norm": "linf", "eps": 8 / 255}
_SMALL_STEP = {"alpha": 1 / 255}
# What a part takes on one data set, whichever method it stands in: (slot, part, data).
PART_ON_DATA: Mapping[tuple[str, str, str], Mapping[str, Any]] = {
    # Strengths published for CIFAR-10 blow up on 8x8 images at a rate of 0.2, whose input
    # gradients are larger (measured: igr, cure and logitalign diverge, gradalign stays at chance).
    ("regularizer", "igr", "digits"): {"reg_weight": 1.0},
    ("regularizer", "cure", "digits"): {"reg_weight": 0.05},
    ("regularizer", "gradalign", "digits"): {"reg_weight": 0.5},
    ("regularizer", "logitalign", "digits"): {"reg_weight": 2.0},
    ("regularizer", "consistency", "digits"): {"reg_weight": 5.0},
    # Measured: under a triangular cycle the published 30, which met a rate that had dropped
    # tenfold, drives a short run to a constant prediction; 3 does not.
    ("target", "temporal-ensembling", "digits"): {"te_weight": 3.0},
}

# The same for two parts together: (objective, weights, data). The published 10th of 200 epochs is
# the 2nd of 30.
PAIR_ON_DATA: Mapping[tuple[str, str, str], Mapping[str, Any]] = {
    (*pair, "digits"): {"warmup_epochs": 1} for pair in BESIDE
}

# Those whose published code is robust_overfitting's.
_RICE: tuple[str, ...] = ("pgd", "awp", "rwp", "swa", "rat-lr", "rat-wp", "at-fix-lr-k")
_RICE += ("at-fix-param-k", "at-awp-k", "awp-loss-range", "at-leave-out")

# Options of parts that were published for one data set only. The numbers hold for the settings
# they were published with; elsewhere the parts' own rules apply.
METHOD_ON_DATA: Mapping[tuple[str, str], tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    **{
        (method, data): _LEARNED_STEPS
        for method in ("apart", "apart-no-layers", "apart-no-start", "fgsm-plus")
        for data in ("cifar10", "cifar100")
    },
    ("rwp", "cifar100"): ({}, {"c_min": 4.0}),
    ("awp", "svhn"): (_LINF, _SMALL_STEP | {"warmup_epochs": 5}),
    ("rwp", "svhn"): (_LINF, _SMALL_STEP | {"warmup_epochs": 5}),
    **{(method, "svhn"): (_LINF, _SMALL_STEP) for method in _RICE if method not in ("awp", "rwp")},
    ("apart-imagenet", "imagenet"): _LEARNED_ON_IMAGENET,
}

_MEMORIZATION_ON_SVHN = {"epochs": 80, "lr": 0.01, "schedule": "cosine", "eval_alpha": 2 / 255}

# How a method was trained on one data set, where that differs from its row in the table.
TRAINING_ON_DATA: Mapping[tuple[str, str], Mapping[str, Any]] = {
    **{(method, "cifar100"): {"augmentation": "rotate"} for method in _RICE},
    ("pgd-eval", "svhn"): _MEMORIZATION_ON_SVHN,
    ("te", "svhn"): _MEMORIZATION_ON_SVHN,
    ("trades", "svhn"): _MEMORIZATION_ON_SVHN,
    ("trades-te", "svhn"): _MEMORIZATION_ON_SVHN,
}


def preset_of(data: str) -> Preset:
    """The preset of a data set, which may be named with a path: "folder:PATH"."""
    return DATA.get(_kind(data), OTHER)


def _kind(data: str) -> str:
    return data.partition(":")[0]


@dataclass(frozen=True)
class Presets:
    """Settings of a run and options of its parts, each with its origin.

    ``known``: every option that the parts of the method have.
    """

    settings: dict[str, Any]
    origins: dict[str, Origin]
    options: dict[str, Any]
    option_origins: dict[str, Origin]
    known: frozenset[str]


def presets_for(
    method: str, data: str, given: Mapping[str, Any], options: Mapping[str, Any]
) -> Presets:
    """What ``method`` takes on ``data`` where the user says nothing.

    ``given`` are the settings the user chose: they decide whether published step-size rates
    apply. ``options`` are the parts' options and swapped parts that the user chose; an option of
    a part that was swapped out is not among those returned.
    """
    row, kind, preset = recipe(method), _kind(data), preset_of(data)
    settings = dict(preset.settings)
    norm = given.get("norm", DEFAULTS["norm"])
    published = {**row.training, **TRAINING_ON_DATA.get((method, kind), {})}
    published = published if preset.published else {}
    settings |= published
    if preset.published and norm != "linf":
        for name in ("eps", "eval_alpha"):
            settings.pop(name, None)  # published ones are all of Linf balls
    origins = {name: Origin.RECIPE if name in published else Origin.DATA for name in settings}
    if "eps" not in settings:
        settings["eps"], origins["eps"] = USUAL_EPS[norm], Origin.DEFAULT
    slots = choose_parts(row, options)
    of_parts: dict[str, Any] = {}
    for slot, part in slots.items():
        of_parts |= PART_ON_DATA.get((slot, part, kind), {})
    of_parts |= PAIR_ON_DATA.get((slots["objective"], slots["weights"], kind), {})
    conditions, of_method = METHOD_ON_DATA.get((method, kind), ({}, {}))
    final = settings | {"norm": norm} | dict(given)
    if any(final.get(name) != value for name, value in conditions.items()):
        of_method = {}
    option_origins = dict.fromkeys(of_parts, Origin.DATA) | dict.fromkeys(of_method, Origin.RECIPE)
    known = frozenset(known_options(slots))
    chosen = {n: value for n, value in {**of_parts, **of_method}.items() if n in known}
    return Presets(settings, origins, chosen, option_origins, known)
