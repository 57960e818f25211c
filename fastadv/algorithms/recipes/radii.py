"""Recipes that vary the radius of the ball: by time, and by image."""

from collections.abc import Mapping

from fastadv.algorithms.publication import UNSTATED, Published
from fastadv.algorithms.recipe import OnData, Recipe, Variant
from fastadv.algorithms.starting_words import IMAGE, UNIFORM

RADII: Mapping[str, Recipe] = {
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
