"""The references against independent computations and properties."""

import math

import oracle_gradients
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastadv import kernels
from fastadv.kernels.reference_top_n import top_n_forward

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int, dtype: torch.dtype = torch.float64, size: int = 7) -> Tensor:
    return torch.rand(3, 3, size, 5, generator=generator(seed), dtype=torch.float64).to(dtype)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def linf_by_hand(x_adv: float, grad: float, x: float, alpha: float, eps: float) -> float:
    if not math.isfinite(grad):
        return math.nan
    sign = 0.0 if grad == 0 else math.copysign(1.0, grad)
    moved = min(max(x_adv + alpha * sign, x - eps), x + eps)
    return min(max(moved, 0.0), 1.0)


def test_linf_step_by_hand() -> None:
    x, x_adv, grad = images(0), images(1), images(2) - 0.5
    grad.view(-1)[:9] = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-300, 0, 0, 0])
    stepped = kernels.linf_step(x_adv, grad, x, 0.1, 0.3)
    rows = zip(*(t.flatten().tolist() for t in (x_adv, grad, x)), strict=True)
    expected = torch.tensor([linf_by_hand(*row, 0.1, 0.3) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(stepped.flatten(), expected, rtol=0, atol=1e-15, equal_nan=True)
    again = kernels.linf_step(x_adv, grad, x, torch.tensor(0.1, dtype=torch.float64), 0.3)
    torch.testing.assert_close(again, stepped, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_gradient_without_a_direction_moves_its_sample_to_nan(bad: float) -> None:
    """1e30 has a direction in Linf; in L2 its float32 norm overflows."""
    x, grad = images(0, torch.float32), images(1, torch.float32) - 0.5
    grad[1, 0, 0, 0] = bad
    for step in (kernels.linf_step, kernels.l2_step):
        moved = step(x, grad, x, 0.1, 0.3).flatten(1)
        lost = not math.isfinite(bad) or step is kernels.l2_step
        assert bool(moved[1].isnan().any()) == lost
        assert moved[0].isfinite().all()
        assert moved[2].isfinite().all()
    (signs,) = kernels.block_signs([grad])
    assert bool(signs[1, 0, 0, 0].isnan()) == (not math.isfinite(bad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_keep_the_dtype_and_the_ball(dtype: torch.dtype) -> None:
    x, grad = images(0, dtype), images(1, dtype) - 0.5
    rows, room = torch.arange(3), 1 + 8 * torch.finfo(dtype).eps
    for start, step, project, norm in (
        (kernels.linf_start, kernels.linf_step, kernels.linf_project, math.inf),
        (kernels.l2_start, kernels.l2_step, kernels.l2_project, 2),
    ):
        x_adv = step(start(x, 0.3, rows, 1, 2), grad, x, torch.tensor(0.2), 0.3)
        assert x_adv.dtype == dtype
        distance = (x_adv.double() - x.double()).flatten(1).norm(norm, dim=1)
        assert (distance <= 0.3 * room + 10 * torch.finfo(dtype).eps / 4).all()
        assert ((x_adv >= 0) & (x_adv <= 1)).all()
        assert project(x_adv, x, 0.3).dtype == dtype


def test_l2_step_against_renorm() -> None:
    x, x_adv, grad = images(0), images(1), images(2) - 0.5
    unit = grad / (grad.flatten(1).norm(dim=1).view(3, 1, 1, 1) + 1e-10)
    delta = (x_adv + 0.7 * unit - x).renorm(2, 0, 1.5)
    expected = (x + delta).clamp(0, 1)
    torch.testing.assert_close(
        kernels.l2_step(x_adv, grad, x, 0.7, 1.5), expected, rtol=0, atol=1e-6
    )
    projected = (x + (x_adv - x).renorm(2, 0, 1.5)).clamp(0, 1)
    torch.testing.assert_close(kernels.l2_project(x_adv, x, 1.5), projected, rtol=0, atol=1e-6)


def test_l2_zero_gradient_and_zero_distance() -> None:
    x = images(0)
    assert torch.equal(kernels.l2_step(x, torch.zeros_like(x), x, 0.5, 0.1), x)
    assert torch.equal(kernels.l2_project(x, x, 0.0), x)


def test_l2_start_is_a_direction_times_a_radius() -> None:
    x, rows = torch.zeros(500, 3, 4, 4, dtype=torch.float64), torch.arange(500)
    delta = kernels.l2_start(x, 0.5, rows, 1, 2, -9.0, 9.0).flatten(1)
    radius = delta.norm(dim=1)
    assert radius.max() < 0.5
    assert abs(radius.mean().item() - 0.25) < 0.02
    noise = kernels.noise_normal(rows, (48,), 1, 2, dtype=torch.float64)
    cosine = F.cosine_similarity(delta, noise, dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**20), st.floats(0, 2), st.sampled_from(["linf", "l2"]))
def test_projection_is_idempotent_and_nearest(seed: int, eps: float, norm: str) -> None:
    x, far = images(seed), images(seed + 1) * 4 - 2
    project = getattr(kernels, f"{norm}_project")
    once = project(far, x, eps)
    torch.testing.assert_close(project(once, x, eps), once, rtol=0, atol=1e-12)
    if norm == "linf":
        # Nearest in every pixel: no closer point of the ball and the box exists.
        low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
        assert torch.equal(once, torch.minimum(torch.maximum(far, low), high))


def layers(seed: int) -> list[Tensor]:
    return [normal(seed + i, *s) for i, s in enumerate(((4, 3, 3, 3), (7,), (5, 2)))]


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_perturb_weights_has_the_published_size(scope: str) -> None:
    w, g = layers(0), layers(10)
    weights, v = [t.clone() for t in w], [t.clone() for t in g]
    kernels.perturb_weights(weights, v, torch.tensor(0.01), scope)

    def size(tensors: list[Tensor]) -> float:
        return math.sqrt(sum(t.square().sum().item() for t in tensors))

    for i in range(len(w)):
        torch.testing.assert_close(weights[i], w[i] + v[i])
        torch.testing.assert_close(v[i] / v[i].norm(), g[i] / g[i].norm())
        if scope == "tensor":
            assert size([v[i]]) == pytest.approx(0.01 * size([w[i]]))
    if scope == "global":
        assert size(v) == pytest.approx(0.01 * size(w))
        assert v[0][0, 0, 0, 0] / g[0][0, 0, 0, 0] == pytest.approx((v[2] / g[2])[0, 0].item())
    kernels.restore_weights(weights, w, v)
    assert all(torch.equal(a, b) for a, b in zip(weights, w, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_is_exact_where_subtracting_is_not(dtype: torch.dtype) -> None:
    w = [normal(0, 2000).to(dtype)]
    v, weights = [normal(1, 2000).to(dtype)], [w[0].clone()]
    kernels.perturb_weights(weights, v, 0.5)
    assert not torch.equal(weights[0] - v[0], w[0])
    weights[0] += 0.25 * (weights[0] > 3)
    kernels.restore_weights(weights, w, v)
    untouched = (w[0] + v[0]) <= 3
    assert torch.equal(weights[0][untouched], w[0][untouched])


def test_perturb_weights_edges() -> None:
    w, g = layers(0), layers(10)
    g[0].zero_()
    g[1][0] = math.nan
    weights = [t.clone() for t in w]
    kernels.perturb_weights(weights, g, 0.1)
    assert torch.equal(weights[0], w[0])
    assert torch.equal(weights[1], w[1])
    assert not torch.equal(weights[2], w[2])
    kernels.perturb_weights([], [], 0.1)
    parameter = torch.nn.Parameter(torch.ones(3))
    kernels.perturb_weights([parameter], [torch.ones(3)], 0.1)
    assert parameter.requires_grad
    with pytest.raises(ValueError, match="scope"):
        kernels.perturb_weights(weights, g, 0.1, "layer")
    with pytest.raises(ValueError, match="paired"):
        kernels.perturb_weights(weights, g[::-1], 0.1)
    with pytest.raises(ValueError, match="3 and 2"):
        kernels.restore_weights(weights, w[:2], g)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_top_n_equals_a_sort(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
    n = data.draw(st.integers(0, len(values)))
    z = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    z_adv = torch.zeros_like(z, requires_grad=True)
    total = kernels.top_n_sum(z, z_adv, n)
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:n]
    assert total.item() == sum(abs(values[i]) for i in order)
    grad, grad_adv = torch.autograd.grad(total, (z, z_adv))
    expected = [(i in order) * ((v > 0) - (v < 0)) for i, v in enumerate(values)]
    assert grad[0].tolist() == expected
    assert torch.equal(grad_adv, -grad)
    _, kept = top_n_forward(z, z_adv, n, True)
    assert kept[0].tolist() == expected


def test_top_n_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"0\.\.6"):
        kernels.top_n_sum(torch.zeros(2, 3), torch.zeros(2, 3), 7)


def test_trades_kl_against_kl_div_and_gradcheck() -> None:
    p, q = (normal(s, 4, 5).requires_grad_() for s in (0, 1))
    expected = F.kl_div(q.log_softmax(1), p.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(kernels.trades_kl(p, q), expected)
    assert torch.autograd.gradcheck(kernels.trades_kl, (p, q))
    assert torch.autograd.gradgradcheck(kernels.trades_kl, (p, q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trades_kl_of_extreme_logits_is_finite(dtype: torch.dtype) -> None:
    rows = [[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 0], [1e4, 1e4, -1e4]]
    p = torch.tensor(rows, dtype=dtype, requires_grad=True)
    q = torch.tensor(rows[::-1], dtype=dtype, requires_grad=True)
    kl = kernels.trades_kl(p, q)
    assert kl.isfinite().all()
    assert (kl >= 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(kl.sum(), (p, q)))
    assert not kernels.trades_kl(p, p).any()


@pytest.mark.parametrize("c_min", [0.0, 1.5, math.inf])
def test_masked_ce_by_hand_and_gradcheck(c_min: float) -> None:
    logits, y = normal(0, 8, 5).requires_grad_(), torch.arange(8) % 5
    total, count = kernels.masked_ce(logits, y, torch.tensor(c_min))
    losses = [-row.log_softmax(0)[label].item() for row, label in zip(logits, y, strict=True)]
    kept = [loss for loss in losses if loss <= c_min]
    assert total.item() == pytest.approx(sum(kept) / 8)
    assert (count.item(), count.dtype) == (len(kept), torch.int64)
    assert torch.autograd.gradcheck(lambda z: kernels.masked_ce(z, y, c_min)[0], logits)
    assert torch.autograd.gradgradcheck(lambda z: kernels.masked_ce(z, y, c_min)[0], logits)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_row_of_masked_ce_without_a_loss_has_no_gradient(bad: float) -> None:
    """A compiled region also shows the fault; the row is not kept, and its gradient is NaN."""
    logits, y = normal(0, 6, 5).float(), torch.arange(6) % 5
    logits[1, 3], logits[4, 4] = bad, bad
    logits.requires_grad_()
    lost = torch.tensor([False, True, False, False, True, False])

    torch._dynamo.reset()
    compiled = torch.compile(kernels.masked_ce, backend="inductor", fullgraph=True)
    kept = oracle_gradients.masked_ce_forward(logits.detach(), y, 1.7)[2]
    one = torch.ones(())
    for found in (
        torch.autograd.grad(kernels.masked_ce(logits, y, 1.7)[0], logits)[0],
        torch.autograd.grad(compiled(logits, y, 1.7)[0], logits)[0],
        oracle_gradients.masked_ce_backward(one, logits, y, kept),
    ):
        assert found[lost].isnan().all()
        assert found[~lost].isfinite().all()


def test_explicit_backwards_equal_autograd() -> None:
    p, q = (normal(s, 6, 5).requires_grad_() for s in (0, 1))
    y, grad = torch.arange(6) % 5, normal(2, 6)
    expected = torch.autograd.grad(kernels.trades_kl(p, q), (p, q), grad)
    found = oracle_gradients.trades_kl_backward(grad, p, q, True, True)
    torch.testing.assert_close(found, expected)
    total, count, kept = oracle_gradients.masked_ce_forward(p, y, 1.5)
    expected_total, expected_count = kernels.masked_ce(p, y, 1.5)
    torch.testing.assert_close((total, count), (expected_total.detach(), expected_count))
    (expected_grad,) = torch.autograd.grad(expected_total, p, grad[0])
    found_grad = oracle_gradients.masked_ce_backward(grad[0], p, y, kept)
    torch.testing.assert_close(found_grad, expected_grad)


def test_block_signs_noise_and_step_gradients() -> None:
    blocks = [normal(0, 2, 3, 4, 4).to(memory_format=torch.channels_last), normal(1, 5, 2)]
    blocks[1][0, 0] = 0
    signs = kernels.block_signs(blocks)
    assert all(torch.equal(s, b.sign()) for s, b in zip(signs, blocks, strict=True))
    assert signs[0].stride() == blocks[0].stride()
    noise = kernels.block_noise(signs, torch.tensor([0.5, -2.0], dtype=torch.float64))
    assert torch.equal(noise[0], 0.5 * blocks[0].sign())
    assert torch.equal(noise[1], -2 * blocks[1].sign())
    found = kernels.block_step_gradients(blocks, signs)
    expected = torch.stack([b.abs().sum() for b in blocks])
    torch.testing.assert_close(found, expected)
    halves = kernels.block_step_gradients([blocks[1].half()], [signs[1].half()])
    assert halves.dtype == torch.float32


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_padded_channels_by_hand_and_gradcheck(layout: torch.memory_format) -> None:
    x = normal(0, 2, 3, 4, 5).to(memory_format=layout)
    found = kernels.pad_channels(x, 8, torch.float16)
    expected = torch.zeros(2, 8, 4, 5, dtype=torch.float16)
    expected[:, :3] = x.half()
    assert torch.equal(found, expected)
    assert found.dtype == torch.float16
    assert found.is_contiguous(memory_format=torch.channels_last)
    wide = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kernels.pad_channels(z, 8, torch.float64), wide)
    assert torch.autograd.gradgradcheck(lambda z: kernels.pad_channels(z, 8, torch.float64), wide)
