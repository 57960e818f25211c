"""A capture needs parameters whose autograd nodes are not bound to another stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from fastadv.training.update import Update


@contextmanager
def with_fresh_grad_accumulators(eager: Update) -> Iterator[None]:
    """Replace the parameters by aliases if any of them has an autograd node from before.

    Autograd binds a parameter's AccumulateGrad node to the stream of its first use, and keeps the
    node while any graph references it (DDP always does). A capture on another stream would fail,
    so within this context the model has parameters over the same storage with fresh nodes.
    """
    parameters = [p for p in eager.net.model.parameters() if p.requires_grad]
    # A compiled region creates no autograd nodes when it runs.
    if eager.net.runner.compiles or not any(_held_by_a_graph(p) for p in parameters):
        yield
        return
    modules = list(eager.net.model.modules())
    own = [dict(module._parameters) for module in modules]
    structure, named = eager.net.structure, eager.parameters.named
    known = structure.parameters
    fresh = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in named.values()}
    try:
        eager.parameters.named = {name: fresh[id(parameter)] for name, parameter in named.items()}
        structure.parameters = {name: fresh[id(each)] for name, each in known.items()}
        for module, mine in zip(modules, own, strict=True):
            found = {name: p if p is None else fresh[id(p)] for name, p in mine.items()}
            module._parameters.update(found)
        yield
    finally:
        eager.parameters.named, structure.parameters = named, known
        for module, mine in zip(modules, own, strict=True):
            module._parameters.update(mine)


def _held_by_a_graph(parameter: Tensor) -> bool:
    """True if another graph keeps the parameter's node of the autograd graph alive."""
    mark = "fastadv"
    # The type stubs of torch declare a method where a node has a dictionary.
    notes: Any = get_gradient_edge(parameter).node.metadata
    notes[mark] = True
    notes = get_gradient_edge(parameter).node.metadata
    return notes.pop(mark, None) is not None
