"""What a recording of an update has fixed: it is replayed only while all of it is the same."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from operator import attrgetter, methodcaller

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fastadv.algorithms.contract import Batch
from fastadv.engine.model.parameter_hooks import first_hooked
from fastadv.engine.model.precision import float32_settings
from fastadv.engine.model.registries import Registries
from fastadv.threat import batch as threats
from fastadv.training.recording import batch_tensors
from fastadv.training.update import Update

_ADDRESS, _LEARNS = methodcaller("data_ptr"), attrgetter("requires_grad")


def situation(update: Update, batch: Batch, python_state: int) -> Hashable:
    """What an update of ``batch`` depends on, besides the values of tensors. ``python_state`` is
    the number of the present Python state (``python_state.py``)."""
    net, parts = update.net, update.plan.parts.values()
    return (
        tuple((t.shape, t.dtype, t.stride()) for t in batch_tensors(batch)),
        tuple(value is None for value in batch),
        tuple(part.phase() for part in parts),
        tuple(tensor.data_ptr() for part in parts for tensor in part.state.values()),
        _addresses(net.structure.registries),
        python_state,
        (net.structure.version, first_hooked(update.parameters.named), threats.fixed(batch.threat)),
        (net.outer_dtype, net.attack_dtype, net.looks),
        (_switches(), update.room),
    )


def _addresses(registries: Registries) -> Hashable:
    """The addresses of parameters and buffers, requires_grad of each parameter, and the train flag
    of each module.

    Called before every replay, so without a Python call per module; with TorchScript, whose
    parameters only PyTorch reads, by a walk of its own.
    """
    if registries.scripts:
        return tuple(_walked(registries.model))
    parameters = [each for each in registries.parameters() if each is not None]
    buffers = [each for each in registries.buffers() if each is not None]
    return (
        *registries.train_flags(),
        *map(_ADDRESS, parameters),
        *map(_LEARNS, parameters),
        *map(_ADDRESS, buffers),
    )


def _walked(model: nn.Module) -> Iterator[Hashable]:
    for module in model.modules():
        yield module.training
        for parameter in module._parameters.values():
            if parameter is not None:
                yield from (parameter.data_ptr(), parameter.requires_grad)
        yield from (each.data_ptr() for each in module._buffers.values() if each is not None)


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
