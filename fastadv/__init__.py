"""fastadv: fast adversarial training in PyTorch."""

from importlib.metadata import PackageNotFoundError, version

from fastadv.algorithms.grouping import param_groups
from fastadv.algorithms.recipes.table import methods
from fastadv.data.view import View
from fastadv.errors import TrainingError, UserError
from fastadv.evaluation.accuracy import evaluate
from fastadv.evaluation.attacks import attack
from fastadv.models import build_model
from fastadv.run.saved_models import load_model
from fastadv.threat import Threat
from fastadv.training.training_step import Step, step

try:
    __version__ = version("fastadv")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Step",
    "Threat",
    "TrainingError",
    "UserError",
    "View",
    "attack",
    "build_model",
    "evaluate",
    "load_model",
    "methods",
    "param_groups",
    "step",
]
