"""Recipes whose attack and update hold the predictions of an image and of its adversarial example
together: GAT by their squared difference, NuAT by a nuclear norm."""

from collections.abc import Mapping
from typing import Any

from fastadv.algorithms.publication import Published
from fastadv.algorithms.recipe import Recipe
from fastadv.algorithms.recipes import fastat_training

EIGHT = 8 / 255
PLAIN: dict[str, Any] = {"padding": "constant", "normalize": False}

# 49,000 images in batches of 64.
SRIRAMANAN: dict[str, Any] = {"model": "resnet18", "epochs": 100, "batch_size": 64, "lr": 0.1}
SRIRAMANAN |= {"weight_decay": 5e-4} | PLAIN
CORNER = "x + 4/255 times a random sign, clipped to the box"

GUIDED: Mapping[str, Recipe] = {
    "gat": Recipe(
        "natural CE, squared change of p",
        "Sriramanan et al. 2020; val-iisc/GAMA-GAT, CIFAR10/GAT_cifar10.py",
        note="p: the prediction; every second attack ascends the square also",
        adversary="fgsm-r",
        attack_loss="guided",
        start="bernoulli",
        objective="natural-ce",
        regularizer="guided",
        options={"attack_bn": "eval"},
        training=SRIRAMANAN | {"schedule": "multistep", "drops": (0.71, 0.86)},
        published=Published(
            "CIFAR10/GAT_cifar10.py",
            model="resnet18",
            data="cifar10",
            epochs=100,
            batch_size=64,
            schedule="multistep",
            lr=0.1,
            weight_decay=5e-4,
            eps=EIGHT,
            steps=1,
            alpha=EIGHT,
            attack_bn="eval",
            start=CORNER,
            drops=(0.71, 0.86),
            more={"reg_weight": 10.0, "start_scale": 0.5} | PLAIN,
        ),
        variant="gat",
        variants={
            "fastat": fastat_training.row_of_own_loss(
                "the attack follows the smoothed loss",
                "gat",
                "85.10 clean, 49.15 AutoAttack",
                {"reg_weight": 10.0, "start_scale": 0.5},
                attack_bn="eval",
                start=CORNER,
                departs={
                    "updates": "in the first, third, ... update of each epoch its attack takes the "
                    "softmax twice",
                    "bn": "its evaluation leaves the network in eval mode, in which the first pass "
                    "of the next epoch does not move the statistics",
                },
            )
        },
        also=("guided adversarial training",),
    ),
    "nuat": Recipe(
        "natural CE, nuclear norm of the change",
        "Sriramanan et al. 2021; val-iisc/NuAT, CIFAR10/NuAT_cifar10.py",
        note="of the logits; every second attack ascends the norm also",
        adversary="fgsm-r",
        attack_loss="nuclear",
        start="bernoulli",
        objective="natural-ce",
        regularizer="nuclear",
        options={"attack_bn": "eval"},
        training=SRIRAMANAN | {"schedule": "triangular", "peak": 0.4},
        published=Published(
            "CIFAR10/NuAT_cifar10.py",
            model="resnet18",
            data="cifar10",
            epochs=100,
            batch_size=64,
            schedule="cyclic, then steps",
            lr=0.1,
            weight_decay=5e-4,
            eps=EIGHT,
            steps=1,
            alpha=EIGHT,
            attack_bn="eval",
            start=CORNER,
            more={"reg_weight": 4.5, "ramp_end": 0.9, "start_scale": 0.5, "peak": 0.4} | PLAIN,
            departs={
                "schedule": "up in 40 epochs, down to a fifth until epoch 80, divided by 10 after "
                "epochs 85 and 90; here up in 40 and down to 0 in 60",
            },
        ),
        variant="nuat",
        variants={
            "fastat": fastat_training.row_of_own_loss(
                "weight 4 at the end of the run, the attack in BatchNorm's training mode",
                "nu_at",
                "81.0 clean, 50.10 AutoAttack",
                {"reg_weight": 4.0, "ramp_end": 1.0, "start_scale": 0.5, "attack_bn": "train"},
                start=CORNER,
            )
        },
        also=("nu-at", "nuclear norm adversarial training"),
    ),
}
