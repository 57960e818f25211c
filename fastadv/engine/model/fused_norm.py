"""BatchNorm with its ReLU and its residuals in fastadv's own kernels, for any network.

BatchNorm's statistics need one pass over its input, and its output another one, in which ReLU and
the sum with a skip path cost nothing. So within ``fusing`` BatchNorm computes the statistics when
it is called, and returns a pending tensor (``pending.py``); ReLU, or an addition and ReLU, compute
the output. A residual sum before a BatchNorm is computed in the pass of the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from fastadv.engine.model import pending
from fastadv.engine.model.pending import Pending
from fastadv.engine.model.replaced_norm import is_pytorchs, pytorchs, replaced
from fastadv.errors import UserError
from fastadv.kernels.dispatch import TRITON_DTYPES
from fastadv.kernels.norm import Measured, deferred, measured, norm_apply, normalized

# Where the own kernels are used; tests without a GPU set both.
DEVICES = ("cuda",)
DTYPES = TRITON_DTYPES

# What a network of fastadv adds its residuals with, by the module's name: ``residual`` within
# ``fusing``, and PyTorch's own function, without a call in Python, everywhere else.
add: Callable[[Tensor, Tensor], Tensor] = torch.add
taken = 0  # BatchNorms that the own kernels have computed in this process


@contextmanager
def fusing(device: torch.device) -> Iterator[None]:
    """Within this context ``torch.nn.functional.batch_norm`` and ``add`` are the ones below, on a
    GPU.

    If other code has replaced ``batch_norm`` already, nothing is done.
    """
    if device.type not in DEVICES or not is_pytorchs():
        yield
        return
    global add
    add = residual
    try:
        with replaced(batch_norm):
            yield
            pending.settle()
    finally:
        add = torch.add
        pending.forget()  # a kept one must not hold what it was computed from


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """True if the user has compiled one of ``modules``: compiled code cannot take a pending tensor,
    so nothing is fused."""
    return any(
        # By its name: the class is in a part of torch that takes seconds to import.
        type(module).__name__ == "OptimizedModule"
        or module.__dict__.get("_compiled_call_impl") is not None
        for module in modules
    )


def of_compiled_code(error: Exception) -> UserError | None:
    """The ``UserError`` for an ``error`` of a compiler within ``fusing``: a function that the model
    calls, which is compiled there, cannot take a pending tensor."""
    compilers = type(error).__module__.startswith("torch._dynamo") or "torch.compile" in str(error)
    if not compilers or functional.batch_norm is not batch_norm:
        return None
    return pending.refusal("calls a compiled function")


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` with the same arguments; the result is a pending tensor
    where the own kernels compute the same."""
    if torch.compiler.is_compiling():
        return pytorchs(input, running_mean, running_var, weight, bias, training, momentum, eps)
    per_channel = (running_mean, running_var, weight, bias)
    shape = input.shape
    if not (
        _usual()
        and _takes(input, pending_too=True)
        and _take(per_channel, shape, input.device, training)
    ):
        if training:  # what waits for the buffers must see that they move
            _count_change(running_mean, running_var)
            # PyTorch keeps the buffers for its backward pass, which does not read them: a second
            # use of them, which is counted as well, must not invalidate the first.
            per_channel = _uncounted(running_mean), _uncounted(running_var), weight, bias
        return pytorchs(
            pending.plain(input), *per_channel, training=training, momentum=momentum, eps=eps
        )
    if training:
        functional._verify_batch_size(shape)  # type: ignore[attr-defined]
    x, before = input, None  # what is measured
    of_what: Tensor = input  # what has the history
    if isinstance(input, Pending):
        if isinstance(input.source, _Sum) and not input.has_value():
            x, before = input.source.parts(input)
        else:
            x = of_what = input.read()
    global taken
    taken += 1
    of = measured(x, running_mean, running_var, training, momentum, eps, before)
    if before is not None and isinstance(input, Pending):
        input.give(of.total)
    recorded = torch.is_grad_enabled() and any(
        tensor is not None and _requires_grad(tensor) for tensor in (of_what, weight, bias)
    )
    return _Norm(of_what, weight, bias, of, None, recorded).pending()


def residual(out: Tensor, skip: Tensor) -> Tensor:
    """``out + skip``, of one shape (B,C,H,W): within ``fusing`` a pending tensor, which the next
    BatchNorm computes together with its statistics."""
    if torch.compiler.is_compiling() or functional.batch_norm is not batch_norm:
        return out + skip
    skip = pending.plain(skip)
    if not (_usual() and _takes(out) and _takes(skip)):
        return out + skip
    if out.shape != skip.shape or out.dtype != skip.dtype or out.device != skip.device:
        return out + skip
    recorded = torch.is_grad_enabled() and (out.requires_grad or skip.requires_grad)
    source = _Sum(out, skip)
    if recorded:
        found: Tensor = _Summed.apply(out, skip, source)
        return found
    return Pending.of(source, out, False)


class _Sum:
    """The source of a residual sum."""

    def __init__(self, out: Tensor, skip: Tensor) -> None:
        self.out, self.skip = out, skip
        self._versions = _versions(out, skip)

    def fresh(self) -> bool:
        return _versions(self.out, self.skip) == self._versions

    def value(self) -> Tensor:
        return self.out.detach() + self.skip.detach()

    def relu(self, recorded: bool) -> None:
        return None

    def plus(self, other: Tensor) -> None:
        return None

    def parts(self, total: Pending) -> tuple[Tensor, Tensor | None]:
        """The summands of ``total``, the sum, or its values if they are computed already."""
        values = total.given()
        if values is not None:
            return values, None
        if not self.fresh():
            raise pending.refusal("changes a summand of a residual in place before a BatchNorm")
        return self.out, self.skip


class _Norm:
    """The source of a normalised tensor: BatchNorm of ``x`` with the statistics ``of``, plus
    ``after``. ``x`` is a tensor, or a residual sum that is not read. With ``recorded`` False it has
    no gradient for ``x``, ``weight`` and ``bias``."""

    def __init__(
        self,
        x: Tensor | Pending,
        weight: Tensor | None,
        bias: Tensor | None,
        of: Measured,
        after: Tensor | None,
        recorded: bool,
    ) -> None:
        self.x, self.weight, self.bias, self.of, self.after = x, weight, bias, of, after
        self.recorded = recorded
        self._versions = self._present()

    def _present(self) -> list[int]:
        of = self.of
        return _versions(of.total, of.mean, of.spread, self.weight, self.bias, self.after)

    def fresh(self) -> bool:
        return self._present() == self._versions

    def value(self) -> Tensor:
        return self._applied(relu=False)

    def relu(self, recorded: bool) -> Tensor:
        if not recorded:
            with torch.no_grad():
                return self._applied(relu=True)
        x, weight, bias, before = self._inputs()
        y, total = normalized(x, weight, bias, self.of, before, self.after, relu=True)
        if before is not None and isinstance(self.x, Pending):
            self.x.become(total)
        return y

    def plus(self, other: Tensor) -> Pending | None:
        if self.after is not None or not _takes(other):
            return None
        more = _Norm(self.x, self.weight, self.bias, self.of, other, self.recorded)
        return more.pending()

    def pending(self) -> Pending:
        """The pending tensor that this computes."""
        after = self.after
        also = after is not None and after.requires_grad and torch.is_grad_enabled()
        if not (also or (self.recorded and torch.is_grad_enabled())):
            return Pending.of(self, self.of.total, False)
        x, weight, bias, before = self._inputs()
        made: Any = deferred(
            x, weight, bias, self.of, before, after, lambda: Pending.of(self, self.of.total, True)
        )
        return made

    def _applied(self, relu: bool) -> Tensor:
        of = self.of
        return norm_apply(
            of.total, of.mean, of.spread, of.added, self.weight, self.bias, self.after, relu
        )

    def _inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """x, weight, bias and ``before``, with the history that they have in the result."""
        if not self.recorded:
            weight, bias = (
                None if tensor is None else tensor.detach() for tensor in (self.weight, self.bias)
            )
            return self.of.total, weight, bias, None
        x = self.x
        if not isinstance(x, Pending):
            return x, self.weight, self.bias, None
        if isinstance(x.source, _Sum) and x.recorded and not x.has_value():
            return x.source.out, self.weight, self.bias, x.source.skip
        return x.read(), self.weight, self.bias, None


class _Summed(torch.autograd.Function):
    """The pending tensor of a residual sum."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, skip: Tensor, source: _Sum) -> Tensor:
        return Pending.of(source, out, True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, gradient, None


def _usual() -> bool:
    """True if no mode, transform or tracer sees or changes what operations do."""
    return not (
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.is_inference_mode_enabled()
        or forward_ad._current_level >= 0
    )


def _takes(x: Tensor, pending_too: bool = False) -> bool:
    """True if ``x`` is an ordinary tensor that the own kernels take: (B,C,H,W) in channels_last."""
    kind = type(x)
    if kind is Pending:
        return pending_too
    return (
        kind is Tensor
        and x.dim() == 4
        and x.device.type in DEVICES
        and x.dtype in DTYPES
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
        and not x.is_inference()
    )


def _take(
    per_channel: Sequence[Tensor | None], shape: torch.Size, device: torch.device, training: bool
) -> bool:
    """True if the own kernels take the running buffers, weight and bias for activations of this
    ``shape``."""
    if (per_channel[0] is None) != (per_channel[1] is None):
        return False
    if per_channel[0] is None and not training:
        return False
    channels = shape[1]
    for tensor in per_channel:
        if tensor is not None and not (
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.dim() == 1
            and len(tensor) == channels
            and tensor.dtype in DTYPES
            and tensor.device == device
            and not tensor.is_inference()
        ):
            return False
    return True


def _requires_grad(tensor: Tensor) -> bool:
    return tensor.recorded if isinstance(tensor, Pending) else tensor.requires_grad


def _versions(*tensors: Tensor | None) -> list[int]:
    return [tensor._version for tensor in tensors if tensor is not None]


def _count_change(*buffers: Tensor | None) -> None:
    for buffer in buffers:
        if type(buffer) is Tensor and not buffer.is_inference():
            torch.autograd.graph.increment_version(buffer)


def _uncounted(buffer: Tensor | None) -> Tensor | None:
    """The same memory, with a version of its own."""
    return buffer.data if type(buffer) is Tensor else buffer
