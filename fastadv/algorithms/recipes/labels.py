"""Recipes with other labels or samples: soft labels, weighted samples, more data."""

from collections.abc import Mapping
from typing import Any

from fastadv.algorithms.recipe import (
    KL_ATTACK,
    MEMORIZATION,
    MEMORIZATION_ON_SVHN,
    RICE,
    TRADES,
    Recipe,
)

EVAL_ATTACK = {"attack_bn": "eval"}
ON = "best / last (ResNet-18, CIFAR-10)"
# 256 images per batch, half of them pseudo-labelled; 200 epochs of 50,000 images (Carmon et al.).
# There the learning rate follows its cosine once per epoch, here with every update.
RST: dict[str, Any] = {"model": "wide_resnet28_10", "epochs": 200, "batch_size": 256, "lr": 0.1}
RST |= {"schedule": "cosine", "nesterov": True, "weight_decay": 5e-4}
RST |= {"padding": "constant", "normalize": False}

LABELS: Mapping[str, Recipe] = {
    "te": Recipe(
        "AT, predictions near their average",
        "Memorization, Eq. 7 and Tables 1, 2 and C.1",
        note="temporal ensembling, PGD-AT+TE: predictions are held to their running average",
        target="temporal-ensembling",
        start="uniform-unclipped",
        options=EVAL_ATTACK,
        training=MEMORIZATION,
        on_data=MEMORIZATION_ON_SVHN,
        reported=f"55.79 / 54.83 PGD-10, 50.59 / 49.62 AutoAttack {ON}",
        elsewhere="PGD-10 best / last, ResNet-18: CIFAR-10 L2 72.58 / 71.93; SVHN 59.74 / 59.05; "
        "CIFAR-100 31.74 / 30.24. CIFAR-10: WRN-34-10 59.30 / 56.63; VGG-16 52.06 / 51.29",
    ),
    "trades-te": Recipe(
        "TRADES, predictions near their average",
        "Memorization, Sec. 4.2 and Tables 1 and C.1",
        note="temporal ensembling: predictions are held to their running average",
        objective="trades",
        target="temporal-ensembling",
        attack_loss="kl",
        options=KL_ATTACK,
        training=MEMORIZATION,
        on_data=MEMORIZATION_ON_SVHN,
        reported=f"55.15 / 54.42 PGD-10, 49.77 / 49.20 AutoAttack {ON}",
        elsewhere="PGD-10 best / last, ResNet-18: CIFAR-10 L2 72.72 / 72.43; SVHN 59.81 / 58.49; "
        "CIFAR-100 31.09 / 30.12",
    ),
    "label-smoothing": Recipe(
        "AT with smoothed labels",
        "Pang et al. 2021; Memorization, Table 2",
        note="PGD-AT+LS; its strength is not published",
        target="label-smoothing",
        options=EVAL_ATTACK,
        training=MEMORIZATION,
        reported=f"53.70 / 48.90 PGD-10, 49.02 / 44.39 AutoAttack {ON}",
    ),
    "sat": Recipe(
        "AT, labels move towards predictions",
        "Huang et al. 2020; Memorization, Table 2",
        note="the network's predictions; no published code",
        target="self-adaptive",
        options=EVAL_ATTACK,
        training=MEMORIZATION,
        reported=f"53.81 / 53.31 PGD-10, 50.21 / 49.73 AutoAttack {ON}",
    ),
    "trades-sat": Recipe(
        "TRADES, labels move towards predictions",
        "Huang et al. 2020 (released code)",
        note="the network's predictions",
        objective="trades",
        target="self-adaptive",
        attack_loss="kl",
        options=KL_ATTACK,
        training=TRADES | {"epochs": 100, "weight_decay": 2e-4, "drops": (0.74, 0.89, 0.99)},
    ),
    "kd-swa": Recipe(
        "AT, two teachers, weights averaged",
        "Chen et al. 2021; Memorization, Table 2",
        note="a standard and a robust teacher, option teachers",
        target="distillation",
        averaging="swa",
        options={"average_start": 0.275},
        training=MEMORIZATION | {"drops": (50 / 200, 150 / 200)},
        reported=f"54.89 / 53.80 PGD-10, 50.42 / 49.83 AutoAttack {ON}",
    ),
    "clean-mixed": Recipe(
        "AT, clean loss faded out over the run",
        "Memorization, Eq. 6 and Fig. A.8",
        note="the share of the adversarial loss rises",
        objective="clean-mixed",
        options=EVAL_ATTACK,
    ),
    "gairat": Recipe(
        "AT, samples near the boundary weigh more",
        "Zhang et al. 2021; RAT, Table 4",
        note="decision boundary",
        objective="gairat",
        options=EVAL_ATTACK,
        reported="57.81 / 53.76 PGD-20 best / last (PreActResNet-18, CIFAR-10)",
    ),
    "at-leave-out": Recipe(
        "AT without the samples of small loss",
        "RWP, Fig. 4",
        note="option leave_out_below",
        options={"leave_out_below": 0.5},
        on_data=RICE,
    ),
    "rst": Recipe(
        "TRADES, also on pseudo-labelled images",
        "Carmon et al. 2019; RWP, Table 2",
        note="half of each batch",
        objective="rst",
        attack_loss="kl",
        options=KL_ATTACK,
        training=RST,
        reported="89.69 clean, 62.60 PGD-20, 59.53 AutoAttack (WRN-28-10, CIFAR-10)",
    ),
    "rst-awp": Recipe(
        "RST, weights perturbed per layer",
        "Wu et al. 2020; RWP, Table 2",
        objective="rst",
        weights="awp",
        attack_loss="kl",
        options=KL_ATTACK,
        training=RST,
        reported="88.25 clean, 63.73 PGD-20, 60.05 AutoAttack (WRN-28-10, CIFAR-10)",
    ),
    "rst-rwp": Recipe(
        "RST, weights perturbed by easy samples",
        "RWP, Table 2",
        note="easy: of small loss; no published code runs",
        objective="rst",
        weights="rwp",
        attack_loss="kl",
        options=KL_ATTACK,
        training=RST,
        reported="88.87 clean, 64.11 PGD-20, 60.36 AutoAttack (WRN-28-10, CIFAR-10)",
    ),
}
