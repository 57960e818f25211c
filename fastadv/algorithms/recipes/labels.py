"""Recipes with other labels or samples: soft labels, weighted samples, more data."""

from collections.abc import Mapping
from typing import Any

from fastadv.algorithms.recipe import (
    KL_ATTACK,
    MEMORIZATION,
    MEMORIZATION_ON_SVHN,
    RADIUS,
    RICE,
    SMOOTH,
    STEP,
    TRADES,
    TRADES_ATTACK,
    Recipe,
    Variant,
)
from fastadv.algorithms.recipes import publications

EVAL_ATTACK = {"attack_bn": "eval"}
ON = "best / last (ResNet-18, CIFAR-10)"
# 256 images per batch, half of them pseudo-labelled; 200 epochs of 50,000 images (Carmon et al.).
RST: dict[str, Any] = {"model": "wide_resnet28_10", "epochs": 200, "batch_size": 256, "lr": 0.1}
RST |= {"schedule": "cosine-epoch", "nesterov": True, "weight_decay": 5e-4}
RST |= {"padding": "constant", "normalize": False} | RADIUS

# LayneH/self-adaptive-training. Its epochs count from 1, as TRADES' do.
SELF_ADAPTIVE: dict[str, Any] = TRADES | {"model": "wide_resnet34_10", "epochs": 100}
SELF_ADAPTIVE |= {"weight_decay": 2e-4, "drops": (74 / 100, 89 / 100, 99 / 100)} | RADIUS

# zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training. The 60th of its epochs, which
# count from 1, is the first with a lower learning rate.
GAIRAT: dict[str, Any] = {"model": "wide_resnet32_10", "epochs": 120, "schedule": "multistep"}
GAIRAT |= {"drops": (59 / 120, 89 / 120, 109 / 120), "drop_factors": (0.1, 0.1, 0.5)}
GAIRAT |= {"weight_decay": 2e-4, "padding": "constant", "normalize": False} | RADIUS

# The memorization paper's study of random labels, without augmentation.
RANDOM_LABELS: dict[str, Any] = {"model": "wide_resnet28_10", "epochs": 300, "weight_decay": 0.0}
RANDOM_LABELS |= {"schedule": "multistep", "drops": (100 / 300, 200 / 300), "normalize": False}
RANDOM_LABELS |= {"pad": 0, "flip": False, "padding": "constant"}

LABELS: Mapping[str, Recipe] = {
    "te": Recipe(
        "AT, predictions near their average",
        "Memorization, Eq. 7 and Tables 1, 2 and C.1",
        published=publications.TE,
        note="temporal ensembling, PGD-AT+TE: predictions are held to their running average",
        target="temporal-ensembling",
        start="uniform-unclipped",
        options=EVAL_ATTACK,
        training=MEMORIZATION,
        on_data=MEMORIZATION_ON_SVHN,
        reported=f"55.79 / 54.83 PGD-10, 50.59 / 49.62 AutoAttack {ON}",
        elsewhere="PGD-10 best / last, ResNet-18: CIFAR-10 L2 72.58 / 71.93; SVHN 59.74 / 59.05; "
        "CIFAR-100 31.74 / 30.24. CIFAR-10: WRN-34-10 59.30 / 56.63; VGG-16 52.06 / 51.29",
        also=("PGD-AT+TE",),
    ),
    "trades-te": Recipe(
        "TRADES, predictions near their average",
        "Memorization, Sec. 4.2 and Tables 1 and C.1",
        published=publications.TRADES_TE,
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
        published=publications.SMOOTHED,
        note="PGD-AT+LS; its strength is not published",
        target="label-smoothing",
        options=EVAL_ATTACK,
        training=MEMORIZATION,
        reported=f"53.70 / 48.90 PGD-10, 49.02 / 44.39 AutoAttack {ON}",
        also=("PGD-AT+LS", "AT+LS"),
    ),
    "sat": Recipe(
        "AT, labels move towards predictions",
        "Huang et al. 2020; Memorization, Table 2",
        published=publications.SAT,
        note="the network's predictions; no published code",
        target="self-adaptive",
        options=EVAL_ATTACK,
        training=MEMORIZATION,
        reported=f"53.81 / 53.31 PGD-10, 50.21 / 49.73 AutoAttack {ON}",
        also=("self-adaptive training",),
    ),
    "trades-sat": Recipe(
        "TRADES, labels move towards predictions",
        "Huang et al. 2020 (released code)",
        published=publications.TRADES_SAT,
        note="the network's predictions",
        objective="trades",
        target="self-adaptive",
        attack_loss="kl",
        options=TRADES_ATTACK,
        training=SELF_ADAPTIVE,
        on_data=STEP,
    ),
    "kd-swa": Recipe(
        "AT, two teachers, weights averaged",
        "Chen et al. 2021; Memorization, Table 2",
        published=publications.KD_SWA_AGAIN,
        note="a standard and a robust teacher, option teachers",
        target="distillation",
        averaging="swa",
        options={"average_start": 0.275},
        training=MEMORIZATION | {"drops": (50 / 200, 150 / 200)},
        reported=f"54.89 / 53.80 PGD-10, 50.42 / 49.83 AutoAttack {ON}",
        variant="memorization",
        variants={
            "smoothening": Variant(
                "Chen et al. 2021",
                "its own code: a PreActResNet-18 on normalized images, a tenth held out",
                training=SMOOTH | {"model": "preact_resnet18", "normalize": True},
                published=publications.KD_SWA,
            )
        },
    ),
    "clean-mixed": Recipe(
        "AT, clean loss faded out over the run",
        "Memorization, Eq. 6 and Fig. A.8",
        published=publications.CLEAN_MIXED,
        note="the share of the adversarial loss rises",
        objective="clean-mixed",
        options=EVAL_ATTACK,
        training=RANDOM_LABELS,
    ),
    "gairat": Recipe(
        "AT, samples near the boundary weigh more",
        "Zhang et al. 2021 (released code); RAT, Table 4",
        published=publications.GAIRAT,
        note="decision boundary",
        objective="gairat",
        options=EVAL_ATTACK,
        training=GAIRAT,
        on_data=STEP,
        reported="57.81 / 53.76 PGD-20 best / last (WRN-32-10 in the code's README, which RAT "
        "quotes as PreActResNet-18; CIFAR-10)",
    ),
    "at-leave-out": Recipe(
        "AT without the samples of small loss",
        "RWP, Fig. 4",
        published=publications.LEAVE_OUT,
        note="option leave_out_below",
        options={"leave_out_below": 0.5},
        on_data=RICE,
    ),
    "rst": Recipe(
        "TRADES, also on pseudo-labelled images",
        "Carmon et al. 2019; RWP, Table 2",
        published=publications.RST,
        note="half of each batch",
        objective="rst",
        attack_loss="kl",
        options=TRADES_ATTACK,
        training=RST,
        on_data=STEP,
        reported="89.69 clean, 62.60 PGD-20, 59.53 AutoAttack (WRN-28-10, CIFAR-10)",
    ),
    "rst-awp": Recipe(
        "RST, weights perturbed per layer",
        "Wu et al. 2020; RWP, Table 2",
        published=publications.RST_AWP,
        objective="rst",
        weights="awp",
        attack_loss="kl",
        options=TRADES_ATTACK,
        training=RST,
        on_data=STEP,
        reported="88.25 clean, 63.73 PGD-20, 60.05 AutoAttack (WRN-28-10, CIFAR-10)",
    ),
    "rst-rwp": Recipe(
        "RST, weights perturbed by easy samples",
        "RWP, Table 2",
        published=publications.RST_RWP,
        note="easy: of small loss; no published code runs",
        objective="rst",
        weights="rwp",
        attack_loss="kl",
        options=TRADES_ATTACK,
        training=RST,
        on_data=STEP,
        reported="88.87 clean, 64.11 PGD-20, 60.36 AutoAttack (WRN-28-10, CIFAR-10)",
    ),
}
