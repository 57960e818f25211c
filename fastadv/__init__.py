"""fastadv: fast adversarial training in PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastadv.algorithms.grouping import param_groups
    from fastadv.algorithms.recipes.table import methods
    from fastadv.data.view import View
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

# Imported when first asked for (PEP 562): `fastadv --help` must not wait for torch.
_HOMES = {
    "Step": "training.training_step",
    "Threat": "threat",
    "TrainingError": "errors",
    "UserError": "errors",
    "View": "data.view",
    "attack": "evaluation.attacks",
    "build_model": "models",
    "evaluate": "evaluation.accuracy",
    "load_model": "run.saved_models",
    "methods": "algorithms.recipes.table",
    "param_groups": "algorithms.grouping",
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
