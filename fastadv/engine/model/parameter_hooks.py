"""Runs the user's hooks on parameters as in a plain loop: once per update, on its gradient.

A step computes several gradients per update (the direction of AWP, the outer pass), with respect to
low-precision copies of the weights or inside a compiled graph. There a hook would run too often or
never. So hooks are detached while gradients are computed, and the final gradients are passed
through them once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

# Read for every parameter in every update, so without a call of a Python function.
_before = attrgetter("_backward_hooks")
_after = attrgetter("_post_accumulate_grad_hooks")


def first_hooked(named: Mapping[str, Tensor]) -> str | None:
    """The name of the first parameter with a hook, or None."""
    return next((name for name, p in named.items() if _before(p) or _after(p)), None)


@contextmanager
def detached(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gradients computed within this context run no hook of ``parameters``."""
    every = list(parameters)
    found: list[tuple[Any, Any]] = []
    if any(map(_before, every)):
        found = [(p, _before(p)) for p in every if _before(p)]
    try:
        for parameter, _ in found:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, hooks in found:
            parameter._backward_hooks = hooks


def through(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """``gradients`` of ``parameters`` (None for a parameter without gradient) after the hooks of
    ``register_hook``."""
    found = list(gradients)
    if not any(map(_before, parameters)):
        return found
    hooked = {
        place: (parameter, gradient)
        for place, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True))
        if gradient is not None and _before(parameter)
    }
    if hooked:
        own = [parameter for parameter, _ in hooked.values()]
        # Autograd runs the hooks, with its own checks of what they return.
        after = torch.autograd.grad(own, own, [gradient for _, gradient in hooked.values()])
        for place, gradient in zip(hooked, after, strict=True):
            found[place] = gradient
    return found


def accumulated(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Run the hooks of ``register_post_accumulate_grad_hook`` of each parameter with a gradient."""
    if not any(map(_after, parameters)):
        return
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and _after(parameter):
            for hook in list(_after(parameter).values()):
                hook(parameter)
