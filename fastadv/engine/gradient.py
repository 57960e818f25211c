"""Every gradient fastadv takes comes from here: a mode can change how without touching a part."""

from collections.abc import Sequence

import torch
from torch import Tensor


def input_gradient(loss: Tensor, inputs: Tensor) -> Tensor:
    """The gradient of the scalar ``loss`` with respect to ``inputs``, detached, in its shape.

    ``inputs`` must require grad. The graph is freed.
    """
    return torch.autograd.grad(loss, [inputs])[0]


def gradients(loss: Tensor, inputs: Sequence[Tensor], *, keep_graph: bool = False) -> list[Tensor]:
    """The gradients of the scalar ``loss`` with respect to each of ``inputs``, in their shapes.

    Every one of ``inputs`` must have a part in the loss.
    """
    return list(torch.autograd.grad(loss, list(inputs), retain_graph=keep_graph))


def gradients_if_used(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Like ``gradients``, with None for an input the loss does not depend on.

    ``loss.backward()`` leaves it so too: an optimizer then skips that parameter, decay included.
    """
    return list(torch.autograd.grad(loss, list(inputs), allow_unused=True))


def differentiable_gradient(loss: Tensor, inputs: Tensor) -> Tensor:
    """The gradient of the scalar ``loss`` at ``inputs``, itself differentiable in the weights.

    The graph is kept: the outer pass differentiates through it (double backward).
    """
    return torch.autograd.grad(loss, [inputs], create_graph=True)[0]
