"""Detects changes of a model's modules and parameters.

Between two calls of a step the user may replace a head, add a parametrization or prune a weight.
Everything derived from the model's structure (names, folds, counters, compiled graphs) must then be
derived again. One look at the dictionaries of the modules (``registries.py``) finds a change, in a
fraction of the time that ``named_parameters`` takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

from torch import nn

from fastadv.engine.model.registries import Registries, hooks_on


class Structure:
    """The modules and parameters of ``model``, compared by identity, as of the last ``look``.

    ``parameters`` is name -> parameter; ``modules`` are all modules in order, each once.
    ``version`` counts the changes seen so far. A change is another module, parameter or buffer
    name, another module or parameter object, or another class, forward or hook of a module. A new
    value, train flag or ``requires_grad`` is not a change. ``inner`` does not count a change that
    is only a hook on the whole model, since it cannot change the order of the modules' calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.version = self.inner = -1
        self.parameters: dict[str, nn.Parameter] = {}
        self.modules: list[nn.Module] = []
        self._registries: Registries | None = None
        self._trusted = False
        self._parts: list[Any] | None = None  # None before the first look
        self._hooks: list[Any] = []  # hooks on the whole model
        self.look()

    @property
    def registries(self) -> Registries:
        """The dictionaries of the modules as of now."""
        if self._registries is None or not (self._trusted or self._registries.are_same()):
            self._registries = Registries(self.model)
        return self._registries

    @contextmanager
    def trusted(self) -> Iterator[None]:
        """Within this context, until ``distrust``, nobody changes the modules that the last look
        has found, so that they are not walked again."""
        self._trusted = True
        try:
            yield
        finally:
            self._trusted = False

    def distrust(self) -> None:
        """Say that code of the user runs, which may change the modules."""
        self._trusted = False

    def look(self) -> bool:
        """Compare with the last look; True if the model has changed."""
        self._trusted = False
        parts, hooks = self.registries.parts(), hooks_on(self.model)
        inner = self._parts is None or not _same(parts, self._parts)
        if not inner and _same(hooks, self._hooks):
            return False
        self._parts, self._hooks = parts, hooks
        self.parameters = dict(self.model.named_parameters())
        self.modules = list(self.model.modules())
        self.inner += inner
        self.version += 1
        return True

    def __getstate__(self) -> dict[str, Any]:
        # The names and hooks of a copy are other objects, so a copy must look again.
        return vars(self) | {"_parts": None, "_registries": None}


def _same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(map(is_, first, second))
