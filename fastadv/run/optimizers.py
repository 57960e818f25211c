"""The optimizer of a run, with the parameter groups of its layers part."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fastadv.engine.optimizer.replayed import CAPTURABLE
from fastadv.models.wrapped import inner_module
from fastadv.run import optimizer_kinds
from fastadv.run.config import RunConfig

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
_HOW = ("capturable", "fused", "foreach")


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """``config.optimizer`` for ``model``, with torch's defaults for what is no setting of a run."""
    groups = config.plan.layers.optimizer_groups(model, config.lr)
    if not config.decay_norms:
        groups = without_norm_decay(model, groups)
    arguments = optimizer_kinds.its_arguments(
        config.optimizer,
        config.optimizer_options,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )
    kind = optimizer_kinds.kinds()[config.optimizer]
    # Fused: one launch on a GPU, which masks itself where a loss was not finite; the same bits in
    # less time on a CPU.
    fused = kind in FUSED
    if fused:
        arguments["fused"] = True
    # So that a CUDA graph can hold its step. On a CPU only fused ones compute like that.
    if kind in CAPTURABLE and (fused or _on_gpu(model)):
        arguments["capturable"] = True
    return kind(groups, **arguments)


def _on_gpu(model: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in model.parameters())


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the ``state_dict`` of an optimizer of ``make_optimizer``, perhaps for another device:
    how this one computes stays as it is, and so do the types of the state."""
    groups = [
        saved | {name: own[name] for name in _HOW if name in own}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict(state | {"param_groups": groups})
    # Torch has made all but the counts of steps of the weights' type (NAdam's product is wider).
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    places = [place for group in groups for place in group["params"]]
    for weight, place in zip(weights, places, strict=True):
        own = optimizer.state.get(weight, {})
        for name, value in state["state"].get(place, {}).items():
            if isinstance(value, torch.Tensor) and own[name].dtype != value.dtype:
                own[name] = value.to(own[name].device, copy=True)


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
