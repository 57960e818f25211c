"""Reach the user's network inside torch.compile and DistributedDataParallel."""

from torch import nn

from fastadv.errors import UserError


def inner_module(model: nn.Module) -> nn.Module:
    """The network inside any layers of ``torch.compile`` and DDP, whose names have no prefix.

    Raises ``UserError`` for DataParallel: its replicas lose what a step does to the model.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise UserError(
                "DataParallel is not supported; use DistributedDataParallel (torchrun), or pass "
                "the network itself (model.module)."
            )
        # torch.compile's wrapper is known by its attribute: importing its class loads the compiler.
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled, nn.Module):
            model = compiled
        else:
            return model
