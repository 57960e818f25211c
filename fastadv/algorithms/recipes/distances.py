"""Recipes that hold the predictions at two points together by another distance than TRADES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadv.algorithms.recipe import OnData, Recipe
from fastadv.algorithms.recipes import averaged

_LIET: dict[str, Any] = {"smoothing": 0.6, "kind": "js", "reg_weight": 100.0, "reg_ramp": True}

DISTANCES: Mapping[str, Recipe] = {
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
        options=_LIET | averaged.AVERAGED,
        training=averaged.TRAINING,
        on_data={"digits": OnData(options={"average_decay": 0.95, "reg_weight": 10.0})},
        reported="80.7 clean, 49.99 AutoAttack (ResNet-18, CIFAR-10)",
        published=averaged.published(
            "fast_at/liet.py",
            start="the label information or noise, with a random sign for the batch",
            more={"momentum": 0.9, "val_fraction": 0.02, **_LIET, **averaged.AVERAGED}
            | {"renew_every": 20, "min_mask": 0.1, "max_mask": 0.5},
        ),
    ),
}
