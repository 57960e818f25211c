"""The Python state of a model: numbers, names and switches that are not in tensors.

A CUDA graph has fixed them. ``PythonState.number`` identifies the state before every replay:
attributes of modules and of their classes, and the globals and closures that their code reads. It
is called in every step, so unchanged values are recognised by identity alone.
"""

from __future__ import annotations

import argparse
import enum
import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
# Types that are compared by identity: their values do not change inside.
_LEAVES = frozenset(
    {
        *_NUMBERS,
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, range, slice),
        *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type),
    }
)
# Limits: depth of nesting, entries per container, containers per attribute.
DEEP, MANY, BUDGET = 6, 256, 100
_CONTAINERS = (list, tuple, set, frozenset, deque)
# Packages whose code does not change between two steps.
_SETTLED = frozenset({"torch", "numpy", "fastadv", "math", *sys.stdlib_module_names}) - {"__main__"}


class PythonState:
    """The Python state of ``models``, and of the options of ``parts``, which are dataclasses. The
    keys of ``models`` are prefixes of the names of their attributes."""

    def __init__(self, models: Mapping[str, nn.Module], parts: Iterable[object] = ()) -> None:
        self.models = dict(models)
        self.changed = ""  # name of the first value that differed at the last change
        self._parts = [part for part in parts if is_dataclass(part)]
        self._modules: list[nn.Module] = []
        self._plans: dict[int, _Plan] = {}
        self._readings: list[_Reading] | None = None  # None: not known for the present structure
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

    def _code(self) -> list[_Reading]:
        """What is read beside attributes; created again for another structure or other
        functions."""
        if self._readings is None:
            self._modules = [m for model in self.models.values() for m in modules_of(model)]
            self._readings = list(_code_readings(self._modules))
            self._readings += [_options(part) for part in self._parts]
            self._plans.clear()
        return self._readings

    def _name(self, seen: list[Any], deep: list[Hashable]) -> int:
        self._seen, self._deep = seen, deep
        self._plans.clear()
        found = dict(self.values())
        self._readings = None  # another function may read other names
        others = [name for name in found if found[name] != self._last.get(name, _MISSING)]
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
        undo = list(_undo(modules))
        try:
            yield
        finally:
            for put_back in undo:
                put_back()


_MISSING = object()


class _Plan:
    """How the attributes of a module are compared: values that cannot change inside by identity,
    lists of such values by their entries, everything else by content. Created again after every
    change."""

    def __init__(self, module: nn.Module, skipped: set[tuple[int, str]]) -> None:
        own = vars(module)
        self.module, self.count = module, len(own)
        keys = [k for k in own if k not in OF_EVERY_MODULE and (id(module), k) not in skipped]
        self._get = _getter([key for key in keys if _is_settled(own[key])])
        rest = [key for key in keys if not _is_settled(own[key])]
        self._lists = [key for key in rest if type(own[key]) is list and _are_leaves(own[key])]
        self._deep = [key for key in rest if key not in self._lists]

    def read(self, own: dict[str, Any], seen: list[Any], deep: list[Hashable]) -> None:
        seen += self._get(own)
        for key in self._lists:
            seen.append(own[key])
            seen += own[key]
        for key in self._deep:
            deep.append(frozen(own[key]))


class _Reading:
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
            if type(value) in _LEAVES or _is_code(value):
                seen.append(value)
            else:
                deep.append(frozen(value))


def _is_code(value: Any) -> bool:
    kinds = types.FunctionType, property, classmethod, staticmethod
    return isinstance(value, kinds) or (callable(value) and hasattr(type(value), "__get__"))


def _is_data(key: str, value: Any) -> bool:
    """True if an entry of a class is code or data that may be replaced."""
    return _is_code(value) or not (key.startswith("__") or hasattr(type(value), "__get__"))


def _options(part: Any) -> _Reading:
    names = [field.name for field in fields(part) if field.init and field.name != "teachers"]
    return _Reading(type(part).__name__, vars(part), names)


def _getter(keys: list[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    if len(keys) > 1:
        return itemgetter(*keys)
    return lambda own: tuple(own[key] for key in keys)


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


def _is_settled(value: Any) -> bool:
    """True if the content of ``value`` cannot change while it stays the same object."""
    if type(value) is tuple:
        return _are_leaves(value)
    return type(value) in _LEAVES or isinstance(value, (enum.Enum, type))


def _are_leaves(values: Iterable[Any]) -> bool:
    return all(type(each) in _LEAVES for each in values)


def frozen(value: Any) -> Hashable:
    """``value`` in a form that can be compared later. An object that is not inspected is compared
    by identity."""
    return _frozen(value, DEEP, [BUDGET])


def _frozen(value: Any, depth: int, left: list[int]) -> Hashable:
    kind = type(value)
    if kind in _LEAVES or isinstance(value, (enum.Enum, type)):
        return value
    if isinstance(value, Tensor):
        return _of_tensor(value)
    left[0] -= 1
    if not depth or left[0] < 0:
        return _Same(value)

    def inner(each: Any) -> Hashable:
        return _frozen(each, depth - 1, left)

    if isinstance(value, functools.partial):
        return _frozen((value.func, value.args, value.keywords), depth, left)
    if kind in _CONTAINERS and len(value) <= MANY:
        return kind, tuple(value if _are_leaves(value) else map(inner, value))
    if isinstance(value, dict) and len(value) <= MANY:
        keys = tuple(key if type(key) in _LEAVES else _Same(key) for key in value)
        return kind, keys, tuple(map(inner, value.values()))
    if isinstance(value, nn.Module):
        # A module that is not a child of the model: a child would not be a plain attribute.
        state = vars(value)
        own = [state[key] for key in state if key not in OF_EVERY_MODULE]
        parts = [*state["_parameters"].values(), *state["_buffers"].values()]
        return _Same(value), state["training"], inner([*own, *parts, *state["_modules"].values()])
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        content = value.tobytes() if value.nbytes <= 16 * MANY else _Same(value)
        return kind, value.shape, content
    if _has_insides(value):
        return _Same(value), inner(_insides(value))
    return _Same(value)


def _has_insides(value: Any) -> bool:
    """True for an object of a user's class, and for a plain name space."""
    known = isinstance(value, (types.SimpleNamespace, argparse.Namespace))
    return known or not (_settled(type(value).__module__) or isinstance(value, type))


def _insides(value: Any) -> dict[str, Any]:
    """The attributes of an object, including those in slots."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
    return {**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})}


def _slots(kind: type) -> list[str]:
    names = vars(kind).get("__slots__", ())
    return [names] if isinstance(names, str) else [n for n in names if not n.startswith("__")]


class _Same:
    """An object compared by identity. It is held here, so that its id is not given to another."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _of_tensor(tensor: Tensor) -> Hashable:
    """The shape, type and address of a tensor. On the host with CUDA also its version, since a
    kernel on a GPU takes a single number from there by value."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return _Same(tensor)
    place = tensor.shape, tensor.dtype, tensor.device, tensor.data_ptr()
    if tensor.is_cpu and torch.cuda.is_initialized() and not tensor.is_inference():
        return *place, tensor._version
    return place


def _undo(modules: list[nn.Module]) -> Iterator[Callable[[], None]]:
    """Functions that restore the present content of the containers of the modules' Python state."""
    waiting: list[tuple[Any, int]] = []
    for module in modules:
        own = vars(module)
        content = {key: own[key] for key in own if key not in OF_EVERY_MODULE}
        yield functools.partial(_put_back_keys, own, content, OF_EVERY_MODULE)
        waiting += [(each, DEEP) for each in content.values()]
    for reading in _code_readings(modules):
        values = {key: reading.space[key] for key in reading.names()}
        if isinstance(reading.space, Cells):
            yield functools.partial(_put_back_cells, reading.space.cells, values)
        elif isinstance(reading.space, dict):
            yield functools.partial(_put_back_keys, reading.space, values, None)
        waiting += [(each, DEEP) for each in values.values()]
    seen: set[int] = set()
    while waiting:
        holder, depth = waiting.pop()
        if id(holder) in seen or not depth or isinstance(holder, (nn.Module, Tensor, type)):
            continue
        seen.add(id(holder))
        if isinstance(holder, (list, deque)) and len(holder) <= MANY:
            yield functools.partial(_put_back_entries, holder, list(holder))
            waiting += [(each, depth - 1) for each in holder]
        elif isinstance(holder, dict) and len(holder) <= MANY:
            yield functools.partial(_put_back_keys, holder, dict(holder), frozenset())
            waiting += [(each, depth - 1) for each in holder.values()]
        elif isinstance(holder, tuple) and len(holder) <= MANY:
            waiting += [(each, depth - 1) for each in holder]
        elif type(holder) not in _LEAVES and _has_insides(holder):
            own = _insides(holder)
            yield functools.partial(_put_back_attributes, holder, own)
            waiting += [(each, depth - 1) for each in own.values()]


def _put_back_entries(holder: Any, content: list[Any]) -> None:
    if len(holder) != len(content) or not all(map(is_, holder, content)):
        holder.clear()
        holder.extend(content)


def _put_back_keys(
    holder: dict[Any, Any], content: dict[Any, Any], left_alone: frozenset[str] | None
) -> None:
    """Restore ``content`` in ``holder``. Other keys are deleted except those in ``left_alone``;
    None deletes none."""
    if left_alone is not None:
        for key in [key for key in holder if key not in content and key not in left_alone]:
            del holder[key]
    for key, value in content.items():
        if holder.get(key, _MISSING) is not value:
            holder[key] = value


def _put_back_attributes(holder: Any, content: dict[str, Any]) -> None:
    for name in [name for name in getattr(holder, "__dict__", ()) if name not in content]:
        delattr(holder, name)
    for name, value in content.items():
        if getattr(holder, name, _MISSING) is not value:
            object.__setattr__(holder, name, value)


def _put_back_cells(cells: Mapping[str, Any], content: dict[str, Any]) -> None:
    for name, value in content.items():
        cells[name].cell_contents = value


# -- what code reads ------------------------------------------------------------------------------


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


def _code_readings(modules: list[nn.Module]) -> Iterator[_Reading]:
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
        if not _settled(kind.__module__):
            yield _Reading(kind.__name__, vars(kind), None)
            functions += [_function_of(each) for each in vars(kind).values()]
    yield from _of_functions(functions)


def _of_functions(functions: list[Any]) -> Iterator[_Reading]:
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
            if id(function) not in seen and not _settled(type(function).__module__):
                seen.add(id(function))
                yield _Reading(type(function).__name__, inside, None)
                functions += [_function_of(each) for each in vars(type(function)).values()]
            continue
        if id(function) in seen or _settled(function.__module__ or ""):
            continue
        seen.add(id(function))
        named = _names(function.__code__)
        space = function.__globals__
        read = [name for name in named if name in space]
        yield from _of_space(function.__module__ or "", space, read)
        functions += [space[name] for name in read if callable(space[name])]
        for kind in [space[name] for name in read if isinstance(space[name], type)]:
            if not (_settled(kind.__module__) or issubclass(kind, nn.Module)):
                yield _Reading(kind.__name__, vars(kind), None)
        if function.__defaults__:
            yield _Reading(function.__qualname__, {"defaults": function.__defaults__}, None)
        for name in read:
            value = space[name]
            if isinstance(value, types.ModuleType) and not _settled(value.__name__):
                inner = [each for each in named if each in vars(value)]
                yield from _of_space(value.__name__, vars(value), inner)
                functions += [vars(value)[each] for each in inner if callable(vars(value)[each])]
        if function.__closure__:
            cells = Cells(function)
            inner = [name for name in cells if name in cells and name != "__class__"]
            yield from _of_space(function.__qualname__, cells, inner)
            functions += [cells[name] for name in inner if callable(cells[name])]


def _of_space(place: str, space: Mapping[str, Any], names: list[str]) -> Iterator[_Reading]:
    data = [n for n in names if not isinstance(space[n], (types.ModuleType, type, nn.Module))]
    if data:
        yield _Reading(place, space, data)


def _function_of(value: Any) -> Any:
    if isinstance(value, property):
        return value.fget
    return getattr(value, "__func__", value)


def _names(code: types.CodeType) -> set[str]:
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _settled(module: str) -> bool:
    return module.partition(".")[0] in _SETTLED
