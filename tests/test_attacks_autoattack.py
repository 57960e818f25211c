"""AutoAttack and its parts: a bound on PGD, no global state changed, and what they refuse."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastadv.errors import NotFiniteError, UserError
from fastadv.evaluation.accuracy import evaluate
from fastadv.evaluation.attacks import attack
from fastadv.evaluation.search.cascade import Pipeline
from fastadv.evaluation.search.engine import NOT_FINITE
from fastadv.threat import Threat


def trained_net(classes, dtype=torch.float32):
    """A small network fitted to which quarter of the image is bright, and held-out images."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, classes)
    )
    y = torch.arange(160) % classes
    x = 0.4 + 0.2 * torch.rand(160, 1, 6, 6)
    for i, label in enumerate(y.tolist()):
        x[i, 0, label % 6, : 3 + label // 6] += 0.3
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(net(x[:120]), y[:120]).backward()
        optimizer.step()
    return net.to(dtype), x[120:].to(dtype), y[120:]


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autoattack_is_at_least_as_strong_as_pgd(norm, eps, dtype):
    net, x, y = trained_net(5, dtype)
    scores = evaluate(net, [(x, y)], ("clean", "pgd-20", "autoattack"), eps=eps, norm=norm)
    assert scores["clean"] == 1
    assert 0 < scores["autoattack"] <= scores["pgd-20"] < 1
    torch.manual_seed(7)
    x_adv = attack(net, x, y, "autoattack", eps=eps, norm=norm)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), after), "the global seed was moved"
    assert x_adv.dtype == dtype
    right = (net(x_adv).argmax(1) == y).double().mean().item()
    assert right == pytest.approx(scores["autoattack"])
    delta = (x_adv - x).flatten(1)
    reach = delta.abs().amax() if norm == "linf" else delta.norm(dim=1).amax()
    assert reach <= eps * (1 + 1e-5)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_too_few_classes_are_refused_in_one_sentence():
    net, x, y = trained_net(3)
    with pytest.raises(UserError, match=r"at least 4 classes and the model has 3; use 'apgd-ce'"):
        attack(net, x, y, "autoattack")


def linear(dtype=torch.float32):
    """A linear network of five classes, images with the classes that it gives them."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).to(dtype)
    x = torch.rand(9, 3, 2, 2).to(dtype)
    return net, x, net(x).argmax(1)


class Spoiled(nn.Module):
    """Logits that are not finite for a bright image."""

    def __init__(self, net, value):
        super().__init__()
        self.net, self.value = net, value

    def forward(self, x):
        logits = self.net(x)
        bright = (x.flatten(1).amin(1) > 0.99)[:, None]
        return torch.where(bright, torch.full_like(logits, self.value), logits)


@pytest.mark.parametrize("name", ["apgd-ce-2", "fab-t-2-1", "square-2", "quick"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_without_finite_logits_does_not_count_as_fooled(name, value):
    net, x, y = linear()
    x[4], y[4] = 1, 2
    with pytest.raises(NotFiniteError, match="not finite"):
        attack(Spoiled(net, value), x, y, name)


@pytest.mark.parametrize("name", ["fgsm", "fgsm-rwp", "pgd-2", "pgd-2-2", "cw-2", "cw-margin-2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_steps_at_logits_that_are_not_finite_are_no_attack(name, value):
    """They are filled in, so the gradient of that image is zero, which alone tells nothing."""
    net, x, y = linear()
    x[4], y[4] = 1, 2
    with pytest.raises(NotFiniteError) as error:
        attack(Spoiled(net, value), x, y, name, eps=1e-3)
    assert str(error.value) == NOT_FINITE
    attack(Spoiled(net, value), x[:4], y[:4], name, eps=1e-3)


def test_square_is_for_images():
    net, x, y = linear()
    with pytest.raises(UserError, match=r"windows of images \(B,C,H,W\), and these are \(9, 12\)"):
        attack(net, x.flatten(1), y, "apgd-ce-2+square-5", eps=0.001)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["apgd-ce-5", "fab-5", "fab-t-5-2", "square-20", "quick"])
def test_a_network_in_bfloat16_is_attacked_in_its_type(name, norm):
    net, x, y = linear(torch.bfloat16)
    x_adv = attack(net, x, y, name, norm=norm, eps=0.2)
    assert x_adv.dtype == torch.bfloat16
    assert not torch.equal(x_adv, x)
    right = (net(x_adv).argmax(1) == y).double().mean().item()
    assert evaluate(net, [(x, y)], [name], norm=norm, eps=0.2)[name] == pytest.approx(right)


@pytest.mark.parametrize("name", ["apgd-ce-4", "pma-4", "quick"])
def test_an_eps_that_was_filled_in_later_is_the_one_of_all_steps(name):
    net, x, y = linear()
    eps = torch.zeros(())
    filled = Threat("linf", eps)
    eps.fill_(0.125)
    expected = attack(net, x, y, name, eps=0.125)
    assert not torch.equal(expected, x)
    assert torch.equal(attack(net, x, y, name, threat=filled), expected)
    scores = evaluate(net, [(x, y)], [name], threat=filled)
    assert scores.verdicts[name].facts["eps"] == 0.125


def test_a_lost_verdict_is_an_error(monkeypatch):
    net, x, y = linear()
    monkeypatch.setattr(Pipeline, "finish", lambda self: iter(()))
    with pytest.raises(RuntimeError, match="verdicts on 9 images"):
        evaluate(net, [(x[:5], y[:5]), (x[5:], y[5:])], ["apgd-ce-2"], eps=0.001)
