"""The counted passes of every recipe against the forwards and backwards of a real network."""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from tiny import tiny_batch
from tiny_staged import PAD, SAMPLES, staged_model, staged_step, view_of
from torch import Tensor, nn
from torch.nn import functional

from fastadv.algorithms import cost
from fastadv.algorithms.contract import passes as kinds
from fastadv.algorithms.recipes.table import METHODS
from fastadv.algorithms.resolution import resolve
from fastadv.benchmark.specs import AT_WORK
from fastadv.cli import explain
from fastadv.engine.model.bn_momentum import DEFAULT_BN_UPDATES

BATCH = 6
SHORTER = {"steps": 3, "replays": 2, "weight_steps": 2, "pad": PAD}
SHORTER["layer_groups"] = ("1",)  # the layer that counts learns
LOGGED = ("adversarial", "adversarial", "natural")
Seen = Callable[[str], None]


class Mark(torch.autograd.Function):
    """The identity; ``seen`` hears of its backward, and of the derivative of that."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, seen: Seen, name: str) -> Tensor:
        ctx.seen, ctx.name = seen, name
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen(ctx.name)
        return Mark.apply(gradient, ctx.seen, f"derivative of {ctx.name}"), None, None


class MarkedConv(nn.Conv2d):
    """A convolution that counts, in batches of ``BATCH`` images and by BatchNorm's mode."""

    counted: Counter[tuple[str, str]]

    def forward(self, x: Tensor) -> Tensor:
        batches = Fraction(len(x), BATCH)
        mode = "train" if self.training else "eval"

        def seen(name: str) -> None:
            self.counted[name, mode] += batches

        seen("forward")
        weight = Mark.apply(self.weight, seen, "weights")
        made = functional.conv2d(x, weight, padding=1)
        return Mark.apply(made, seen, "backward")


def marked(model: nn.Module, counted: Counter[tuple[str, str]]) -> nn.Module:
    """``model``, a layer in its last stage counting into ``counted``."""
    layer = model.get_submodule("layer4.0.conv2")
    layer.__class__ = MarkedConv
    layer.counted = counted
    return model


# What the network is seen to do in one pass of each kind.
SEEN = {
    kinds.FORWARD: {"forward": 1},
    kinds.INPUT_GRADIENT: {"forward": 1, "backward": 1},
    kinds.TRAINING: {"forward": 1, "backward": 1, "weights": 1},
    kinds.SHARED: {"forward": 1, "backward": 2, "weights": 1},
    kinds.DOUBLE_BACKWARD: {"forward": 1, "backward": 2, "weights": 1, "derivative of backward": 1},
}


def counted_in_an_update(method: str, **options: Any) -> tuple[Counter, Counter]:
    """The passes observed in one call of a step, and those counted by its plan."""
    seen: Counter[tuple[str, str]] = Counter()
    known = resolve(method, options).options
    usual = {**SHORTER, **AT_WORK}
    if "teachers" in known:
        usual["teachers"] = [marked(staged_model(seed).eval(), seen) for seed in (7, 8)]
    if "helper" in known:
        usual["helper"] = marked(staged_model(7).eval(), seen)
    options = {name: value for name, value in usual.items() if name in known} | options
    step = staged_step(marked(staged_model(), seen), method, **options)
    x, y, _, _ = tiny_batch(BATCH, seed=3)
    more = {"second": tiny_batch(BATCH, seed=4)[0]} if "second_view" in step.plan.needs else {}
    index = torch.arange(SAMPLES)[:BATCH]
    step(x, y, index, view=view_of(BATCH), **more)
    # The first call also probes with two images: once; twice if BatchNorms' counters would be
    # detached, to see if a forward reads them; and for objectives published with repeated passes
    # as often as those passes, to compare them with one of each. A last one, with a gradient, sees
    # if a backward pass computes activations again.
    for name in ("forward", "backward"):
        seen[name, "train"] -= Fraction(2, BATCH)
    seen["forward", "eval"] -= 3 * Fraction(2, BATCH)
    repeated = step.plan.bn_updates
    if repeated != DEFAULT_BN_UPDATES:
        probed = len(DEFAULT_BN_UPDATES) + len(repeated)
        seen["forward", "train"] -= probed * Fraction(2, BATCH)
    # LIET's pass over one image per class, in every 20th update, is no pass over a batch.
    classes = Fraction(len(step.state.get("label_information", ())), BATCH)
    for name in ("forward", "backward"):
        seen[name, "eval"] -= classes
    expected: Counter[tuple[str, str]] = Counter()
    for (kind, bn), count in cost.passes(resolve(method, options)).counts.items():
        for name, times in SEEN[kind].items():
            expected[name, bn] += times * count * step.updates_per_batch
    return seen, expected


@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_makes_the_passes_that_are_counted(method: str) -> None:
    seen, expected = counted_in_an_update(method)
    assert seen == expected


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("pgd", {"restarts": 3}),
        ("pgd-logitalign", {"restarts": 2}),
        ("pgd-logitalign", {"objective": "trades", "attack_loss": "kl", "start": "uniform"}),
        ("fgsm-n-gradalign", {"objective": "trades"}),
        ("fgsm", {"regularizer": "advlc", "objective": "trades"}),
        ("fgsm-n-advlc", {"attack_bn": "eval"}),
        ("fgsm-n-advlc", {"attack_loss": "kl"}),
        ("fgsm-n-advlc", {"weights": "rwp"}),
        ("advlc", {"weights": "awp"}),
        ("pgd-kdsa", {"objective": "trades", "attack_loss": "kl", "start": "gaussian"}),
        ("pgd-kdsa", {"objective": "clean-mixed", "weights": "awp"}),
        ("te", {"attack_loss": "kl", "attack_bn": "train"}),
        ("apart", {"regularizer": "igr"}),
        ("free", {"regularizer": "advlc", "weights": "awp"}),
        ("pgd-consistency", {"weights": "awp", "objective": "trades"}),
        *((method, {"bn_passes": LOGGED}) for method in ("pgd", "fast", "awp", "rwp", "free")),
        ("pgd", {"bn_passes": LOGGED, "attack_bn": "eval"}),
        ("pgd", {"bn_passes": LOGGED, "regularizer": "advlc"}),
        ("fgsm", {"bn_passes": LOGGED[:2], "regularizer": "advlc"}),
        ("pgd", {"bn_passes": LOGGED, "shrink": 0.5}),
        ("pgd-consistency", {"bn_passes": LOGGED}),
    ],
)
def test_combinations_make_the_passes_that_are_counted(
    method: str, options: dict[str, Any]
) -> None:
    seen, expected = counted_in_an_update(method, **options)
    assert seen == expected


@pytest.mark.parametrize(
    ("method", "forwards", "units"),
    [
        ("standard", 1, 3),
        ("fgsm-n", 2, 5),
        ("pgd", 11, 23),
        ("trades", 13, 27),
        ("awp", 12, 26),
        ("rwp", 21, 53),
        ("trades-awp", 15, 33),
        ("atta-10", 11, 23),
        ("apart", 2, 5),
        ("fgsm-n-advlc", 2, 7),
        ("advlc", 12, 26),
        ("te", 12, 24),
        ("fgsm-n-kdsa", 4, 7),
        ("fgsm-n-logitalign", 4, 10),
        ("pgd-logitalign", 22, 46),
        ("fgsm-n-consistency", 4, 10),
        ("fgsm-n-igr", 2, 8),
        ("fgsm-n-cure", 4, 17),
        ("free", 1, 3),
    ],
)
def test_counts_of_the_published_table(method: str, forwards: int, units: int) -> None:
    # The papers' own counts, by hand: K = 10 steps of PGD, input gradient 2, training pass 3.
    found = cost.passes(resolve(method))
    assert (found.counts.total(), found.units) == (forwards, units)


def test_methods_prints_the_cost_of_a_step() -> None:
    assert explain.passes(resolve("rwp")) == (
        "10 input gradient(s), 1 training pass(es), 10 training pass(es) for the weights: "
        "53 forward passes' work at most"
    )
    assert explain.passes(resolve("trades")).startswith("1 forward(s), 10 input gradient(s), 2 tr")
    assert explain.passes(resolve("free")).startswith("8 updates, each 1 training")
