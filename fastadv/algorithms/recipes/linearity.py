"""Recipes that penalise errors of local linearity: ELLE and ELLE-A."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastadv.algorithms.publication import Published
from fastadv.algorithms.recipe import CYCLIC, OnData, Recipe, Variant
from fastadv.algorithms.recipes import fastat_training
from fastadv.algorithms.starting_words import IMAGE, UNIFORM

EIGHT = 8 / 255

# LIONS-EPFL/ELLE, whose loop calls the optimizer twice with each gradient.
ELLE: dict[str, Any] = CYCLIC | {"weight_decay": 5e-4, "normalize": False}
# There the radius rises in five steps, after each epoch; here with every update.
ELLE_ON_SVHN = {"svhn": OnData({"eps_warmup": 5.0})}
ELLE_DEPARTS = {
    "box": "the published x' and triplets are not clipped to the box; here x' is, the triplets not",
    "updates": "the published loop steps the optimizer twice with each gradient; the paper does not"
    " say so",
    "bn": "the published loop forwards x once more after the loss, which moves the statistics",
    "val_fraction": "1024 images there, 2 % here as for all recipes",
}


def elle(code: str, weight: float) -> Published:
    """What ``code`` states, with the weight of the error at eps 8/255."""
    return Published(
        code,
        model="preact_resnet18",
        data="cifar10",
        epochs=30,
        batch_size=128,
        schedule="triangular",
        lr=0.2,
        weight_decay=5e-4,
        eps=EIGHT,
        steps=1,
        alpha=EIGHT,
        attack_bn="train",
        start=IMAGE,
        more={"reg_weight": weight, "val_fraction": 1024 / 50000}
        | {"padding": "constant", "normalize": False},
        departs=ELLE_DEPARTS,
    )


def in_steps_of_fast(found: Variant) -> Variant:
    """FastAT's ELLE steps as F+FGSM does, and projects to the box only."""
    alpha = OnData(options={"alpha": 10 / 255}, where={"norm": "linf", "eps": EIGHT})
    parts = {**found.parts, "adversary": "n-fgsm", "start": "uniform"}
    return replace(found, parts=parts, on_data={**found.on_data, "cifar10": alpha})


LINEARITY: Mapping[str, Recipe] = {
    "elle": Recipe(
        "FGSM, errors of local linearity penalised",
        "Abad Rocamora et al. 2024; LIONS-EPFL/ELLE, scripts/run_elle_cifar10.sh",
        note="weight 1000 at eps 8/255; published: 5000 from 10/255, 10000 from 22/255",
        adversary="fgsm",
        regularizer="elle",
        training=ELLE,
        on_data=ELLE_ON_SVHN,
        published=elle("scripts/run_elle_cifar10.sh", 1000.0),
        variant="elle",
        variants={
            "fastat": in_steps_of_fast(
                fastat_training.row_of_own_loss(
                    "weight 1, a step of 1.25 eps from a random start, not projected to the ball; "
                    "one of three runs collapsed",
                    "elle",
                    "77.78 clean, 32.46 AutoAttack",
                    {"reg_weight": 1.0},
                    alpha=10 / 255,
                    start=UNIFORM,
                )
            )
        },
    ),
    "elle-a": Recipe(
        "FGSM, local linearity when it is lost",
        "Abad Rocamora et al. 2024; LIONS-EPFL/ELLE, scripts/run_elle-a_cifar10.sh",
        adversary="fgsm",
        regularizer="elle-a",
        training=ELLE,
        on_data=ELLE_ON_SVHN,
        published=elle("scripts/run_elle-a_cifar10.sh", 4000.0),
    ),
}
