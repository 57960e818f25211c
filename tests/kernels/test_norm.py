"""BatchNorm with its ReLU and its residuals against PyTorch's operators, in float64."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norm_calls import EPS, MOMENTUM, activations, by_entries, by_torch
from torch import Tensor

from fastadv import kernels
from fastadv.kernels import FUSED_NORM, fused_norm

FORMS = tuple(itertools.product((False, True), repeat=4))
SHAPE = (3, 5, 4, 6)
BACKWARD = torch.ops.fastadv.fused_norm_backward.default


def double(seed: int = 0, shape: tuple[int, ...] = SHAPE, **parts: Any) -> Any:
    return activations(shape, torch.float64, seed=seed, **parts).changed(Tensor.double)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_pieces_are_batch_norm(form: tuple[bool, ...], training: bool) -> None:
    *parts, relu = form
    given = double(**dict(zip(("before", "after", "affine"), parts, strict=True)))
    torch.testing.assert_close(
        by_entries(given, relu, training), by_torch(given, relu, training), rtol=1e-11, atol=1e-11
    )


Function = Callable[..., tuple[Tensor, Tensor]]


def pytorchs(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    before: Tensor | None,
    after: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    total = x if before is None else x + before
    y = F.batch_norm(total, mean, var, weight, bias, training, momentum, eps)
    y = y if after is None else y + after
    return torch.relu(y) if relu else y, total


def registered(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    before: Tensor | None,
    after: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    assert training
    y, total, _, _ = FUSED_NORM(x, weight, bias, before, after, mean, var, momentum, eps, relu)
    return y, x if before is None else total


def differentiated(
    function: Function, form: tuple[bool, ...], training: bool, twice: bool
) -> list[Tensor]:
    """y, total, the buffers, and the first derivatives (and the second ones)."""
    *parts, relu = form
    given = double(**dict(zip(("before", "after", "affine"), parts, strict=True)))
    x, before, after, weight, bias = (
        None if t is None else t.detach().clone().requires_grad_() for t in given[:5]
    )
    leaves = [t for t in (x, before, after, weight, bias) if t is not None]
    running = given.running_mean.clone(), given.running_var.clone()
    y, total = function(x, *running, weight, bias, training, MOMENTUM, EPS, before, after, relu)
    value = (y * given.grad).sum() + (total * given.grad_total).sum()
    found = list(torch.autograd.grad(value, leaves, retain_graph=True))
    if twice:
        first = torch.autograd.grad(value, leaves, create_graph=True)
        bent: Any = sum(g.pow(3).sum() for g in first)
        if bent.requires_grad:
            second = torch.autograd.grad(bent, leaves, allow_unused=True)
            found += [
                torch.zeros_like(t) if g is None else g for g, t in zip(second, leaves, strict=True)
            ]
    return [y.detach(), total.detach(), *running, *found]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_fused_norm_is_batch_norm_in_both_derivatives(
    form: tuple[bool, ...], training: bool
) -> None:
    found = differentiated(fused_norm, form, training, twice=True)
    expected = differentiated(pytorchs, form, training, twice=True)
    if len(found) != len(expected):  # without a second derivative PyTorch has a zero one
        assert not any(t.any() for t in (*found, *expected)[len(found) : len(expected)])
    torch.testing.assert_close(found, expected[: len(found)], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_registered_operator_is_batch_norm(form: tuple[bool, ...]) -> None:
    torch.testing.assert_close(
        differentiated(registered, form, True, twice=False),
        differentiated(pytorchs, form, True, twice=False),
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("before", [False, True])
def test_the_registered_operator_refuses_a_second_derivative(before: bool) -> None:
    given = double(before=before)
    x = given.x.requires_grad_()
    y, _ = registered(
        x, given.running_mean, given.running_var, *given.parameters, True, MOMENTUM, EPS,
        given.before, None, True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad((y * given.grad).sum(), x, create_graph=True)


@pytest.mark.parametrize("training", [True, False])
def test_derivatives_against_differences(training: bool) -> None:
    given = double(shape=(2, 2, 2, 3))  # one evaluation for each number of each leaf
    leaves = tuple(t.detach().requires_grad_() for t in given[:5] if t is not None)

    def function(x: Tensor, before: Tensor, after: Tensor, *affine: Tensor) -> Any:
        running = given.running_mean.clone(), given.running_var.clone()
        # Away from the kink of the ReLU, where differences have no meaning.
        after = after + 3 * given.grad.sign()
        return fused_norm(x, *running, *affine, training, MOMENTUM, EPS, before, after, False)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residuals", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_opcheck(relu: bool, residuals: bool, layout: torch.memory_format) -> None:
    """Schema, strides and aliases; without a ReLU the gradient of after is the one of y."""
    given = activations(SHAPE, before=residuals, after=residuals, affine=relu)
    given = given.changed(lambda t: t.contiguous(memory_format=layout) if t.dim() == 4 else t)
    x, before, after, weight, bias = (
        None if t is None else t.detach().requires_grad_() for t in given[:5]
    )
    running = given.running_mean, given.running_var
    torch.library.opcheck(
        FUSED_NORM, (x, weight, bias, before, after, *running, MOMENTUM, EPS, relu)
    )
    torch.library.opcheck(
        BACKWARD,
        (
            *(given.grad, given.before, given.x, given.after, given.running_mean),
            *(given.running_var, given.weight, given.bias, relu, residuals, relu),
        ),
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("residuals", [True, False])
def test_compiled_with_its_gradient(backend: str, residuals: bool) -> None:
    given = double(before=residuals, after=residuals)

    def region(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y, total = registered(
            2 * x, mean, var, given.weight, given.bias, True, MOMENTUM, EPS,
            given.before, given.after, True,
        )  # fmt: skip
        value = (y * given.grad).sum() + (total * given.grad_total).sum()
        return y.detach(), torch.autograd.grad(value, x)[0]

    def run(function: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        running = given.running_mean.clone(), given.running_var.clone()
        for _ in range(2):  # the buffers move twice
            found = function(given.x, *running)
        return [*(t.detach() for t in found), *running]

    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = run(torch.compile(region, backend=backend, fullgraph=True))
    torch.testing.assert_close(compiled, run(region), rtol=1e-11, atol=1e-11)


def test_an_exchange_is_sync_batch_norm() -> None:
    """By its formulas: the statistics of all values, and a local gradient of weight and bias."""
    given = double(after=False, before=False)
    numbers = (given.running_mean, given.running_var)
    halves = [given.changed(lambda t, c=c: t[c] if t.dim() == 4 else t) for c in ([0], [1, 2])]
    sent: list[Tensor] = []
    keep = functools.partial(_kept, sent)
    for half in halves:
        kernels.norm_statistics(half.x, None, None, None, MOMENTUM, EPS, keep)
    counts, means, squares = torch.stack(sent).unbind(1)
    for own, half in enumerate(halves):
        torch.testing.assert_close(means[own], half.x.mean((0, 2, 3)))
        assert counts[own].tolist() == [half.x.numel() / 5] * 5
        expected = half.x.var((0, 2, 3), correction=0) * counts[own]
        torch.testing.assert_close(squares[own], expected)
    every = torch.stack(sent)
    running = tuple(t.clone() for t in numbers)
    _, mean, rate = kernels.norm_statistics(
        halves[1].x, None, *running, MOMENTUM, EPS, lambda _own: every
    )
    var, expected_mean = torch.var_mean(given.x, (0, 2, 3), correction=0)
    torch.testing.assert_close((mean, rate), (expected_mean, (var + EPS).rsqrt()))
    expected = by_torch(given, True, True)
    torch.testing.assert_close(running, tuple(expected[2:4]))

    sent.clear()
    rest = (mean, rate, None, given.weight, given.bias, True, True, None, False, True)
    for half in halves:
        kernels.norm_gradients(half.grad, half.x, None, *rest, keep)
    every = torch.stack(sent)
    found = [
        kernels.norm_gradients(half.grad, half.x, None, *rest, lambda _own: every)
        for half in halves
    ]
    torch.testing.assert_close(torch.cat([each[0] for each in found]), expected[4])
    torch.testing.assert_close(found[0][2] + found[1][2], expected[5])
    torch.testing.assert_close(found[0][3] + found[1][3], expected[6])
    assert not torch.equal(found[0][2], found[1][2])


def _kept(sent: list[Tensor], own: Tensor) -> Tensor:
    sent.append(own)
    return own[None]


@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1, 1), (0, 5, 4, 4)])
def test_too_few_values_for_a_variance(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="more than one value per channel"):
        kernels.norm_statistics(torch.zeros(shape), None, None, None, MOMENTUM, EPS)
