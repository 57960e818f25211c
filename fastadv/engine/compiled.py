"""How a region of tensor code is run: as written, or compiled as one graph."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastadv.errors import UserError, warn

Result = TypeVar("Result")


class Runner:
    """Runs regions: functions of tensors with forward, gradients and arithmetic in one.

    ``compiles=False`` calls them. Otherwise each is compiled once with ``fullgraph=True``: a graph
    break is an error, not a slow step, or, unless ``strict``, the end of compiling, with a warning.
    ``backend`` is for tests.
    """

    def __init__(
        self, compiles: bool = False, backend: str = "inductor", *, strict: bool = True
    ) -> None:
        self.compiles = compiles
        self.strict = strict
        self.backend = backend
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, region: Callable[..., Result], *inputs: Any) -> Result:
        if not self.compiles:
            return region(*inputs)
        compiled = self._compiled.get(region)
        if compiled is None:
            compiled = torch.compile(
                _own_copy(region), fullgraph=True, dynamic=False, backend=self.backend
            )
            self._compiled[region] = compiled
        # Patched around our own calls only: the flag lets autograd.grad be traced into the graph.
        try:
            with torch._dynamo.config.patch(trace_autograd_ops=True):
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
        """What was compiled is of another network or threat. Dynamo's own guards do not see every
        change (hooks of modules), and count its recompilations."""
        self._compiled.clear()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_compiled": {}}  # a copy compiles its own


def _own_copy(region: Callable[..., Result]) -> Callable[..., Result]:
    """The same function or method with a code object of its own: Dynamo counts recompilations per
    code object, and two steps in one process must not use up each other's."""
    function = getattr(region, "__func__", region)
    if not isinstance(function, types.FunctionType):
        return region  # an object that is called has no code of its own to copy
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy if function is region else types.MethodType(copy, region.__self__)  # type: ignore[attr-defined]
