"""AutoAttack: a bound on PGD, and no global state changed."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastadv.errors import UserError
from fastadv.evaluation.accuracy import evaluate
from fastadv.evaluation.attacks import attack


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
