"""Recipes that attack with one gradient, or reuse one: F+FGSM, Free, ATTA, FGSM+, APART.

The CIFAR accuracies of the APART paper are those after 30 epochs; its ImageNet ones are quoted from
the methods' own papers. Its baselines' scripts are not published: rows that only it reports take
the images (not normalized, grey border) and the network of its own code.
"""

from collections.abc import Mapping
from typing import Any

from fastadv.algorithms.publication import Published
from fastadv.algorithms.recipe import (
    CYCLIC,
    GREY,
    LEARNED_ON_CIFAR,
    ROTATED,
    OnData,
    Recipe,
    Variant,
)
from fastadv.algorithms.recipes import fastat_training, publications
from fastadv.algorithms.recipes.logged import with_clean

ON_CIFAR = "(PreActResNet-18, CIFAR-10)"
ON_IMAGENET = "PGD-10 (ResNet-50, ImageNet, eps 2/255)"

# hzzheng93/ATTA on CIFAR-10. Its epochs count from 1; the learning rate drops at the beginning of
# the 30th and the 36th.
ATTA_CIFAR: dict[str, Any] = {"model": "wide_resnet34_10", "epochs": 38, "lr": 0.1, "eps": 0.031}
ATTA_CIFAR |= {"schedule": "multistep", "drops": (29 / 38, 35 / 38), "weight_decay": 2e-4}
ATTA_CIFAR |= {"batch_size": 64} | GREY

# Wong et al. 2020 raise the image size and lower the batch size from 512 to 128 in three phases.
# Here both are those of the middle phase throughout, with the one cycle of the learning rate that
# the APART paper prints; the variant "phases" has their sizes.
IMAGENET: dict[str, Any] = {"model": "resnet50", "stem": "imagenet", "eps": 2 / 255}
IMAGENET |= {"batch_size": 224, "epochs": 15, "lr": 0.4, "schedule": "triangular"}
IMAGENET |= {"weight_decay": 1e-4, "decay_norms": False, "cycle_momentum": False}
IMAGENET |= {"augmentation": "resized-crop"}
# mahyarnajibi/FreeAdversarialTraining: 90 epochs and drops every 30, divided by the 4 replays. The
# rate is set once an epoch, and all parameters decay.
FREE_IMAGENET: dict[str, Any] = {"model": "resnet50", "stem": "imagenet", "eps": 2 / 255}
FREE_IMAGENET |= {"batch_size": 256, "epochs": 23, "lr": 0.1, "schedule": "multistep"}
FREE_IMAGENET |= {"drops": (8 / 23, 16 / 23), "weight_decay": 1e-4}
FREE_IMAGENET |= {"augmentation": "resized-crop"}

# tml-epfl/understanding-fast-adv-training.
GRADALIGN: dict[str, Any] = CYCLIC | {"lr": 0.3, "peak": 2 / 5, "weight_decay": 5e-4}
GRADALIGN |= {"normalize": False, "cycle_momentum": False}

# The files are scaled to the largest of these sizes, which the last phase trains on.
IN_PHASES = OnData({"image_sizes": publications.SMALL_FIRST, "image_size": 288})

LEARNED_ON_IMAGENET = OnData(
    options={"step_size_lr": 4e-9, "step_size_decay": 5000.0}, where={"epochs": 15}
)

# robust_overfitting's training, where the recipe has another one.
RICE_TRAINING: dict[str, Any] = {"epochs": 200, "lr": 0.1, "schedule": "piecewise"}
RICE_TRAINING |= {"weight_decay": 5e-4, "shortcut": "preact", "padding": "reflect"}
RICE_ON_DATA = {
    "cifar100": OnData(ROTATED | {"padding": "constant"}),
    "svhn": OnData({"lr": 0.01, "padding": "constant"}),
}


def by_atta(published: Published) -> Mapping[str, Variant]:
    """ATTA as its code trains on CIFAR-10, where the mean loss is divided once more."""
    option: dict[str, Any] = {"over_batch": True}
    made = Variant(
        published.code,
        "the mean loss is divided by the number of images once more, as the code has it",
        options=option,
        published=publications.with_more(published, **option),
    )
    return {"atta": made}


FAST: Mapping[str, Recipe] = {
    "fast": Recipe(
        "F+FGSM: 1.25 eps from a random start",
        "Wong et al. 2020; APART, Tables 2 to 4",
        published=publications.FAST,
        adversary="fast",
        training=CYCLIC | {"weight_decay": 5e-4},
        reported=f"83.81 clean, 46.06 PGD-20 {ON_CIFAR}",
        elsewhere="85.10 clean, 46.37 PGD-20 (WRN-34-10); 57.95, 25.31 (CIFAR-100)",
        variant="fast-adversarial",
        variants={
            "fastat": fastat_training.FAST,
            "robust-overfitting": with_clean(
                publications.RICE_FGSM, training=RICE_TRAINING, on_data=RICE_ON_DATA
            ),
        },
        also=("FGSM-RS", "F+FGSM", "RS-FGSM", "Fast AT"),
    ),
    "fast-imagenet": Recipe(
        "F+FGSM on ImageNet",
        "Wong et al. 2020; APART, Table 5",
        published=publications.FAST_IMAGENET,
        adversary="fast",
        training=IMAGENET,
        reported=f"60.90 clean, 43.46 {ON_IMAGENET}",
        variant="apart",
        variants={
            "phases": Variant(
                "Wong et al. 2020 (released code)",
                "images of 128, 224 and 288 pixels in epochs 1-6, 7-12 and 13-15; evaluated at 288",
                on_data={"imagenet": IN_PHASES},
                published=publications.FAST_IN_PHASES,
                reported=f"60.90 clean, 43.46 {ON_IMAGENET}",
            )
        },
    ),
    "n-fgsm": Recipe(
        "eps from noise of 2 eps, not projected",
        "de Jorge et al. 2022",
        published=publications.N_FGSM,
        adversary="n-fgsm",
        training=CYCLIC | {"weight_decay": 5e-4},
        on_data={"svhn": OnData({"lr": 0.05, "peak": 2 / 5, "eps_warmup": 5.0})},
        variant="n-fgsm",
        variants={"fastat": fastat_training.N_FGSM},
    ),
    "gradalign": Recipe(
        "FGSM, gradients near an image aligned",
        "Andriushchenko and Flammarion 2020",
        published=publications.GRADALIGN,
        note="input gradients of clean and noisy images; published weight 0.02 * 10^(eps/8)",
        adversary="fgsm",
        regularizer="gradalign",
        options={"edge_gradient": "half", "reg_weight": 0.2},
        training=GRADALIGN,
        variant="gradalign",
        variants={
            "torch-1.4": Variant(
                "Andriushchenko and Flammarion 2020 (released code, with the torch of its time)",
                "pixels at an end of the range of images get no gradient and do not move",
                options={"edge_gradient": "none"},
                published=publications.GRADALIGN_THEN,
            ),
            "fastat": fastat_training.GRADALIGN,
        },
        also=("FGSM-GA",),
    ),
    "free": Recipe(
        "Free-8: 8 updates per batch",
        "Shafahi et al. 2019; Wong et al. 2020",
        published=publications.FREE,
        note="each update of weights and perturbation takes one backward pass",
        adversary="free",
        options={"box": "delta"},
        training=CYCLIC | {"epochs": 10, "lr": 0.04, "weight_decay": 5e-4},
        variant="fast-adversarial",
        variants={
            "fastat": fastat_training.FREE,
            "apart": Variant(
                "APART, Tables 2 to 4",
                "30 epochs at 0.2, on images that are not normalized",
                training={"epochs": 30, "lr": 0.2, "weight_decay": 2e-4} | GREY,
                published=publications.FREE_COMPARED,
                reported=f"81.64 clean, 47.37 PGD-20 {ON_CIFAR}; WRN-34-10 85.54, 47.68; "
                "CIFAR-100 55.13, 25.88",
            ),
        },
        also=("Free-AT", "Free-8", "Free-m"),
    ),
    "free-4-imagenet": Recipe(
        "Free-4 on ImageNet",
        "Shafahi et al. 2019; APART, Table 5",
        published=publications.FREE_IMAGENET,
        adversary="free",
        options={"replays": 4},
        training=FREE_IMAGENET,
        reported=f"64.44 clean, 43.52 {ON_IMAGENET}",
    ),
    "atta-1": Recipe(
        "1 step from the stored perturbation",
        "Zheng et al. 2020",
        published=publications.ATTA_1,
        note="stored per sample in the epoch before",
        adversary="atta",
        start="stored",
        training=ATTA_CIFAR,
        variant="paper",
        variants=by_atta(publications.ATTA_1),
    ),
    "atta-3": Recipe(
        "3 steps from the stored perturbation",
        "Zheng et al. 2020",
        published=publications.ATTA_3,
        note="stored per sample in the epoch before",
        adversary="atta",
        start="stored",
        options={"steps": 3},
        training=ATTA_CIFAR,
        variant="paper",
        variants=by_atta(publications.ATTA_3),
    ),
    "atta-10": Recipe(
        "10 steps from the stored perturbation",
        "Zheng et al. 2020; APART, Table 3",
        published=publications.ATTA_10,
        note="stored per sample in the epoch before",
        adversary="atta",
        start="stored",
        options={"steps": 10},
        training=ATTA_CIFAR,
        reported="83.80 clean, 54.33 PGD-20 (WRN-34-10, CIFAR-10)",
        variant="paper",
        variants=by_atta(publications.ATTA_10),
    ),
    "atta-10-cyclic": Recipe(
        "ATTA-10 in 30 epochs, cyclic rate",
        "APART, Tables 2 and 4",
        published=publications.ATTA_CYCLIC,
        note="one triangular cycle of the learning rate",
        adversary="atta",
        start="stored",
        options={"steps": 10},
        training=CYCLIC | GREY,
        reported=f"82.10 clean, 49.03 PGD-20 {ON_CIFAR}",
        elsewhere="56.20 clean, 25.60 PGD-20 (CIFAR-100)",
    ),
    "atta-2-imagenet": Recipe(
        "ATTA-2 on ImageNet",
        "Zheng et al. 2020; APART, Table 5",
        published=publications.ATTA_IMAGENET,
        note="its training settings are not published; Free's are taken",
        adversary="atta",
        start="stored",
        options={"steps": 2},
        training=FREE_IMAGENET,
        reported=f"60.70 clean, 44.57 {ON_IMAGENET}",
    ),
    "pgd-cyclic": Recipe(
        "PGD-10 in 30 epochs, cyclic rate",
        "APART, Tables 2 to 4",
        published=publications.PGD_CYCLIC,
        note="one triangular cycle of the learning rate",
        training=CYCLIC | GREY,
        reported=f"82.05 clean, 47.43 PGD-20 {ON_CIFAR}",
        elsewhere="86.43 clean, 47.12 PGD-20 (WRN-34-10); 55.14, 25.61 (CIFAR-100)",
        also=("PGD-10",),
    ),
    "fgsm-plus": Recipe(
        "a step of learned size and start",
        "APART, Sec. 3.2 and Table 6 (APART without layer-wise perturbation)",
        published=publications.APART,
        adversary="fgsm-plus",
        training=CYCLIC | GREY,
        on_data=LEARNED_ON_CIFAR,
        reported=f"83.30 clean, 46.35 PGD-20 {ON_CIFAR}",
        also=("FGSM+",),
    ),
    "apart": Recipe(
        "FGSM+, a learned step in each block",
        "APART, Alg. 1 and Tables 2 to 4",
        published=publications.APART,
        note="residual blocks, at their first convolution",
        adversary="apart",
        training=CYCLIC | GREY,
        on_data=LEARNED_ON_CIFAR,
        reported=f"82.45 clean, 49.30 PGD-20 {ON_CIFAR}",
        elsewhere="84.75 clean, 51.10 PGD-20 (WRN-34-10); 57.10, 27.10 (CIFAR-100)",
    ),
    "apart-imagenet": Recipe(
        "APART on ImageNet",
        "APART, Sec. 5.1 and Table 5",
        published=publications.APART_IMAGENET,
        adversary="apart",
        training=IMAGENET,
        on_data={"imagenet": LEARNED_ON_IMAGENET},
        reported=f"60.52 clean, 44.30 {ON_IMAGENET}",
    ),
    "apart-no-layers": Recipe(
        "APART without layer-wise noise: FGSM+",
        "APART, Table 6",
        published=publications.APART,
        adversary="apart",
        options={"layerwise": False},
        training=CYCLIC | GREY,
        on_data=LEARNED_ON_CIFAR,
        reported=f"83.30 clean, 46.35 PGD-20 {ON_CIFAR}",
        also=("APART (w/o layer-wise perturbation)",),
    ),
    "apart-no-start": Recipe(
        "APART without learned start",
        "APART, Table 6",
        published=publications.APART_NO_START,
        note="no perturbation initialisation: every sample starts at its image",
        adversary="apart",
        options={"learned_start": False},
        training=CYCLIC | GREY,
        on_data=LEARNED_ON_CIFAR,
        reported=f"82.00 clean, 48.40 PGD-20 {ON_CIFAR}",
        also=("APART (w/o perturbation initialization)",),
    ),
}
