"""BatchNorm with its ReLU and its residuals in Triton's interpreter."""

import itertools
import math
from typing import Any

import pytest
import torch
from norm_calls import EPS, MOMENTUM, Activations, activations, by_entries, by_torch
from oracle import (
    assert_error_rule,
    call,
    generator,
    in_pairs,
    laid_out,
    poisoned,
    triton_and_reference,
)
from torch import Tensor

from fastadv.kernels import norm, triton_norm

# Channels below, at and above one block; a tile, a part of one, many; programs that share the rows
# equally, and those that do not.
SHAPES = (
    *((2, 3, 1, 1), (3, 1, 1, 1), (2, 1, 4, 4), (3, 5, 4, 6), (4, 16, 8, 8), (4, 24, 9, 7)),
    *((3, 100, 8, 8), (2, 513, 3, 3), (4, 64, 8, 8), (8, 4), (5, 6, 7), (2, 3, 2, 4, 3)),
)
LARGEST = (3, 100, 8, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (before, after, affine, relu)
FLAGS = tuple(itertools.product((False, True), repeat=4))
SLOW_BUT_ONE = [
    flags if all(flags) else pytest.param(flags, marks=pytest.mark.slow) for flags in FLAGS
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles and few programs, so that a small tensor has many of both."""
    monkeypatch.setattr(triton_norm, "SUM_TILE", 256)
    monkeypatch.setattr(triton_norm, "APPLY_TILE", 512)
    monkeypatch.setattr(triton_norm, "PROGRAMS", 24)


def error_rule(given: Activations, relu: bool, training: bool) -> list[Tensor]:
    """At most twice the error of PyTorch's operators in the same dtype."""
    with poisoned():
        kernel = by_entries(given, relu, training, "triton")
    plain = by_torch(given, relu, training)
    exact = by_torch(given.changed(Tensor.double), relu, training)
    assert [t.dtype for t in kernel] == [t.dtype for t in plain]
    assert_error_rule(kernel, plain, exact, slack=2e-6)
    return kernel


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_form(flags: tuple[bool, bool, bool, bool]) -> None:
    for training in (True, False):
        error_rule(activations((3, 5, 4, 6), torch.float32, *flags[:3]), flags[3], training)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("flags", SLOW_BUT_ONE, ids=str)
def test_every_form_in_a_half_type(flags: tuple[bool, bool, bool, bool]) -> None:
    for training in (True, False):
        error_rule(activations((3, 5, 4, 6), DTYPES[1], *flags[:3]), flags[3], training)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, marks=[pytest.mark.slow] if s == LARGEST else []) for s in SHAPES],
    ids=str,
)
def test_every_shape(shape: tuple[int, ...]) -> None:
    whole = SHAPES.index(shape) % 2 == 1
    error_rule(activations(shape, DTYPES[whole], *3 * [whole]), True, True)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_with_the_other_type(shape: tuple[int, ...]) -> None:
    whole = SHAPES.index(shape) % 2 == 0
    error_rule(activations(shape, DTYPES[whole], *3 * [whole]), True, True)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    in_pairs([(10, 64, 8, 8), (9, 48, 15, 11)], [torch.float32, torch.bfloat16, torch.float16]),
)
def test_with_the_tiles_of_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # The interpreter rounds some sums to bfloat16 wrongly, see interpreted_backends.py.
    error_rule(activations(shape, dtype, before=dtype != torch.bfloat16), True, True)


@pytest.mark.parametrize(("ratio", "dtype"), in_pairs([1e3, 30.0], [torch.float32, torch.bfloat16]))
def test_a_mean_that_is_large_against_the_deviation(ratio: float, dtype: torch.dtype) -> None:
    """The squares of the values would lose six digits at 1e3, as many as float32 has."""
    given = activations((16, 32, 12, 12), dtype, before=False, after=False, ratio=ratio)
    kernel = error_rule(given, True, True)
    exact = by_torch(given.changed(Tensor.double), True, True)
    if dtype == torch.float32:
        torch.testing.assert_close(kernel[3].double(), exact[3], rtol=3e-6, atol=0)


def test_a_first_tile_that_is_far_from_all_others() -> None:
    given = activations((8, 16, 16, 16), before=False, after=False)
    x = given.x.clone()
    x[0] += 1e3
    x[1] = 5.0
    error_rule(given._replace(x=x, grad=given.grad.clone()), True, True)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_the_elementwise_pieces_equal_the_reference(flags: tuple[bool, bool, bool, bool]) -> None:
    """From the same statistics: y, its mask, and the gradients that are not sums."""
    *parts, relu = flags
    dtype, eps = (torch.float32, None) if relu else (torch.float16, EPS)
    given = activations((3, 5, 4, 6), dtype, *parts)
    grad = torch.randn(given.x.shape, generator=generator(9)).to(dtype)
    total = given.x if given.before is None else given.x + given.before
    scales = (given.running_mean, given.running_var, eps, *given.parameters)
    y, expected = triton_and_reference("norm_apply", total, *scales, given.after, relu)
    assert torch.equal(y, expected)
    shown = None if given.after is None else y
    rest = (*scales, relu, False, given.grad_total, given.after is not None)
    for wants_affine in (False, True):
        own, other = triton_and_reference("norm_gradients", grad, total, shown, *rest, wants_affine)
        assert [t is None for t in own] == [t is None for t in other]
        for mine, its in zip(own[:2], other[:2], strict=True):
            assert mine is None or torch.equal(mine, its)


def test_special_values_pass_as_in_the_reference() -> None:
    """A NaN goes through the ReLU, and its gradient too; -0 and what rounds to 0 have none."""
    bad = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-7, -1e-7, 6e4, 3.0, -3.0])
    for dtype in DTYPES[:2]:
        total = bad.to(dtype).view(10, 1, 1, 1).expand(10, 4, 1, 1).contiguous()
        mean, rate = torch.tensor([0.0, 1.0, math.nan, 0.0]), torch.tensor([1.0, 2.0, 1.0, 1e-4])
        grad = torch.arange(1.0, 41).to(dtype).view(10, 4, 1, 1)
        for after in (None, total):
            y, expected = triton_and_reference(
                "norm_apply", total, mean, rate, None, None, None, after, True
            )
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
            found, plain = triton_and_reference(
                "norm_gradients", grad, total, None if after is None else y, mean, rate, None,
                None, None, True, False, None, after is not None, False,
            )  # fmt: skip
            torch.testing.assert_close(found[:2], plain[:2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_channel_with_a_bad_value_is_lost_alone(bad: float) -> None:
    given = activations((4, 12, 5, 5), before=False, after=False)
    good = by_entries(given, True, True, "triton")
    x = given.x.clone()
    x[2, 7, 3, 3] = bad
    with poisoned():
        found = by_entries(given._replace(x=x), True, True, "triton")
    others = [c for c in range(12) if c != 7]
    for own, right in zip(found, good, strict=True):
        own, right = (t.transpose(0, 1) if t.dim() == 4 else t for t in (own, right))
        assert torch.equal(own[others], right[others])
    assert found[0][:, 7].isnan().all()
    assert not found[2][7].isfinite()
    assert not found[3][7].isfinite()
    assert found[4][:, 7].isnan().all()


@pytest.mark.usefixtures("small")
def test_the_same_bits_in_any_order_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that finishes is another one, and the sums are the same."""
    given = activations((4, 24, 9, 7), torch.float16)
    first = by_entries(given, True, True, "triton")
    again = by_entries(given, True, True, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    plain = triton_norm.launch
    finished = []

    def backwards(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """The same launch with its programs from the last to the first."""
        with pytest.MonkeyPatch.context() as patch:
            from triton.runtime import interpreter

            builder = interpreter.interpreter_builder
            set_index = builder.set_grid_idx

            def turned(x: int, y: int, z: int) -> None:
                finished.append(grid[0] - 1 - x)
                set_index(grid[0] - 1 - x, y, z)

            patch.setattr(builder, "set_grid_idx", turned)
            plain(kernel, grid, *args, **options)

    monkeypatch.setattr(triton_norm, "launch", backwards)
    turned = by_entries(given, True, True, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, turned, strict=True))
    assert finished[-1] == 0
    assert max(finished) > 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_parameters_and_buffers_in_a_half_type(half: torch.dtype) -> None:
    given = activations((4, 12, 5, 5), half, before=False)
    narrow = given._replace(
        weight=given.weight.to(half),
        bias=given.bias.to(half),
        running_mean=given.running_mean.to(half),
        running_var=given.running_var.to(half),
    )
    for training in (True, False):
        with poisoned():
            found = by_entries(narrow, True, training, "triton")
        expected = by_entries(narrow, True, training, "reference")
        assert {t.dtype for t in found} == {half}
        step = torch.finfo(half).eps
        torch.testing.assert_close(found, expected, rtol=step, atol=step)


def test_buffers_that_are_missing_or_not_contiguous() -> None:
    x = activations((3, 5, 4, 6)).x
    wide = torch.ones(5, 2)
    expected = torch.zeros(5), torch.ones(5)
    call("norm_statistics", x, None, *expected, MOMENTUM, EPS, backend="reference")
    with poisoned():
        total, mean, _ = call(
            "norm_statistics", x, None, torch.zeros(5), wide[:, 1], MOMENTUM, EPS, backend="triton"
        )
        call("norm_statistics", x, None, None, None, MOMENTUM, EPS, backend="triton")
    assert total is x
    torch.testing.assert_close(wide, torch.stack([torch.ones(5), expected[1]], 1))
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))


def test_autograd_knows_that_the_buffers_have_changed() -> None:
    x, mean, var = activations((3, 5, 4, 6)).x, torch.zeros(5), torch.ones(5)
    versions = mean._version, var._version
    triton_norm.norm_statistics(x, None, mean, var, MOMENTUM, EPS)
    assert mean._version > versions[0]
    assert var._version > versions[1]
    with torch.inference_mode():
        mean = torch.zeros(5)
        triton_norm.norm_statistics(x, None, mean, None, MOMENTUM, EPS)
    assert mean.any()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_other_layouts_are_copied(layout: str) -> None:
    given = activations((3, 5, 4, 6))
    wanted = by_entries(given, True, True, "triton")
    moved = given.changed(lambda t: laid_out(t, layout) if t.dim() == 4 else t)
    moved = moved._replace(grad=moved.grad[:, :, :, :1].expand_as(given.grad))
    plain = by_entries(moved, True, True, "reference")
    with poisoned():
        found = by_entries(moved, True, True, "triton")
    torch.testing.assert_close(found, plain, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0)
    assert all(
        t.is_contiguous(memory_format=torch.channels_last)
        for t in wanted + found[:2]
        if t.dim() == 4
    )


def test_an_empty_batch_and_one_value_per_channel() -> None:
    empty = torch.zeros(0, 5, 4, 4)
    numbers = torch.ones(5)
    for x in (empty, torch.zeros(1, 5, 1, 1)):
        with pytest.raises(ValueError, match="more than one value per channel"):
            call("norm_statistics", x, None, None, None, 0.1, EPS, backend="triton")
    scales = (numbers, numbers, EPS, numbers, numbers)
    y = call("norm_apply", empty, *scales, None, True, backend="triton")
    assert y.shape == empty.shape
    found = call(
        "norm_gradients", empty, empty, None, *scales, True, False, None, False, True,
        backend="triton",
    )  # fmt: skip
    assert found[0].shape == empty.shape
    assert torch.equal(found[2], torch.zeros(5))


@pytest.mark.usefixtures("small")
def test_statistics_over_processes_are_those_of_the_whole_batch() -> None:
    """Two processes with different batches, through an exchange that knows both parts."""
    whole = activations((6, 24, 5, 5), ratio=100.0)
    cuts = (slice(0, 2), slice(2, 6))
    for backend in ("triton", "reference"):
        expected = by_entries(whole, True, True, backend)
        parts: list[Tensor] = []

        def every(part: Tensor, parts: list[Tensor] = parts) -> Tensor:
            parts.append(part)
            return torch.stack(parts[-2:] if len(parts) > 1 else [part, part])

        own = [whole.changed(lambda t, cut=cut: t[cut] if t.dim() == 4 else t) for cut in cuts]

        def statistics(given: Activations, exchange: Any, backend: str = backend) -> Any:
            buffers = given.running_mean.clone(), given.running_var.clone()
            found = call(
                "norm_statistics", given.x, given.before, *buffers, MOMENTUM, EPS, exchange,
                backend=backend,
            )  # fmt: skip
            return *found, *buffers

        for given in own:
            statistics(given, every)
        both = torch.stack(parts)
        found = [statistics(given, lambda _part, both=both: both) for given in own]
        for total, mean, rate, running_mean, running_var in found:
            torch.testing.assert_close(running_mean, expected[2])
            torch.testing.assert_close(running_var, expected[3])
            assert torch.equal(mean, found[0][1])
            assert torch.equal(rate, found[0][2])
            assert total.shape[0] in (2, 4)
        parts.clear()

        def backward(given: Activations, made: Any, exchange: Any, backend: str = backend) -> Any:
            total, mean, rate, *_ = made
            scales = (mean, rate, None, *given.parameters)
            y = call("norm_apply", total, *scales, given.after, True, backend=backend)
            return call(
                "norm_gradients", given.grad, total, y, *scales, True, True, given.grad_total,
                True, True, exchange, backend=backend,
            )  # fmt: skip

        for given, made in zip(own, found, strict=True):
            backward(given, made, every)
        both = torch.stack(parts)
        gradients = [
            backward(given, made, lambda _part, both=both: both)
            for given, made in zip(own, found, strict=True)
        ]
        joined = [torch.cat([g[k] for g in gradients]) for k in (0, 1)]
        local = [gradients[0][k] + gradients[1][k] for k in (2, 3)]
        torch.testing.assert_close(joined + local, expected[4:], rtol=2e-4, atol=2e-4)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("training", [True, False])
def test_fused_norm_and_its_second_derivative(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole autograd function with the kernels in it."""
    given = activations((3, 5, 4, 6))

    def everything(backend: str) -> list[Tensor]:
        for name in ("norm_statistics", "norm_apply", "norm_gradients"):
            monkeypatch.setattr(norm, name, lambda *a, name=name: call(name, *a, backend=backend))
        x, before, after, weight, bias = (t.detach().requires_grad_() for t in given[:5])
        running = given.running_mean.clone(), given.running_var.clone()
        y, total = norm.fused_norm(
            x, *running, weight, bias, training, MOMENTUM, EPS, before, after, True
        )
        value = (y * given.grad).sum() + (total * given.grad_total).sum()
        leaves = (x, before, after, weight, bias)
        first = torch.autograd.grad(value, leaves, retain_graph=True)
        again = torch.autograd.grad(value, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), leaves[:4:3])
        return [y, total, *running, *first, *second]

    torch.testing.assert_close(everything("triton"), everything("reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("flags", SLOW_BUT_ONE, ids=str)
def test_two_parts_of_the_gradient_are_their_sum(
    flags: tuple[bool, bool, bool, bool], training: bool
) -> None:
    """In float32 bit for bit."""
    *parts, relu = flags
    given = activations((3, 5, 4, 6), torch.float32, *parts)
    more = torch.randn(given.x.shape, generator=generator(7)).to(memory_format=torch.channels_last)
    scales = (given.running_mean, given.running_var, EPS, *given.parameters)
    y = call("norm_apply", given.x, *scales, given.after, relu, backend="triton")
    shown, skipped = (None if t is None else u for t, u in ((given.after, y), (given.before, more)))
    rest = (given.x, shown, *scales, relu, training, skipped, shown is not None)
    for affine in (False, True):
        with poisoned():
            apart = call("norm_gradients", given.grad, *rest, affine, more=more, backend="triton")
        whole = call("norm_gradients", given.grad + more, *rest, affine, backend="triton")
        plain = call("norm_gradients", given.grad, *rest, affine, more=more, backend="reference")
        for found, same, close in zip(apart, whole, plain, strict=True):
            assert (found is None) == (same is None)
            if found is not None:
                assert torch.equal(found, same)
                torch.testing.assert_close(found, close, rtol=1e-5, atol=1e-5)
