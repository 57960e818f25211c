"""The Python state of a model: numbers, names and switches that are not in tensors.

A CUDA graph has fixed them. ``PythonState.number`` identifies the state before every replay:
attributes of modules and of their classes, and the globals and closures that their code reads. It
is called in every step, so unchanged values are recognised by identity alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from operator import is_, itemgetter
from typing import Any

from torch import nn
from torch.jit import ScriptModule

from fastadv.engine.model.python_code import Reading, code_readings, function_readings
from fastadv.engine.model.python_undo import undo_functions
from fastadv.engine.model.python_values import (
    MISSING,
    OF_EVERY_MODULE,
    are_leaves,
    frozen,
    is_unchangeable,
)


class PythonState:
    """The Python state of ``models``, of the options of ``parts``, which are dataclasses, and of
    the user's ``functions`` and those among the options. The keys of ``models`` are prefixes of
    the names of their attributes."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        parts: Iterable[object] = (),
        functions: Iterable[Any] = (),
    ) -> None:
        self.models = dict(models)
        self.changed = ""  # name of the first value that differed at the last change
        self._parts = [part for part in parts if is_dataclass(part)]
        self._functions = list(functions)
        self._modules: list[nn.Module] = []
        self._plans: dict[int, _Plan] = {}
        self._readings: list[Reading] | None = None  # None: not known for the present structure
        self._version: Hashable = None
        self._seen: list[Any] = []
        self._deep: list[Hashable] = []
        self._last: dict[str, Hashable] = {}
        self._numbers: dict[Hashable, int] = {}
        self._number = -1
        self._skipped: set[tuple[int, str]] = set()

    def number(self, version: Hashable = None) -> int:
        """A number for the present state, the same for equal states. ``version`` must differ if the
        model has other modules or hooks."""
        if version != self._version:
            self._readings, self._version = None, version
        readings = self._code()
        seen: list[Any] = []
        deep: list[Hashable] = []
        for module in self._modules:
            own = vars(module)
            plan = self._plans.get(id(module))
            if plan is None or plan.module is not module or plan.count != len(own):
                plan = self._plans[id(module)] = _Plan(module, self._skipped)
            try:
                plan.read(own, seen, deep)
            except (KeyError, TypeError):  # an attribute was removed or has another type now
                plan = self._plans[id(module)] = _Plan(module, self._skipped)
                plan.read(own, seen, deep)
        for reading in readings:
            reading.read(seen, deep)
        if (
            len(seen) != len(self._seen)
            or deep != self._deep
            or not all(map(is_, seen, self._seen))
        ):
            self._number = self._name(seen, deep)
        return self._number

    def _code(self) -> list[Reading]:
        """What is read beside attributes; created again for another structure or other
        functions."""
        if self._readings is None:
            self._modules = [m for model in self.models.values() for m in modules_of(model)]
            self._readings = list(code_readings(self._modules))
            options = [_options(part) for part in self._parts]
            given = [each.space[name] for each in options for name in each.names()]
            functions = [*self._functions, *(each for each in given if callable(each))]
            self._readings += [*options, *function_readings(functions)]
            self._plans.clear()
        return self._readings

    def _name(self, seen: list[Any], deep: list[Hashable]) -> int:
        self._seen, self._deep = seen, deep
        self._plans.clear()
        found = dict(self.values())
        self._readings = None  # another function may read other names
        others = [name for name in found if found[name] != self._last.get(name, MISSING)]
        others += [name for name in self._last if name not in found]
        if others and self._last:
            self.changed = others[0]
        self._last = found
        return self._numbers.setdefault(tuple(found.items()), len(self._numbers))

    def values(self) -> Iterator[tuple[str, Hashable]]:
        """Everything that is compared: (name for the user, value as returned by ``frozen``)."""
        for name, module, key in self.attributes():
            if (id(module), key) not in self._skipped:
                yield name, frozen(vars(module)[key])
        for reading in self._code():
            for key in reading.names():
                yield f"{reading.place}.{key}", frozen(reading.space[key])

    def attributes(self) -> Iterator[tuple[str, nn.Module, str]]:
        """The attributes of modules beyond those of every ``nn.Module``: name, module and key."""
        for before, model in self.models.items():
            for path, module in model.named_modules(prefix=before):
                if isinstance(module, ScriptModule):
                    continue
                for key in vars(module):
                    if key not in OF_EVERY_MODULE:
                        yield f"{path}.{key}" if path else key, module, key

    def skip(self, module: nn.Module, key: str) -> None:
        """Leave out an attribute that every forward pass writes before it reads it."""
        self._skipped.add((id(module), key))
        self._plans.clear()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Attributes and the content of their containers are restored on exit."""
        modules = [m for model in self.models.values() for m in modules_of(model)]
        undo = list(undo_functions(modules))
        try:
            yield
        finally:
            for put_back in undo:
                put_back()


class _Plan:
    """How the attributes of a module are compared: values that cannot change inside by identity,
    lists of such values by their entries, everything else by content. Created again after every
    change."""

    def __init__(self, module: nn.Module, skipped: set[tuple[int, str]]) -> None:
        own = vars(module)
        self.module, self.count = module, len(own)
        keys = [k for k in own if k not in OF_EVERY_MODULE and (id(module), k) not in skipped]
        self._get = _getter([key for key in keys if is_unchangeable(own[key])])
        rest = [key for key in keys if not is_unchangeable(own[key])]
        self._lists = [key for key in rest if type(own[key]) is list and are_leaves(own[key])]
        self._deep = [key for key in rest if key not in self._lists]

    def read(self, own: dict[str, Any], seen: list[Any], deep: list[Hashable]) -> None:
        seen += self._get(own)
        for key in self._lists:
            seen.append(own[key])
            seen += own[key]
        for key in self._deep:
            deep.append(frozen(own[key]))


def _options(part: Any) -> Reading:
    """The options of ``part``, without lists of networks: their own state is read as a model's."""
    names = [
        field.name
        for field in fields(part)
        if field.init and not _are_networks(getattr(part, field.name))
    ]
    return Reading(type(part).__name__, vars(part), names)


def _are_networks(value: object) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(each, nn.Module) for each in value)


def _getter(keys: list[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    if keys:
        return itemgetter(*keys, keys[0])  # of one key alone it would return no tuple
    return lambda own: ()


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of ``model``, each once, without TorchScript, whose attributes are not in
    Python."""
    modules, seen = [model], {model}
    for module in modules:
        if isinstance(module, ScriptModule):
            continue
        yield module
        for child in vars(module)["_modules"].values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
