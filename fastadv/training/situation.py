"""What a recording of an update has fixed: it is replayed only while all of it is the same."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fastadv.algorithms.contract import Batch
from fastadv.engine.model.parameter_hooks import first_hooked
from fastadv.engine.model.precision import float32_settings
from fastadv.threat import batch as threats
from fastadv.training.recording import batch_tensors
from fastadv.training.update import Update


def situation(update: Update, batch: Batch, python_state: int) -> Hashable:
    """What an update of ``batch`` depends on, besides the values of tensors. ``python_state`` is
    the number of the present Python state (``python_state.py``)."""
    net, parts = update.net, update.plan.parts.values()
    return (
        tuple((t.shape, t.dtype, t.stride()) for t in batch_tensors(batch)),
        tuple(value is None for value in batch),
        tuple(part.phase() for part in parts),
        tuple(tensor.data_ptr() for part in parts for tensor in part.state.values()),
        tuple(_addresses(net.model)),
        python_state,
        (net.structure.version, first_hooked(update.parameters.named), threats.fixed(batch.threat)),
        (net.outer_dtype, net.attack_dtype, net.looks),
        (_switches(), update.room),
    )


def _addresses(model: nn.Module) -> list[Hashable]:
    """The addresses of parameters and buffers, requires_grad of each parameter, and the train flag
    of each module.

    Called before every replay; ``named_modules`` would take many times as long.
    """
    found: list[Hashable] = []
    seen, waiting = {model}, [model]
    while waiting:
        module = waiting.pop()
        found.append(module.training)
        for parameter in module._parameters.values():
            if parameter is not None:
                found += (parameter.data_ptr(), parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None:
                found.append(buffer.data_ptr())
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return found


def _switches() -> Hashable:
    """The settings of the process that decide which kernels run, and the hooks on all modules."""
    hooks = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        float32_settings(),
        torch._C._get_cudnn_deterministic(),
        torch._C._get_cudnn_enabled(),
        tuple(each for kind in hooks for each in (*kind, *kind.values())),
    )
