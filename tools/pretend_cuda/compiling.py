"""Computes on the CPU what a compiler would compute on the device.

Inductor folds constants (``aten.full`` and what is computed from it) by running them on the device
they are for and reading the result, which it writes into the generated code as a literal. On the
pretended runtime nothing is computed: the literal would be the previous content of the memory, and
code compiled here would give wrong results on a real GPU. So constants are folded on the CPU, and
any other read of a value from the device during a compilation is an error.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import compile_fx
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__")

_compiling = threading.local()


class ReadWhileCompiling(RuntimeError):
    """The compiler read a value of the device, which could have entered the compiled code."""


class _OnTheCpu(TorchDispatchMode):
    """Operators that would create a tensor on the device, or move it there, use the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_cpu_for_cuda, (args, kwargs or {}))
        return func(*args, **kwargs)


def _cpu_for_cuda(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


def fold_on_the_cpu() -> None:
    """Patch Inductor. Call it once per process."""
    for name in ("__init__", "run"):
        _patch(UniformValueConstantFolder, name, _inside_mode)
    _patch(compile_fx, "compile_fx", _while_compiling)
    for name in READS:
        _patch(torch.Tensor, name, _refused_while_compiling)


def _patch(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, wrap(getattr(owner, name)))


def _inside_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with _OnTheCpu():
            return function(*args, **kwargs)

    return inside


def _while_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def compiling(*args: Any, **kwargs: Any) -> Any:
        before = getattr(_compiling, "now", False)
        _compiling.now = True
        try:
            return function(*args, **kwargs)
        finally:
            _compiling.now = before

    return compiling


def _refused_while_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def read(self: torch.Tensor, *args: Any) -> Any:
        real = type(self) in (torch.Tensor, torch.nn.Parameter) and self.is_cuda
        if real and getattr(_compiling, "now", False):
            raise ReadWhileCompiling(
                "the compiler read a value of the pretended device, which computes none; fold "
                f"it on the CPU in {__name__}.py."
            )
        return function(self, *args)

    return read
