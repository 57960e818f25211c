"""What stands in the model during an attack, whose passes all see the same weights.

Low precision: autocast would cast every weight again in every pass, ten times the same for
PGD-10; its own cache outlives a change of the weights in place (``precision.py``), so the copies
are made here, once an attack. Running statistics: BatchNorm folds into the convolution before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastadv.engine.folding import CONVOLUTIONS, Fold

# Modules that hand weight and bias to an operation autocast lowers. Not their subclasses, which
# may do something to a weight first (standardise it) that must see all its digits.
LOWERED = (*CONVOLUTIONS, nn.Linear)


class Value(NamedTuple):
    """The tensor that a parameter of ``module`` has during an attack."""

    module: nn.Module
    name: str
    tensor: Tensor


class AttackWeights:
    """``folds`` are used where BatchNorm uses its running statistics."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.folds: list[Fold] = []
        self._copies: list[nn.Parameter] = []
        self._identity = nn.Identity()

    @contextmanager
    def in_place(self, dtype: torch.dtype | None, *, folded: bool) -> Iterator[None]:
        """Copies of the weights of this moment stand in the model inside: in ``dtype`` those
        autocast would cast (None: none), and with ``folded`` BatchNorms in their convolutions.

        A gradient with respect to them is not possible.
        """
        with torch.no_grad():
            values = self._values(dtype, self.folds if folded else [])
            copies = self._filled(values, dtype)
        own = [(value.module, value.name, value.module._parameters[value.name]) for value in values]
        norms = [(fold.parent, fold.name, fold.norm) for fold in self.folds] if folded else []
        try:
            for value, copy in zip(values, copies, strict=True):
                value.module._parameters[value.name] = copy
            for parent, name, _ in norms:
                parent._modules[name] = self._identity
            yield
        finally:
            for module, name, parameter in own:
                module._parameters[name] = parameter
            for parent, name, norm in norms:
                parent._modules[name] = norm

    def _values(self, dtype: torch.dtype | None, folds: Sequence[Fold]) -> list[Value]:
        values = []
        for fold in folds:
            weight, bias = fold.weights()
            values += [Value(fold.convolution, "weight", weight)]
            values += [Value(fold.convolution, "bias", bias)]
        if dtype is None:
            return values
        done = {fold.convolution for fold in folds}
        for module in self.model.modules():
            if type(module) in LOWERED and module not in done:
                for name in ("weight", "bias"):
                    parameter = module._parameters.get(name)
                    # Autocast leaves float64 as it is.
                    if parameter is not None and parameter.dtype == torch.float32:
                        values.append(Value(module, name, parameter))
        return values

    def _filled(self, values: Sequence[Value], dtype: torch.dtype | None) -> list[nn.Parameter]:
        """Copies of ``values``: the same tensors every time, unless the model has changed."""
        tensors = [value.tensor for value in values]
        dtypes = [
            dtype if dtype is not None and tensor.dtype == torch.float32 else tensor.dtype
            for tensor in tensors
        ]
        wanted = [(t.shape, t.device, kind) for t, kind in zip(tensors, dtypes, strict=True)]
        if wanted != [(copy.shape, copy.device, copy.dtype) for copy in self._copies]:
            self._copies = [
                nn.Parameter(torch.empty_like(tensor, dtype=kind), requires_grad=False)
                for tensor, kind in zip(tensors, dtypes, strict=True)
            ]
        if tensors:
            torch._foreach_copy_(list[Tensor](self._copies), tensors)
        return self._copies
