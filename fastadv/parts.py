"""The table of parts: slot -> name -> class. A new part is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from fastadv.adversaries.apart import APART
from fastadv.adversaries.atta import ATTA
from fastadv.adversaries.fast import Fast
from fastadv.adversaries.fgsm import FGSM
from fastadv.adversaries.fgsm_n import FGSMN
from fastadv.adversaries.fgsm_plus import FGSMPlus
from fastadv.adversaries.fgsm_r import FGSMR
from fastadv.adversaries.free import Free
from fastadv.adversaries.n_fgsm import NFGSM
from fastadv.adversaries.none import NoAttack
from fastadv.adversaries.pgd import PGD
from fastadv.averaging.ema import EMA
from fastadv.averaging.swa import SWA
from fastadv.contract import Part
from fastadv.layers.fixed_rate import FixedRate, RatLR
from fastadv.layers.frozen import Frozen
from fastadv.layers.uniform import Uniform
from fastadv.objectives.ce import CrossEntropy
from fastadv.objectives.clean_mixed import CleanMixed
from fastadv.objectives.clean_subtracted import CleanSubtracted
from fastadv.objectives.gairat import Gairat
from fastadv.objectives.rst import RST
from fastadv.objectives.trades import Trades
from fastadv.regularizers.advlc import AdvLC
from fastadv.regularizers.consistency import Consistency
from fastadv.regularizers.cure import Cure
from fastadv.regularizers.gradalign import GradAlign
from fastadv.regularizers.igr import IGR
from fastadv.regularizers.logitalign import LogitAlign
from fastadv.targets.distillation import Distillation
from fastadv.targets.label_smoothing import LabelSmoothing
from fastadv.targets.one_hot import OneHot
from fastadv.targets.self_adaptive import SelfAdaptive
from fastadv.targets.temporal_ensembling import TemporalEnsembling
from fastadv.weights.awp import AWP
from fastadv.weights.rwp import RWP

NONE = "none"

PARTS: Mapping[str, Mapping[str, type[Part]]] = {
    "adversary": {
        NONE: NoAttack,
        "fgsm": FGSM,
        "fgsm-r": FGSMR,
        "fgsm-n": FGSMN,
        "n-fgsm": NFGSM,
        "fast": Fast,
        "pgd": PGD,
        "free": Free,
        "atta": ATTA,
        "fgsm-plus": FGSMPlus,
        "apart": APART,
    },
    "objective": {
        "ce": CrossEntropy,
        "trades": Trades,
        "clean-mixed": CleanMixed,
        "clean-subtracted": CleanSubtracted,
        "gairat": Gairat,
        "rst": RST,
    },
    "target": {
        "one-hot": OneHot,
        "label-smoothing": LabelSmoothing,
        "temporal-ensembling": TemporalEnsembling,
        "self-adaptive": SelfAdaptive,
        "distillation": Distillation,
    },
    "regularizer": {
        "advlc": AdvLC,
        "igr": IGR,
        "cure": Cure,
        "gradalign": GradAlign,
        "logitalign": LogitAlign,
        "consistency": Consistency,
    },
    "weights": {"awp": AWP, "rwp": RWP},
    "layers": {"uniform": Uniform, "rat-lr": RatLR, "fixed-lr": FixedRate, "frozen": Frozen},
    "averaging": {"swa": SWA, "ema": EMA},
}

OPTIONAL = ("regularizer", "weights", "averaging")
"""Slots that may be empty; "none" there means no part at all."""


def names(slot: str) -> list[str]:
    """The part names a slot takes, "none" included where it may be empty."""
    return [*([NONE] if slot in OPTIONAL else []), *PARTS[slot]]
