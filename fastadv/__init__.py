"""fastadv: fast adversarial training in PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastadv.algorithms.adversaries.ascent import Ascent
    from fastadv.algorithms.adversaries.pgd import PGD
    from fastadv.algorithms.contract.adversary import Adversary
    from fastadv.algorithms.contract.attack_loss import AttackLoss
    from fastadv.algorithms.contract.averaging import Averaging
    from fastadv.algorithms.contract.capabilities import Capabilities, Conflict
    from fastadv.algorithms.contract.layers import Layers
    from fastadv.algorithms.contract.objective import Objective
    from fastadv.algorithms.contract.passes import Pass
    from fastadv.algorithms.contract.regularizer import Regularizer
    from fastadv.algorithms.contract.setup import Setup
    from fastadv.algorithms.contract.start import Start
    from fastadv.algorithms.contract.target import Fit, Target
    from fastadv.algorithms.contract.tensors import (
        Adversarial,
        Batch,
        Context,
        Outcome,
        Outputs,
        required,
    )
    from fastadv.algorithms.contract.weighted import Weighted
    from fastadv.algorithms.contract.weights import WeightPerturbation
    from fastadv.algorithms.grouping import param_groups
    from fastadv.algorithms.publication import Published
    from fastadv.algorithms.recipe import OnData, Recipe, Variant
    from fastadv.algorithms.recipes.table import methods
    from fastadv.algorithms.registry import register, register_recipe
    from fastadv.algorithms.sample_state import SampleStore
    from fastadv.algorithms.stored_perturbations import StoredPerturbations
    from fastadv.by_epoch import Phases, Ramp
    from fastadv.data.view import View
    from fastadv.declared import option
    from fastadv.engine.gradient import input_gradient, leaf
    from fastadv.engine.noise import noise_stream
    from fastadv.errors import TrainingError, UserError
    from fastadv.evaluation.accuracy import evaluate
    from fastadv.evaluation.attacks import attack
    from fastadv.evaluation.sanity.claim import sanity
    from fastadv.models import build_model
    from fastadv.run.loaded import Run, load_run
    from fastadv.run.saved_models import load_model
    from fastadv.threat import Threat
    from fastadv.training.entry import step
    from fastadv.training.training_step import Step

    __version__: str

__all__ = [
    "PGD",
    "Adversarial",
    "Adversary",
    "Ascent",
    "AttackLoss",
    "Averaging",
    "Batch",
    "Capabilities",
    "Conflict",
    "Context",
    "Fit",
    "Layers",
    "Objective",
    "OnData",
    "Outcome",
    "Outputs",
    "Pass",
    "Phases",
    "Published",
    "Ramp",
    "Recipe",
    "Regularizer",
    "Run",
    "SampleStore",
    "Setup",
    "Start",
    "Step",
    "StoredPerturbations",
    "Target",
    "Threat",
    "TrainingError",
    "UserError",
    "Variant",
    "View",
    "WeightPerturbation",
    "Weighted",
    "attack",
    "build_model",
    "evaluate",
    "input_gradient",
    "leaf",
    "load_model",
    "load_run",
    "methods",
    "noise_stream",
    "option",
    "param_groups",
    "register",
    "register_recipe",
    "required",
    "sanity",
    "step",
]

# Imported when first asked for (PEP 562): `fastadv --help` must not wait for torch.
_HOMES = {
    "Adversarial": "algorithms.contract.tensors",
    "Adversary": "algorithms.contract.adversary",
    "Ascent": "algorithms.adversaries.ascent",
    "AttackLoss": "algorithms.contract.attack_loss",
    "Averaging": "algorithms.contract.averaging",
    "Batch": "algorithms.contract.tensors",
    "Capabilities": "algorithms.contract.capabilities",
    "Conflict": "algorithms.contract.capabilities",
    "Context": "algorithms.contract.tensors",
    "Fit": "algorithms.contract.target",
    "Layers": "algorithms.contract.layers",
    "Objective": "algorithms.contract.objective",
    "OnData": "algorithms.recipe",
    "Outcome": "algorithms.contract.tensors",
    "Outputs": "algorithms.contract.tensors",
    "PGD": "algorithms.adversaries.pgd",
    "Pass": "algorithms.contract.passes",
    "Phases": "by_epoch",
    "Published": "algorithms.publication",
    "Ramp": "by_epoch",
    "Recipe": "algorithms.recipe",
    "Regularizer": "algorithms.contract.regularizer",
    "Run": "run.loaded",
    "SampleStore": "algorithms.sample_state",
    "Setup": "algorithms.contract.setup",
    "Start": "algorithms.contract.start",
    "Step": "training.training_step",
    "StoredPerturbations": "algorithms.stored_perturbations",
    "Target": "algorithms.contract.target",
    "Threat": "threat",
    "TrainingError": "errors",
    "UserError": "errors",
    "Variant": "algorithms.recipe",
    "View": "data.view",
    "WeightPerturbation": "algorithms.contract.weights",
    "Weighted": "algorithms.contract.weighted",
    "attack": "evaluation.attacks",
    "build_model": "models",
    "evaluate": "evaluation.accuracy",
    "input_gradient": "engine.gradient",
    "leaf": "engine.gradient",
    "load_model": "run.saved_models",
    "load_run": "run.loaded",
    "methods": "algorithms.recipes.table",
    "noise_stream": "engine.noise",
    "option": "declared",
    "param_groups": "algorithms.grouping",
    "register": "algorithms.registry",
    "register_recipe": "algorithms.registry",
    "required": "algorithms.contract.tensors",
    "sanity": "evaluation.sanity.claim",
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
