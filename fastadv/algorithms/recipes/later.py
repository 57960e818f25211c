"""Recipes of several steps, published after TRADES: MART."""

from collections.abc import Mapping

from fastadv.algorithms.publication import Published
from fastadv.algorithms.recipe import OnData, Recipe

LATER: Mapping[str, Recipe] = {
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
            start="x + 0.001 N(0,1), clipped to the box by the first step",
            drops=(74 / 120, 89 / 120, 99 / 120),
            more={"beta": 5.0, "padding": "constant", "normalize": False},
        ),
        also=("misclassification aware adversarial training",),
    ),
}
