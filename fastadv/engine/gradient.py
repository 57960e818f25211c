"""All gradients are computed here, so that a mode can change how without a change of the parts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fastadv.errors import UserError

UNREACHED = (
    "The model's output does not depend on its input by a gradient, so there is nothing to attack "
    "along: a part of its forward runs under torch.no_grad or on detached tensors. Freeze weights "
    "by requires_grad_(False) instead."
)
UNLEARNT = (
    "The loss does not depend on a weight by a gradient, so there is nothing to learn: the model's "
    "forward runs under torch.no_grad or on detached tensors."
)
REENTRANT = (
    "The model checkpoints its activations with use_reentrant=True, which torch.autograd.grad "
    "cannot differentiate: call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
)

_around: ContextVar[Callable[[], AbstractContextManager[object]]] = ContextVar(
    "context of every backward pass", default=nullcontext
)


@contextmanager
def backward_within(context: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Every gradient that is computed within this context is computed within ``context()``."""
    before = _around.set(context)
    try:
        yield
    finally:
        _around.reset(before)


def leaf(x: Tensor) -> Tensor:
    """``x`` detached, with requires_grad: a tensor to take gradients with respect to."""
    if torch.compiler.is_compiling():
        # Before torch 2.13 a compiled graph cannot call requires_grad_ on its own results.
        return _Leaf.apply(x.detach(), _REQUIRES_GRAD)
    return x.detach().requires_grad_()


class _Leaf(torch.autograd.Function):
    """The first input; it requires grad because the second does. Neither gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


_REQUIRES_GRAD = torch.zeros((), requires_grad=True)


def input_gradient(loss: Tensor, inputs: Tensor) -> Tensor:
    """The gradient of the scalar ``loss`` with respect to ``inputs``, detached, in its shape.

    ``inputs`` must require grad. The graph is freed. Raises ``UserError`` if the loss does not
    depend on ``inputs``.
    """
    (found,) = _grad(loss, [inputs])
    if found is None:
        raise UserError(UNREACHED)
    return found


def gradients(loss: Tensor, inputs: Sequence[Tensor], *, keep_graph: bool = False) -> list[Tensor]:
    """The gradients of the scalar ``loss`` with respect to each of ``inputs``, in their shapes.

    Raises ``UserError`` if the loss does not depend on one of them.
    """
    return _reached(_grad(loss, list(inputs), retain_graph=keep_graph))


def gradients_if_used(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Like ``gradients``, with None for an input that the loss does not depend on.

    ``loss.backward()`` leaves None also: an optimizer then skips that parameter, including its
    weight decay.
    """
    return _grad(loss, list(inputs), UNLEARNT)


def differentiable_gradient(loss: Tensor, inputs: Tensor) -> Tensor:
    """The gradient of the scalar ``loss`` with respect to ``inputs``, differentiable in the
    weights.

    The graph is kept, since the outer pass differentiates through it (double backward). Raises
    ``UserError`` if the loss does not depend on ``inputs``.
    """
    return _reached(_grad(loss, [inputs], create_graph=True))[0]


def _grad(
    loss: Tensor, inputs: list[Tensor], otherwise: str = UNREACHED, **options: Any
) -> list[Tensor | None]:
    if not loss.requires_grad:
        raise UserError(otherwise)
    if torch.compiler.is_compiling():
        return list(torch.autograd.grad(loss, inputs, allow_unused=True, **options))
    try:
        with _around.get()():
            return list(torch.autograd.grad(loss, inputs, allow_unused=True, **options))
    except RuntimeError as error:
        if "use_reentrant=True" in str(error):
            raise UserError(REENTRANT) from error
        raise


def _reached(found: list[Tensor | None]) -> list[Tensor]:
    reached = [gradient for gradient in found if gradient is not None]
    if len(reached) < len(found):
        raise UserError(UNREACHED)
    return reached
