"""BatchNorm's second derivative in closed form, beside PyTorch's."""

import pytest
import torch
from tiny import sgd, tiny_batch, tiny_model, tiny_step
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastadv.engine.model import network
from fastadv.engine.model.double_backward import batch_norm, cheap_double_backward

CPU = torch.device("cpu")
SHAPES = [(6, 3), (4, 3, 5), (4, 3, 2, 3)]


def drawn(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def arguments(shape, dtype=torch.float64):
    """x, weight and bias of (C,), and running statistics."""
    channels = shape[1]
    x = drawn(shape, 0, dtype).requires_grad_()
    weight, bias = (drawn(channels, seed).requires_grad_() for seed in (1, 2))
    statistics = [drawn(channels, 3), drawn(channels, 4).abs() + 0.5]
    return x, weight, bias, statistics


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_derivatives_are_those_of_finite_differences(shape, training):
    x, weight, bias, statistics = arguments(shape)
    cotangent = drawn(shape, 5).requires_grad_()

    def forward(x, weight, bias):
        moved = [tensor.clone() for tensor in statistics]
        return batch_norm(x, *moved, weight, bias, training)

    def gradient(x, weight, bias, cotangent):
        y = forward(x, weight, bias)
        return torch.autograd.grad(y, [x], cotangent, create_graph=True)[0]

    assert torch.autograd.gradcheck(forward, (x, weight, bias))
    assert torch.autograd.gradcheck(gradient, (x, weight, bias, cotangent))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_a_module_computes_the_same_as_without_it(affine, momentum, tracked, train):
    results = []
    for cheap in (False, True):
        norm = nn.BatchNorm2d(3, affine=affine, momentum=momentum, track_running_stats=tracked)
        norm.double().train(train)
        x = drawn((4, 3, 2, 3), 0).requires_grad_()
        for _ in range(2):
            if cheap:
                with cheap_double_backward(CPU):
                    y = norm(x)
            else:
                y = norm(x)
        (gradient,) = torch.autograd.grad(y.sin().sum(), [x], create_graph=True)
        twice = torch.autograd.grad(gradient.pow(2).sum(), [x, *norm.parameters()])
        results.append([y, gradient, *twice, *norm.buffers()])
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_is_no_further_from_float64_than_pytorchs(training):
    """x in bfloat16, weights in float32, as autocast has them."""

    def second(norm, dtype):
        x, weight, bias, statistics = arguments((32, 8, 6, 6), torch.bfloat16)
        own = torch.float64 if dtype == torch.float64 else torch.float32
        weight, bias = (tensor.detach().to(own).requires_grad_() for tensor in (weight, bias))
        x = x.detach().to(dtype).requires_grad_()
        statistics = [tensor.to(own) for tensor in statistics]
        y = norm(x, *statistics, weight, bias, training)
        cotangent = drawn(x.shape, 6, torch.bfloat16).to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(y, [x], cotangent, create_graph=True)
        loss = (gradient.to(own) * drawn(x.shape, 7).to(own)).sum()
        # With running statistics nothing depends on x.
        found = torch.autograd.grad(loss, [x, weight, cotangent], materialize_grads=True)
        return [tensor.double() for tensor in found]

    exact = second(functional.batch_norm, torch.float64)
    errors = [
        [
            float((found - true).norm())
            for found, true in zip(second(norm, torch.bfloat16), exact, strict=True)
        ]
        for norm in (batch_norm, functional.batch_norm)
    ]
    for own, pytorchs in zip(*errors, strict=True):
        assert own <= 1.1 * pytorchs


@pytest.mark.parametrize("tracked", [True, False])
def test_without_weights_low_precision_is_taken_too(tracked):
    x = drawn((4, 3, 2, 3), 0, torch.bfloat16).requires_grad_()
    norm = nn.BatchNorm2d(3, affine=False, track_running_stats=tracked)
    with cheap_double_backward(CPU):
        y = norm(x)
    torch.testing.assert_close(y, norm(x))
    (gradient,) = torch.autograd.grad(y.float().sin().sum(), [x], create_graph=True)
    assert torch.autograd.grad(gradient.float().pow(2).sum(), [x])[0].isfinite().all()


def test_one_value_per_channel_is_refused_as_by_pytorch():
    with cheap_double_backward(CPU), pytest.raises(ValueError, match="more than 1 value"):
        nn.BatchNorm1d(3)(torch.ones(1, 3))


def test_a_checkpointed_network_is_differentiated_twice():
    model = tiny_model()
    plain = tiny_step(model, "standard-igr")
    x, y, index, _ = tiny_batch()
    plain(x, y, index)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    other = Checkpointed()
    step = tiny_step(other, "standard-igr")
    step(x, y, index)
    for own, expected in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)


def test_a_custom_batch_norm_is_not_replaced(monkeypatch):
    calls = []

    def own(*args, **kwargs):
        calls.append(1)
        return batch_norm(*args, **kwargs)

    monkeypatch.setattr(functional, "batch_norm", own)
    model = tiny_model()
    x, y, index, _ = tiny_batch()
    tiny_step(model, "standard-igr")(x, y, index)
    assert calls
    assert functional.batch_norm is own


def test_unsupported_derivatives_are_refused():
    x, weight, bias, statistics = arguments((4, 3, 2, 3))
    loss = batch_norm(x, *statistics, weight, bias, True).sin().sum()
    of_x, of_weight = torch.autograd.grad(loss, [x, weight], create_graph=True)
    with pytest.raises(NotImplementedError, match="once more"):
        torch.autograd.grad(of_x.pow(2).sum(), [x], create_graph=True)
    with pytest.raises(NotImplementedError, match="its input"):
        torch.autograd.grad(of_weight.pow(2).sum(), [x])


@pytest.mark.parametrize(
    ("method", "options", "used"),
    [("standard-igr", {}, True), ("fgsm-n-cure", {}, True), ("pgd", {"steps": 1}, False)],
)
def test_steps_use_it_where_they_differentiate_twice(monkeypatch, method, options, used):
    entered = []
    monkeypatch.setattr(
        network,
        "cheap_double_backward",
        lambda device: entered.append(1) or cheap_double_backward(device),
    )
    model = tiny_model()
    step = tiny_step(model, method, optimizer=sgd(model), **options)
    x, y, index, _ = tiny_batch()
    step(x, y, index)
    assert bool(entered) == used
    assert functional.batch_norm is not batch_norm
