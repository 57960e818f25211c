"""What FastAT_Benchmark trains every method with, and its strongest row: averaged weights.

Its averages are those of the whole state, BatchNorm's running statistics included, by ``ema``
without a warm-up. Of the live and the averaged network it saves the more robust one; here the
averaged one is evaluated. The reported accuracies are means of three seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadv.algorithms.publication import Published
from fastadv.algorithms.recipe import OnData, Recipe, Variant

SOURCE = "fzjcdt/FastAT_Benchmark"

TRAINING: dict[str, Any] = {"model": "resnet18", "epochs": 100, "batch_size": 128, "lr": 0.1}
TRAINING |= {"schedule": "triangular", "weight_decay": 5e-4}
TRAINING |= {"padding": "constant", "normalize": False}

SMOOTHED: dict[str, Any] = {"smoothing": 0.4, "smooth_over": "all"}
AVERAGED: dict[str, Any] = {"average_decay": 0.9995, "average_warmup": False}
AVERAGED |= {"average_buffers": True}
# An average of 2,000 updates would still hold the random start after 30 epochs of digits.
ON_DIGITS = {"digits": OnData(options={"average_decay": 0.95})}

SELECTION = {
    "selection": "FastAT saves the more robust of the live and the averaged network after each "
    "epoch; here the averaged one is evaluated, and the best of its epochs is saved"
}


def published(code: str, **changes: Any) -> Published:
    """The settings of one row of FastAT_Benchmark on CIFAR-10; ``code`` is its file."""
    more = {"momentum": 0.9, "val_fraction": 0.02, "normalize": False, "padding": "constant"}
    settings: dict[str, Any] = {
        "code": f"{SOURCE}, {code}, main.py and configs/cifar10",
        "model": "resnet18",
        "data": "cifar10",
        "epochs": 100,
        "batch_size": 128,
        "schedule": "one-cycle",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "eps": 8 / 255,
        "steps": 1,
        "alpha": 8 / 255,
        "attack_bn": "train",
        "start": "none: the image",
        "more": more | SMOOTHED | AVERAGED,
        "departs": SELECTION,
    }
    return Published(**settings | changes)


def row(note: str, code: str, reported: str, *, options: Mapping[str, Any], **changes: Any) -> Any:
    """The variant "fastat" of a method whose attack follows the smoothed loss, as all of FastAT's
    own attacks do; ``changes`` are the fields of ``published`` that differ."""
    return Variant(
        SOURCE,
        note,
        parts={"target": "label-smoothing", "attack_loss": "fit", "averaging": "ema"},
        options=SMOOTHED | AVERAGED | dict(options),
        training=TRAINING,
        on_data=ON_DIGITS,
        published=published(code, **changes),
        reported=f"{reported} (ResNet-18, CIFAR-10)",
    )


FGSM = row(
    "smoothed labels, averaged weights, 100 epochs; catastrophic overfitting in each of three runs",
    "fast_at/fgsm_at.py",
    "69.17 clean, 37.28 AutoAttack",
    options={},
)

FAST = row(
    "smoothed labels, averaged weights, 100 epochs",
    "fast_at/fgsm_rs.py",
    "77.7 clean, 43.09 AutoAttack, standard deviation 5.3",
    options={},
    alpha=10 / 255,
    start="uniform in the ball, clipped to the box",
)

N_FGSM = row(
    "smoothed labels, averaged weights, 100 epochs",
    "fast_at/n_fgsm.py",
    "78.6 clean, 47.77 AutoAttack",
    options={},
    start="uniform in a cube of 2 eps, clipped to the box",
)

FREE = Variant(
    SOURCE,
    "Free-4 with smoothed labels and averaged weights, 50 epochs of 4 updates per batch",
    parts={"target": "label-smoothing", "averaging": "ema"},
    options=SMOOTHED | AVERAGED | {"replays": 4},
    training=TRAINING | {"epochs": 50},
    on_data=ON_DIGITS,
    published=published(
        "fast_at/free_at.py",
        epochs=50,
        steps=4,
        start="the image, anew for each batch",
        departs=SELECTION
        | {
            "schedule": "FastAT steps a cycle of 200 epochs 50 times, so that its rate only rises; "
            "here the cycle ends with the run",
            "start": "FastAT begins each batch at the images; Free keeps its perturbation, as its "
            "authors do",
            "steps": "the 4 updates per batch, option replays",
        },
    ),
    reported="75.20 clean, 44.34 AutoAttack (ResNet-18, CIFAR-10)",
)

PGD = Variant(
    SOURCE,
    "smoothed labels, the attack in BatchNorm's eval mode, 100 epochs, no average",
    parts={"target": "label-smoothing"},
    options=SMOOTHED | {"attack_bn": "eval"},
    training=TRAINING,
    published=published(
        "fast_at/pgd_at.py",
        steps=10,
        alpha=2 / 255,
        attack_bn="eval",
        start="uniform in the ball, clipped to the box",
        more={"momentum": 0.9, "val_fraction": 0.02, **SMOOTHED},
        departs={"selection": "FastAT evaluates the last network here"},
    ),
    reported="85.4 clean, 44.33 AutoAttack, last epoch (ResNet-18, CIFAR-10)",
)

AVERAGES: Mapping[str, Recipe] = {
    "pgd-ema": Recipe(
        "AT, smoothed labels, averaged weights",
        "FastAT_Benchmark, PGD-AT-WA; Izmailov et al. 2018; Rebuffi et al. 2021",
        note="an exponential moving average of weights and statistics; the attack follows hard "
        "labels in BatchNorm's eval mode",
        target="label-smoothing",
        averaging="ema",
        options=SMOOTHED | AVERAGED | {"attack_bn": "eval"},
        training=TRAINING,
        on_data=ON_DIGITS,
        reported="82.4 clean, 50.49 AutoAttack (ResNet-18, CIFAR-10)",
        published=published(
            "fast_at/pgd_at.py",
            steps=10,
            alpha=2 / 255,
            attack_bn="eval",
            start="uniform in the ball, clipped to the box",
        ),
        also=("PGD-AT-WA", "PGD-AT+EMA"),
    ),
}
