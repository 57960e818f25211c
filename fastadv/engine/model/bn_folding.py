"""Folds BatchNorms with running statistics into the convolutions before them, for attacks.

With running statistics BatchNorm is an affine map per channel, so a convolution followed by it is a
convolution. It is not known beforehand if other code reads the convolution's output: a forward may
read it without a gradient, under a condition, in the third batch. So a folded convolution computes
the folded result and returns a stand-in for its output. Its BatchNorm takes the folded result out
of the stand-in. If any other code reads or keeps the stand-in, the forward pass is repeated without
that fold, and the fold is not used again.

The modules keep their parameters and buffers; only their ``forward`` is replaced for a while.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from fastadv.engine.model.bn_fold import FORWARDS, Fold, forwards_replaced
from fastadv.engine.model.bn_stand_in import StandIn
from fastadv.engine.model.buffers import copy_into
from fastadv.engine.model.pending import Pending
from fastadv.engine.model.replaced_norm import is_pytorchs

_EVERYBODYS_HOOKS = (
    modules._global_forward_hooks,
    modules._global_forward_pre_hooks,
    modules._global_backward_hooks,
    modules._global_backward_pre_hooks,
)


class Folding:
    """The folds of a network, and their weights as of the last ``refreshed``.

    Call ``invalidate`` after every change of the weights or the statistics, since a change through
    ``.data`` cannot be detected. A fold is not used in a pass in which its tensors change, or are
    replaced, between the calls of its two modules.
    """

    def __init__(self) -> None:
        self.folds: list[Fold] = []
        self._weights: dict[torch.dtype | None, list[Tensor]] = {}
        self._up_to_date: dict[torch.dtype | None, list[UsedFold]] = {}
        self._given_up: set[Fold] = set()
        self._handed_out: list[tuple[Fold, weakref.ref[StandIn]]] = []

    def invalidate(self) -> None:
        """Mark the folded weights stale. Call after every change of weights or statistics."""
        self._up_to_date.clear()

    @contextmanager
    def at_work(self, used: Sequence[UsedFold]) -> Iterator[None]:
        """Within this context forward passes use the folds ``used``, which ``refreshed``
        returned."""
        runs: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        for each in used:
            each.begin()
            runs |= {each.fold.convolution: each.convolve, each.fold.norm: each.normalize}
        try:
            with forwards_replaced(runs):
                yield
        finally:
            self._handed_out.clear()

    def misread(self, ended: bool = True) -> bool:
        """True if code other than its norm has read or kept the output of a folded convolution in
        the last forward pass. Such a fold is dropped, and the pass must be repeated. ``ended`` is
        False if the pass raised."""
        for fold, stand_in in self._handed_out:
            if ended and stand_in() is not None:
                self._given_up.add(fold)
        self._handed_out.clear()
        wrong, self._given_up = self._given_up, set()
        if wrong:
            self.folds = [fold for fold in self.folds if fold not in wrong]
            for module in (module for fold in wrong for module in fold):
                module.__dict__.pop("forward", None)
        return bool(wrong)

    def refreshed(self, dtype: torch.dtype | None) -> list[UsedFold]:
        """The folds that are possible in passes under autocast to ``dtype`` (None: without
        autocast), with present weights, always in the same memory."""
        if any(_EVERYBODYS_HOOKS) or not is_pytorchs():
            return []
        if torch._C._len_torch_function_stack():  # a mode may change what an operation does
            return []
        if not all(used.current() for used in self._up_to_date.get(dtype, [])):
            self.invalidate()
        if dtype not in self._up_to_date:
            self._up_to_date[dtype] = self._made(dtype)
        return [
            used
            for used in self._up_to_date[dtype]
            if used.fold in self.folds and used.fold.possible()
        ]

    def _made(self, dtype: torch.dtype | None) -> list[UsedFold]:
        folds = [fold for fold in self.folds if fold.possible()]
        with torch.no_grad():
            tensors = [tensor for fold in folds for tensor in fold.weights()]
            low = [t.dtype if dtype is None or t.dtype != torch.float32 else dtype for t in tensors]
            wanted = [(t.shape, t.device, kind) for t, kind in zip(tensors, low, strict=True)]
            memory = self._weights.get(dtype, [])
            if [(own.shape, own.device, own.dtype) for own in memory] != wanted:
                pairs = zip(tensors, low, strict=True)
                memory = [torch.empty_like(tensor, dtype=kind) for tensor, kind in pairs]
                self._weights[dtype] = memory
            copy_into(memory, tensors)
        weights = zip(folds, memory[::2], memory[1::2], strict=True)
        return [UsedFold(self, fold, dtype, weight, bias) for fold, weight, bias in weights]


class UsedFold:
    """A fold with its weights. Its two modules call ``convolve`` and ``normalize`` instead of
    ``forward``."""

    def __init__(
        self,
        folding: Folding,
        fold: Fold,
        dtype: torch.dtype | None,
        weight: Tensor,
        bias: Tensor,
    ) -> None:
        self.folding, self.fold, self.dtype = folding, fold, dtype
        self.weight, self.bias = weight, bias
        self.eps: Any = fold.norm.eps
        self.made_from = self.standing = fold.tensors()
        self.made_of = self.states = _states(self.standing)

    def current(self) -> bool:
        """True if the modules still hold the tensors that were folded, unchanged."""
        tensors = self.fold.tensors()
        alike = _same(tensors, self.made_from) and _states(tensors) == self.made_of
        return alike and self.fold.norm.eps == self.eps

    def begin(self) -> None:
        """Take the tensors that are in the modules now, perhaps low-precision copies, as those that
        were folded."""
        self.standing = self.fold.tensors()
        self.states = _states(self.standing)

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution's ``forward``: a stand-in with the folded result if it can be used."""
        convolution: Any = self.fold.convolution
        plain = FORWARDS[type(convolution)]
        if type(x) is Pending:
            x = x.read()
        if not self._as_made(x):
            found: Tensor = plain(convolution, x)
            return found
        output = convolution._conv_forward(x, self.weight, self.bias)
        fold, folding = self.fold, self.folding
        stand_in = StandIn.of(
            output,
            fold.norm,
            lambda: plain(convolution, x),
            lambda: folding._given_up.add(fold),
        )
        folding._handed_out.append((fold, weakref.ref(stand_in)))
        return stand_in

    def normalize(self, x: Tensor) -> Tensor:
        """The norm's ``forward``: the folded result of its own stand-in if nothing has changed."""
        norm: Any = self.fold.norm
        if (
            not torch.compiler.is_compiling()
            and type(x) is StandIn
            and x._norm is norm
            and x._output is not None
            and x._recorded == torch.is_grad_enabled()
            and not norm.training
            and norm.eps == self.eps
            and _same(self.fold.tensors(), self.standing)
            and _states(self.standing) == self.states
        ):
            output, x._output = x._output, None  # a second call computes the norm itself
            return output
        found: Tensor = FORWARDS[type(norm)](norm, x)
        return found

    def _as_made(self, x: Tensor) -> bool:
        """True if a convolution of ``x`` in the present modes can use the folded weights."""
        if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
            return False
        if x.is_inference() or x.dim() != self.weight.dim():
            return False
        kind = x.device.type
        if torch.is_autocast_enabled(kind) != (self.dtype is not None):
            return False
        if self.dtype is not None and torch.get_autocast_dtype(kind) != self.dtype:
            return False
        # Inside of torch.func a tensor may be a wrapper with other shapes.
        return torch._C._functorch.peek_interpreter_stack() is None


def _same(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return all(one is other for one, other in zip(first, second, strict=True))


def _states(tensors: Sequence[Any]) -> list[tuple[int, int] | None]:
    """Per tensor its version, which changes in place, and its address, which ``.data =`` changes;
    None for None."""
    return [None if t is None else (t._version, t.data_ptr()) for t in tensors]
