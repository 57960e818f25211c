"""PGD and CW in the forms of released code, against the same attacks image by image, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_attacks import images, linear_model, small_net
from torch import Tensor, nn

from fastadv import kernels
from fastadv.engine.model.network import Network
from fastadv.errors import UserError
from fastadv.evaluation.accuracy import evaluate
from fastadv.evaluation.attacks import attack, parse_attack
from fastadv.evaluation.attacks.problem import STREAM
from fastadv.evaluation.attacks.searched import stages_of
from fastadv.evaluation.search import cascade
from fastadv.evaluation.search.cascade import Stage
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.pgd import Pgd
from fastadv.evaluation.search.rows import joined
from fastadv.evaluation.search.search import Images
from fastadv.threat import Threat

SEED, COUNT = 3, 24
EPS = {"linf": 0.06, "l2": 0.6}
ALPHA = {"linf": 0.02, "l2": 0.2}


def cross_entropy(z: Tensor, label: int) -> Tensor:
    return z.exp().sum().log() - z[label]


def margin(z: Tensor, label: int) -> Tensor:
    return torch.cat([z[:label], z[label + 1 :]]).max() - z[label]


def hinge(z: Tensor, label: int) -> Tensor:
    others = [z[j] for j in range(len(z)) if j != label]
    ahead = z[label] - torch.stack([*others, torch.zeros_like(z[0])]).max() + 10
    return -ahead if ahead > 0 else 0 * z.sum()


LOSSES = {"pgd": cross_entropy, "pgd-margin": margin, "cw": hinge, "cw-margin": margin}


def inside(moved: Tensor, x: Tensor, norm: str) -> Tensor:
    """``moved`` (C,H,W) in the ball around ``x``, then in [0,1]."""
    away = moved - x
    if norm == "linf":
        away = away.clamp(-EPS[norm], EPS[norm])
    elif away.norm() > EPS[norm]:
        away = away * EPS[norm] / away.norm()
    return (x + away).clamp(0, 1)


def by_hand(
    model: nn.Module, x: Tensor, y: Tensor, norm: str, kind: str, steps: int, runs: int, form: str
) -> Tensor:
    """x' (B,C,H,W): ``kind`` with ``steps`` steps from each of ``runs`` starts."""
    stopped, loss = "stopped" in form or kind == "cw-margin", LOSSES[kind]
    found = []
    for i, label in enumerate(y.tolist()):
        kept, height = x[i], -torch.inf
        for run in range(runs):
            index, drawn = torch.tensor([i]), (SEED, run)
            if norm == "linf":
                noise = kernels.noise_uniform(index, x.shape[1:], *drawn, STREAM, x.dtype)[0]
                point = x[i] + EPS[norm] * noise
            else:
                box = (-torch.inf, torch.inf)
                point = kernels.l2_start(x[i : i + 1], EPS[norm], index, *drawn, *box, STREAM)[0]
            if "unclipped" not in form:
                point = point.clamp(0, 1)
            for _ in range(steps):
                leaf = point.clone().requires_grad_()
                z = model(leaf[None])[0]
                if stopped and int(z.argmax()) != label:
                    break
                (slope,) = torch.autograd.grad(loss(z, label), leaf)
                direction = slope.sign() if norm == "linf" else slope / (slope.norm() + 1e-10)
                point = inside(point + ALPHA[norm] * direction, x[i], norm)
            z = model(point[None])[0].detach()
            fools = int(z.argmax()) != label
            if "largest" in form:
                if cross_entropy(z, label) >= height:
                    kept, height = point, float(cross_entropy(z, label))
            elif fools or loss(z, label) > height:
                kept, height = point, float(loss(z, label))
                if fools:
                    break
        found.append(kept)
    return torch.stack(found)


def labelled() -> tuple[nn.Module, Tensor, Tensor]:
    """A network, and images of which every fifth is wrong without an attack; some pixels are at the
    ends of the range."""
    model, (x, _) = small_net(), images(COUNT)
    x = (1.4 * x - 0.2).clamp(0, 1)
    y = model(x).argmax(1)
    y[::5] = (y[::5] + 1) % 5
    return model, x, y


FORMS = [
    ("pgd", 4, 4, ""),
    ("pgd", 4, 4, "largest"),
    ("pgd", 4, 4, "stopped-largest"),
    ("pgd", 5, 1, "stopped"),
    ("pgd", 4, 3, "stopped"),
    ("pgd", 3, 1, "unclipped"),
    ("pgd", 3, 3, "unclipped-largest"),
    ("pgd-margin", 3, 4, "largest"),
    ("cw", 3, 4, "largest"),
    ("cw", 3, 2, "unclipped"),
    ("cw", 3, 3, "largest-stopped"),
    ("cw-margin", 3, 4, ""),
    ("cw-margin", 3, 4, "largest"),
]


def name_of(kind: str, steps: int, runs: int, form: str) -> str:
    return f"{kind}-{steps}-{runs}-{form}" if form else f"{kind}-{steps}-{runs}"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: name_of(*form))
def test_a_form_is_the_attack_image_by_image(form: tuple[str, int, int, str], norm: str) -> None:
    model, x, y = labelled()
    expected = by_hand(model, x, y, norm, *form)
    options = {"norm": norm, "alpha": ALPHA[norm], "seed": SEED}
    found = attack(model, x, y, name_of(*form), eps=EPS[norm], **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    right = model(expected).argmax(1) == y
    assert 0 < right.sum() < COUNT
    scores = evaluate(
        model, zip(x.split(7), y.split(7), strict=True), [name_of(*form)], eps=EPS[norm], **options
    )
    assert scores.verdicts[name_of(*form)].right.tolist() == right.tolist()
    if form[3]:
        plain = attack(model, x, y, name_of(*form[:3], ""), eps=EPS[norm], **options)
        assert not torch.allclose(plain, found)
