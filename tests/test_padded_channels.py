"""A first convolution with images padded to eight channels computes what it did without."""

from contextlib import nullcontext

import pytest
import torch
from tiny import CLASSES, tiny_batch, tiny_step
from tiny_run import Counting
from torch import nn

import fastadv
from fastadv import kernels
from fastadv.engine.compiled import Runner
from fastadv.engine.model.network import Network
from fastadv.engine.model.padded_channels import channels_padded, padded_weight
from fastadv.errors import UserError

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture(autouse=True)
def able(monkeypatch):
    monkeypatch.setattr("fastadv.engine.model.precision.cpu_multiplies", lambda _: True)


def channels_last(module):
    return module.to(memory_format=torch.channels_last)


def network():
    torch.manual_seed(0)
    model = fastadv.build_model(
        "preact_resnet18", width=4, num_classes=CLASSES, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2)
    )
    return channels_last(model)


def test_the_sums_of_a_convolution_stay():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 7, 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.rand(5, 3, 3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    wide = padded_weight(weight.detach(), 8)
    wide[:, :3] = weight.detach()
    wide.requires_grad_()
    expected = torch.conv2d(x, weight, stride=2, padding=1)
    found = torch.conv2d(kernels.pad_channels(x, 8, torch.float64), wide, stride=2, padding=1)
    torch.testing.assert_close(found, expected)
    slopes = torch.autograd.grad(expected.square().sum(), (x, weight))
    padded_slopes = torch.autograd.grad(found.square().sum(), (x, wide))
    torch.testing.assert_close(padded_slopes[0], slopes[0])
    torch.testing.assert_close(padded_slopes[1][:, :3], slopes[1])
    assert not padded_slopes[1][:, 3:].any()  # so that no step of an optimizer would move them


class Exact(nn.Module):
    """All sums are integers below 256, which bfloat16 holds exactly. The weight is also read by
    code that is not the convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 2, bias=False)
        self.read = False
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.conv.weight.copy_(torch.randint(-1, 2, (2, 3, 2, 2), generator=generator))

    def forward(self, x):
        out = self.conv(x).float().sum((2, 3))
        return out + self.conv.weight.float().square().sum() if self.read else out


def noting(monkeypatch):
    """How many channels each padding has made."""
    seen, pad = [], kernels.pad_channels

    def noted(x, channels, dtype):
        seen.append((channels, dtype))
        return pad(x, channels, dtype)

    monkeypatch.setattr(kernels, "pad_channels", noted)
    return seen


def network_of(model, x, on=True, **dtypes):
    with channels_padded() if on else nullcontext():
        net = Network(
            model, CPU, Runner(), **({"outer_dtype": BF16, "attack_dtype": BF16} | dtypes)
        )
    net.probe(x)
    return net


def weighted(logits):
    return (logits * torch.tensor([1.0, -2.0])).sum()


@pytest.mark.parametrize("read", [False, True])
def test_logits_and_gradients_are_equal(read, monkeypatch):
    padded = noting(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 3, (4, 3, 3, 3), generator=generator).float()
    found = []
    for on in (False, True):
        model = channels_last(Exact())
        model.read = read
        net = network_of(model, x, on)
        weights = dict(model.named_parameters())
        with net.attacking("train"):
            image = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(weighted(net.logits(image)), image)
        with net.training():
            image = x.clone().requires_grad_()
            loss = weighted(net.logits(image))
            of_all = net.gradients(loss, weights, [image])
        found.append([slope, loss.detach(), *of_all])
        assert len(padded) == 2 * on
        assert model.conv.weight is weights["conv.weight"]
        assert not {"_conv_forward", "forward"} & vars(model.conv).keys()
    assert padded == [(8, BF16)] * 2
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)
        assert plain.dtype == other.dtype == torch.float32
    # A parameter's gradient is as dense as the parameter, for optimizers that work on flat memory.
    assert found[1][2].stride() == channels_last(Exact()).conv.weight.stride()


def test_it_is_off_unless_it_is_switched_on(monkeypatch):
    padded = noting(monkeypatch)
    x, y, index, _ = tiny_batch()
    step = tiny_step(network(), "pgd", amp=True, steps=1)
    step(x.float(), y, index)
    assert not padded
    assert step.internals.net.copies.padded == []


class Views(nn.Module):
    """Convolutions of the images and of other tensors."""

    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(3, 8, 3, padding=1)
        self.pixel = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.cast = nn.Conv2d(3, 8, 3, padding=1)
        self.later = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(3, 3, 3, padding=1)
        self.hooked = nn.Conv2d(3, 8, 3, padding=1)
        self.hooked.register_forward_hook(lambda *_: None)
        self.subclass = Own(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        first = (
            self.image(x)
            + self.pixel(x)
            + self.cast(x.bfloat16())
            + self.hooked(x)
            + self.subclass(x)
        )
        once = self.twice(x)
        return (self.wide(first) + self.later(self.grouped(x)) + self.twice(once).sum()).mean(
            (2, 3)
        )


class Own(nn.Conv2d):
    """A user's class."""


def test_only_plain_convolutions_of_float32_images_are_padded():
    model = channels_last(Views())
    x = torch.rand(2, 3, 4, 4)
    # The second call of one of them gets a result in bfloat16, and one of a pixel has no layout.
    assert network_of(model, x).copies.padded == [model.image]
    assert network_of(Views(), x).copies.padded == []
    assert network_of(channels_last(Exact()).double(), x.double()).copies.padded == []


def test_six_channels_are_padded_but_not_in_groups():
    found = []
    for groups in (1, 2):
        first = nn.Conv2d(6, 8, 3, padding=1, groups=groups)
        model = channels_last(nn.Sequential(first, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        found.append(len(network_of(model, torch.rand(2, 6, 4, 4)).copies.padded))
    assert found == [1, 0]


class Other(Exact):
    """The convolution is also called with another weight."""

    def __init__(self):
        super().__init__()
        self.other = nn.Parameter(self.conv.weight.detach().flip(0))

    def forward(self, x):
        return super().forward(x) + 2 * self.conv._conv_forward(x, self.other.bfloat16(), None).sum(
            (2, 3)
        )


def test_another_weight_is_not_replaced(monkeypatch):
    padded = noting(monkeypatch)
    x = torch.randint(0, 2, (4, 3, 3, 3), generator=torch.Generator().manual_seed(1)).float()
    found = []
    for on in (False, True):
        net = network_of(channels_last(Other()), x, on)
        with net.attacking("train"):
            found.append(net.logits(x))
    assert torch.equal(*found)
    assert padded == [(8, BF16)]


def test_images_with_too_many_channels_are_refused_as_before():
    net = network_of(channels_last(Exact()), torch.rand(2, 3, 4, 4))
    with net.attacking("train"), pytest.raises((RuntimeError, UserError)):
        net.logits(torch.rand(2, 5, 4, 4))


def test_without_half_precision_nothing_is_padded(monkeypatch):
    padded = noting(monkeypatch)
    x, y, index, _ = tiny_batch()
    with channels_padded():
        step = tiny_step(network(), "pgd", steps=1)
    step(x.float(), y, index)
    assert not padded


def moved(method, mode, on, backend="eager", **options):
    """How far two steps move the weights; the number of compiled graphs."""
    model, counting = network(), Counting(backend)
    before = [weight.detach().clone() for weight in model.parameters()]
    x, y, index, _ = tiny_batch()
    images = torch.nn.functional.interpolate(x.float(), 16)
    with channels_padded() if on else nullcontext():
        step = tiny_step(model, method, mode=mode, amp=True, backend=counting, **options)
    for _ in range(2):
        step(channels_last(images), y, index)
    assert (step.internals.net.copies.padded != []) == on
    pairs = zip(model.parameters(), before, strict=True)
    return torch.cat([(w.detach() - b).flatten() for w, b in pairs]), counting.count


METHODS = {
    "pgd": {"steps": 2},
    "trades": {"steps": 2},  # BatchNorms are folded in the attack
    "apart": {"total_steps": 100},
    "awp": {"steps": 1, "warmup_epochs": 0},  # the weights change between two passes
    "fgsm-n-gradalign": {},  # double backward
}


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_the_same_up_to_rounding(method, monkeypatch):
    padded = noting(monkeypatch)
    plain, _ = moved(method, "eager", False, **METHODS[method])
    assert not padded
    other, _ = moved(method, "eager", True, **METHODS[method])
    assert len(padded) >= 4
    assert (plain - other).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        pytest.param("pgd", "aot_eager", marks=pytest.mark.slow),
        pytest.param("awp", "aot_eager", marks=pytest.mark.slow),
        pytest.param("pgd", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_are_the_same_and_compile_as_often(method, backend):
    options = METHODS[method] | {"backend": backend}
    plain, graphs = moved(method, "compiled", False, **options)
    other, padded_graphs = moved(method, "compiled", True, **options)
    assert (plain - other).norm() < 0.02 * plain.norm()
    assert padded_graphs == graphs
