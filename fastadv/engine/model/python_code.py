"""What the code of a model reads besides its modules' attributes: class attributes, globals,
closures."""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from fastadv.engine.model.python_values import LEAVES, frozen, is_settled_package


class Reading:
    """The names that code reads in a class, a Python module or another name space."""

    def __init__(self, place: str, space: Mapping[str, Any], names: Iterable[str] | None) -> None:
        self.place, self.space = place, space
        self._names = None if names is None else list(names)
        self._count = -1
        self._data: list[str] = []

    def names(self) -> list[str]:
        if self._names is not None:
            return [name for name in self._names if name in self.space]
        if len(self.space) != self._count:
            self._count = len(self.space)
            self._data = [key for key, value in self.space.items() if _is_data(key, value)]
        return [key for key in self._data if key in self.space]

    def read(self, seen: list[Any], deep: list[Hashable]) -> None:
        for key in self.names():
            value = self.space[key]
            if type(value) in LEAVES or _is_code(value):
                seen.append(value)
            else:
                deep.append(frozen(value))


class Cells(Mapping[str, Any]):
    """The variables of outer functions that a function can read."""

    def __init__(self, function: types.FunctionType) -> None:
        names = function.__code__.co_freevars
        self.cells = dict(zip(names, function.__closure__ or (), strict=False))

    def __getitem__(self, name: str) -> Any:
        try:
            return self.cells[name].cell_contents
        except ValueError:
            raise KeyError(name) from None  # not assigned yet

    def __contains__(self, name: object) -> bool:
        try:
            self[str(name)]
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)


def code_readings(modules: list[nn.Module]) -> Iterator[Reading]:
    """Class attributes, globals and closures that the code of the model's modules and hooks names.

    Functions that this code names are followed, except those of PyTorch and the standard library.
    """
    kinds: dict[type, None] = {}
    functions: list[Any] = []
    for module in modules:
        kinds |= dict.fromkeys(type(module).__mro__)
        own = vars(module)
        functions += [own[key] for key in ("forward",) if key in own]
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            functions += own[hooks].values()
        functions += [each for each in own.values() if isinstance(each, types.FunctionType)]
    for kind in kinds:
        if not is_settled_package(kind.__module__):
            yield Reading(kind.__name__, vars(kind), None)
            functions += [_function_of(each) for each in vars(kind).values()]
    yield from _of_functions(functions)


def function_readings(functions: Iterable[Any]) -> Iterator[Reading]:
    """``functions`` of the user that are no part of a model, and what their code reads."""
    plain: list[Any] = []
    for number, function in enumerate(functions):
        yield Reading("function", {str(number): function}, [str(number)])
        while isinstance(function, functools.partial):
            function = function.func
        if isinstance(function, nn.Module):
            yield from code_readings(list(function.modules()))
        else:
            plain.append(function)
    yield from _of_functions(plain)


def _of_functions(functions: list[Any]) -> Iterator[Reading]:
    seen: set[int] = set()
    while functions:
        function = functions.pop()
        if isinstance(function, types.MethodType):
            function = function.__func__
        if not isinstance(function, types.FunctionType):
            # A hook that is an object carries its state and its code.
            inside = getattr(function, "__dict__", None)
            if not isinstance(inside, dict) or isinstance(function, (type, nn.Module)):
                continue
            if id(function) not in seen and not is_settled_package(type(function).__module__):
                seen.add(id(function))
                yield Reading(type(function).__name__, inside, None)
                functions += [_function_of(each) for each in vars(type(function)).values()]
            continue
        if id(function) in seen or is_settled_package(function.__module__ or ""):
            continue
        seen.add(id(function))
        named = _names(function.__code__)
        space = function.__globals__
        read = [name for name in named if name in space]
        yield from _of_space(function.__module__ or "", space, read)
        functions += [space[name] for name in read if callable(space[name])]
        for kind in [space[name] for name in read if isinstance(space[name], type)]:
            if not (is_settled_package(kind.__module__) or issubclass(kind, nn.Module)):
                yield Reading(kind.__name__, vars(kind), None)
        if function.__defaults__:
            yield Reading(function.__qualname__, {"defaults": function.__defaults__}, None)
        for name in read:
            value = space[name]
            if isinstance(value, types.ModuleType) and not is_settled_package(value.__name__):
                inner = [each for each in named if each in vars(value)]
                yield from _of_space(value.__name__, vars(value), inner)
                functions += [vars(value)[each] for each in inner if callable(vars(value)[each])]
        if function.__closure__:
            cells = Cells(function)
            inner = [name for name in cells if name in cells and name != "__class__"]
            yield from _of_space(function.__qualname__, cells, inner)
            functions += [cells[name] for name in inner if callable(cells[name])]


def _of_space(place: str, space: Mapping[str, Any], names: list[str]) -> Iterator[Reading]:
    data = [n for n in names if not isinstance(space[n], (types.ModuleType, type, nn.Module))]
    if data:
        yield Reading(place, space, data)


def _function_of(value: Any) -> Any:
    if isinstance(value, property):
        return value.fget
    return getattr(value, "__func__", value)


def _names(code: types.CodeType) -> set[str]:
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _is_code(value: Any) -> bool:
    kinds = types.FunctionType, property, classmethod, staticmethod
    return isinstance(value, kinds) or (callable(value) and hasattr(type(value), "__get__"))


def _is_data(key: str, value: Any) -> bool:
    """True if an entry of a class is code or data that may be replaced."""
    return _is_code(value) or not (key.startswith("__") or hasattr(type(value), "__get__"))
