"""Recipes whose attack grows over the run: in a ball that rises from 0, by more steps, or after
epochs without any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastadv.algorithms.publication import UNSTATED, Published
from fastadv.algorithms.recipe import RICE, OnData, Recipe, Variant
from fastadv.algorithms.starting_words import NEAR, UNIFORM
from fastadv.by_epoch import Phases, Ramp

_EPOCHS = 110
# In the released code eps rises once per epoch, here with every update.
_TRAINING: dict[str, Any] = {"model": "resnet18", "epochs": _EPOCHS, "batch_size": 128, "lr": 0.2}
_TRAINING |= {"schedule": "cosine-epoch", "weight_decay": 5e-4, "eps_warmup": float(_EPOCHS)}
_TRAINING |= {"padding": "constant", "normalize": False}

_PARTS: dict[str, Any] = {
    "beta": 11.0,
    "attack_bn": "eval",
    "bn_passes": ("natural", "adversarial"),
}
_PARTS |= {"gamma": 0.005, "warmup_epochs": 9}
# Its epochs count from 1: the average begins with the first update of the 83rd.
_PARTS |= {"average_decay": 0.9996, "average_warmup": False, "average_buffers": True}
_PARTS |= {"average_start": 82 / _EPOCHS}


def _step(largest: float) -> Mapping[str, OnData]:
    """A step that rises with eps to ``largest``, in pixels, on the published data sets."""
    where = {"norm": "linf", "eps": 8 / 255, "epochs": _EPOCHS, "eps_warmup": float(_EPOCHS)}
    taken = OnData(options={"alpha": Ramp(0.0, largest, float(_EPOCHS))}, where=where)
    return {"cifar10": taken, "cifar100": taken}


# Measured: with the published beta of 11 a triangular cycle to 0.3 ends in a constant prediction.
_DIGITS = OnData(
    options={"average_decay": 0.95, "average_start": 0.34, "warmup_epochs": 1, "beta": 6.0}
)

_PUBLISHED = Published(
    code="val-iisc/DAJAT, train_DAJAT.py, defaults.py and run.sh",
    model="resnet18",
    data="cifar10",
    epochs=_EPOCHS,
    batch_size=128,
    schedule="cosine-epoch",
    lr=0.2,
    weight_decay=5e-4,
    eps=8 / 255,
    steps=5,
    alpha=4 / 255,
    attack_bn="eval",
    start=NEAR,
    more={"val_fraction": 0.02, "normalize": False, "padding": "constant", **_PARTS},
)

# Its epochs count from 1; the rate drops at the beginning of the 60th, the 90th and the 110th.
_FAT: dict[str, Any] = {"model": "wide_resnet32_10", "epochs": 120, "batch_size": 128, "lr": 0.1}
_FAT |= {"schedule": "multistep", "drops": (59 / 120, 89 / 120, 109 / 120)}
_FAT |= {"drop_factors": (0.1, 0.1, 0.5), "weight_decay": 2e-4, "eps": 0.031}
_FAT |= {"padding": "constant", "normalize": False}
_FAT_PHASES = OnData(
    options={"alpha": 0.007, "tau": Phases([(0, 0), (50, 1), (90, 2)])},
    where={"norm": "linf", "eps": 0.031, "epochs": 120},
)

# No code of it is published; the paper's settings were not at hand and are not compared.
_CLEAN_FIRST = Published(
    code="Gupta et al. 2020 (arXiv 2002.04237); no code is published",
    model=UNSTATED,
    data="cifar10",
    epochs=UNSTATED,
    batch_size=UNSTATED,
    schedule=UNSTATED,
    lr=UNSTATED,
    drops=UNSTATED,
    weight_decay=UNSTATED,
    eps=UNSTATED,
    steps=UNSTATED,
    alpha=UNSTATED,
    attack_bn=UNSTATED,
    start=UNSTATED,
    more={"attack_start": UNSTATED},
)

PHASED: Mapping[str, Recipe] = {
    "acat": Recipe(
        "TRADES with AWP, eps rises over the run",
        "Addepalli et al. 2022; val-iisc/DAJAT",
        note="ascending constraint, ACAT; the script means 2 to 5 steps by epoch, but each of its "
        "conditions is tested and the last one holds: 5 steps of eps/2 throughout",
        objective="trades",
        attack_loss="kl",
        weights="awp",
        averaging="ema",
        options=_PARTS | {"steps": 5},
        training=_TRAINING,
        on_data={**_step(4 / 255), "digits": _DIGITS},
        published=_PUBLISHED,
        variant="dajat",
        variants={
            "paper": Variant(
                "Addepalli et al. 2022 (two-step defense; option train_budget=low of the code)",
                "two steps of eps",
                options={"steps": 2},
                on_data=_step(8 / 255),
                published=replace(_PUBLISHED, steps=2, alpha=8 / 255),
            )
        },
        also=("ACAT",),
    ),
    "fat": Recipe(
        "PGD that stops once an image is fooled",
        "Zhang et al. 2020; zjfheart/Friendly-Adversarial-Training, FAT.py",
        note="friendly adversarial training; images move 0, 1, then 2 steps further, option tau",
        adversary="friendly",
        options={"attack_bn": "eval"},
        training=_FAT,
        on_data={"cifar10": _FAT_PHASES, "svhn": _FAT_PHASES},
        reported="89.34 clean, 46.13 PGD-20 (WRN-32-10, CIFAR-10)",
        published=Published(
            code="zjfheart/Friendly-Adversarial-Training, FAT.py and earlystop.py",
            model="wide_resnet32_10",
            data="cifar10",
            epochs=120,
            batch_size=128,
            schedule="multistep",
            drops=_FAT["drops"],
            lr=0.1,
            weight_decay=2e-4,
            eps=0.031,
            steps=10,
            alpha=0.007,
            attack_bn="eval",
            start=UNIFORM,
            more={"drop_factors": _FAT["drop_factors"], "step_noise": 0.001, "normalize": False},
        ),
        also=("friendly adversarial training",),
    ),
    "clean-first": Recipe(
        "standard training first, then PGD",
        "Gupta et al. 2020",
        note="the switch at half of the run is fastadv's choice, and the training is that of "
        "Rice et al. 2020",
        adversary="clean-first",
        on_data=RICE,
        published=_CLEAN_FIRST,
    ),
}
