"""A stand-in for the output of a folded convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class StandIn(Tensor):
    """A stand-in for the output of a convolution, without values. Every operation on it, in Python
    or below, is intercepted here, recorded, and computed with the true output."""

    _true: Callable[[], Tensor]
    _touched: Callable[[], None]
    _output: Tensor | None  # the folded result, for ``_norm`` only
    _norm: Any
    _recorded: bool  # the grad mode in which it was created

    @staticmethod
    def of(
        output: Tensor,
        norm: nn.Module,
        true: Callable[[], Tensor],
        touched: Callable[[], None],
    ) -> StandIn:
        """A stand-in with the shape of ``output``, which ``norm`` may take out. ``true`` computes
        the true output; ``touched`` is called if other code reads the stand-in."""
        made: StandIn = Tensor._make_wrapper_subclass(
            StandIn, output.shape, dtype=output.dtype, device=output.device
        )
        made._output, made._norm, made._true, made._touched = output, norm, true, touched
        made._recorded = torch.is_grad_enabled()
        return made

    def _read(self) -> Tensor:
        self._touched()
        true = self._true()
        self._true = lambda: true
        self._output = None
        return true

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*_true(args), **_true(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*_true(args), **_true(kwargs or {}))


def _true(value: Any) -> Any:
    return tree_map_only(StandIn, StandIn._read, value)
