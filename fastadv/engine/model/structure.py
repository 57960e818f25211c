"""Detects changes of a model's modules and parameters.

Between two calls of a step the user may replace a head, add a parametrization or prune a weight.
Everything derived from the model's structure (names, folds, counters, compiled graphs) must then be
derived again. One walk over the modules finds a change, in a fraction of the time that
``named_parameters`` takes.
"""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import nn
from torch.jit import ScriptModule


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
        self._parts: list[Any] = []
        self._hooks: list[Any] = []  # hooks on the whole model
        self.look()

    def look(self) -> bool:
        """Compare with the last look; True if the model has changed."""
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
        # The names and hooks of a copy are other objects, so a copy must look again.
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
    """The objects of which a model consists. The keys of its dictionaries are among them, since
    they also stay the same objects while nothing changes. As long as the objects are held here,
    Python cannot give their ids to others."""
    found: list[Any] = [model]
    modules, seen = [model], {model}
    for module in modules:
        if isinstance(module, ScriptModule):  # the parts of TorchScript cannot change
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
