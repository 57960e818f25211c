"""What FastAT_Benchmark trains every method with, and its rows of the methods of other papers.

Its averages are those of the whole state, BatchNorm's running statistics included, by ``ema``
without a warm-up. Of the live and the averaged network it saves the more robust one; here the
averaged one is evaluated. The reported accuracies are means of three seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastadv.algorithms.publication import Published
from fastadv.algorithms.recipe import OnData, Variant
from fastadv.algorithms.recipes.publications import with_more
from fastadv.algorithms.starting_words import IMAGE, UNIFORM, WIDE

SOURCE = "fzjcdt/FastAT_Benchmark"

TRAINING: dict[str, Any] = {"model": "resnet18", "epochs": 100, "batch_size": 128, "lr": 0.1}
TRAINING |= {"schedule": "one-cycle", "weight_decay": 5e-4}
# The cycle moves the momentum from 0.95 to 0.85 and back, whatever the configuration says.
TRAINING |= {"momentum": 0.95, "padding": "constant", "normalize": False}

SMOOTHED: dict[str, Any] = {"smoothing": 0.4, "smooth_over": "all"}
AVERAGED: dict[str, Any] = {"average_decay": 0.9995, "average_warmup": False}
AVERAGED |= {"average_buffers": True}
# An average of 2,000 updates would still hold the random start after 30 epochs of digits.
ON_DIGITS = {"digits": OnData(options={"average_decay": 0.95})}


def published(code: str, **changes: Any) -> Published:
    """The settings of one row of FastAT_Benchmark on CIFAR-10; ``code`` is its file."""
    more = {"momentum": 0.95, "val_fraction": 0.02, "normalize": False, "padding": "constant"}
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
        "start": IMAGE,
        "more": more | SMOOTHED | AVERAGED,
    }
    return Published(**settings | changes)


def row(
    note: str, code: str, reported: str, *, options: Mapping[str, Any], **changes: Any
) -> Variant:
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


def row_of_own_loss(
    note: str, file: str, reported: str, more: Mapping[str, Any], **changes: Any
) -> Variant:
    """As ``row``, for a method whose own loss of the attack stays; ``more`` are its options, and
    ``file`` is in ``fast_at/``."""
    note = f"{note}; smoothed labels, averaged weights, 100 epochs"
    code = f"fast_at/{file}.py"
    found = row(note, code, reported, options=more, **changes)
    parts = {slot: name for slot, name in found.parts.items() if slot != "attack_loss"}
    # The mode of BatchNorm has its own field.
    stated = {name: value for name, value in more.items() if name != "attack_bn"}
    return replace(found, parts=parts, published=with_more(published(code, **changes), **stated))


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
    start=UNIFORM,
)

N_FGSM = row(
    "smoothed labels, averaged weights, 100 epochs",
    "fast_at/n_fgsm.py",
    "78.6 clean, 47.77 AutoAttack",
    options={},
    start=WIDE,
)

FREE = Variant(
    SOURCE,
    "from each image anew, smoothed labels, averaged weights; FastAT steps a cycle of 200 "
    "epochs 50 times, so that its rate only rises, and here the cycle ends with the run",
    parts={"target": "label-smoothing", "averaging": "ema"},
    options=SMOOTHED | AVERAGED | {"replays": 4, "box": "delta", "keep_delta": False},
    training=TRAINING | {"epochs": 50},
    on_data=ON_DIGITS,
    published=published("fast_at/free_at.py", epochs=50, steps=0, start=IMAGE),
    reported="75.20 clean, 44.34 AutoAttack (ResNet-18, CIFAR-10)",
    summary="Free-4: 4 updates per batch",
)

PGD = Variant(
    SOURCE,
    "smoothed labels, the attack in BatchNorm's eval mode, 100 epochs; the last network counts",
    parts={"target": "label-smoothing"},
    options=SMOOTHED | {"attack_bn": "eval"},
    training=TRAINING,
    published=published(
        "fast_at/pgd_at.py",
        steps=10,
        alpha=2 / 255,
        attack_bn="eval",
        start=UNIFORM,
        more={"momentum": 0.95, "val_fraction": 0.02, **SMOOTHED},
    ),
    reported="85.4 clean, 44.33 AutoAttack, last epoch (ResNet-18, CIFAR-10)",
)

GRADALIGN = Variant(
    SOURCE,
    "smoothed labels in the update alone, averaged weights, 100 epochs",
    parts={"target": "label-smoothing", "averaging": "ema"},
    options=SMOOTHED | AVERAGED | {"edge_gradient": "whole"},
    training=TRAINING | {"peak": 0.3, "cycle_momentum": True},
    on_data=ON_DIGITS,
    published=published(
        "fast_at/grad_align.py",
        more={"momentum": 0.95, "val_fraction": 0.02, "normalize": False, "padding": "constant"}
        | SMOOTHED
        | AVERAGED
        | {"edge_gradient": "whole", "reg_weight": 0.2},
        departs={"box": "the published noisy image is clipped to [0,1]; here it is not"},
    ),
    reported="79.39 clean, 47.99 AutoAttack (ResNet-18, CIFAR-10)",
)
