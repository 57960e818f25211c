"""Changes train flags, requires_grad and the grad mode for a while, and restores them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastadv.errors import UserError


@contextmanager
def train_flags(model: nn.Module, train: bool | None) -> Iterator[None]:
    """Set the mode of every module, and restore each module's flag on exit.

    ``train=None`` keeps the flags; ``False`` is eval mode for all modules. ``True`` is training
    mode as the user means it: if the model itself is in training mode, the flags of single modules
    (a frozen BatchNorm) stay. Raises ``UserError`` for a model whose mode cannot change.
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
    """Each module's train flag is restored on exit."""
    found = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in found:
            module.training = flag


@contextmanager
def frozen_parameters(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within this context none of ``parameters`` requires grad; the former setting is restored on
    exit."""
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
    """The model as an attack needs it: ``parameters`` frozen, train flags as in ``train_flags``,
    gradients enabled.

    It works under ``torch.no_grad``, and restores flags, ``requires_grad`` and the grad mode.
    """
    with torch.enable_grad(), train_flags(model, train), frozen_parameters(parameters):
        yield
