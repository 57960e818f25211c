"""A device that behaves as CUDA does towards Python, with a CPU's arithmetic.

Tensors on it are wrappers of CPU tensors whose ``device`` is another one, so that code takes its
GPU branches, and every operator passes through ``_run``. There is refused what breaks on a GPU:
operands on two devices, waiting for the device where that is forbidden, and in a recording
whatever a CUDA graph cannot hold. A recording is replayed as a graph is: the same operators, with
the same numbers, on the same memory, and no Python.

The device is registered for the whole process and before its first backward pass, so files that
use this module run in a process of their own (``test_cuda_fake.py``).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv.engine.cuda_graph import NotReplayable

aten = torch.ops.aten
NAME = "pretend"

# What needs the value of a tensor on the host. cuSOLVER's results are checked there (PyTorch's
# svd_cusolver copies its convergence flags), those of a cross entropy are not.
WAITS = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default),
    *(aten.is_nonzero.default, aten.equal.default, aten.allclose.default),
    *(aten._unique2.default, aten.unique_dim.default, aten.repeat_interleave.Tensor),
    *(aten._linalg_svd.default, aten._linalg_eigh.default, aten.linalg_qr.default),
    *(aten._linalg_solve_ex.default, aten.linalg_cholesky_ex.default, aten.bincount.default),
}
INDEXING = {
    *(aten.index.Tensor, aten.index_put.default, aten.index_put_.default),
    *(aten._index_put_impl_.default, aten._unsafe_index.Tensor),
}
RANDOM = {
    *(aten.randperm.default, aten.rand.default, aten.randn.default, aten.randint.default),
    *(aten.rand_like.default, aten.randn_like.default, aten.uniform_.default),
    *(aten.normal_.default, aten.bernoulli_.float, aten.random_.default),
    *(aten.native_dropout.default, aten.multinomial.default),
}
FUSED = {
    *(aten._fused_sgd_.default, aten._fused_adam_.default, aten._fused_adamw_.default),
    *(aten._fused_adam_.tensor_lr, aten._fused_adamw_.tensor_lr, aten._fused_sgd_.tensor_lr),
}
MOVES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}
LIFTS = {aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.lift.default}  # torch.tensor
# Written to, though the schema does not say so.
RUNNING = {aten.native_batch_norm.default: (3, 4), aten.cudnn_batch_norm.default: (3, 4)}


class WaitsForTheDevice(RuntimeError):
    """The host needs a value that the device has not computed yet."""


class NotInAGraph(RuntimeError):
    """A CUDA graph cannot hold this operation, or would not repeat it correctly."""


class _Module:
    """What PyTorch asks of the module ``torch.pretend``."""

    is_initialized = is_available = lambda self: True
    current_device = lambda self: 0  # noqa: E731 (one line a question)
    device_count = lambda self: 1  # noqa: E731
    _is_in_bad_fork = lambda self: False  # noqa: E731
    manual_seed_all = lambda self, seed: None  # noqa: E731
    get_amp_supported_dtype = lambda self: [torch.float16, torch.bfloat16]  # noqa: E731


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_ANYTHING = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_LOWERED = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")


def _lowered(operator: Any) -> Callable[..., Any]:
    """``operator`` in autocast's dtype, as autocast on CUDA computes it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            kind = torch.get_autocast_dtype(NAME)
            cast = [a.to(kind) if _is_float32(a) else a for a in args]
            return operator(*cast, **kwargs)

    return run


def _is_float32(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


_ANYTHING.fallback(torch.library.fallthrough_kernel)
for _name in ("conv2d", "linear", "matmul"):
    _LOWERED.impl(_name, _lowered(getattr(aten, _name).default))


class OnDevice(torch.Tensor):
    """A tensor on the device; ``raw`` is the CPU tensor that holds its numbers."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        made.raw = raw
        _live[_memory(raw)] += 1
        weakref.finalize(made, _forget, _memory(raw))
        return made

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()  # PyTorch's own refuses subclasses

    def __format__(self, form: str) -> str:
        return format(self.cpu(), form)

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.raw})"

    @classmethod
    def __torch_dispatch__(
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operator, args, kwargs or {})


_live: Counter[int] = Counter()  # how many tensors Python holds of each piece of memory


def _memory(raw: Tensor) -> int:
    return raw.untyped_storage()._cdata


def _forget(memory: int) -> None:
    _live[memory] -= 1


class Rules:
    """The present restrictions; ``log`` is the recording in progress."""

    no_waits = False
    log: Recording | None = None


class _Everywhere(TorchDispatchMode):
    """Sees calls without a tensor on the device: those that make one."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operator, args, kwargs or {})


def pretend_gpu() -> TorchDispatchMode:
    """Inside, ``device="pretend"`` works."""
    return _Everywhere()


@contextmanager
def no_waits() -> Iterator[None]:
    """Inside the block, waiting for the device is an error."""
    before, Rules.no_waits = Rules.no_waits, True
    try:
        yield
    finally:
        Rules.no_waits = before


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in an operator's arguments or results, also those in lists."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _collect(each, found)
    elif isinstance(value, dict):
        for each in value.values():
            _collect(each, found)


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """``value`` with ``change`` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(each, change) for each in value))
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(each, change) for each in value])
    if isinstance(value, dict):
        return {key: _mapped(each, change) for key, each in value.items()}
    return value


def _raw(tensor: Tensor) -> Tensor:
    return tensor.raw if isinstance(tensor, OnDevice) else tensor


def _run(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = _tensors((args, kwargs))
    ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    device = kwargs.get("device")
    makes_ours = bool(ours) if device is None else torch.device(device).type == NAME
    if not ours and not makes_ours:
        return operator(*args, **kwargs)
    _check(operator, args, tensors, ours, makes_ours)
    raw_args, raw_kwargs = _mapped(args, _raw), _mapped(kwargs, _raw)
    if device is not None:
        raw_kwargs["device"] = torch.device("cpu")
    if Rules.log is not None:
        result = Rules.log.add(operator, raw_args, raw_kwargs)
    else:
        result = operator(*raw_args, **raw_kwargs)
    if not makes_ours:
        return result
    known = {id(tensor.raw): tensor for tensor in ours}
    return _mapped(result, lambda raw: known[id(raw)] if id(raw) in known else OnDevice(raw))


def _check(
    operator: Any, args: Any, tensors: list[Tensor], ours: list[Any], makes_ours: bool
) -> None:
    """Raise for what a GPU, or the moment, does not allow."""
    others = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    moves, indexes = operator in MOVES, operator in INDEXING
    if ours and not moves and not indexes and any(tensor.dim() for tensor in others):
        raise RuntimeError(f"{operator}: tensors on the device and on the CPU")
    if operator in FUSED:
        for group in zip(*(tensors for tensors in args[:5] if tensors), strict=False):
            if len({_steps(tensor) for tensor in group if tensor.dim()}) > 1:
                raise RuntimeError(f"{operator}: a weight and its gradient differ in layout")
    if ours and (Rules.no_waits or Rules.log is not None):
        if operator is aten._to_copy.default:
            brings = not makes_ours
        else:
            brings = moves and not all(isinstance(t, OnDevice) for t in _tensors(args[0]))
        masks = indexes and any(t.dtype in {torch.bool, torch.uint8} for t in _tensors(args[1]))
        if operator in WAITS or brings or masks:
            raise WaitsForTheDevice(_told(operator, tensors))
    if Rules.log is not None and (others or operator in RANDOM or operator in LIFTS):
        raise NotInAGraph(_told(operator, tensors))


def _told(operator: Any, tensors: list[Tensor]) -> str:
    return f"{operator} of {[(tensor.device.type, tuple(tensor.shape)) for tensor in tensors]}"


def _steps(tensor: Tensor) -> tuple[int, ...]:
    """The strides of the dimensions with more than one element."""
    return tuple(step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


@dataclass
class Recording:
    """The operators of a recording; what they read and write."""

    calls: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)
    made: dict[int, Tensor] = field(default_factory=dict)  # memory of the graph's own
    read: dict[int, Any] = field(default_factory=dict)  # memory it found there, and who reads it
    before: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    later: list[Recording] = field(default_factory=list)  # made after it in the same pool

    def add(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator and note it."""
        given = _tensors((args, kwargs))
        for raw in given:
            if _memory(raw) not in self.made:
                self.read.setdefault(_memory(raw), operator)
        for raw in _written(operator, args, kwargs):
            if _memory(raw) not in self.made and _memory(raw) not in self.before:
                self.before[_memory(raw)] = (_bytes(raw), _bytes(raw).clone())
        result = operator(*args, **kwargs)
        for raw in _tensors(result):
            if _memory(raw) not in self.read:
                self.made[_memory(raw)] = raw
        self.calls.append((operator, args, kwargs, result))
        return result

    def end(self) -> None:
        """Recording computes nothing: written memory is restored, results get meaningless bytes."""
        for memory, old in self.before.values():
            memory.copy_(old)
        self.before.clear()
        for raw in self.made.values():
            _bytes(raw).fill_(0x7F)

    def replay(self) -> None:
        """All operators again, on the same memory."""
        with no_dispatch():
            for memory, reader in self.read.items():
                if _live[memory] < 1:
                    raise NotInAGraph(f"{reader} reads memory that nobody holds any more")
            for memory, raw in self.made.items():
                if _live[memory] < 1:  # another graph of the pool may have used it since
                    _bytes(raw).fill_(0x7F)
            for other in self.later:  # what it holds may lie where this one's passing results go
                for raw in other.made.values():
                    _bytes(raw).fill_(0x7F)
            for operator, args, kwargs, results in self.calls:
                again = operator(*args, **kwargs)
                _overwrite(results, again, args, kwargs)


def _bytes(raw: Tensor) -> Tensor:
    """All memory that ``raw`` is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(raw.untyped_storage())


def _written(operator: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operator changes."""
    found: list[Any] = []
    for place, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs.get(argument.name))
    found += [args[place] for place in RUNNING.get(operator, ())]
    return _tensors(found)


def _overwrite(old: Any, new: Any, args: Any, kwargs: Any) -> None:
    """Put results where the recording's results were; a view of an argument is there already."""
    inputs = {_memory(tensor) for tensor in _tensors((args, kwargs))}
    for target, value in zip(_tensors(old), _tensors(new), strict=True):
        if _memory(target) not in inputs:
            target.copy_(value)


@contextmanager
def no_dispatch() -> Iterator[None]:
    """Straight to the CPU."""
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        yield


class Recorder:
    """Stands in for ``CudaRecorder``."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.pool: list[Recording] = []  # those that share their memory

    def warm_up(self, function: Callable[[], Any]) -> None:
        try:
            with no_waits():
                function()
        except WaitsForTheDevice as error:
            raise NotReplayable(str(error)) from error

    def __call__(
        self, function: Callable[[], Any], *, alone: bool = False
    ) -> tuple[Any, Callable[[], None]]:
        Rules.log = log = Recording()
        try:
            result = function()
        finally:
            Rules.log = None
        log.end()
        if not alone:
            for earlier in self.pool:
                earlier.later.append(log)
            self.pool.append(log)
        self.recordings.append(log)
        return result, log.replay


def to_device(value: Any) -> Any:
    """Tensors, and those in lists, tuples and dicts, on the device."""
    return _mapped(value, lambda tensor: tensor.to(DEVICE))


def to_host(value: Any) -> Any:
    """The CPU tensors that hold the numbers."""
    return _mapped(value, _raw)
