"""Values of Python in a form that can be compared later."""

from __future__ import annotations

import argparse
import enum
import functools
import sys
import types
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
# Types that are compared by identity: their values do not change inside.
LEAVES = frozenset(
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
MISSING = object()  # unequal to every value of a user


def frozen(value: Any) -> Hashable:
    """``value`` in a form that can be compared later. An object that is not inspected is compared
    by identity."""
    return _frozen(value, DEEP, [BUDGET])


def _frozen(value: Any, depth: int, left: list[int]) -> Hashable:
    kind = type(value)
    if kind in LEAVES or isinstance(value, (enum.Enum, type)):
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
        return kind, tuple(value if are_leaves(value) else map(inner, value))
    if isinstance(value, dict) and len(value) <= MANY:
        keys = tuple(key if type(key) in LEAVES else _Same(key) for key in value)
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
    if has_insides(value):
        return _Same(value), inner(insides(value))
    return _Same(value)


def is_unchangeable(value: Any) -> bool:
    """True if the content of ``value`` cannot change while it stays the same object."""
    if type(value) is tuple:
        return are_leaves(value)
    return type(value) in LEAVES or isinstance(value, (enum.Enum, type))


def are_leaves(values: Iterable[Any]) -> bool:
    return all(type(each) in LEAVES for each in values)


def has_insides(value: Any) -> bool:
    """True for an object of a user's class, and for a plain name space."""
    known = isinstance(value, (types.SimpleNamespace, argparse.Namespace))
    return known or not (is_settled_package(type(value).__module__) or isinstance(value, type))


def insides(value: Any) -> dict[str, Any]:
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


def is_settled_package(module: str) -> bool:
    return module.partition(".")[0] in _SETTLED
