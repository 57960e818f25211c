"""Runs regions of tensor code eagerly, or compiled as one graph each."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule

from fastadv.engine.fused_graph import fuse_norms
from fastadv.errors import UserError, warn

Result = TypeVar("Result")


class Runner:
    """Runs regions: functions of tensors with forward pass, gradients and arithmetic in one.

    With ``compiles=False`` they are called. Otherwise each is compiled once with
    ``fullgraph=True``. A graph break raises ``UserError`` with ``strict``; otherwise the user is
    warned and regions run eagerly from then on. ``backend`` is that of ``torch.compile``. With
    ``fused_norm`` it gets graphs in which BatchNorms are fused (``fused_graph.py``).
    """

    def __init__(
        self,
        compiles: bool = False,
        backend: str = "inductor",
        *,
        strict: bool = True,
        fused_norm: bool = False,
    ) -> None:
        self.compiles = compiles
        self.strict = strict
        self.backend = backend
        self.fused_norm = fused_norm
        self.fused = 0  # number of BatchNorms that were fused
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, region: Callable[..., Result], *inputs: Any) -> Result:
        if not self.compiles:
            return region(*inputs)
        compiled = self._compiled.get(region)
        if compiled is None:
            backend = _Fusing(self) if self.fused_norm else self.backend
            compiled = torch.compile(
                own_copy(region), fullgraph=True, dynamic=False, backend=backend
            )
            self._compiled[region] = compiled
        # The flag lets autograd.grad be traced into the graph; it is set for these calls only.
        try:
            with _tracing_gradients():
                return compiled(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            sentence = f"This network or method cannot be compiled as one graph ({reason})"
            if self.strict:
                raise UserError(f"{sentence}: pass mode='eager'.") from error
        warn(f"{sentence}; it runs as written.")
        self.compiles = False
        return region(*inputs)

    def forget(self) -> None:
        """Drop all compiled code, after a change of the network or the threat. The guards of Dynamo
        do not see every such change (hooks of modules), and it limits recompilations."""
        self._compiled.clear()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_compiled": {}}  # a copy compiles its own


@functools.cache
def _tracing_gradients() -> Any:
    """One patch for all calls: each new one would leave a variable in this thread's context for
    ever (torch 2.13)."""
    return torch._dynamo.config.patch(trace_autograd_ops=True)


class _Fusing:
    """The backend of ``runner``, for graphs in which BatchNorms are fused before."""

    def __init__(self, runner: Runner) -> None:
        name: Any = runner.backend
        self._runner, self._compiler = runner, torch._dynamo.lookup_backend(name)

    def __call__(self, module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self._runner.fused += fuse_norms(module)
        found: Any = self._compiler(module, inputs)
        return found


def own_copy(region: Callable[..., Result]) -> Callable[..., Result]:
    """The same function or method with its own code object: Dynamo limits recompilations per code
    object, and two steps in one process must not share that limit."""
    function = getattr(region, "__func__", region)
    if not isinstance(function, types.FunctionType):
        return region  # a callable object has no code object to copy
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy if function is region else types.MethodType(copy, region.__self__)  # type: ignore[attr-defined]
