"""Noise, L-infinity and L2 steps in Triton's interpreter against the reference."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    call,
    error_rule,
    gradients,
    images,
    laid_out,
    one_by_one,
)
from oracle import triton_and_reference as both
from torch import Tensor

from fastadv.kernels import triton_l2

EPS, ALPHA = 8 / 255, 2 / 255
KEYS: list[tuple[Any, Any, int]] = [
    (1, 1, 1),
    (2**64 - 1, 2**40 + 3, 255),
    (torch.tensor(-5), torch.tensor(2**33), 0),
]
ROWS = torch.tensor([5, 2**31 + 7, 0, 1])


@pytest.mark.parametrize(
    ("key", "dtype", "shape"), one_by_one(KEYS, DTYPES, [(3, 33, 31), (1,), (3, 32, 32)])
)
def test_uniform_noise_is_the_reference_bit_for_bit(
    key: tuple[Any, Any, int], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    triton, plain = both("noise_uniform", ROWS, shape, *key, dtype)
    assert torch.equal(triton, plain)


@pytest.mark.parametrize("key", KEYS)
def test_normal_noise(key: tuple[Any, Any, int]) -> None:
    triton, plain = both("noise_normal", ROWS, (3, 33, 31), *key)
    torch.testing.assert_close(triton, plain, rtol=0, atol=4e-6)


@pytest.mark.parametrize(("shape", "layout", "dtype"), one_by_one(SHAPES, LAYOUTS, DTYPES))
def test_linf_is_the_reference_bit_for_bit(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    x = laid_out(images(shape, 0, dtype), layout)
    grad = laid_out(gradients(shape, 1, dtype), "contiguous")
    start, plain = both("linf_start", x, EPS, ROWS[: shape[0]], 3, torch.tensor(4))
    assert torch.equal(start, plain)
    for alpha in (ALPHA, torch.tensor(ALPHA), torch.tensor(ALPHA, dtype=torch.float64)):
        stepped, plain = both("linf_step", start, grad, x, alpha, EPS)
        assert torch.equal(stepped, plain)
    projected, plain = both("linf_project", start, x, EPS / 2, 0.1, 0.9)
    assert torch.equal(projected, plain)


def rows_of(count: int, largest: float) -> dict[str, Tensor]:
    """Tensors of radii: one for all samples, and one for each, dense, spread out, and repeated."""
    each = largest * torch.linspace(0.2, 1, count)
    spread = torch.full((3 * count,), math.nan)
    spread[::3] = each
    return {
        "0-dim": torch.tensor(largest),
        "rows": each,
        "half": each.to(torch.float16),
        "spread": spread[::3],
        "repeated": torch.tensor([largest]).expand(count),
    }


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    one_by_one([(3, 3, 8, 8), (5, 3, 11, 17), *SHAPES], [*LAYOUTS, "samples_inside"], DTYPES),
)
def test_linf_with_tensors_of_radii_is_the_reference_bit_for_bit(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    x, away = images(shape, 0, dtype), images(shape, 2, dtype)
    if layout == "samples_inside":
        x = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    else:
        x = laid_out(x, layout)
    grad, index = gradients(shape, 1, dtype), torch.arange(shape[0])
    # Each kind of step with one kind of radius, another pair in each dtype.
    steps = [ALPHA, *rows_of(shape[0], ALPHA).values()]
    for turn, eps in enumerate(rows_of(shape[0], EPS).values(), DTYPES.index(dtype)):
        start, plain = both("linf_start", x, eps, index, 3, 4)
        assert torch.equal(start, plain)
        for alpha in (steps[turn % 6], steps[(turn + 3) % 6]):
            stepped, plain = both("linf_step", start, grad, x, alpha, eps)
            assert torch.equal(stepped, plain)
        projected, plain = both("linf_project", away, x, eps, 0.1, 0.9)
        assert torch.equal(projected, plain)
    for alpha in steps[1:]:
        stepped, plain = both("linf_step", x, grad, x, alpha, EPS)
        assert torch.equal(stepped, plain)


SEVERAL_PROGRAMS = (2, 3, 53, 53)  # for each sample
ROW_SHAPES = [(3, 3, 5, 7), (1, 3, 5, 7), (3, 1, 1, 1), SEVERAL_PROGRAMS]
KINDS = ("rows", "0-dim", "half", "spread", "repeated")


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "kind"), one_by_one(ROW_SHAPES, LAYOUTS, DTYPES, KINDS)
)
def test_l2_rows_are_samples_with_numbers_bit_for_bit(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, kind: str
) -> None:
    if shape == SEVERAL_PROGRAMS and (dtype != torch.float32 or kind != "rows"):
        return
    x = laid_out(images(shape, 0, dtype), layout)
    away = laid_out((images(shape, 0) + 0.1 * images(shape, 2)).clamp(0, 1).to(dtype), layout)
    grad, index = laid_out(gradients(shape, 1, dtype), "contiguous"), torch.arange(shape[0])
    alpha, eps = (rows_of(shape[0], largest)[kind] for largest in (0.2, 0.3))
    calls: dict[str, Any] = {
        "l2_step": lambda b, a, e: (away[b], grad[b], x[b], a, e),
        "l2_project": lambda b, a, e: (away[b], x[b], e),
        "l2_start": lambda b, a, e: (x[b], e, index[b], 5, 7),
    }
    for name, arguments in calls.items():
        everything = slice(None)
        found = error_rule(name, *arguments(everything, alpha, eps), slack=3e-7)
        for row in range(shape[0]):
            one = slice(row, row + 1)
            a, e = (float(t.expand(shape[0])[row]) for t in (alpha, eps))
            alone = call(name, *arguments(one, a, e), backend="triton")
            assert torch.equal(found[one], alone), (name, row)


def test_as_many_radii_as_samples() -> None:
    x = images((3, 3, 4, 4), 0)
    two = torch.tensor([0.1, 0.2])
    for name, arguments in {
        "linf_start": (x, two, ROWS[:3], 1, 1),
        "l2_start": (x, two, ROWS[:3], 1, 1),
        "linf_step": (x, x, x, 0.1, two),
        "l2_step": (x, x, x, two, 0.1),
        "linf_project": (x, x, two),
        "l2_project": (x, x, two[:1]),
    }.items():
        for backend in ("triton", "reference"):
            with pytest.raises(ValueError, match=r"shape \([12],\) for 3 images"):
                call(name, *arguments, backend=backend)


def test_extreme_values_and_nan() -> None:
    grad = torch.tensor([[math.inf, -math.inf, math.nan, 1e-45, -1e-45, 0.0, -0.0, 3e38]])
    x = torch.full((1, 8), 0.5)
    triton, plain = both("linf_step", x, grad, x, ALPHA, EPS)
    assert torch.equal(triton[0, 3:], plain[0, 3:])
    assert triton[0, :3].isnan().all()
    assert plain[0, :3].isnan().all()
    for infinite in (math.inf, math.nan, 1e30):
        grad[0, 0] = infinite
        for moved in both("l2_step", x, grad, x, ALPHA, EPS):
            assert moved.isnan().all()
    broken = torch.full((1, 8), math.nan)
    assert both("linf_step", broken, grad, x, ALPHA, EPS)[0].isnan().all()
    finite = grad.nan_to_num(0.0, 1.0, -1.0)
    free, plain = both("linf_step", x, finite, x, 5.0, math.inf, -math.inf, math.inf)
    assert torch.equal(free, plain)


def test_a_bfloat16_gradient_of_a_float32_image() -> None:
    x, grad = images((2, 3, 5, 4), 0), gradients((2, 3, 5, 4), 1).to(torch.bfloat16)
    triton, plain = both("linf_step", x, grad, x, ALPHA, EPS)
    assert torch.equal(triton, plain)


LARGE = (2, 3, 110, 112)
# The largest samples of one program, and the smallest of several.
ONE = triton_l2.ONE_PROGRAM
LIMITS = tuple((2, 1, 1, n) for n in (ONE, ONE + 16, ONE // 2 - 1, ONE // 2 + 1))
ONLY_ONCE = (LARGE, *LIMITS)


@pytest.mark.parametrize(
    ("layout", "shape", "dtype", "eps"),
    one_by_one(
        ["channels_last", "contiguous", "strided"], [*SHAPES, *ONLY_ONCE], DTYPES, [0.05, 0.5]
    ),
)
def test_l2_error(shape: tuple[int, ...], layout: str, dtype: torch.dtype, eps: float) -> None:
    if shape in ONLY_ONCE and (layout != "channels_last" or dtype != torch.float32):
        return
    x = laid_out(images(shape, 0, dtype), layout)
    away = laid_out((images(shape, 0) + 0.1 * images(shape, 2)).clamp(0, 1).to(dtype), layout)
    grad = laid_out(gradients(shape, 1, dtype), "contiguous")
    for alpha in (0.2, torch.tensor(0.2)):
        stepped = error_rule("l2_step", away, grad, x, alpha, eps, slack=3e-7)
        norm = (stepped.double() - x.double()).flatten(1).norm(dim=1)
        # Each pixel below 1 is rounded by at most a quarter of the dtype's epsilon.
        rounding = x[0].numel() ** 0.5 * torch.finfo(dtype).eps / 4
        assert (norm <= eps * (1 + 1e-6) + rounding).all()
    error_rule("l2_project", away, x, eps, slack=3e-7)


@pytest.mark.parametrize(
    "shape",
    [
        *((3, 3, 33, 31), *LIMITS[:2]),
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in (LARGE, *LIMITS[2:])),
    ],
)
def test_l2_start(shape: tuple[int, ...]) -> None:
    x = laid_out(images(shape, 0), "channels_last")
    triton, plain = both("l2_start", x, 0.5, ROWS[: shape[0]], 2**63, torch.tensor(9), 0.0, 1.0, 1)
    torch.testing.assert_close(triton, plain, rtol=0, atol=1e-6)


def test_l2_with_a_zero_gradient_stays() -> None:
    x = images((2, 3, 4, 4), 0)
    stepped = call("l2_step", x, torch.zeros_like(x), x, 0.5, 0.5, backend="triton")
    assert torch.equal(stepped, x)
    tiny = call("l2_step", x, torch.full_like(x, 1e-30), x, 0.5, 0.5, backend="triton")
    torch.testing.assert_close(tiny, x)


def sized(data: st.DataObject) -> tuple[Tensor, Tensor, Tensor]:
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40)))
    seed = data.draw(st.integers(0, 2**20))
    return images(shape, seed), images(shape, seed + 1) * 3 - 1, gradients(shape, seed + 2)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.floats(0.0, 0.5), st.floats(0.0, 2.0))
def test_linf_properties(data: st.DataObject, eps: float, alpha: float) -> None:
    x, x_adv, grad = sized(data)
    stepped = call("linf_step", x_adv, grad, x, alpha, eps, backend="triton")
    assert ((stepped - x).abs() <= eps + 6e-8).all()
    assert ((stepped >= 0) & (stepped <= 1)).all()
    again = call("linf_project", stepped, x, eps, backend="triton")
    assert torch.equal(again, stepped)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.floats(0.01, 3.0), st.floats(0.0, 2.0))
def test_l2_properties(data: st.DataObject, eps: float, alpha: float) -> None:
    x, x_adv, grad = sized(data)
    stepped = call("l2_step", x_adv, grad, x, alpha, eps, backend="triton")
    assert ((stepped - x).norm(dim=1) <= eps * (1 + 1e-5)).all()
    assert ((stepped >= 0) & (stepped <= 1)).all()
    again = call("l2_project", stepped, x, eps, backend="triton")
    torch.testing.assert_close(again, stepped, rtol=0, atol=1e-6)
