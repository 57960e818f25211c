"""Recipes whose FGSM starts from an earlier perturbation: FGSM-PGI, by sample with momentum (MEP),
by sample (EP), by place in the batch (BP)."""

from collections.abc import Mapping
from typing import Any

from fastadv.algorithms.publication import UNSTATED, Published
from fastadv.algorithms.recipe import Recipe
from fastadv.algorithms.recipes import fastat_training
from fastadv.algorithms.starting_words import STORED_SIGNS

EIGHT = 8 / 255
PLAIN: dict[str, Any] = {"padding": "constant", "normalize": False}

# jiaxiaojunQAQ/FGSM-PGI: MultiStepLR, stepped with each update.
PGI: dict[str, Any] = {"model": "resnet18", "epochs": 110, "batch_size": 128, "lr": 0.1}
PGI |= {"schedule": "multistep", "drops": (100 / 110, 105 / 110), "weight_decay": 5e-4} | PLAIN
PGI_CODE = Published(
    "FGSM_MEP.py",
    model="resnet18",
    data="cifar10",
    epochs=110,
    batch_size=128,
    schedule="multistep",
    lr=0.1,
    weight_decay=5e-4,
    eps=EIGHT,
    steps=1,
    alpha=EIGHT,
    attack_bn="train",
    start=STORED_SIGNS,
    drops=(100 / 110, 105 / 110),
    more={"smoothing": 0.4, "reg_weight": 10.0, "momentum_decay": 0.3, "reset_every": 40} | PLAIN,
)
# The formula without momentum, and that of batches, are in the paper's Sec. 3 alone.
PGI_PAPER = Published(
    "Jia et al. 2022, Sec. 3 and 4; no code",
    model="resnet18",
    data="cifar10",
    epochs=110,
    batch_size=128,
    schedule="multistep",
    lr=0.1,
    weight_decay=5e-4,
    eps=EIGHT,
    steps=1,
    alpha=EIGHT,
    attack_bn=UNSTATED,
    start="the perturbation of the epoch or of the batch before; at first random",
    drops=(100 / 110, 105 / 110),
)

PRIORS: Mapping[str, Recipe] = {
    "fgsm-mep": Recipe(
        "FGSM from where the earlier epochs ended",
        "Jia et al. 2022; jiaxiaojunQAQ/FGSM-PGI, FGSM_MEP.py",
        note="along the momentum of each sample's gradients",
        adversary="fgsm-mep",
        attack_loss="fit",
        target="label-smoothing",
        regularizer="start-and-end",
        options={"smoothing": 0.4},
        training=PGI,
        published=PGI_CODE,
        variant="fgsm-pgi",
        variants={
            "fastat": fastat_training.row_of_own_loss(
                "a share of the label for all classes",
                "fgsm_pgi",
                "79.7 clean, 49.89 AutoAttack",
                {"reg_weight": 10.0, "momentum_decay": 0.3, "reset_every": 40, "clip_start": True},
                start=STORED_SIGNS,
            )
        },
        also=("fgsm-pgi", "pgi"),
    ),
    "fgsm-ep": Recipe(
        "FGSM from where the last epoch ended",
        "Jia et al. 2022, Sec. 3",
        note="FGSM-MEP without momentum; no code is published",
        adversary="fgsm-mep",
        attack_loss="fit",
        target="label-smoothing",
        regularizer="start-and-end",
        options={"smoothing": 0.4, "momentum_decay": 0.0},
        training=PGI,
        published=PGI_PAPER,
    ),
    "fgsm-bp": Recipe(
        "FGSM from where the last batch ended",
        "Jia et al. 2022, Sec. 3",
        note="a perturbation for each place in the batch; no code is published",
        adversary="fgsm-bp",
        attack_loss="fit",
        target="label-smoothing",
        regularizer="start-and-end",
        options={"smoothing": 0.4},
        training=PGI,
        published=PGI_PAPER,
    ),
}
