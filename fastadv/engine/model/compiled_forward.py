"""The forward pass of a network compiled for batches of any size, with its backward pass.

What is around it (the objective, the steps of a search) is called as it is, so that a search may
give every pass as many images as it has. On a CPU that pays: the compiler joins BatchNorm, ReLU and
sums to one loop over memory each, in both directions. Compiled code does not fold BatchNorms
(``bn_folding.py``), and reads the weights that are in the model at each call.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

from fastadv.engine.compiled import own_copy
from fastadv.errors import warn

# PyTorch convolves fewer images by another function, for which it would be compiled again.
SMALLEST = 16
# With and without a gradient, and twice as many for what else may change in the model's Python.
MOST_GRAPHS = 4


class CompiledForward:
    """Calls a model compiled, once for each type of autocast.

    A model that does not compile as one graph is called as it is from then on, after a warning.
    ``backend`` is that of ``torch.compile``. One object serves one model.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self.backend = backend
        self.works = True
        self._compiled: dict[torch.dtype | None, Callable[..., Any]] = {}

    def __call__(self, model: nn.Module, x: Tensor, dtype: torch.dtype | None) -> Any:
        """What ``model`` returns for ``x`` (B,...) under autocast to ``dtype`` (None: without),
        which the caller is in."""
        if not self.works or len(x) < SMALLEST:
            return model(x)
        try:
            with _limited():
                return self._of(dtype)(model, _any_size(x))
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            sentence = "The model changes from pass to pass and would be compiled again and again"
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0].removesuffix(".")
            sentence = f"The model cannot be compiled as one graph ({reason})"
        self.works = False
        found = model(x)  # an error of the model itself comes again, and needs no warning
        warn(f"{sentence}, so it runs as written.")
        return found

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Passes, forward and backward, are within this context."""
        _LOG.addFilter(_says_anything_else)
        try:
            # A search may take several gradients of one pass, so the first must leave what it
            # reads. An error of the compiler in the backward pass must come in the forward pass,
            # which catches it.
            with _for_searches():
                yield
        finally:
            _LOG.removeFilter(_says_anything_else)

    def _of(self, dtype: torch.dtype | None) -> Callable[..., Any]:
        if dtype not in self._compiled:
            self._compiled[dtype] = torch.compile(
                own_copy(_forward), fullgraph=True, dynamic=False, backend=self.backend
            )
        return self._compiled[dtype]


# One patch each for all calls: a new one leaves a variable in the thread's context for ever.


@functools.cache
def _limited() -> Any:
    return torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS)


@functools.cache
def _for_searches() -> Any:
    functorch: Any = torch._functorch.config
    return functorch.patch(donated_buffer=False, force_non_lazy_backward_lowering=True)


_LOG = logging.getLogger("torch._dynamo.convert_frame")


def _says_anything_else(record: logging.LogRecord) -> bool:
    """False for Dynamo's own lines at its limit, of which one sentence is told."""
    return "recompile_limit" not in record.getMessage()


def _forward(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def _any_size(x: Tensor) -> Tensor:
    """``x`` (B,...) in one layout, since another would be compiled again, marked as a batch of any
    size. A model that fixes the size is compiled for it."""
    x = x.contiguous()
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x
