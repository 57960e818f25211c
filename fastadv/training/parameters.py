"""The parameters of the present model: their names, which learn, which are perturbed."""

from __future__ import annotations

from torch import Tensor

from fastadv.algorithms.contract import Freezes
from fastadv.algorithms.plan import Plan
from fastadv.engine.model.buffers import floating_buffers
from fastadv.engine.model.network import Network


class Parameters:
    """The parameters of ``net`` as ``plan`` trains them. ``named``: name -> parameter."""

    def __init__(self, plan: Plan, net: Network) -> None:
        self.plan, self.net = plan, net
        self.named: dict[str, Tensor] = {}
        self._learns: set[str] = set()
        self.follow()

    def follow(self) -> None:
        """Take over the parameters of the present model."""
        self.named = dict(self.net.structure.parameters)
        layers = self.plan.layers
        if isinstance(layers, Freezes):
            self._learns = {name for name in self.named if layers.learns(name)}
        else:
            self._learns = set(self.named)

    def averaged(self) -> dict[str, Tensor]:
        """Name -> tensor, for all that the averaging part averages."""
        averaging = self.plan.averaging
        if averaging is None or not averaging.averages_buffers:
            return self.named
        return self.named | floating_buffers(self.net.model)

    def learning(self) -> list[Tensor]:
        """The parameters that learn, in the order of ``learning_named``."""
        return list(self.learning_named().values())

    def learning_named(self) -> dict[str, Tensor]:
        """Name -> parameter, for all that require grad and that the recipe does not freeze."""
        return {
            name: parameter
            for name, parameter in self.named.items()
            if parameter.requires_grad and name in self._learns
        }

    def perturbed(self) -> dict[str, Tensor]:
        """Name -> weight that is perturbed: selected by the weights part, and requires grad."""
        weights = self.plan.weights
        if weights is None or not weights.active:
            return {}
        names, tensors = list(self.named), list(self.named.values())
        selected = [(names[place], tensors[place]) for place in weights.select(names, tensors)]
        return {name: tensor for name, tensor in selected if tensor.requires_grad}
