"""One row of the table of methods, and the settings that several rows share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastadv.algorithms.publication import Published
from fastadv.algorithms.slots import NONE, SLOTS
from fastadv.algorithms.starting_words import GRADIENT
from fastadv.errors import UserError, unknown


@dataclass(frozen=True)
class OnData:
    """How a method was trained on one kind of data set, where that differs from its recipe.

    ``training`` are settings of the run, ``options`` those of the parts. Published options hold for
    the settings ``where`` they were published with; elsewhere the parts' own rules apply.
    """

    training: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """What one published code, or one paper, does differently from the recipe that it belongs to.

    ``parts`` is slot -> name of its part. ``options`` and ``training`` are added to the recipe's,
    ``on_data`` replaces its entries. ``note`` says in one sentence what differs; ``summary`` takes
    the place of the recipe's where that does not hold for this form.
    """

    source: str
    note: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    on_data: Mapping[str, OnData] = field(default_factory=dict)
    published: Published | None = None
    reported: str = ""
    summary: str = ""


@dataclass(frozen=True)
class Recipe:
    """One method: the name of the part in each slot, and its settings.

    ``summary`` fits on one line of ``fastadv methods``; ``note`` adds what the line has no room
    for. ``source`` names the paper, equation and tables. ``options`` are the parts'
    hyper-parameters that differ from the parts' defaults; ``training`` are the settings of the run
    (epochs, learning rate, ...) in the publication. ``on_data``: kind of data set -> how the method
    was trained there. ``reported`` is the accuracy that the source reports, in per cent;
    ``elsewhere`` is the same for other data sets, networks and balls.

    ``published`` are the settings of the publication, and why the recipe departs from them.
    ``variant`` is the name of the code or paper that the recipe follows, ``variants`` are the
    others that publish it. ``also`` are names that others give the method.
    """

    summary: str
    source: str
    adversary: str = "pgd"
    attack_loss: str = "ce"
    start: str = NONE
    objective: str = "ce"
    target: str = "one-hot"
    regularizer: str = NONE
    weights: str = NONE
    averaging: str = NONE
    layers: str = "uniform"
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    on_data: Mapping[str, OnData] = field(default_factory=dict)
    note: str = ""
    reported: str = ""
    elsewhere: str = ""
    published: Published | None = None
    variant: str = ""
    variants: Mapping[str, Variant] = field(default_factory=dict)
    also: tuple[str, ...] = ()

    def what(self) -> str:
        """``summary``, followed by ``note`` if there is one."""
        return f"{self.summary} ({self.note})" if self.note else self.summary

    def parts(self) -> dict[str, str]:
        """Slot -> name of its part."""
        return {slot: getattr(self, slot) for slot in SLOTS}

    def of_variant(self, name: str) -> Recipe:
        """The recipe as the code or paper called ``name`` publishes it. Raises ``UserError`` for a
        name that is not among ``variant`` and ``variants``, with the nearest one."""
        if name == self.variant:
            return self
        if not self.variants:
            raise UserError("This method is published in one form only: omit the variant.")
        if name not in self.variants:
            raise unknown("variant", name, [self.variant, *self.variants])
        chosen = self.variants[name]
        return replace(
            self,
            **chosen.parts,
            summary=chosen.summary or self.summary,
            source=chosen.source,
            options={**self.options, **chosen.options},
            training={**self.training, **chosen.training},
            on_data={**self.on_data, **chosen.on_data},
            note=chosen.note,
            reported=chosen.reported,
            elsewhere="",
            published=chosen.published,
            variant=name,
        )

    def all_options(self) -> dict[str, Any]:
        """``options``, and those that its parts take together (``beside``)."""
        return {**beside(self.parts()), **self.options}


# The training of F+FGSM and its successors: short, with one triangular cycle of the learning rate.
CYCLIC: dict[str, Any] = {"epochs": 30, "lr": 0.2, "schedule": "triangular", "weight_decay": 2e-4}
CYCLIC |= {"shortcut": "raw", "padding": "constant"}

# APART and ATTA train on images that are not normalized, with a grey border.
GREY: dict[str, Any] = {"padding": "grey", "normalize": False}

# The step sizes of APART and FGSM+ on CIFAR, published for every radius from 2/255 to 10/255.
LEARNED_STEPS = OnData(
    options={"step_size_lr": 5e-8, "step_size_decay": 400.0},
    where={"epochs": 30, "batch_size": 128},
)
LEARNED_ON_CIFAR = {"cifar10": LEARNED_STEPS, "cifar100": LEARNED_STEPS}

# The methods whose published code is robust_overfitting's (Rice et al., 2020).
ROTATED = {"augmentation": "rotate"}
LINF = {"norm": "linf", "eps": 8 / 255}
SMALL_STEP = {"alpha": 1 / 255}
RICE = {
    "cifar100": OnData(training=ROTATED),
    "svhn": OnData(options=SMALL_STEP, where=LINF),
}
# Beside a perturbation of the weights.
RICE_WARM = RICE | {"svhn": OnData(options=SMALL_STEP | {"warmup_epochs": 5}, where=LINF)}

# The training of all methods of the AdvLC paper on CIFAR-10.
ADVLC: dict[str, Any] = {"epochs": 200, "batch_size": 100, "lr": 0.1, "schedule": "multistep"}
ADVLC |= {"weight_decay": 1e-4, "shortcut": "raw", "padding": "constant", "normalize": False}

# Its Section 4 has another network.
ADVLC_SECTION_4 = {name: value for name, value in ADVLC.items() if name != "shortcut"}
ADVLC_SECTION_4 |= {"model": "wide_resnet34_1"}

# The radius and the step of TRADES' own code, which others took over, on CIFAR.
RADIUS: dict[str, Any] = {"eps": 0.031}
_STEP = OnData(options={"alpha": 0.007}, where={"norm": "linf"} | RADIUS)
STEP = {"cifar10": _STEP, "cifar100": _STEP}


def as_advlc_runs(published: Published) -> Mapping[str, Variant]:
    """The variant of the code that the AdvLC paper released, for a method that is in it and that is
    ``published`` so."""
    code = "TreeLLi/Combating-RO-AdvLC src/utils/train.py, src/adversary.py"
    return {
        "advlc": Variant(
            "AdvLC (released code)",
            "as the code runs: the attack begins one input gradient away from the image",
            parts={"start": "gradient"},
            published=replace(published, code=code, start=GRADIENT),
        )
    }


# The training of TRADES and the methods built on it in the RWP paper. Its epochs count from 1; the
# learning rate drops at the beginning of the 100th and the 150th.
TRADES: dict[str, Any] = {"schedule": "multistep", "drops": (99 / 200, 149 / 200)}
TRADES |= {"padding": "constant", "normalize": False}

# The training of the memorization paper, on CIFAR and on SVHN.
MEMORIZATION: dict[str, Any] = {"model": "resnet18", "schedule": "multistep"}
MEMORIZATION |= {"padding": "constant", "normalize": False}
MEMORIZATION_ON_SVHN = {
    "svhn": OnData({"epochs": 80, "lr": 0.01, "schedule": "cosine", "eval_alpha": 2 / 255})
}

# Chen et al. 2021: a tenth of the images is held out.
SMOOTH: dict[str, Any] = {"schedule": "multistep", "drops": (50 / 200, 150 / 200)}
SMOOTH |= {"padding": "constant", "val_fraction": 0.1}

KL_ATTACK: dict[str, Any] = {"attack_bn": "eval"}  # of the methods that attack the KL
TRADES_ATTACK = KL_ATTACK | {"l2_form": "trades"}  # of TRADES' code and the codes made from it

# The TRADES of AWP's code, and of the codes made from it, forwards x' before x, and x twice.
ATTACKED_FIRST: dict[str, Any] = {"bn_passes": ("adversarial", "natural", "natural")}

# (objective, weights) -> the options of a perturbation of the weights that depend on the objective,
# in every recipe with these two parts. The published code counts epochs from 1 and perturbs from
# the 10th on.
_GENTLE: dict[str, Any] = {"gamma": 0.005, "warmup_epochs": 9}
BESIDE: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("trades", "awp"): _GENTLE | ATTACKED_FIRST,
    ("trades", "rwp"): _GENTLE | ATTACKED_FIRST,
    ("rst", "awp"): _GENTLE,
    ("rst", "rwp"): _GENTLE,
}

# Kind of data set -> what the same pairs take there: the published 10th of 200 epochs is the 2nd of
# 30.
BESIDE_ON_DATA: Mapping[str, Mapping[str, Any]] = {"digits": {"warmup_epochs": 1}}

# (objective, target) -> options. The published code of the targets that follow the predictions of
# TRADES forwards x and x' once each.
_ONCE_EACH: dict[str, Any] = {"bn_passes": ("natural", "adversarial")}
FOLLOWED: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("trades", "self-adaptive"): _ONCE_EACH,
    ("trades", "temporal-ensembling"): _ONCE_EACH,
}


def beside(slots: Mapping[str, str]) -> dict[str, Any]:
    """The options that depend on two parts in ``slots`` together, whatever the recipe."""
    objective = slots["objective"]
    followed = FOLLOWED.get((objective, slots["target"]), {})
    # If both set an option, the weights part decides: its published code computes the loss.
    return {**followed, **BESIDE.get((objective, slots["weights"]), {})}


def beside_on(slots: Mapping[str, str], kind: str) -> Mapping[str, Any]:
    """The options that the pair of objective and weights takes on one kind of data set."""
    pair = (slots["objective"], slots["weights"])
    return BESIDE_ON_DATA.get(kind, {}) if pair in BESIDE else {}
