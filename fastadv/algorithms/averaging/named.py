"""What every average of the weights needs: one tensor per averaged one, stored by its name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import field

import torch
from torch import Tensor

from fastadv.algorithms.contract import Averaging
from fastadv.errors import UserError

PREFIX = "average."


class Named(Averaging):
    """``shadow`` is name of a parameter or buffer -> its average."""

    shadow: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)

    def start(self, tensors: Mapping[str, Tensor]) -> None:
        self._keep({name: _copy(tensor) for name, tensor in _movable(tensors)})

    def replaced(self, tensors: Mapping[str, Tensor], old: Mapping[str, str]) -> None:
        before = self.shadow
        self._keep(
            {
                name: before[old[name]] if old.get(name) in before else _copy(tensor)
                for name, tensor in _movable(tensors)
            }
        )

    def _keep(self, shadow: dict[str, Tensor]) -> None:
        self.shadow = shadow
        others = {k: tensor for k, tensor in self.state.items() if not k.startswith(PREFIX)}
        self.state = {PREFIX + name: tensor for name, tensor in shadow.items()} | others

    @torch.no_grad()
    def move(
        self, tensors: Mapping[str, Tensor], weight: Tensor | float, names: Collection[str]
    ) -> None:
        """average <- average + weight (tensor - average), for the tensors in ``names``; ``weight``
        is a number or 0-dim."""
        live = [tensors[name] for name in names]
        averages = [self.shadow[name] for name in names]
        if isinstance(weight, Tensor):
            weights = [weight.to(average.dtype) for average in averages]
            torch._foreach_lerp_(averages, live, weights)
        else:
            torch._foreach_lerp_(averages, live, weight)

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        if saved.keys() != self.state.keys():
            ours, theirs = self.state.keys(), saved.keys()
            name = next(iter(sorted(theirs - ours) + sorted(ours - theirs)))
            where = "the model" if name in theirs else "the saved state"
            raise UserError(
                f"The saved averages are of another model: {name.removeprefix(PREFIX)!r} is not in "
                f"{where}."
            )
        super().load_state(saved)


def _movable(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    # Some networks hold integers (quantised weights) as parameters that never learn.
    return ((name, each) for name, each in tensors.items() if each.is_floating_point())


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
