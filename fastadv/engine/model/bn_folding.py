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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastadv.engine.model.buffers import copy_into

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_KINDS: tuple[Any, ...] = (*CONVOLUTIONS, *NORMS)
_PYTORCHS: dict[type, Callable[..., Any]] = {kind: kind.forward for kind in _KINDS}
_BATCH_NORM = functional.batch_norm
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SHADOWING = {"forward", "_conv_forward", "weight", "bias", "running_mean", "running_var"}
_EVERYBODYS_HOOKS = (
    modules._global_forward_hooks,
    modules._global_forward_pre_hooks,
    modules._global_backward_hooks,
    modules._global_backward_pre_hooks,
)


class Fold(NamedTuple):
    """A convolution, and the BatchNorm that is the only consumer of its output."""

    convolution: nn.Module
    norm: nn.Module

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that computes both modules, from their present
        values."""
        norm: Any = self.norm
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        bias = -norm.running_mean * scale
        own = self.convolution._parameters["bias"]
        if own is not None:
            bias = bias + own * scale
        if norm.bias is not None:
            bias = bias + norm.bias
        weight: Any = self.convolution._parameters["weight"]
        return weight * scale.view(-1, *[1] * (weight.dim() - 1)), bias

    def possible(self) -> bool:
        """True if both are PyTorch's own modules without hooks and parametrizations, with
        parameters and statistics of one type."""
        if not (_untouched(self.convolution, CONVOLUTIONS) and _untouched(self.norm, NORMS)):
            return False
        if CONVOLUTIONS.index(type(self.convolution)) != NORMS.index(type(self.norm)):
            return False
        weight, *others = self.tensors()
        if weight is None or others[1] is None or others[2] is None:
            return False
        every = [tensor for tensor in (weight, *others) if tensor is not None]
        return (
            all(type(tensor) in (Tensor, nn.Parameter) for tensor in every)
            and weight.is_floating_point()
            and all((t.dtype, t.device) == (weight.dtype, weight.device) for t in every)
            and all(len(tensor) == len(weight) for tensor in every)
        )

    def tensors(self) -> list[Any]:
        """The tensors from which the fold is computed: the convolution's parameters, then the
        statistics and parameters of the norm; None for one that is missing."""
        own = self.convolution._parameters
        statistics, affine = self.norm._buffers, self.norm._parameters
        return [
            *(own.get(name) for name in ("weight", "bias")),
            *(statistics.get(name) for name in ("running_mean", "running_var")),
            *(affine.get(name) for name in ("weight", "bias")),
        ]


def _untouched(module: nn.Module, kinds: tuple[Any, ...]) -> bool:
    own = module.__dict__
    return (
        type(module) in kinds
        and type(module).forward is _PYTORCHS[type(module)]
        and not any(own.get(hooks) for hooks in _HOOKS)
        # Such an attribute of the module would hide the usual one.
        and not own.keys() & _SHADOWING
        and own.get("_compiled_call_impl") is None
    )


# -- the stand-in ---------------------------------------------------------------------------------


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


# -- which BatchNorms fold ------------------------------------------------------------------------


def seen_folds(
    model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, list[Fold]]:
    """``forward(x)``, which calls ``model`` in eval mode, and the folds that are candidates: every
    BatchNorm whose input was the untouched output of a convolution, both called once."""
    convolutions = [module for module in model.modules() if _untouched(module, CONVOLUTIONS)]
    norms = [module for module in model.modules() if _untouched(module, NORMS)]
    took: dict[nn.Module, nn.Module] = {}
    calls: Counter[nn.Module] = Counter()
    read: set[nn.Module] = set()
    given: list[tuple[nn.Module, weakref.ref[StandIn]]] = []

    def convolve(module: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            calls[module] += 1
            output = _PYTORCHS[type(module)](module, x)
            if torch.compiler.is_compiling() or type(output) is not Tensor:
                return output
            stand_in = StandIn.of(output, module, lambda: output, lambda: read.add(module))
            given.append((module, weakref.ref(stand_in)))
            return stand_in

        return run

    def normalize(module: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            calls[module] += 1
            if type(x) is StandIn and x._output is not None:
                took[x._norm], x = module, x._output
            found: Tensor = _PYTORCHS[type(module)](module, x)
            return found

        return run

    runs = {module: convolve(module) for module in convolutions}
    runs |= {module: normalize(module) for module in norms}
    with _instead(runs), torch.enable_grad(), _Writes() as writes:
        logits = forward(x.detach().requires_grad_())
    read |= {module for module, stand_in in given if stand_in() is not None}
    folds = [Fold(convolution, norm) for convolution, norm in took.items()]
    found = [
        fold
        for fold in folds
        if calls[fold.convolution] == calls[fold.norm] == 1
        if fold.convolution not in read and fold.possible()
        if not writes.found & {_memory(tensor) for tensor in fold.tensors() if tensor is not None}
    ]
    return logits.detach(), found


class _Writes(TorchDispatchMode):
    """Records the storages to which operations write. A forward that computes its weights in place
    may do so through ``.data``, which does not change a tensor's version."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                each = given if isinstance(given, (list, tuple)) else [given]
                self.found |= {_memory(value) for value in each if type(value) is not StandIn}
        return func(*args, **kwargs)


def _memory(value: Any) -> int:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0


@contextmanager
def _instead(runs: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within this context each module in ``runs`` calls its function instead of ``forward``."""
    for module, run in runs.items():
        module.__dict__["forward"] = run
    try:
        yield
    finally:
        for module in runs:
            module.__dict__.pop("forward", None)


# -- folds in use ---------------------------------------------------------------------------------


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
            with _instead(runs):
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
        if any(_EVERYBODYS_HOOKS) or functional.batch_norm is not _BATCH_NORM:
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
        plain = _PYTORCHS[type(convolution)]
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
        found: Tensor = _PYTORCHS[type(norm)](norm, x)
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
