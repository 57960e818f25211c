"""Top-n, TRADES' divergence and RWP's masked cross entropy in Triton's interpreter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    DTYPES,
    assert_error_rule,
    call,
    error_rule,
    generator,
    one_by_one,
    poisoned,
    triton_and_reference,
)
from torch import Tensor

from fastadv.kernels import reference, triton_losses, triton_top_n
from fastadv.kernels.tickets import tickets

SIZES = ((128, 10), (1, 1), (5, 1), (3, 1000), (300, 10), (2, 33))


def logits(size: tuple[int, int], seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(size, generator=generator(seed))


def by_sorting(z: Tensor, z_adv: Tensor, n: int) -> tuple[float, Tensor]:
    """The sum and its sub-gradient, by a stable sort in plain Python."""
    difference = (z - z_adv).flatten().tolist()
    order = sorted(range(len(difference)), key=lambda i: (-abs(difference[i]), i))[:n]
    kept = torch.zeros(len(difference), dtype=torch.int8)
    for i in order:
        kept[i] = (difference[i] > 0) - (difference[i] < 0)
    return sum(abs(difference[i]) for i in order), kept.view(z.shape)


@pytest.mark.parametrize(
    ("ties", "size"), one_by_one([True, False], [(128, 10), (1, 1), (3, 5), (20, 1000)])
)
def test_top_n_equals_a_sort(size: tuple[int, int], ties: bool) -> None:
    z, z_adv = logits(size, 0), logits(size, 1)
    if ties:
        z, z_adv = z.round(), z_adv.round()
    for n in {0, 1, z.numel() // 10, z.numel()}:
        with poisoned():
            total, kept = call("top_n_forward", z, z_adv, n, True, backend="triton")
        expected, expected_kept = by_sorting(z, z_adv, n)
        assert torch.equal(kept, expected_kept)
        assert total.item() == pytest.approx(expected, rel=2e-6)
        alone, _ = call("top_n_forward", z, z_adv, n, False, backend="triton")
        assert torch.equal(alone, total)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_top_n_property(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 60))
    # Few distinct values make many ties.
    numbers = st.sampled_from([0.0, -1.0, 1.0, 0.5, 1e-38, 3e38, -2.0])
    z = torch.tensor([data.draw(st.lists(numbers, min_size=count, max_size=count))])
    n = data.draw(st.integers(1, count))
    total, kept = call("top_n_forward", z, torch.zeros_like(z), n, True, backend="triton")
    expected, expected_kept = by_sorting(z, torch.zeros_like(z), n)
    assert torch.equal(kept, expected_kept)
    if expected < 3e38:
        assert total.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 999, 51200])
def test_top_n_at_imagenet_size(n: int) -> None:
    z, z_adv = logits((512, 1000), 0), logits((512, 1000), 1).to(torch.float16).float()
    total, kept = call("top_n_forward", z, z_adv, n, True, backend="triton")
    plain, plain_kept = call("top_n_forward", z, z_adv, n, True, backend="reference")
    assert torch.equal(kept, plain_kept)
    torch.testing.assert_close(total, plain)


def test_top_n_gradients_and_errors() -> None:
    z, z_adv = (logits((4, 5), s).to(torch.float16).requires_grad_() for s in (0, 1))
    total = triton_top_n.top_n_sum(z, z_adv, 6)
    got = torch.autograd.grad(3 * total, (z, z_adv))
    expected = torch.autograd.grad(3 * call("top_n_sum", z, z_adv, 6), (z, z_adv))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(ValueError, match=r"0\.\.20"):
        triton_top_n.top_n_sum(z, z_adv, 21)


@pytest.mark.parametrize(("size", "dtype", "scale"), one_by_one(SIZES, DTYPES, [1.0, 1e4]))
def test_trades_kl(size: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    p, q = (logits(size, s, scale).to(dtype) for s in (0, 1))
    error_rule("trades_kl_forward", p, q, slack=3e-7)
    grad = torch.randn(size[0], generator=generator(2))
    error_rule("trades_kl_backward", grad, p, q, True, True, slack=3e-7)
    only_q = triton_and_reference("trades_kl_backward", grad, p, q, False, True)[0]
    assert only_q[0].numel() == 0
    assert only_q[1].shape == q.shape


@pytest.mark.parametrize(
    ("c_min", "size", "dtype"), one_by_one([1.7, 0.0, torch.tensor(4.0), math.inf], SIZES, DTYPES)
)
def test_masked_ce(size: tuple[int, int], dtype: torch.dtype, c_min: float | Tensor) -> None:
    z, y = logits(size, 0).to(dtype), torch.randint(size[1], size[:1], generator=generator(1))
    kernel, plain = triton_and_reference("masked_ce_forward", z, y, c_min)
    exact = call("masked_ce_forward", z.double(), y, c_min)
    assert_error_rule(kernel[0], plain[0], exact[0], slack=3e-7)
    assert torch.equal(kernel[1], plain[1])
    assert torch.equal(kernel[2], plain[2])
    assert kernel[1] == kernel[2].sum()
    backward = (torch.tensor(2.0), z, y, kernel[2])
    error_rule("masked_ce_backward", *backward)


def test_masked_ce_of_extreme_logits_is_finite() -> None:
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    y = torch.tensor([0, 0])
    total, count = triton_losses.masked_ce(z, y, 1e9)
    assert (total.item(), count.item()) == (1e4, 2)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_masked_ce_without_a_loss_has_no_gradient(bad: float, dtype: torch.dtype) -> None:
    """A NaN must not become 0: in autograd's gradient, the explicit one, and the kernel's."""
    z, y = logits((6, 5), 0).to(dtype), torch.arange(6) % 5
    z[1, 3], z[4, 4] = bad, bad  # elsewhere than the label, and at it
    lost = torch.tensor([False, True, False, False, True, False])
    weight = torch.tensor(2.0)
    for c_min in (0.0, 1.7, math.inf):
        found = []
        for function in (reference.masked_ce, triton_losses.masked_ce):
            leaf = z.clone().requires_grad_()
            with poisoned():
                total, count = function(leaf, y, c_min)
                for again in (False, True):  # once through the reference's expression
                    found += torch.autograd.grad(
                        total, leaf, weight.to(total.dtype), retain_graph=True, create_graph=again
                    )
            assert total.isfinite()
            assert count <= 4
        kept = call("masked_ce_forward", z, y, c_min, backend="reference")[2]
        found += triton_and_reference("masked_ce_backward", weight, z, y, kept)
        for gradient in found:
            assert gradient[lost].isnan().all()
            assert gradient[~lost].isfinite().all()
            torch.testing.assert_close(gradient, found[0], equal_nan=True)


@pytest.mark.parametrize("name", ["trades_kl", "masked_ce"])
def test_eager_first_and_second_derivatives(name: str) -> None:
    """Triton backwards for the first derivative, the reference's expression for the second."""
    y = torch.tensor([0, 3, 1])
    results = []
    for function in (getattr(triton_losses, name), lambda *a: call(name, *a, backend="reference")):
        p, q = logits((3, 5), 0).requires_grad_(), logits((3, 5), 1).requires_grad_()
        inputs = (p, q) if name == "trades_kl" else (p,)
        value = function(p, q) if name == "trades_kl" else function(p, y, 2.0)[0]
        value = (value * torch.arange(1, value.numel() + 1)).sum()
        plain_first = torch.autograd.grad(value, inputs, retain_graph=True)
        first = torch.autograd.grad(value, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append((plain_first, first, second))
    torch.testing.assert_close(results[0], results[1])


def test_one_side_alone_needs_a_gradient() -> None:
    p, q = logits((3, 5), 0), logits((3, 5), 1).requires_grad_()
    (got,) = torch.autograd.grad(triton_losses.trades_kl(p, q).sum(), q)
    (expected,) = torch.autograd.grad(call("trades_kl", p, q).sum(), q)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("columns", [slice(0, None, 2), slice(3, 8)])
def test_strided_logits(columns: slice) -> None:
    p, q = logits((6, 12), 0)[:, columns], logits((6, 12), 1)[:, columns]
    y = torch.arange(12)[::2] % p.shape[1]
    for name, arguments in (
        ("trades_kl_forward", (p, q)),
        ("trades_kl_backward", (torch.ones(()).expand(6), p, q, True, True)),
        ("top_n_forward", (p, q, 5, True)),
        ("masked_ce_forward", (p, y, 2.0)),
    ):
        torch.testing.assert_close(*triton_and_reference(name, *arguments))


def test_the_kernels_leave_their_counters_at_zero() -> None:
    """So that no launch zeroes them before the next use."""
    z, z_adv = logits((20, 1000), 0), logits((20, 1000), 1)
    y, cpu = torch.arange(20), torch.device("cpu")
    for _ in range(2):
        for name, arguments in (
            ("top_n_forward", (z, z_adv, 300, True)),
            ("top_n_forward", (z, z_adv, 300, False)),
            ("masked_ce_forward", (z, y, 9.0)),
        ):
            torch.testing.assert_close(*triton_and_reference(name, *arguments))
        assert not tickets(cpu, 3 * triton_top_n.BINS).any()
        assert not tickets(cpu, 1).any()
