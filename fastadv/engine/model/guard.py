"""Leave the user's model as it was found: train flags, requires_grad and the grad mode."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastadv.errors import UserError


@contextmanager
def train_flags(model: nn.Module, train: bool | None) -> Iterator[None]:
    """Set the mode of every module, and put each one's own flag back on exit.

    ``train=None`` keeps the flags, ``False`` is eval mode everywhere. ``True`` is training mode
    as the user means it: where the model as a whole already trains, flags the user set on single
    modules (a frozen BatchNorm) stay.
    """
    if train is None or (train and model.training):
        yield
        return
    with flags_kept(model):
        try:
            model.train(train)
        except NotImplementedError as error:
            raise UserError(
                "The model cannot change between training and evaluation mode, as those of "
                "torch.export cannot: pass the network it was exported from."
            ) from error
        yield


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, each module's train flag returns."""
    found = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in found:
            module.training = flag


@contextmanager
def frozen_parameters(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """None of ``parameters`` asks for a gradient inside; each one's own setting returns on exit."""
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def frozen(
    model: nn.Module, parameters: Iterable[nn.Parameter], train: bool | None = False
) -> Iterator[None]:
    """An attack's view of the model: its ``parameters`` frozen, BN mode chosen, gradients on.

    Works under ``torch.no_grad`` and leaves flags, ``requires_grad`` and the grad mode as found.
    """
    with torch.enable_grad(), train_flags(model, train), frozen_parameters(parameters):
        yield
