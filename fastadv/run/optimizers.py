"""The optimizer of a run, with the parameter groups of its layers part."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fastadv.models.wrapped import inner_module
from fastadv.run.config import RunConfig

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """``config.optimizer`` for ``model``, with torch's defaults for what is no setting of a run."""
    groups = config.plan.layers.optimizer_groups(model, config.lr)
    if not config.decay_norms:
        groups = without_norm_decay(model, groups)
    # Fused: one launch on a GPU, which masks itself where a loss was not finite; the same bits in
    # less time on a CPU.
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **common)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(groups, capturable=True, **common)  # so that a CUDA graph can hold its step


def without_norm_decay(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``groups``, each divided in two: in the second the affine parameters of normalization
    layers, without weight decay.

    As the ImageNet code of Wong et al. 2020 does; there, too, the biases of other layers decay.
    """
    norms = [module for module in inner_module(model).modules() if isinstance(module, NORMS)]
    affine = {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}
    found: list[dict[str, Any]] = []
    for group in groups:
        decayed = [parameter for parameter in group["params"] if id(parameter) not in affine]
        others = [parameter for parameter in group["params"] if id(parameter) in affine]
        found += [group | {"params": decayed}] if decayed else []
        found += [group | {"params": others, "weight_decay": 0.0}] if others else []
    return found
