"""What a run takes where the user says nothing, per data set and method, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastadv.algorithms.recipe import OnData, beside_on
from fastadv.algorithms.recipes.table import recipe
from fastadv.algorithms.resolution import VARIANT, choose_parts, known_options, part_classes
from fastadv.errors import unknown
from fastadv.run.defaults import DEFAULTS
from fastadv.run.origin import Origin
from fastadv.run.request import setting_types
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
    if VARIANT in given:
        row = row.of_variant(given[VARIANT])
    settings = dict(preset.settings)
    norm = given.get("norm", DEFAULTS["norm"])
    here = row.on_data.get(kind, OnData())
    for name in (*row.training, *here.training, *here.where):
        if name not in setting_types():
            raise unknown(f"setting of the recipe {method!r}:", name, setting_types())
    published = {**row.training, **here.training} if preset.published else {}
    settings |= published
    if preset.published and norm != "linf":
        for name in ("eps", "eval_alpha"):
            settings.pop(name, None)  # published ones are all of Linf balls
    origins = {name: Origin.RECIPE if name in published else Origin.DATA for name in settings}
    if "eps" not in settings:
        settings["eps"], origins["eps"] = USUAL_EPS[norm], Origin.DEFAULT
    slots = choose_parts(row, options)
    of_parts: dict[str, Any] = {}
    for part in part_classes(slots).values():
        of_parts |= part.on_data.get(kind, {})
    of_parts |= beside_on(slots, kind)
    final = settings | {"norm": norm} | dict(given)
    apply = all(final.get(name) == value for name, value in here.where.items())
    of_method = here.options if apply else {}
    option_origins = dict.fromkeys(of_parts, Origin.DATA) | dict.fromkeys(of_method, Origin.RECIPE)
    known = frozenset(known_options(slots))
    chosen = {n: value for n, value in {**of_parts, **of_method}.items() if n in known}
    return Presets(settings, origins, chosen, option_origins, known)
