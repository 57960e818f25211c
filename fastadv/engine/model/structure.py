"""Tells whether a model still has the modules and parameters that it had at the last look.

Users replace heads, add parametrizations and prune between two calls of a step. Whatever was
learnt from the model's structure (names, folds, counters, compiled graphs) must be learnt again
then. One walk over the modules says so, in a fraction of the time that ``named_parameters`` takes.
"""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import nn
from torch.jit import ScriptModule


class Structure:
    """The parts of ``model`` by identity, as of the last ``look``.

    ``parameters`` are by name and ``modules`` in order, each once; ``version`` counts the changes
    that were seen.
    A change is another module, parameter or buffer name, another object in its place, another
    class, forward or hook of a module. Values, train flags and ``requires_grad`` are none.
    ``inner`` counts those that are more than a hook on the model as a whole, which cannot change
    how its modules follow each other.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.version = self.inner = -1
        self.parameters: dict[str, nn.Parameter] = {}
        self.modules: list[nn.Module] = []
        self._parts: list[Any] = []
        self._hooks: list[Any] = []  # of the model as a whole
        self.look()

    def look(self) -> bool:
        """Look again: whether the model is another than at the last look."""
        parts, hooks = _parts(self.model), _hooks(self.model)
        inner = not _same(parts, self._parts)
        if not inner and _same(hooks, self._hooks):
            return False
        self._parts, self._hooks = parts, hooks
        self.parameters = dict(self.model.named_parameters())
        self.modules = list(self.model.modules())
        self.inner += inner
        self.version += 1
        return True

    def __getstate__(self) -> dict[str, Any]:
        # The names and hooks of a copy are other objects: it looks again.
        return vars(self) | {"_parts": []}


def _same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(map(is_, first, second))


def _hooks(module: nn.Module) -> list[Any]:
    if isinstance(module, ScriptModule):
        return []
    own = vars(module)
    kinds = (own["_forward_hooks"], own["_forward_pre_hooks"], own["_backward_hooks"])
    return [part for hooks in kinds for part in (*hooks, *hooks.values())]


def _parts(model: nn.Module) -> list[Any]:
    """What a model is made of. Dictionaries keep their keys, so these too are the same objects
    while nothing changes; holding them here keeps their identity from being given to others."""
    found: list[Any] = [model]
    modules, seen = [model], {model}
    for module in modules:
        if isinstance(module, ScriptModule):  # TorchScript keeps its parts, which cannot change
            found.append(type(module))
            continue
        own = vars(module)
        parameters, children = own["_parameters"], own["_modules"]
        found.append(type(module))
        if parameters:
            found += parameters
            found += parameters.values()
        if own["_buffers"]:
            found += own["_buffers"]
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]:
            found += _hooks(module) if module is not model else ()
        if "forward" in own:
            found.append(own["forward"])
        if children:
            found += children
            found += children.values()
            for child in children.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    modules.append(child)
    return found
