"""Traces the operations of a function of tensors, to find out if they are the same in every call.

A CUDA graph repeats kernels. It does not repeat what Python decided at the capture: a branch on a
tensor's value, a number drawn from Python's generator, a counter. Such a function is found here by
the values it reads, by the numbers it draws, or because two of its calls differ in operations.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

Result = TypeVar("Result")

# Reads of a tensor's values that are not operations of PyTorch's dispatcher.
READS = frozenset({"tolist", "numpy", "__array__", "__dlpack__", "__repr__", "__format__"})
SMALL = 64  # most elements of a constant made from Python numbers that is compared by value


@dataclass
class Trace:
    """The operations of one call, in order, with their arguments except the values of tensors.

    ``looks`` names the operations by which Python read a tensor's value (``item``,
    ``bool(tensor)``, ``tolist``, ``equal``) or by which a shape depends on one (``nonzero``).
    ``draws`` names the global generators of the host from which the call drew: "random",
    "numpy.random".
    """

    operations: list[Hashable] = field(default_factory=list)
    looks: list[str] = field(default_factory=list)
    draws: list[str] = field(default_factory=list)

    def difference(self, other: Trace) -> str | None:
        """The first operation that differs in ``other``, in words, or None if there is none."""
        for place, pair in enumerate(zip(self.operations, other.operations, strict=False)):
            if pair[0] != pair[1]:
                first, second = map(_words, pair)
                return f"operation {place} is {first} in one call, {second} in another"
        counts = len(self.operations), len(other.operations)
        if counts[0] != counts[1]:
            return f"one call makes {counts[0]} operations, another {counts[1]}"
        return None


def traced(function: Callable[[], Result]) -> tuple[Result, Trace]:
    """The result of ``function()`` and its trace, of forward and backward passes.

    Not seen are draws from generators that are objects of the user, unless their numbers are
    arguments of an operation (two calls then differ), and code outside of PyTorch.
    """
    trace = Trace()
    before = _host_generators()
    with _Functions(trace), _Operations(trace):
        result = function()
    after = _host_generators()
    trace.draws = [name for name, state in before.items() if after[name] != state]
    return result, trace


def _words(operation: Hashable) -> str:
    name, *arguments = operation if isinstance(operation, tuple) else (operation,)
    return f"{name}{tuple(a for a in arguments if not isinstance(a, tuple))}"


def _host_generators() -> dict[str, Hashable]:
    states: dict[str, Hashable] = {"random": random.getstate()}
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        state = numpy.random.get_state(legacy=False)["state"]
        states["numpy.random"] = (state["key"].tobytes(), state["pos"])
    return states


class _Functions(TorchFunctionMode):
    """Records the reads of a tensor's values that are not operations of the dispatcher."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.trace.looks.append(name)
        elif name == "from_numpy":
            self.trace.operations.append((name, args[0].shape, args[0].tobytes()))
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Records every operation of the dispatcher."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        if depends_on_values(func, args):
            self.trace.looks.append(name)
        if not name.startswith(("aten.detach", "aten.alias", "aten.lift_fresh")):
            flat, _ = tree_flatten((args, kwargs or {}))
            self.trace.operations.append((name, *map(_described, flat)))
        elif name.startswith("aten.lift_fresh"):
            self.trace.operations.append((name, *_constant(args[0])))
        return func(*args, **(kwargs or {}))


def depends_on_values(func: Any, args: tuple[Any, ...]) -> bool:
    """True if Python reads a tensor's value by the operation, or a shape depends on one."""
    if func is torch.ops.aten.index.Tensor:  # only a mask makes the shape depend on values
        masks = (torch.bool, torch.uint8)
        return any(isinstance(each, Tensor) and each.dtype in masks for each in args[1])
    tags = func.tags
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


def _described(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    # Everything that is neither a tensor nor a number or text is compared by its repr.
    return value if isinstance(value, (int, float, bool, str, type(None))) else repr(value)


def _constant(tensor: Tensor) -> tuple[Hashable, ...]:
    """A small tensor made from Python numbers, with its values: Python decided them."""
    described = _described(tensor)
    if tensor.device.type != "cpu" or tensor.numel() > SMALL:
        return (described,)
    with torch._C.DisableTorchFunction():  # the traced function does not read this value
        return described, str(tensor.detach().tolist())
