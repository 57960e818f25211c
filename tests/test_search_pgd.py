"""PGD and CW as searches over a whole set against the same attacks on one batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_attacks import images, small_net
from torch import Tensor, nn

from fastadv.engine.compiled import Runner
from fastadv.engine.model.network import Network
from fastadv.errors import UserError
from fastadv.evaluation.accuracy import evaluate
from fastadv.evaluation.attacks import attack
from fastadv.evaluation.search import cascade, losses
from fastadv.evaluation.search.cascade import Stage
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.pgd import Pgd
from fastadv.evaluation.search.rows import joined
from fastadv.evaluation.search.search import Images
from fastadv.threat import Threat

NAMES = [
    "pgd-5",
    "pgd-4-3",
    "pgd-kl-4-2",
    "pgd-dlr-5",
    "pgd-margin-4-2",
    "pgd-logit-scaled-5",
    "pgd-probability-margin-5",
    "cw-5-2",
    "cw-margin-5-3",
]


def labelled(count: int = 31) -> tuple[Tensor, Tensor]:
    """Images of which every fourth is wrong without an attack."""
    x, _ = images(count)
    y = small_net()(x).argmax(1)
    y[::4] = (y[::4] + 1) % 5
    return x, y


def batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(size), y.split(size), strict=True)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", NAMES)
def test_every_verdict_is_that_of_the_attack_on_one_batch(name: str, norm: str) -> None:
    model, (x, y) = small_net(), labelled()
    eps = 0.06 if norm == "linf" else 0.5
    x_adv = attack(model, x, y, name, eps=eps, norm=norm, seed=2)
    right = model(x_adv).argmax(1) == y
    assert 0 < right.sum() < len(x)
    for size in (31, 8, 1):
        scores = evaluate(model, batches(x, y, size), [name], eps=eps, norm=norm, seed=2)
        assert scores.verdicts[name].right.tolist() == right.tolist()
    if name in ("pgd-5", "pgd-dlr-5"):  # one run: the margin is that of its last point
        logits = model(x_adv)
        margin = -losses.margin(logits, y)
        found = torch.from_numpy(scores.verdicts[name].margin).double()
        smallest = torch.minimum(margin, -losses.margin(model(x), y)).detach()
        wrong = torch.arange(len(x)) % 4 == 0  # of these the last point alone
        expected = torch.where(wrong, margin.detach(), smallest)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class WrongInside(nn.Module):
    """Class 1 at grey images, class 0 around them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        first = x.flatten(1)[:, :1]
        logits = torch.cat([self.one.expand(len(x), 1), first], 1)
        return torch.where((first - 0.5).abs() < 1e-9, -logits, logits)


def test_images_that_are_wrong_without_an_attack_are_attacked_too() -> None:
    """PGD may correct one, and the papers count it as right; a cascade does not look at it."""
    grey = torch.full((4, 2, 6, 6), 0.5, dtype=torch.float64)
    names = ["clean", "pgd-3", "pgd-3+apgd-ce-3"]
    scores = evaluate(WrongInside(), [(grey, torch.zeros(4, dtype=torch.int64))], names, eps=0.1)
    assert scores == {"clean": 0.0, "pgd-3": 1.0, "pgd-3+apgd-ce-3": 0.0}


def test_labels_that_are_no_classes_are_attacked_batch_by_batch() -> None:
    model, (x, y) = small_net(), labelled()
    soft = nn.functional.one_hot(y, 5).double()
    expected = evaluate(model, [(x, y)], ["pgd-4-3"], eps=0.06)
    found = evaluate(model, [(x, soft)], ["pgd-4-3"], eps=0.06)
    assert found == expected
    own = found.verdicts["pgd-4-3"]
    assert own.right.tolist() == expected.verdicts["pgd-4-3"].right.tolist()
    assert own.fooled()["clean"] == 0
    with pytest.raises(UserError, match="needs one class for each image"):
        evaluate(model, [(x, soft)], ["pgd-dlr-4"], eps=0.06)


def test_a_restart_searches_only_what_is_left_in_full_batches() -> None:
    model, (x, y) = small_net(), labelled(64)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    evaluate(model, batches(x, y, 16), ["pgd-5-4"], eps=0.06)
    searched = sizes[-20:]
    assert sum(size == 16 for size in sizes) > len(sizes) / 2
    assert min(searched) < 16  # at the end there are not enough


@pytest.mark.parametrize("name", list(losses.OBJECTIVES))
def test_the_objectives_are_their_formulas(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    y = torch.randint(6, (50,), generator=generator)
    for row, label, found in zip(
        logits, y.tolist(), losses.OBJECTIVES[name](logits, y), strict=True
    ):
        values = sorted(row.tolist(), reverse=True)
        z, others = row[label], torch.cat([row[:label], row[label + 1 :]])
        p = row.exp() / row.exp().sum()
        expected = {
            "ce": -p[label].log(),
            "margin": others.max() - z,
            "dlr": -(z - others.max()) / (values[0] - values[2]),
            "logit-scaled": -(row / (values[0] - values[1])).log_softmax(0)[label],
            "probability-margin": torch.cat([p[:label], p[label + 1 :]]).max() - p[label],
        }[name]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("targeted", [False, True])
def test_the_hinge_is_its_formula(targeted: bool) -> None:
    logits = torch.tensor([[30.0, 2, -1], [-3, -5, -4], [1, 2, 30]], dtype=torch.float64)
    y = torch.tensor([0, 0, 0])
    # z_y - max(other, 0): 28, -3, -29
    expected = [0, -13, -39] if targeted else [-38, -7, 0]
    found = losses.hinge(logits, y, targeted=targeted)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_objectives_that_cannot_be_followed_are_refused_in_one_sentence() -> None:
    model, (x, y) = small_net(classes=2), images(classes=2)
    for call in (
        lambda: attack(model, x, y, "pgd-dlr-2"),
        lambda: evaluate(model, [(x, y)], ["pgd-dlr-2"]),
    ):
        with pytest.raises(UserError, match="at least 3 classes and the model has 2"):
            call()
    with pytest.raises(UserError, match="'dlr' compares classes and follows no criterion"):
        attack(model, x, y, "pgd-2", objective="dlr", criterion=nn.functional.cross_entropy)


class Coarse(nn.Module):
    """A network whose logits are those of ``net`` with an error, as in a low precision."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits + 0.3 * (40 * logits.detach()).sin()


def test_the_last_point_is_judged_by_the_network_itself() -> None:
    """Where the search sees another class than the network, the network's counts."""
    model, (x, y) = small_net(), labelled(64)
    coarse, threat, index = Coarse(model), Threat("linf", 0.06), torch.arange(64)
    networks = [Network(each, x.device, Runner()) for each in (model, coarse)]
    search = Pgd(threat, 1, 1, 5)
    images = Images(x, y, index, model(x).detach())
    rows = cascade.entering(images, index, targeted=False, spares=False)
    with Passes(networks[0], networks[1]) as passes:
        found = joined(cascade.run([Stage(search)], iter([rows]), passes, 64))
    order = found["place"].argsort()
    point, fooled = found["found"][order], found["fooled"][order]
    wrong = model(point).argmax(1) != y
    assert torch.equal(fooled, wrong)
    assert (coarse(point).argmax(1) != y).ne(wrong).any()


def test_a_search_type_adds_no_other_attack_to_pgd() -> None:
    model, (x, y) = small_net(torch.float32), labelled()
    x = x.float()
    found = evaluate(model, [(x, y)], ["pgd-5"], eps=0.06, search_dtype="bf16")
    assert found.verdicts["pgd-5"].stages == ("clean", "pgd-5")
