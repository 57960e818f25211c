"""A convolution and the BatchNorm behind it, which an attack computes as one convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_KINDS: tuple[Any, ...] = (*CONVOLUTIONS, *NORMS)
FORWARDS: dict[type, Callable[..., Any]] = {kind: kind.forward for kind in _KINDS}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SHADOWING = {"forward", "_conv_forward", "weight", "bias", "running_mean", "running_var"}


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
        if not (is_plain(self.convolution, CONVOLUTIONS) and is_plain(self.norm, NORMS)):
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


def is_plain(module: nn.Module, kinds: tuple[Any, ...]) -> bool:
    """True if ``module`` is of one of ``kinds`` and computes what PyTorch's class does."""
    own = module.__dict__
    return (
        type(module) in kinds
        and type(module).forward is FORWARDS[type(module)]
        and not any(own.get(hooks) for hooks in _HOOKS)
        # Such an attribute of the module would hide the usual one.
        and not own.keys() & _SHADOWING
        and own.get("_compiled_call_impl") is None
    )


@contextmanager
def forwards_replaced(runs: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within this context each module in ``runs`` calls its function instead of ``forward``."""
    for module, run in runs.items():
        module.__dict__["forward"] = run
    try:
        yield
    finally:
        for module in runs:
            module.__dict__.pop("forward", None)
