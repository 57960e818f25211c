"""During the passes of an update the model holds low-precision copies of its weights."""

import pytest
import torch
from tiny import CLASSES, EPS, tiny_batch, tiny_step
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import fastadv
from fastadv.engine.compiled import Runner
from fastadv.engine.model.network import Network
from fastadv.engine.model.weight_copies import WeightCopies

STEPS, ALPHA = 3, 0.04


@pytest.fixture(autouse=True)
def able(monkeypatch):
    monkeypatch.setattr("fastadv.engine.model.precision.cpu_multiplies", lambda _: True)


def network():
    torch.manual_seed(0)
    return fastadv.build_model("preact_resnet18", width=4, num_classes=CLASSES)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step_of(model, mode="eager"):
    options = {"steps": STEPS, "alpha": ALPHA, "amp": True, "mode": mode}
    return tiny_step(model, "pgd", optimizer=optimizer_of(model), **options)


def test_two_steps_are_those_of_plain_autocast():
    """Bit for bit: the second step's attack must see what the optimizer did."""
    x, y, index, start = tiny_batch()
    x, start = x.float(), start.float()
    model, other = network(), network()
    step, optimizer = step_of(model), optimizer_of(other)
    for _ in range(2):
        step(x, y, index, start=start)
        x_adv = (x + start.clamp(-EPS, EPS)).clamp(0, 1)
        for _ in range(STEPS):
            x_adv = x_adv.detach().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                logits = other(x_adv)
            (slope,) = torch.autograd.grad(functional.cross_entropy(logits.float(), y), x_adv)
            moved = x_adv.detach() + ALPHA * slope.sign()
            x_adv = (x + (moved - x).clamp(-EPS, EPS)).clamp(0, 1)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            logits = other(x_adv)
        functional.cross_entropy(logits.float(), y).backward()
        optimizer.step()
    expected = other.state_dict()
    for name, found in model.state_dict().items():
        assert torch.equal(found, expected[name]), name


class CountCasts(TorchDispatchMode):
    """How many 4-dimensional tensors are cast from float32 to bf16: convolutions' weights."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._to_copy.default and args[0].shape in self.shapes:
            self.count += (kwargs or {}).get("dtype") is torch.bfloat16
        return operation(*args, **(kwargs or {}))


def test_no_pass_casts_a_weight():
    x, y, index, _ = tiny_batch()
    model = network()
    weights = [weight for weight in model.parameters() if weight.dim() == 4]
    step = step_of(model)
    step(x.float(), y, index)
    with CountCasts({weight.shape for weight in weights}) as casts:
        step(x.float(), y, index)
    assert casts.count == 0


class CountRefreshes(TorchDispatchMode):
    """How often all copies are made anew, which takes one operator."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._foreach_copy_.default:
            self.count += args[0][0].dtype is torch.bfloat16
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "options", "states"),
    [
        ("standard", {}, 1),
        ("pgd", {"steps": 2}, 1),
        ("trades", {"steps": 2}, 2),  # one with BatchNorms folded, one without
        ("fgsm-n-advlc", {}, 1),
        ("awp", {"steps": 1, "warmup_epochs": 0}, 2),  # before and after the perturbation
        ("rwp", {"steps": 1, "weight_steps": 3, "c_min": 100.0, "warmup_epochs": 0}, 4),
    ],
)
def test_each_state_of_the_weights_is_copied_once(method, options, states):
    x, y, index, _ = tiny_batch()
    model = network()
    step = tiny_step(model, method, optimizer=optimizer_of(model), amp=True, **options)
    step(x.float(), y, index)
    with CountRefreshes() as refreshes:
        step(x.float(), y, index)
    assert refreshes.count == states


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Shared(nn.Module):
    """A weight that two convolutions share, and that a third one needs in full precision."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.third = Standardized(3, 3, 3)
        self.second.weight = self.third.weight = self.first.weight
        self.head = nn.Linear(3, CLASSES)
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        return self.head(self.third(self.second(self.first(x).relu())).mean((2, 3)))


def test_gradients_are_those_of_autocast():
    """Two forward passes in one graph, as TRADES has them; bit for bit."""
    torch.manual_seed(0)
    model = Shared()
    x, other = torch.rand(2, 4, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x).float().logsumexp(1).sum() + model(other).float().square().sum()
    expected.backward()
    net = Network(model, torch.device("cpu"), Runner(), torch.bfloat16, torch.bfloat16)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with net.training():
        loss = net.logits(x).logsumexp(1).sum() + net.logits(other).square().sum()
        found = net.gradients(loss, weights)
    assert loss == expected
    for (name, weight), gradient in zip(weights.items(), found, strict=True):
        assert gradient.dtype == torch.float32
        # Not lowered here: cast in every pass, and so not rounded where two passes are added.
        if name != "third.bias":
            assert torch.equal(gradient, weight.grad), name
    assert all(weight.is_leaf and weight.dtype == torch.float32 for weight in model.parameters())


def test_compiled_steps_also_share_the_copies():
    x, y, index, start = tiny_batch()
    models = [network(), network()]
    for model, mode in zip(models, ("eager", "compiled"), strict=True):
        step = step_of(model, mode)
        for _ in range(2):
            step(x.float(), y, index, start=start.float())
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)


def test_replaced_parameters_are_restored_and_subclasses_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Standardized(4, 4, 3), nn.BatchNorm2d(4))
    model.append(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    model.append(nn.Conv2d(4, 4, 1).double())
    before = dict(model.named_parameters())
    inside = {}

    def interrupted():
        with WeightCopies(model).installed(torch.bfloat16, folded=True):
            inside.update(model.named_parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    changed = {name for name in before if inside[name] is not before[name]}
    assert changed == {"0.weight", "0.bias"}
    assert all(inside[name].dtype == torch.bfloat16 for name in changed)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
