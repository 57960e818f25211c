"""The user's network inside torch.compile and DistributedDataParallel."""

from typing import Any

import torch
from torch import nn

from fastadv.errors import UserError


def inner_module(model: nn.Module) -> nn.Module:
    """The network inside any layers of ``torch.compile`` and DDP; parameter names without prefix.

    Raises ``UserError`` for DataParallel, whose replicas lose the changes of a step, and for an
    object that is not a module.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model must be a torch.nn.Module, not a {type(model).__name__}: an attack freezes its "
            "weights and sets its mode. Call the function in the forward of a module."
        )
    while True:
        if isinstance(model, nn.DataParallel):
            raise UserError(
                "DataParallel is not supported; use DistributedDataParallel (torchrun), or pass "
                "the network itself (model.module)."
            )
        # torch.compile's wrapper is recognised by its attribute: importing the class is slow.
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled, nn.Module):
            model = compiled
        else:
            return model


# TorchScript operations with a training mode, and the position of that argument.
_MODE = {"aten::batch_norm": 5, "aten::dropout": 2, "aten::feature_dropout": 2}


def baked_modes(model: nn.Module) -> set[bool]:
    """The modes, training (True) and evaluation (False), in which BatchNorms and dropouts of a
    traced or frozen TorchScript module were recorded; ``train()`` does not change them."""
    if not isinstance(model, torch.jit.ScriptModule):
        return {mode for child in model.children() for mode in baked_modes(child)}
    graph: Any = model.inlined_graph
    said = [
        list(node.inputs())[place].node()
        for kind, place in _MODE.items()
        for node in graph.findAllNodes(kind)
    ]
    constants = [node.output() for node in said if node.kind() == "prim::Constant"]
    return {bool(constant.toIValue()) for constant in constants}
