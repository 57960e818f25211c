"""The dictionaries in which a model's modules keep their parts.

A step reads them before every replay, so they are read by functions written in C, without a Python
call per module: that takes a fraction of the time of a walk.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import nn
from torch.jit import ScriptModule

_REGISTRIES = itemgetter(
    *("_parameters", "_buffers", "_modules"),
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"),
)
_TRAINING = itemgetter("training")


class Registries:
    """The dictionaries of the modules of ``model``, each once, without TorchScript, whose parts are
    not in Python. ``scripts`` is True if there is TorchScript among them.

    ``parameters`` and the methods after it read them as they are now; that is the whole model only
    while ``are_same``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: list[nn.Module] = []
        self.scripts = False
        found, seen = [model], {model}
        for module in found:
            if isinstance(module, ScriptModule):
                self.scripts = True
                continue
            self.modules.append(module)
            for child in vars(module)["_modules"].values():
                if child is not None and child not in seen:
                    seen.add(child)
                    found.append(child)
        self._own = [vars(module) for module in self.modules]
        self._dictionaries = list(chain.from_iterable(map(_REGISTRIES, self._own)))
        every = [self._dictionaries[place::6] for place in range(6)]
        # An empty dictionary is only asked if it is still empty.
        self._empty = [each for kind in every[:3] for each in kind if not each]
        self._parameters, self._buffers, self._children = (
            [each for each in kind if each] for kind in every[:3]
        )
        self._hooks = [each for kind in every[3:] for each in kind[1:]]  # without the whole model's
        self._found = list(chain.from_iterable(map(dict.values, self._children)))

    def are_same(self) -> bool:
        """True if another walk would find the same modules, with the same dictionaries."""
        now = list(chain.from_iterable(map(_REGISTRIES, self._own)))
        children = list(chain.from_iterable(map(dict.values, self._children)))
        return (
            not any(self._empty)
            and all(map(is_, map(vars, self.modules), self._own))
            and all(map(is_, now, self._dictionaries))
            and len(children) == len(self._found)
            and all(map(is_, children, self._found))
        )

    def parameters(self) -> list[Any]:
        """The parameters in every place, None where there is none."""
        return list(chain.from_iterable(map(dict.values, self._parameters)))

    def buffers(self) -> list[Any]:
        """The buffers in every place, None where there is none."""
        return list(chain.from_iterable(map(dict.values, self._buffers)))

    def buffer_names(self) -> Iterable[str]:
        """The name of each of the ``buffers``."""
        return chain.from_iterable(self._buffers)

    def train_flags(self) -> list[bool]:
        """The train flag of each module."""
        return list(map(_TRAINING, self._own))

    def parts(self) -> list[Any]:
        """The objects of which the model consists, without values: classes, forward functions,
        hooks, names, parameters and modules. As long as they are held somewhere, Python cannot give
        their ids to others. Hooks on the whole model are not among them."""
        found: list[Any] = list(map(type, self.modules))
        found += [own["forward"] for own in self._own if "forward" in own]
        found += chain.from_iterable(self._parameters)
        found += chain.from_iterable(map(dict.values, self._parameters))
        found += chain.from_iterable(self._buffers)
        found += chain.from_iterable(self._children)
        found += self._found
        if any(self._hooks):
            found += [part for hooks in self._hooks for part in (*hooks, *hooks.values())]
        return found


def hooks_on(module: nn.Module) -> list[Any]:
    """The hooks on ``module`` and their numbers."""
    if isinstance(module, ScriptModule):
        return []
    kinds = _REGISTRIES(vars(module))[3:]
    if not any(kinds):
        return []
    return [part for hooks in kinds for part in (*hooks, *hooks.values())]
