"""fastadv: fast adversarial training in PyTorch."""

from fastadv.data.view import View
from fastadv.errors import TrainingError, UserError
from fastadv.models import build_model
from fastadv.recipes import methods
from fastadv.threat import Threat
from fastadv.training_step import Step, step

__all__ = [
    "Step",
    "Threat",
    "TrainingError",
    "UserError",
    "View",
    "build_model",
    "methods",
    "step",
]
