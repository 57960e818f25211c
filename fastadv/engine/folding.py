"""Which BatchNorms fold into the convolution before them, and the folded weights.

With running statistics BatchNorm is an affine map a channel, and a convolution followed by it is a
convolution. Where the two follow each other is read from the autograd graph of one forward pass,
so it holds for anybody's network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Fold(NamedTuple):
    """A convolution, the BatchNorm that alone reads its output, and where that one hangs."""

    convolution: nn.Module
    norm: nn.Module
    parent: nn.Module
    name: str

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that is both, from the values of this moment."""
        norm: Any = self.norm
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        bias = -norm.running_mean * scale
        own = self.convolution._parameters["bias"]
        if own is not None:
            bias = bias + own * scale
        if norm.bias is not None:
            bias = bias + norm.bias
        weight: Any = self.convolution._parameters["weight"]
        return weight * scale.view(-1, *[1] * (weight.dim() - 1)), bias


def forward_and_folds(
    model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, list[Fold]]:
    """``forward(x)``, which calls ``model`` in eval mode, and the folds that were seen.

    Not folded: a module called twice, one whose output a hook sees, a subclass that may do more.
    """
    places = _places(model)
    made: dict[nn.Module, list[Any]] = {}
    handles = [
        module.register_forward_hook(
            lambda module, _, output: made.setdefault(module, []).append(output.grad_fn)
        )
        for module in [*_convolutions(model), *places]
    ]
    try:
        with torch.enable_grad():
            logits = forward(x.detach().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    readers = _readers(logits.grad_fn)
    producers = {nodes[0]: module for module, nodes in made.items() if len(nodes) == 1}
    folds = []
    for norm, (parent, name) in places.items():
        if len(made.get(norm, ())) != 1 or made[norm][0] is None:
            continue
        before = made[norm][0].next_functions[0][0]
        module = producers.get(before)
        if type(module) in CONVOLUTIONS and readers[before] == 1 and module is not None:
            folds.append(Fold(module, norm, parent, name))
    return logits.detach(), folds


def _convolutions(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if type(module) in CONVOLUTIONS and not module._forward_hooks
    ]


def _places(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, str]]:
    """BatchNorms with running statistics and no hooks, each with its only parent and its name."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, module in parent._modules.items():
            if module is not None and type(module) in NORMS:
                found.setdefault(module, []).append((parent, name))
    return {
        norm: places[0]
        for norm, places in found.items()
        if len(places) == 1 and norm.running_mean is not None
        if not norm._forward_hooks and not norm._forward_pre_hooks
    }


def _readers(root: Any) -> Counter[Any]:
    """How many later operations read the output of each node of the autograd graph."""
    count: Counter[Any] = Counter()
    waiting, seen = [root] if root is not None else [], {root}
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is None:
                continue
            count[node] += 1
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return count
