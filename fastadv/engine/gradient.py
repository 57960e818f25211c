"""Every gradient fastadv takes comes from here, so that a mode can change how without touching a part."""

from collections.abc import Sequence

import torch
from torch import Tensor


def input_gradient(loss: Tensor, inputs: Tensor) -> Tensor:
    """The gradient of the scalar ``loss`` with respect to ``inputs``, detached, in its shape.

    ``inputs`` must require grad. The graph is freed.
    """
    return torch.autograd.grad(loss, [inputs])[0]


def gradients(
    loss: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False, keep_graph: bool = False
) -> list[Tensor]:
    """The gradients of the scalar ``loss`` with respect to each of ``inputs``, in their shapes.

    An input the loss does not depend on gets zeros, as an optimizer would see it after
    ``zero_grad``. With ``create_graph`` the result can itself be differentiated.
    """
    found = torch.autograd.grad(
        loss,
        list(inputs),
        create_graph=create_graph,
        retain_graph=create_graph or keep_graph,
        allow_unused=True,
    )
    return [
        torch.zeros_like(wrt) if gradient is None else gradient
        for wrt, gradient in zip(inputs, found, strict=True)
    ]
