"""Settings that neither a method nor a data set has a say in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULTS: Mapping[str, Any] = {
    "method": "apart",
    "data": "digits",
    "dropout": 0.0,
    "optimizer": "sgd",
    "momentum": 0.9,
    "decay_norms": True,
    "norm": "linf",
    "amp": False,
    "amp_dtype": "bf16",
    "mode": "auto",
    "fused_norm": "auto",
    "bn": "local",
    "loader": "auto",
    "skip_broken": False,
    "download": False,
    "select": "val",
    "select_attack": "pgd-10",
    "eval_every": 1,
    "test_attacks": "clean,pgd-20",
    "seed": 0,
    "deterministic": False,
    "device": "auto",
    "checkpoint_minutes": 5.0,
    "save_every": 1,
    "keep": ("best", "last", "previous"),
    "normalize": True,
    "cycle_momentum": True,
    "nesterov": False,
    "augmentation": "base",
    "label_noise": 0.0,
}
"""Name -> value. Recipes and data presets come before these, the user before all."""
