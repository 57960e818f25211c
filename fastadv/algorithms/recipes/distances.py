"""Recipes that hold the predictions at two points together as TRADES does, by another distance or
at another point: MART, LIET, IKL, HAT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadv.algorithms.publication import Published
from fastadv.algorithms.recipe import OnData, Recipe
from fastadv.algorithms.recipes import fastat_training
from fastadv.algorithms.starting_words import NEAR
from fastadv.by_epoch import Ramp

_LIET: dict[str, Any] = {"smoothing": 0.6, "kind": "js", "reg_weight": 100.0, "reg_ramp": True}

# The released script means 2 to 5 steps by epoch; since each of its conditions is tested and the
# last one always holds, it takes 5 steps of eps/2 throughout. The checkpoints of all epochs are
# averaged by another script.
_IKL: dict[str, Any] = {"model": "wide_resnet34_10", "epochs": 200, "batch_size": 128, "lr": 0.2}
_IKL |= {"schedule": "cosine-epoch", "weight_decay": 5e-4, "eps_warmup": 200.0}
_IKL |= {"padding": "constant", "normalize": False}
_IKL_PARTS: dict[str, Any] = {"steps": 5, "attack_bn": "eval", "gamma": 0.005, "warmup_epochs": 9}
_IKL_PARTS |= {"average_at": "epoch", "average_decay": 0.9, "average_warmup": False}
_IKL_PARTS |= {"average_buffers": True}
_IKL_STEP = OnData(
    options={"alpha": Ramp(0.0, 4 / 255, 200.0)},
    where={"norm": "linf", "eps": 8 / 255, "epochs": 200, "eps_warmup": 200.0},
)

_HAT: dict[str, Any] = {"model": "resnet18", "epochs": 50, "batch_size": 128, "lr": 0.21}
_HAT |= {"schedule": "one-cycle", "peak": 0.25, "momentum": 0.95, "nesterov": True}
_HAT |= {"weight_decay": 5e-4, "padding": "constant", "normalize": False}
_HAT_PARTS: dict[str, Any] = {"beta": 2.5, "reg_weight": 0.5, "helper_scale": 2.0}

DISTANCES: Mapping[str, Recipe] = {
    "mart": Recipe(
        "misclassified examples weigh more",
        "Wang et al. 2020; YisenWang/MART, mart.py and train_resnet.py",
        note="KL(f(x) || f(x')) times 1 - p_y(x), and a margin",
        objective="mart",
        start="gaussian",
        options={"attack_bn": "eval"},
        training={
            "model": "resnet18",
            "epochs": 120,
            "batch_size": 128,
            "lr": 0.01,
            "weight_decay": 3.5e-3,
            "eps": 0.031,
            "schedule": "multistep",
            # Its epochs count from 1; the rate drops at the beginning of the 75th, 90th and 100th.
            "drops": (74 / 120, 89 / 120, 99 / 120),
            "padding": "constant",
            "normalize": False,
        },
        on_data={"cifar10": OnData(options={"alpha": 0.007}, where={"norm": "linf", "eps": 0.031})},
        elsewhere="87.50 clean, 56.29 AutoAttack (WRN-28-10, CIFAR-10 and 500,000 unlabelled "
        "images; RobustBench)",
        published=Published(
            "mart.py, train_resnet.py",
            model="resnet18",
            data="cifar10",
            epochs=120,
            batch_size=128,
            schedule="multistep",
            lr=0.01,
            weight_decay=3.5e-3,
            eps=0.031,
            steps=10,
            alpha=0.007,
            attack_bn="eval",
            start=NEAR,
            drops=(74 / 120, 89 / 120, 99 / 120),
            more={"beta": 5.0, "padding": "constant", "normalize": False},
        ),
        also=("misclassification aware adversarial training",),
    ),
    "liet": Recipe(
        "one step from images of the labels",
        "Pan et al. 2025; FastAT_Benchmark, fast_at/liet.py",
        note="label information elimination: starts are signs of the loss at a grey image, partly "
        "noise; predictions at start and end are held together, and labels smoothed at random",
        adversary="liet",
        attack_loss="fit",
        target="random-smoothing",
        regularizer="advlc",
        averaging="ema",
        options=_LIET | fastat_training.AVERAGED,
        training=fastat_training.TRAINING,
        on_data={"digits": OnData(options={"average_decay": 0.95, "reg_weight": 10.0})},
        reported="80.7 clean, 49.99 AutoAttack (ResNet-18, CIFAR-10)",
        published=fastat_training.published(
            "fast_at/liet.py",
            start="the label information or noise, with a random sign for the batch",
            more={"momentum": 0.95, "val_fraction": 0.02, **_LIET, **fastat_training.AVERAGED}
            | {"renew_every": 20, "min_mask": 0.1, "max_mask": 0.5},
        ),
    ),
    "ikl": Recipe(
        "TRADES, KL decoupled and class-weighted",
        "Cui et al. 2024; jiequancui/DKL, DKLv1/Adv-training-dkl",
        note="improved KL, IKL-AT: squares of the logits' changes, weighted by each class, and a "
        "cross entropy; with AWP",
        objective="ikl",
        attack_loss="kl",
        weights="awp",
        averaging="ema",
        options=_IKL_PARTS,
        training=_IKL,
        on_data={
            "cifar10": _IKL_STEP,
            "cifar100": _IKL_STEP,
            # Measured: at the published 20 the gradients overflow under a triangular cycle to 0.3.
            "digits": OnData(options={"warmup_epochs": 1, "average_decay": 0.5, "mse_weight": 5.0}),
        },
        reported="85.31 clean, 57.13 AutoAttack (WRN-34-10, CIFAR-10)",
        elsewhere="CIFAR-100, WRN-34-10: 65.76 clean, 31.91 AutoAttack",
        published=Published(
            code="jiequancui/DKL, DKLv1/Adv-training-dkl/train_dkl_cifar10.py, swa.py and "
            "sh/train_dkl_cifar10.sh",
            model="wide_resnet34_10",
            data="cifar10",
            epochs=200,
            batch_size=128,
            schedule="cosine-epoch",
            lr=0.2,
            weight_decay=5e-4,
            eps=8 / 255,
            steps=5,
            alpha=4 / 255,
            attack_bn="eval",
            start=NEAR,
            more={"ce_weight": 4.0, "mse_weight": 20.0, "class_temperature": 4.0}
            | {"gamma": 0.005, "warmup_epochs": 9, "average_decay": 0.9},
            departs={
                "updates": "there epoch e of 200, from 1, has eps 8/255 e/200 and the rate of a "
                "cosine at e/201; here eps rises with every update, and the cosine is at (e-1)/200"
            },
        ),
        also=("IKL-AT", "DKL"),
    ),
    "hat": Recipe(
        "TRADES, a standard net's label beyond x'",
        "Rade and Moosavi-Dezfooli 2022; imrahulr/hat, core/utils/hat.py",
        note="helper-based training, option helper; its one cycle of the rate moves with every "
        "update, here with every epoch",
        objective="trades",
        attack_loss="kl",
        regularizer="helper",
        options=_HAT_PARTS | {"attack_bn": "eval", "bn_passes": ("natural", "adversarial")},
        training=_HAT,
        reported="84.90 clean, 49.08 AutoAttack (ResNet-18, CIFAR-10)",
        elsewhere="SVHN, ResNet-18: 92.46 clean, 53.19 AutoAttack; TinyImageNet, PreActResNet-18: "
        "52.60, 18.14",
        published=Published(
            code="imrahulr/hat, core/utils/hat.py, core/utils/parser.py and README",
            model="resnet18",
            data="cifar10",
            epochs=50,
            batch_size=128,
            schedule="one-cycle",
            lr=0.21,
            weight_decay=5e-4,
            eps=8 / 255,
            steps=10,
            alpha=2 / 255,
            attack_bn="eval",
            start=NEAR,
            more={"peak": 0.25, "nesterov": True, "normalize": False, **_HAT_PARTS},
        ),
    ),
}
