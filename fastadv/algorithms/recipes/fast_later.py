"""Recipes that attack with one gradient, published after F+FGSM: GAT, NuAT, FGSM-PGI, ELLE, and two
ways to vary the radius.

Their variants "fastat" are the rows of FastAT_Benchmark (``averaged.py``).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastadv.algorithms.publication import UNSTATED, Published
from fastadv.algorithms.recipe import CYCLIC, OnData, Recipe, Variant
from fastadv.algorithms.recipes import averaged
from fastadv.algorithms.recipes.publications import with_more
from fastadv.algorithms.starting_words import IMAGE, UNIFORM

EIGHT = 8 / 255

# The training of GAT and NuAT: 49,000 images in batches of 64.
SRIRAMANAN: dict[str, Any] = {"model": "resnet18", "epochs": 100, "batch_size": 64, "lr": 0.1}
SRIRAMANAN |= {"weight_decay": 5e-4, "padding": "constant", "normalize": False}
PLAIN: dict[str, Any] = {"padding": "constant", "normalize": False}
MEP_START = "the stored perturbation, not clipped to [0,1]; at first 8/255 times random signs"
CORNER = "x + 4/255 times a random sign, clipped to the box"

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
    start=MEP_START,
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

# LIONS-EPFL/ELLE, whose loop calls the optimizer twice with each gradient.
ELLE: dict[str, Any] = CYCLIC | {"weight_decay": 5e-4, "normalize": False}
# There the radius rises in five steps, after each epoch; here with every update.
ELLE_ON_SVHN = {"svhn": OnData({"eps_warmup": 5.0})}
ELLE_DEPARTS = {
    "box": "the published x' and triplets are not clipped to the box; here x' is, the triplets not",
    "updates": "the published loop steps the optimizer twice with each gradient; the paper does not"
    " say so",
    "bn": "the published loop forwards x once more after the loss, which moves the statistics",
    "val_fraction": "1024 images there, 2 % here as for all recipes",
}


def elle(code: str, weight: float) -> Published:
    """What ``code`` states, with the weight of the error at eps 8/255."""
    return Published(
        code,
        model="preact_resnet18",
        data="cifar10",
        epochs=30,
        batch_size=128,
        schedule="triangular",
        lr=0.2,
        weight_decay=5e-4,
        eps=EIGHT,
        steps=1,
        alpha=EIGHT,
        attack_bn="train",
        start=IMAGE,
        more={"reg_weight": weight, "val_fraction": 1024 / 50000} | PLAIN,
        departs=ELLE_DEPARTS,
    )


def fastat(note: str, file: str, reported: str, more: Mapping[str, Any], **changes: Any) -> Variant:
    """The row of FastAT_Benchmark with the options ``more``, and the attack's loss of the recipe;
    ``changes`` are the fields of ``Published`` that differ from its other rows."""
    note = f"{note}; smoothed labels, averaged weights, 100 epochs"
    row = averaged.row(note, f"fast_at/{file}.py", reported, options=more, **changes)
    parts = {slot: name for slot, name in row.parts.items() if slot != "attack_loss"}
    # The mode of BatchNorm has its own field.
    stated = {name: value for name, value in more.items() if name != "attack_bn"}
    found: Variant = replace(row, parts=parts, published=with_more(row.published, **stated))
    return found


def in_steps_of_fast(found: Variant) -> Variant:
    """FastAT's ELLE steps as F+FGSM does, and projects to the box only."""
    alpha = OnData(options={"alpha": 10 / 255}, where={"norm": "linf", "eps": EIGHT})
    parts = {**found.parts, "adversary": "n-fgsm", "start": "uniform"}
    return replace(found, parts=parts, on_data={**found.on_data, "cifar10": alpha})


FAST_LATER: Mapping[str, Recipe] = {
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
            "fastat": fastat(
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
            "fastat": fastat(
                "weight 4 at the end of the run, the attack in BatchNorm's training mode",
                "nu_at",
                "81.0 clean, 50.10 AutoAttack",
                {"reg_weight": 4.0, "ramp_end": 1.0, "start_scale": 0.5, "attack_bn": "train"},
                start=CORNER,
            )
        },
        also=("nu-at", "nuclear norm adversarial training"),
    ),
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
            "fastat": fastat(
                "a share of the label for all classes",
                "fgsm_pgi",
                "79.7 clean, 49.89 AutoAttack",
                {"reg_weight": 10.0, "momentum_decay": 0.3, "reset_every": 40, "clip_start": True},
                start=MEP_START,
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
    "elle": Recipe(
        "FGSM, errors of local linearity penalised",
        "Abad Rocamora et al. 2024; LIONS-EPFL/ELLE, scripts/run_elle_cifar10.sh",
        note="weight 1000 at eps 8/255; published: 5000 from 10/255, 10000 from 22/255",
        adversary="fgsm",
        regularizer="elle",
        training=ELLE,
        on_data=ELLE_ON_SVHN,
        published=elle("scripts/run_elle_cifar10.sh", 1000.0),
        variant="elle",
        variants={
            "fastat": in_steps_of_fast(
                fastat(
                    "weight 1, a step of 1.25 eps from a random start, not projected to the ball; "
                    "one of three runs collapsed",
                    "elle",
                    "77.78 clean, 32.46 AutoAttack",
                    {"reg_weight": 1.0},
                    alpha=10 / 255,
                    start=UNIFORM,
                )
            )
        },
    ),
    "elle-a": Recipe(
        "FGSM, local linearity when it is lost",
        "Abad Rocamora et al. 2024; LIONS-EPFL/ELLE, scripts/run_elle-a_cifar10.sh",
        adversary="fgsm",
        regularizer="elle-a",
        training=ELLE,
        on_data=ELLE_ON_SVHN,
        published=elle("scripts/run_elle-a_cifar10.sh", 4000.0),
    ),
    "eps-warmup": Recipe(
        "one step of 1.5 eps, in a ball that grows",
        "Debenedetti et al. 2023; dedeswim/vits-robustness-torch, configs/xcit-adv-training.yaml",
        note="the warm-up of the recipe for vision transformers; the radius is one for all images",
        adversary="fast",
        target="label-smoothing",
        options={"attack_bn": "eval", "smooth_over": "all"},
        training={"epochs": 110, "eps_warmup": 10.0, "schedule": "cosine"},
        on_data={
            "imagenet": OnData(
                {"model": "resnet50", "stem": "imagenet", "batch_size": 512, "eps": 4 / 255},
                {"alpha": 6 / 255},
                {"norm": "linf", "eps": 4 / 255},
            )
        },
        reported="66.54 clean, 35.12 AutoAttack (ResNet-50 with GELU, ImageNet, eps 4/255)",
        elsewhere="XCiT-S12 72.34 clean, 41.78 AutoAttack; XCiT-L12 73.76, 47.60",
        published=Published(
            "configs/xcit-adv-training.yaml",
            model="xcit_small_12_p16_224",
            data="imagenet",
            epochs=110,
            batch_size=512,
            schedule="cosine",
            lr=5e-4,
            weight_decay=0.5,
            eps=4 / 255,
            steps=1,
            alpha=6 / 255,
            attack_bn="eval",
            start=UNIFORM,
            more={"eps_warmup": 10.0, "smoothing": 0.1, "smooth_over": "all"},
            departs={
                "model": "XCiT is no model of fastadv: pass a timm model to fastadv.step",
                "lr": "AdamW there, with 10 epochs of warm-up of the rate; SGD here",
                "weight_decay": "AdamW there, SGD here",
                "updates": "there eps rises after each epoch, alpha is 6/255 in every ball, and "
                "1e-5 is added to the start; here eps rises with every update",
                "bn": "the published code forwards x before x', for its log; its attack is in eval "
                "mode on a GPU, in training mode on a TPU",
            },
        ),
        also=("epsilon-warmup",),
        variant="xcit",
        variants={
            "random": Variant(
                "no publication: the warm-up of Debenedetti et al. 2023 with random radii",
                "PGD-10 with another radius for each image and update, uniform up to the eps of "
                "the moment",
                parts={"adversary": "random-eps-pgd", "target": "one-hot"},
                options={"attack_bn": "eval"},
                on_data={"imagenet": OnData({"model": "resnet50", "stem": "imagenet"})},
                published=Published(
                    "none; the warm-up: configs/xcit-adv-training.yaml",
                    model=UNSTATED,
                    data="imagenet",
                    epochs=110,
                    batch_size=UNSTATED,
                    schedule=UNSTATED,
                    lr=UNSTATED,
                    weight_decay=UNSTATED,
                    eps=UNSTATED,
                    steps=UNSTATED,
                    alpha=UNSTATED,
                    attack_bn="eval",
                    start=UNIFORM,
                    drops=UNSTATED,
                    more={"eps_warmup": 10.0},
                ),
            )
        },
    ),
    "random-eps": Recipe(
        "FGSM, a random radius for each image",
        "Kurakin et al. 2017, Sec. 3; wanglouis49/pytorch-adversarial_box, adversarialbox/train.py",
        note="half-normal radii up to eps; Kurakin et al. attack half of each batch, and towards "
        "the least likely class",
        adversary="random-eps",
        options={"attack_bn": "eval"},
        on_data={"imagenet": OnData({"eps": 16 / 255})},
        published=Published(
            "Kurakin et al. 2017, Sec. 3 and 4; adversarialbox/train.py, FGSM_train_rnd",
            model="inception_v3",
            data="imagenet",
            epochs=UNSTATED,
            batch_size=32,
            schedule=UNSTATED,
            lr=UNSTATED,
            weight_decay=UNSTATED,
            eps=16 / 255,
            steps=1,
            alpha=UNSTATED,
            attack_bn="eval",
            start=IMAGE,
            drops=UNSTATED,
            departs={
                "model": "Inception v3 is no model of fastadv: pass one to fastadv.step",
                "batch_size": "32 per worker, of which 16 are attacked; here all images are",
            },
        ),
    ),
}
