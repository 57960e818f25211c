"""What the publications of the recipes state of their training, by the code they descend from.

The values are those of the named code, or of the paper where no code is published. All state SGD
with momentum 0.9; the images' split and the checkpoint that is kept are in docs/as-published.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastadv.algorithms.publication import UNSTATED, Published
from fastadv.algorithms.starting_words import (
    IMAGE,
    KEPT,
    LEARNED,
    NEAR,
    NO_ATTACK,
    NOISY,
    STORED,
    UNCLIPPED,
    UNIFORM,
    WIDE,
)
from fastadv.by_epoch import Phases


def with_more(found: Published, code: str | None = None, **more: Any) -> Published:
    """``found`` with ``more`` beside its other settings, and of another ``code``."""
    return replace(found, code=code or found.code, more={**found.more, **more})


def without_code(found: Published, where: str, **more: Any) -> Published:
    """``found`` of a paper that publishes no code of this method; ``where`` is the place in it."""
    return with_more(found, f"{where}; no code is published", **more)


_AS_RICE: dict[str, Any] = {"shortcut": "preact", "normalize": True, "padding": "reflect"}

# Rice et al. 2020 and those who continue their code: AWP, RWP, RAT.
RICE = Published(
    code="locuslab/robust_overfitting train_cifar.py",
    model="preact_resnet18",
    data="cifar10",
    epochs=200,
    batch_size=128,
    schedule="piecewise",
    drops=(100 / 200, 150 / 200),
    lr=0.1,
    weight_decay=5e-4,
    eps=8 / 255,
    steps=10,
    alpha=2 / 255,
    attack_bn="train",
    start=UNIFORM,
    more=_AS_RICE,
)
RWP_CODE = "ChaojianYu/Robust-Weight-Perturbation AT_AWP_RWP/train_cifar10.py"
AWP = with_more(RICE, "csdongxian/AWP AT_AWP/train_cifar10.py", gamma=0.01, warmup_epochs=0)
AWP_LOSS_RANGE = without_code(AWP, "RWP, Fig. 1c", loss_range=UNSTATED)
RWP = with_more(
    AWP,
    RWP_CODE,
    c_min=1.7,
    weight_steps=10,
    norm_scope="global",
)
# The paper's settings of SVHN; its code has c_min 1.7 and lr 0.01 there.
RWP_PAPER = replace(
    RWP,
    code="RWP, Sec. 5.1",
    data="svhn",
    alpha=1 / 255,
    more={"gamma": 0.01, "c_min": 2.2, "weight_steps": 10},
    departs={"lr": "0.01, as in all released code for SVHN"},
)
# Their settings with what another of these codes trains.
RICE_FGSM = replace(RICE, code=f"{RICE.code} --attack fgsm", steps=1, alpha=10 / 255, start=UNIFORM)
PGD_BY_RWP = replace(RICE, code=f"{RWP_CODE} --awp-gamma 0")
AWP_BY_RWP = replace(AWP, code=f"{RWP_CODE} --robustWP 0")
LEAVE_OUT = without_code(RICE, "RWP, Fig. 4", leave_out_below=UNSTATED)
_RAT = "dukeng96/layerwise-robust-overfitting"
RAT_LR = with_more(RICE, f"{_RAT} train_cifar10_fixlr.py", layer_groups=("3", "4"))
RAT_WP = with_more(AWP, f"{_RAT} train_cifar10_wp.py", groups=("3", "4"))
FIXED_LR = with_more(RICE, f"{_RAT} train_cifar10_fixlr.py; RAT, Fig. 3a", layer_groups=("4",))
FROZEN = with_more(RICE, f"{_RAT} train_cifar10_freeze.py; RAT, Fig. 2a", layer_groups=("4",))
_LAYER_WISE = "ChaojianYu/Layer-Wise-RO"
RAT_WP_AGAIN = replace(
    RAT_WP, code=f"{_LAYER_WISE} AT_AWP_layer_wise/train_cifar10_Prea18_AWP_3_4.py"
)
AWP_K_FIRST = with_more(AWP, f"{_RAT} train_cifar10_wp.py", groups=("4",))
AWP_K = with_more(
    AWP, f"{_LAYER_WISE} AT_AWP_layer_wise/train_cifar10_Prea18_AWP_4.py", groups=("4",)
)

# TRADES in the RWP paper; epochs count from 1.
_UNSCALED: dict[str, Any] = {"normalize": False, "padding": "constant"}
_OTHER_NETWORK = {
    "model": "the network of the AT rows, so that methods compare; the reported accuracies are of "
    "the published one"
}
TRADES = replace(
    RICE,
    code="ChaojianYu/Robust-Weight-Perturbation trades_AWP_RWP/train_trades_cifar.py",
    model="wide_resnet34_10",
    schedule="multistep",
    drops=(99 / 200, 149 / 200),
    attack_bn="eval",
    start=NEAR,
    more=_UNSCALED | {"beta": 6.0, "bn_passes": ("adversarial", "natural", "natural")},
    departs=_OTHER_NETWORK,
)
TRADES_BY_RWP = replace(
    TRADES,
    departs={
        **_OTHER_NETWORK,
        "bn_passes": "the order of TRADES' own code; the attack reads the running statistics, so "
        "the weights differ too, 6 % of the update after 4 steps of 8 images (variant rwp-code)",
    },
)
# TRADES in its own code; epochs count from 1, and the drop at the 90th never comes.
TRADES_CODE = replace(
    TRADES,
    code="yaodongyu/TRADES train_trades_cifar10.py, trades.py",
    epochs=76,
    drops=(74 / 76,),
    weight_decay=2e-4,
    eps=0.031,
    alpha=0.007,
    more={
        **TRADES.more,
        "bn_passes": ("natural", "adversarial", "natural"),
        "l2_form": "trades",
    },
    departs={},
)
_GENTLE: dict[str, Any] = {"gamma": 0.005, "warmup_epochs": 9}
TRADES_AWP = with_more(TRADES, "csdongxian/AWP trades_AWP/train_trades_cifar.py", **_GENTLE)
TRADES_RWP = with_more(TRADES, c_min=1.7, weight_steps=10, norm_scope="global", **_GENTLE)
TRADES_AWP_K = replace(
    TRADES_AWP,
    code=f"{_LAYER_WISE} TRADES_AWP_layer_wise/train_trades_cifar_prea18_AWP_3_4.py",
    model="preact_resnet18",
    more={**TRADES_AWP.more, "groups": ("3", "4"), "shortcut": "preact"},
    departs={},
)

# Carmon et al. 2019, as the RWP paper trains it.
RST = Published(
    code="ChaojianYu/Robust-Weight-Perturbation RST_AWP_RWP/robust_self_training.py",
    model="wide_resnet28_10",
    data="cifar10",
    epochs=200,
    batch_size=256,
    schedule="cosine-epoch",
    lr=0.1,
    weight_decay=5e-4,
    eps=0.031,
    steps=10,
    alpha=0.007,
    attack_bn="eval",
    start=NEAR,
    more=_UNSCALED | {"beta": 6.0, "nesterov": True},
)
RST_AWP = with_more(RST, **_GENTLE)
RST_RWP = with_more(RST, c_min=1.7, weight_steps=10, norm_scope="global", **_GENTLE)

# Huang et al. 2020; epochs count from 1.
TRADES_SAT = replace(
    TRADES,
    code="LayneH/self-adaptive-training scripts/cifar10/run_trades_sat.sh, main_adv.py",
    epochs=100,
    drops=(74 / 100, 89 / 100, 99 / 100),
    weight_decay=2e-4,
    eps=0.031,
    alpha=0.007,
    more={
        **TRADES.more,
        "bn_passes": ("natural", "adversarial"),
        "sat_momentum": 0.9,
        "sat_start": 69 / 100,
    },
    departs={},
)

# Zhang et al. 2021; epochs count from 1.
GAIRAT = Published(
    code="zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training GAIRAT.py",
    model="wide_resnet32_10",
    data="cifar10",
    epochs=120,
    batch_size=128,
    schedule="multistep",
    drops=(59 / 120, 89 / 120, 109 / 120),
    lr=0.1,
    weight_decay=2e-4,
    eps=0.031,
    steps=10,
    alpha=0.007,
    attack_bn="eval",
    start=UNIFORM,
    more={
        **_UNSCALED,
        "drop_factors": (0.1, 0.1, 0.5),
        "gairat_start": 59 / 120,
        "gairat_lambda": -1.0,
    },
)

# Chen et al. 2021. "resnet18" is a PreActResNet-18 there.
SMOOTHENING = replace(
    RICE,
    code="VITA-Group/Alleviate-Robust-Overfitting main_adv.py --swa",
    schedule="multistep",
    drops=(50 / 200, 150 / 200),
    more={
        **_AS_RICE,
        "padding": "constant",
        "val_fraction": 0.1,
        "average_start": 55 / 200,
        "average_every": 1,
    },
)
KD_SWA = with_more(
    SMOOTHENING,
    "VITA-Group/Alleviate-Robust-Overfitting main_adv.py --swa --lwf",
    kd_weights=(0.3, 0.1, 0.6),
    temperature=2.0,
)

# The memorization paper: temporal ensembling (train_te.py), and random labels (train.py).
MEMORIZATION = replace(
    RICE,
    code="dongyp13/memorization-AT train_te.py",
    model="resnet18",
    schedule="multistep",
    attack_bn="eval",
    start=UNCLIPPED,
    more=_UNSCALED,
)
_ENSEMBLE: dict[str, Any] = {
    "te_weight": 30.0,
    "te_momentum": 0.9,
    "te_start": 89 / 200,
    "te_end": 149 / 200,
}
TE = with_more(MEMORIZATION, **_ENSEMBLE)
TRADES_TE = replace(
    with_more(TE, f"{TE.code} --loss-type trades", beta=6.0),
    start=NEAR,
)
TRADES_AGAIN = replace(
    MEMORIZATION,
    code="dongyp13/memorization-AT loss.py, train_te.py --loss-type trades before --start-es",
    start=NEAR,
    more={
        **_UNSCALED,
        "beta": 6.0,
        "bn_passes": ("natural", "adversarial"),
        "l2_form": "robust-overfitting",
    },
)
_TABLE_2 = replace(MEMORIZATION, start=UNSTATED)
PGD_EVAL = replace(
    MEMORIZATION,
    code="Memorization, Sec. 4.2; dongyp13/memorization-AT train.py has the attack",
    start=UNIFORM,
)
SMOOTHED = without_code(_TABLE_2, "Memorization, Table 2", smoothing=UNSTATED)
SAT = without_code(_TABLE_2, "Memorization, Table 2", sat_momentum=UNSTATED, sat_start=UNSTATED)
KD_SWA_AGAIN = replace(
    without_code(_TABLE_2, "Memorization, Table 2", kd_weights=UNSTATED, average_start=UNSTATED),
    drops=UNSTATED,
    attack_bn=UNSTATED,
)
CLEAN_MIXED = replace(
    MEMORIZATION,
    code="dongyp13/memorization-AT README.md, train.py; Memorization, Eq. 6 has no code",
    model="wide_resnet28_10",
    epochs=300,
    drops=(100 / 300, 200 / 300),
    weight_decay=0.0,
    start=UNIFORM,
    more={"normalize": False, "pad": 0, "flip": False, "mix_epochs": UNSTATED},
)

# AdvLC, Sec. 5.
ADVLC = Published(
    code="TreeLLi/Combating-RO-AdvLC src/config/train.py; AdvLC, Sec. 4 and 5",
    model="preact_resnet18",
    data="cifar10",
    epochs=200,
    batch_size=100,
    schedule="multistep",
    drops=(100 / 200, 150 / 200),
    lr=0.1,
    weight_decay=1e-4,
    eps=8 / 255,
    steps=10,
    alpha=2 / 255,
    attack_bn="train",
    start=IMAGE,
    more=_UNSCALED | {"shortcut": "raw"},
)
PGD_10 = ADVLC
FGSM_N = replace(ADVLC, steps=1, alpha=8 / 255, start=NOISY)
CLEAN = replace(ADVLC, steps=0, alpha=None, attack_bn=None, start=NO_ATTACK)
TINY = replace(ADVLC, data="tinyimagenet")

# AdvLC, Sec. 4: another network. The paper does not state its width, its code has 1.
_SECTION_4 = replace(ADVLC, model="wide_resnet34_1", more=_UNSCALED)
FGSM_R = replace(_SECTION_4, steps=1, alpha=8 / 255, start=UNIFORM)
FGSM_R_SUBTRACTED = without_code(FGSM_R, "AdvLC, Eq. 9", clean_weight=UNSTATED)
WEAKENED = without_code(replace(_SECTION_4, steps=20), "AdvLC, Sec. 4.3")
CLEAN_IGR = without_code(
    replace(CLEAN, model="wide_resnet34_1", more=_UNSCALED), "AdvLC, Eq. 10", reg_weight=UNSTATED
)


def penalised(by: Published, reg_weight: float | str, **more: Any) -> Published:
    """AdvLC's own regularizer beside ``by``."""
    return with_more(by, reg_weight=reg_weight, **more)


def compared(by: Published, reg_weight: float, **more: Any) -> Published:
    """A regularizer that the AdvLC paper compares with, beside ``by``: its strength is printed, its
    code is not published."""
    return without_code(by, "AdvLC, Sec. 5.1", reg_weight=reg_weight, **more)


def with_cure(by: Published) -> Published:
    """CURE beside ``by``."""
    why = "1500 weighs the square of a gradient of a mean; of a mean of squares it is 1500/B"
    return replace(compared(by, 1500.0), departs={"reg_weight": why})


def distilled(by: Published, **more: Any) -> Published:
    """KDSA's two teachers beside ``by``, in "the original configuration"."""
    where = "AdvLC, Sec. 5.1, after VITA-Group/Alleviate-Robust-Overfitting"
    return without_code(by, where, kd_weights=(0.3, 0.1, 0.6), temperature=2.0, **more)


AVERAGED: dict[str, Any] = {"average_start": 50 / 200, "average_every": 1}

# APART and what it is compared with. The code trains with eps 0.031, the paper with 8/255.
_CYCLE: dict[str, Any] = {"shortcut": "raw", "cycle_momentum": True}
APART = Published(
    code="LiyuanLucasLiu/APART; eps: APART, Sec. 5.1",
    model="preact_resnet18",
    data="cifar10",
    epochs=30,
    batch_size=128,
    schedule="triangular",
    lr=0.2,
    weight_decay=2e-4,
    eps=8 / 255,
    steps=1,
    alpha=None,
    attack_bn="train",
    start=LEARNED,
    more={
        **_CYCLE,
        "normalize": False,
        "padding": "grey",
        "step_size_lr": 5e-8,
        "step_size_decay": 400.0,
    },
)
APART_NO_START = replace(without_code(APART, "APART, Table 6"), start=IMAGE)
_COMPARED = replace(
    APART,
    code="APART, Sec. 5.1, and its code's data and network; scripts of the baselines are not "
    "published",
    more={**_CYCLE, "normalize": False, "padding": "grey"},
)
FGSM_CYCLIC = replace(_COMPARED, alpha=8 / 255, start=IMAGE)
PGD_CYCLIC = replace(_COMPARED, steps=10, alpha=UNSTATED, start=UNIFORM)
ATTA_CYCLIC = replace(_COMPARED, steps=10, alpha=UNSTATED, attack_bn=UNSTATED, start=STORED)
APART_IMAGENET = replace(
    APART,
    code="APART, Sec. 5.1; no code is published",
    model="resnet50",
    data="imagenet",
    epochs=15,
    batch_size=UNSTATED,
    lr=0.4,
    weight_decay=UNSTATED,
    eps=2 / 255,
    more={"step_size_lr": 4e-9, "step_size_decay": 5000.0},
)

# Wong et al. 2020. Their half precision (apex O2) keeps no float32 weights.
_HALF = {"amp": "float32 unless --amp; apex O2 without float32 weights is not offered"}
_FAST_MORE: dict[str, Any] = {**_CYCLE, "normalize": True, "padding": "constant"}
FAST = replace(
    APART,
    code="locuslab/fast_adversarial CIFAR10/train_fgsm.py; epochs: APART, Sec. 5.1",
    weight_decay=5e-4,
    alpha=10 / 255,
    start=UNIFORM,
    more={**_FAST_MORE, "amp": True},
    departs=_HALF,
)
FREE = replace(
    FAST,
    code="locuslab/fast_adversarial CIFAR10/train_free.py",
    epochs=11,
    lr=0.04,
    steps=0,
    alpha=8 / 255,
    start=KEPT,
    more={**FAST.more, "replays": 8, "box": "delta"},
    departs={**_HALF, "epochs": "10, the 80 passes of the paper's Table 3; 11 is the default"},
)
FREE_COMPARED = replace(
    _COMPARED,
    weight_decay=UNSTATED,
    steps=0,
    alpha=UNSTATED,
    attack_bn=UNSTATED,
    start=UNSTATED,
    more={"replays": 8},
)
SMALL_FIRST = Phases([(0, 128), (6, 224), (12, 288)])  # pixels by epoch
FAST_IMAGENET = replace(
    FAST,
    code="locuslab/fast_adversarial ImageNet/main_fast.py, run_fast_2px.sh",
    model="resnet50",
    data="imagenet",
    epochs=15,
    batch_size="512, 224, 128 in epochs 1-6, 7-12, 13-15",
    schedule="linear between 0, 0.4, 0.04, 0.004, 0.0004, in three phases",
    lr=0.4,
    weight_decay=1e-4,
    eps=2 / 255,
    alpha=2.5 / 255,
    more={
        "stem": "imagenet",
        "normalize": True,
        "augmentation": "resized-crop",
        "decay_norms": False,
        "cycle_momentum": False,
        "amp": True,
    },
    departs={
        "amp": "float32 unless --amp",
        "batch_size": "that of the middle phase throughout, as is the size of the images; "
        "variant phases has its sizes",
        "schedule": "one cycle, as the APART paper prints it",
    },
)
FAST_IN_PHASES = replace(
    FAST_IMAGENET,
    more={**FAST_IMAGENET.more, "image_sizes": SMALL_FIRST},
    departs={
        "amp": "float32 unless --amp",
        "batch_size": "that of the middle phase throughout: a run has one batch size",
        "schedule": "one cycle, as the APART paper prints it, not lowered tenfold in each phase",
    },
)
# de Jorge et al. 2022.
N_FGSM = replace(
    FAST,
    code="pdejorge/N-FGSM train.py, experiments.sh",
    alpha=8 / 255,
    start=WIDE,
    more={**_FAST_MORE, "noise_scale": 2.0},
    departs={},
)

# Andriushchenko and Flammarion 2020. Their network has no BatchNorm and no ReLU before the pooling.
GRADALIGN = replace(
    FAST,
    code="tml-epfl/understanding-fast-adv-training train.py, sh/exps_diff_eps_cifar10.sh",
    model="preact_resnet18 without its last BatchNorm and ReLU",
    lr=0.3,
    alpha=10 / 255,
    start=IMAGE,
    more={
        "shortcut": "raw",
        "normalize": False,
        "padding": "constant",
        "peak": 2 / 5,
        "cycle_momentum": False,
        "edge_gradient": "half",
        "reg_weight": 0.2,
    },
    departs={
        "model": "with them, as in all other published code",
        "alpha": "1.25 eps from the image, projected to the ball, is a step of eps",
    },
)

# The same code with torch 1.4, in which the published runs were made.
GRADALIGN_THEN = replace(GRADALIGN, more={**GRADALIGN.more, "edge_gradient": "none"})

# Shafahi et al. 2019 on ImageNet. The released file has eps 4/255, the tables 2/255.
FREE_IMAGENET = Published(
    code="mahyarnajibi/FreeAdversarialTraining main_free.py, configs.yml; eps: APART, Table 5",
    model="resnet50",
    data="imagenet",
    epochs=23,
    batch_size=256,
    schedule="multistep",
    drops=(8 / 23, 16 / 23),
    lr=0.1,
    weight_decay=1e-4,
    eps=2 / 255,
    steps=0,
    alpha=2 / 255,
    attack_bn="train",
    start=KEPT,
    more={
        "stem": "imagenet",
        "normalize": True,
        "augmentation": "resized-crop",
        "decay_norms": True,
        "replays": 4,
        "box": "image",
    },
)

# Zheng et al. 2020; epochs count from 1.
_ATTA = replace(
    APART,
    code="hzzheng93/ATTA train_atta_cifar.py",
    model="wide_resnet34_10",
    epochs=38,
    batch_size=64,
    schedule="multistep",
    drops=(29 / 38, 35 / 38),
    lr=0.1,
    eps=0.031,
    attack_bn="eval",
    start=STORED,
    more={"normalize": False, "padding": "grey", "reset_every": 10},
)
ATTA_1 = replace(_ATTA, steps=1, alpha=0.015)
ATTA_3 = replace(_ATTA, steps=3, alpha=0.01)
ATTA_10 = replace(_ATTA, steps=10, alpha=0.007)
ATTA_IMAGENET = replace(
    _ATTA,
    code="APART, Table 5; no code is published",
    model="resnet50",
    data="imagenet",
    epochs=UNSTATED,
    batch_size=UNSTATED,
    schedule=UNSTATED,
    drops=UNSTATED,
    lr=UNSTATED,
    weight_decay=UNSTATED,
    eps=2 / 255,
    steps=2,
    alpha=UNSTATED,
    attack_bn=UNSTATED,
    more={},
)
