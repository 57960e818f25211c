"""The table of parts: slot -> name -> class. A new part of fastadv is one file and one line here; a
part from elsewhere is added by ``registry.register``."""

from __future__ import annotations

from fastadv.algorithms.adversaries.apart import APART
from fastadv.algorithms.adversaries.atta import ATTA
from fastadv.algorithms.adversaries.clean_first import CleanFirst
from fastadv.algorithms.adversaries.fast import Fast
from fastadv.algorithms.adversaries.fgsm import FGSM
from fastadv.algorithms.adversaries.fgsm_bp import FGSMBP
from fastadv.algorithms.adversaries.fgsm_fuap import FGSMFUAP
from fastadv.algorithms.adversaries.fgsm_mep import FGSMMEP
from fastadv.algorithms.adversaries.fgsm_n import FGSMN
from fastadv.algorithms.adversaries.fgsm_pco import FGSMPCO
from fastadv.algorithms.adversaries.fgsm_plus import FGSMPlus
from fastadv.algorithms.adversaries.fgsm_r import FGSMR
from fastadv.algorithms.adversaries.fgsm_uap import FGSMCUAP, FGSMUAP
from fastadv.algorithms.adversaries.free import Free
from fastadv.algorithms.adversaries.friendly import Friendly
from fastadv.algorithms.adversaries.liet import LIET
from fastadv.algorithms.adversaries.n_fgsm import NFGSM
from fastadv.algorithms.adversaries.none import NoAttack
from fastadv.algorithms.adversaries.pgd import PGD
from fastadv.algorithms.adversaries.random_eps import RandomEps
from fastadv.algorithms.adversaries.random_eps_pgd import RandomEpsPGD
from fastadv.algorithms.adversaries.ssat import SSAT
from fastadv.algorithms.adversaries.zero_grad import ZeroGrad
from fastadv.algorithms.attack_losses.ce import CrossEntropyAttack
from fastadv.algorithms.attack_losses.fit import FitAttack
from fastadv.algorithms.attack_losses.guided import GuidedAttack
from fastadv.algorithms.attack_losses.kl import KLAttack
from fastadv.algorithms.attack_losses.nuclear import NuclearAttack
from fastadv.algorithms.attack_losses.smoothed import SmoothedAttack
from fastadv.algorithms.averaging.ema import EMA
from fastadv.algorithms.averaging.swa import SWA
from fastadv.algorithms.contract import Part
from fastadv.algorithms.layers.fixed_rate import FixedRate, RatLR
from fastadv.algorithms.layers.frozen import Frozen
from fastadv.algorithms.layers.uniform import Uniform
from fastadv.algorithms.objectives.ce import CrossEntropy
from fastadv.algorithms.objectives.clean_mixed import CleanMixed
from fastadv.algorithms.objectives.clean_subtracted import CleanSubtracted
from fastadv.algorithms.objectives.gairat import Gairat
from fastadv.algorithms.objectives.ikl import IKL
from fastadv.algorithms.objectives.mart import Mart
from fastadv.algorithms.objectives.natural_ce import NaturalCE
from fastadv.algorithms.objectives.rst import RST
from fastadv.algorithms.objectives.trades import Trades
from fastadv.algorithms.regularizers.abnormal import Abnormal
from fastadv.algorithms.regularizers.advlc import AdvLC
from fastadv.algorithms.regularizers.consistency import Consistency
from fastadv.algorithms.regularizers.cure import Cure
from fastadv.algorithms.regularizers.elle import Elle, ElleA
from fastadv.algorithms.regularizers.equal_changes import EqualChanges
from fastadv.algorithms.regularizers.gradalign import GradAlign
from fastadv.algorithms.regularizers.guided import Guided
from fastadv.algorithms.regularizers.helper import Helper
from fastadv.algorithms.regularizers.igr import IGR
from fastadv.algorithms.regularizers.logitalign import LogitAlign
from fastadv.algorithms.regularizers.nuclear import NuclearNorm
from fastadv.algorithms.regularizers.smooth_convergence import SmoothConvergence
from fastadv.algorithms.regularizers.start_and_end import StartAndEnd
from fastadv.algorithms.slots import NONE, OPTIONAL
from fastadv.algorithms.starts.bernoulli import Bernoulli
from fastadv.algorithms.starts.center import Center
from fastadv.algorithms.starts.gaussian import Gaussian
from fastadv.algorithms.starts.gradient import Gradient
from fastadv.algorithms.starts.stored import Stored
from fastadv.algorithms.starts.unclipped import Unclipped
from fastadv.algorithms.starts.uniform import UniformStart
from fastadv.algorithms.targets.distillation import Distillation
from fastadv.algorithms.targets.label_smoothing import LabelSmoothing
from fastadv.algorithms.targets.one_hot import OneHot
from fastadv.algorithms.targets.random_smoothing import RandomSmoothing
from fastadv.algorithms.targets.self_adaptive import SelfAdaptive
from fastadv.algorithms.targets.temporal_ensembling import TemporalEnsembling
from fastadv.algorithms.weights.awp import AWP
from fastadv.algorithms.weights.rwp import RWP

PARTS: dict[str, dict[str, type[Part]]] = {
    "adversary": {
        NONE: NoAttack,
        "fgsm": FGSM,
        "fgsm-r": FGSMR,
        "fgsm-n": FGSMN,
        "n-fgsm": NFGSM,
        "fast": Fast,
        "pgd": PGD,
        "clean-first": CleanFirst,
        "friendly": Friendly,
        "free": Free,
        "atta": ATTA,
        "fgsm-plus": FGSMPlus,
        "apart": APART,
        "fgsm-mep": FGSMMEP,
        "fgsm-bp": FGSMBP,
        "random-eps": RandomEps,
        "random-eps-pgd": RandomEpsPGD,
        "liet": LIET,
        "zero-grad": ZeroGrad,
        "ssat": SSAT,
        "fgsm-uap": FGSMUAP,
        "fgsm-cuap": FGSMCUAP,
        "fgsm-fuap": FGSMFUAP,
        "fgsm-pco": FGSMPCO,
    },
    "attack_loss": {
        "ce": CrossEntropyAttack,
        "kl": KLAttack,
        "fit": FitAttack,
        "smoothed": SmoothedAttack,
        "guided": GuidedAttack,
        "nuclear": NuclearAttack,
    },
    "start": {
        "center": Center,
        "uniform": UniformStart,
        "uniform-unclipped": Unclipped,
        "gaussian": Gaussian,
        "bernoulli": Bernoulli,
        "gradient": Gradient,
        "stored": Stored,
    },
    "objective": {
        "ce": CrossEntropy,
        "trades": Trades,
        "clean-mixed": CleanMixed,
        "clean-subtracted": CleanSubtracted,
        "gairat": Gairat,
        "rst": RST,
        "mart": Mart,
        "natural-ce": NaturalCE,
        "ikl": IKL,
    },
    "target": {
        "one-hot": OneHot,
        "label-smoothing": LabelSmoothing,
        "random-smoothing": RandomSmoothing,
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
        "helper": Helper,
        "elle": Elle,
        "elle-a": ElleA,
        "guided": Guided,
        "nuclear": NuclearNorm,
        "start-and-end": StartAndEnd,
        "smooth-convergence": SmoothConvergence,
        "abnormal": Abnormal,
        "equal-changes": EqualChanges,
    },
    "weights": {"awp": AWP, "rwp": RWP},
    "layers": {"uniform": Uniform, "rat-lr": RatLR, "fixed-lr": FixedRate, "frozen": Frozen},
    "averaging": {"swa": SWA, "ema": EMA},
}


def names(slot: str) -> list[str]:
    """The names of the parts that fit a slot, with "none" if the slot may be empty."""
    return [*([NONE] if slot in OPTIONAL else []), *PARTS[slot]]
