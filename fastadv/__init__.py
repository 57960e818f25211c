"""fastadv: fast adversarial training in PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastadv.algorithms.contract.adversary import Adversary
    from fastadv.algorithms.contract.attack_loss import AttackLoss
    from fastadv.algorithms.contract.averaging import Averaging
    from fastadv.algorithms.contract.capabilities import Capabilities, Conflict
    from fastadv.algorithms.contract.layers import Layers
    from fastadv.algorithms.contract.objective import Objective
    from fastadv.algorithms.contract.regularizer import Regularizer
    from fastadv.algorithms.contract.start import Start
    from fastadv.algorithms.contract.target import Target
    from fastadv.algorithms.contract.tensors import Adversarial, Batch, Context, Outcome, Outputs
    from fastadv.algorithms.contract.weights import WeightPerturbation
    from fastadv.algorithms.grouping import param_groups
    from fastadv.algorithms.recipe import OnData, Recipe
    from fastadv.algorithms.recipes.table import methods
    from fastadv.algorithms.registry import register, register_recipe
    from fastadv.by_epoch import Phases, Ramp
    from fastadv.data.view import View
    from fastadv.declared import option
    from fastadv.errors import TrainingError, UserError
    from fastadv.evaluation.accuracy import evaluate
    from fastadv.evaluation.attacks import attack
    from fastadv.models import build_model
    from fastadv.run.saved_models import load_model
    from fastadv.threat import Threat
    from fastadv.training.entry import step
    from fastadv.training.training_step import Step

    __version__: str

__all__ = [
    "Adversarial",
    "Adversary",
    "AttackLoss",
    "Averaging",
    "Batch",
    "Capabilities",
    "Conflict",
    "Context",
    "Layers",
    "Objective",
    "OnData",
    "Outcome",
    "Outputs",
    "Phases",
    "Ramp",
    "Recipe",
    "Regularizer",
    "Start",
    "Step",
    "Target",
    "Threat",
    "TrainingError",
    "UserError",
    "View",
    "WeightPerturbation",
    "attack",
    "build_model",
    "evaluate",
    "load_model",
    "methods",
    "option",
    "param_groups",
    "register",
    "register_recipe",
    "step",
]

# Imported when first asked for (PEP 562): `fastadv --help` must not wait for torch.
_HOMES = {
    "Adversarial": "algorithms.contract.tensors",
    "Adversary": "algorithms.contract.adversary",
    "AttackLoss": "algorithms.contract.attack_loss",
    "Averaging": "algorithms.contract.averaging",
    "Batch": "algorithms.contract.tensors",
    "Capabilities": "algorithms.contract.capabilities",
    "Conflict": "algorithms.contract.capabilities",
    "Context": "algorithms.contract.tensors",
    "Layers": "algorithms.contract.layers",
    "Objective": "algorithms.contract.objective",
    "OnData": "algorithms.recipe",
    "Outcome": "algorithms.contract.tensors",
    "Outputs": "algorithms.contract.tensors",
    "Phases": "by_epoch",
    "Ramp": "by_epoch",
    "Recipe": "algorithms.recipe",
    "Regularizer": "algorithms.contract.regularizer",
    "Start": "algorithms.contract.start",
    "Step": "training.training_step",
    "Target": "algorithms.contract.target",
    "Threat": "threat",
    "TrainingError": "errors",
    "UserError": "errors",
    "View": "data.view",
    "WeightPerturbation": "algorithms.contract.weights",
    "attack": "evaluation.attacks",
    "build_model": "models",
    "evaluate": "evaluation.accuracy",
    "load_model": "run.saved_models",
    "methods": "algorithms.recipes.table",
    "option": "declared",
    "param_groups": "algorithms.grouping",
    "register": "algorithms.registry",
    "register_recipe": "algorithms.registry",
    "step": "training.entry",
}


if not TYPE_CHECKING:  # a type checker would take every name for one of this package

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            value: Any = _version()
        elif name in _HOMES:
            value = getattr(importlib.import_module(f"fastadv.{_HOMES[name]}"), name)
        else:
            raise AttributeError(f"module 'fastadv' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fastadv")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"
