"""For the kernel tests: operators by name, the error rule, poisoned memory, unusual tensors."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from oracle_gradients import (
    masked_ce_backward,
    masked_ce_forward,
    trades_kl_backward,
    trades_kl_forward,
)
from torch import Tensor

from fastadv.kernels.dispatch import OPERATORS, Operator
from fastadv.kernels.reference_pad import pad_channels
from fastadv.kernels.reference_top_n import top_n_forward

# Forward and backward of the operators that are differentiated: (reference, Triton's module).
PARTS: dict[str, tuple[Callable[..., Any], str]] = {
    "masked_ce_backward": (masked_ce_backward, "triton_losses"),
    "masked_ce_forward": (masked_ce_forward, "triton_losses"),
    "pad_channels_forward": (pad_channels, "triton_pad"),
    "top_n_forward": (top_n_forward, "triton_top_n"),
    "trades_kl_backward": (trades_kl_backward, "triton_losses"),
    "trades_kl_forward": (trades_kl_forward, "triton_losses"),
}

SHAPES = ((1, 3, 33, 31), (3, 3, 8, 8), (2, 1, 1, 1), (2, 4, 5, 7))
LAYOUTS = ("contiguous", "channels_last", "strided")
DTYPES = (torch.float32, torch.float16)


def one_by_one(*lists: Sequence[Any]) -> list[Any]:
    """Cases for ``parametrize``, the product of ``lists``. Those that differ from the first of all
    values in several places are slow: each value is met in the quick ones too, not each pair."""
    places = [range(len(values)) for values in lists]
    return [
        pytest.param(
            *(values[i] for values, i in zip(lists, place, strict=True)),
            marks=[pytest.mark.slow] if sum(map(bool, place)) > 1 else [],
        )
        for place in itertools.product(*places)
    ]


def in_pairs(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Cases for ``parametrize``, all pairs. Those of values in the same place are quick."""
    return [
        pytest.param(a, b, marks=[] if i == j else [pytest.mark.slow])
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last":
        return t.to(memory_format=torch.channels_last)
    if layout == "strided":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan, dtype=t.dtype)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    return t.contiguous()


def images(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=generator(seed)).to(dtype)


def gradients(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers with a few zeros; the first of several samples is all zero."""
    g = torch.randn(shape, generator=generator(seed))
    g.view(-1)[::7] = 0
    if shape[0] > 1:
        g[0] = 0
    return g.to(dtype)


def widened(value: Any) -> Any:
    """The same arguments in float64."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, (list, tuple)):
        return type(value)(widened(v) for v in value)
    return value


def assert_error_rule(kernel: Any, plain: Any, exact: Any, slack: float = 1e-7) -> None:
    """At most twice the error of the same-dtype expression, both against float64.

    ``slack``, in units of the result's size, stands for one rounding of float32: an expression may
    happen to be exact.
    """
    if isinstance(exact, (list, tuple)):
        for k, p, e in zip(kernel, plain, exact, strict=True):
            assert_error_rule(k, p, e, slack)
        return
    assert kernel.dtype == plain.dtype
    assert kernel.shape == plain.shape
    assert torch.isfinite(kernel).all()
    if not exact.numel():
        return
    scale = max(1.0, exact.abs().max().item())
    if kernel.dtype in (torch.float16, torch.bfloat16):
        slack = max(slack, torch.finfo(kernel.dtype).eps / 2)
    allowed = 2 * (plain.double() - exact).abs().max().item() + slack * scale
    assert (kernel.double() - exact).abs().max().item() <= allowed


@contextmanager
def poisoned() -> Iterator[None]:
    """In this context, memory that was not written yet is NaN (or a large integer)."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            return t.fill_(math.nan if t.is_floating_point() else 77)

        return made

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield


def call(name: str, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
    """Run an operator, or a part of one, by its name; ``backend`` None chooses."""
    operator = OPERATORS[name] if name in OPERATORS else Operator(*PARTS[name])
    return operator.run(*args, backend=backend, **kwargs)


def triton_and_reference(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The results of both backends on the same arguments, Triton with poisoned memory."""
    with poisoned():
        result = call(name, *args, backend="triton", **kwargs)
    return result, call(name, *args, backend="reference", **kwargs)


def error_rule(name: str, *args: Any, slack: float = 1e-7, **kwargs: Any) -> Any:
    """Apply the error rule to a kernel; returns Triton's result."""
    kernel, plain = triton_and_reference(name, *args, **kwargs)
    exact = call(name, *widened(args), backend="reference", **kwargs)
    assert_error_rule(kernel, plain, exact, slack)
    return kernel
