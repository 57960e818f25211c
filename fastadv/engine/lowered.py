"""One low-precision copy of the weights for all passes of an attack.

Autocast would cast every weight again in every pass: ten times the same for PGD-10. Its own cache
cannot be used, since it outlives a change of the weights in place (``precision.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

# Modules that hand these parameters to an operation autocast lowers. Not their subclasses, which
# may do something to a weight first (standardise it) that must see all its digits.
LOWERED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NAMES = ("weight", "bias")


class Lowered:
    """The weights of ``model``'s convolutions and linear layers in a lower precision."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._copies: list[nn.Parameter] = []

    @contextmanager
    def in_place(self, dtype: torch.dtype) -> Iterator[None]:
        """Copies of the weights of this moment in ``dtype`` stand in the model inside; no
        gradient with respect to them is possible."""
        places = self._places()
        own = [cast(nn.Parameter, module._parameters[name]) for module, name in places]
        self._allocate(own, dtype)
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](self._copies), list[Tensor](own))
        try:
            _put(places, self._copies)
            yield
        finally:
            _put(places, own)

    def _places(self) -> list[tuple[nn.Module, str]]:
        """Where float32 parameters stand: autocast leaves float64 as it is."""
        return [
            (module, name)
            for module in self.model.modules()
            if type(module) in LOWERED
            for name in NAMES
            if (weight := module._parameters.get(name)) is not None
            if weight.dtype == torch.float32
        ]

    def _allocate(self, own: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        """The same copies every time, unless the model has moved or changed its shape."""
        wanted = [(weight.shape, weight.device, dtype) for weight in own]
        if wanted != [(copy.shape, copy.device, copy.dtype) for copy in self._copies]:
            self._copies = [
                nn.Parameter(torch.empty_like(weight, dtype=dtype), requires_grad=False)
                for weight in own
            ]


def _put(places: Sequence[tuple[nn.Module, str]], parameters: Sequence[nn.Parameter]) -> None:
    for (module, name), parameter in zip(places, parameters, strict=True):
        module._parameters[name] = parameter
