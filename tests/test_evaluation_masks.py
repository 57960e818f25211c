"""An evaluation reports masked gradients and the number of images, and covers every class."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.data import eval_batches
from fastadv.evaluation.intervals import wilson
from fastadv.run.source import EvalBatches


class Around(nn.Module):
    """A network that classifies every image correctly, with a layer before and one after it."""

    def __init__(self, before: Callable[[Tensor], Tensor], behind: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.linear.weight.data = 10 * torch.eye(4)
        self.before, self.behind = before, behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.linear(self.before(x).flatten(1)))


def same(x: Tensor) -> Tensor:
    return x


def images(count: int = 40) -> tuple[Tensor, Tensor]:
    """Class k is bright at pixel k."""
    y = torch.arange(count) % 4
    x = torch.full((count, 1, 2, 2), 0.4)
    x.flatten(1)[torch.arange(count), y] = 0.6
    return x, y


def told(model: nn.Module, *attacks: str) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fastadv.evaluate(model, [images()], attacks, eps=0.02)
    return [str(warning.message) for warning in seen]


def test_an_unmasked_network_is_not_warned_about() -> None:
    attacks = ("clean", "fgsm", "fgsm-rwp", "pgd-3", "pgd-3-2", "cw-3", "cw-margin-3", "noise-0.1")
    assert told(Around(same, same), *attacks) == []


@pytest.mark.parametrize(
    "hides", [lambda x: (x * 255).round() / 255, lambda x: x.detach() + 0 * x], ids=["8 bit", "cut"]
)
def test_zero_gradients_are_counted(hides: Callable[[Tensor], Tensor]) -> None:
    (sentence,) = told(Around(hides, same), "fgsm")
    assert "fgsm: the gradient was exactly zero for 40 of 40 images (100 %)" in sentence


def test_half_of_the_gradients() -> None:
    def half(x: Tensor) -> Tensor:
        return torch.cat([x[:20], x[20:].detach()])

    (sentence,) = told(Around(half, same), "fgsm")
    assert "20 of 40 images (50 %)" in sentence


def test_a_saturated_softmax_is_counted() -> None:
    """The gradient underflows where the margin is above a hundred or so."""
    (sentence,) = told(Around(same, lambda z: 1e4 * z), "pgd-3")
    assert "pgd-3: the gradient was exactly zero for 40 of 40" in sentence
    (sentence,) = told(Around(same, lambda z: 20 * z), "pgd-3")
    assert "the loss was exactly zero for 40 of 40 images" in sentence


def test_a_cascade_is_not_said_to_mean_nothing() -> None:
    """The cross entropy has no gradient; the ratio of logits in the second search has one."""
    (sentence,) = told(Around(same, lambda z: 1e4 * z), "apgd-ce-2+apgd-dlr-2")
    assert "the gradient of a search was exactly zero for 40 of 40" in sentence
    assert "may be too high: check the network with fastadv evaluate --sanity" in sentence


def test_probabilities_and_noise_are_reported() -> None:
    soft = told(Around(same, lambda z: z.softmax(1)), "clean")
    assert any("returns probabilities" in sentence for sentence in soft)
    noisy = Around(lambda x: x + 0.01 * torch.randn_like(x), same)
    assert any("change from call to call" in sentence for sentence in told(noisy, "clean"))


def larger_in_a_batch_of_40(by: float) -> Around:
    return Around(same, lambda z: z * (1 + by) if len(z) == 40 else z)


@pytest.mark.parametrize(
    ("dtype", "by", "changes"),
    [
        (torch.float32, 2e-4, False),
        (torch.float32, 2**-7, True),
        (torch.float16, 2**-9, False),
        (torch.float16, 2**-7, True),
        (torch.bfloat16, 2**-7, False),
        (torch.bfloat16, 2**-4, True),
    ],
)
def test_outputs_change_by_more_than_roundings(
    dtype: torch.dtype, by: float, changes: bool
) -> None:
    """One rounding of bfloat16 is 2**-7, of float16 2**-10."""
    x, y = images()
    model = larger_in_a_batch_of_40(by).to(dtype)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fastadv.evaluate(model, [(x.to(dtype), y)], ("clean",))
        fastadv.attack(model, x.to(dtype), y, "apgd-ce-1", eps=0.02)
    assert ["change from call to call" in str(one.message) for one in seen] == 2 * [True] * changes


@pytest.mark.parametrize("count", [2, 7, 16])
def test_outputs_that_depend_on_the_other_images_of_a_batch_are_reported(count: int) -> None:
    mixed = Around(lambda x: x - 0.5 * x.mean(0), same)
    with pytest.warns(UserWarning, match="or with the other images of a batch"):
        fastadv.evaluate(mixed, [images(count)], ("clean",))


def test_outputs_of_a_sigmoid_are_reported() -> None:
    """Each probability is computed alone, so their sum is arbitrary."""
    (sentence,) = told(Around(same, torch.sigmoid), "clean")
    assert "returns probabilities" in sentence
    assert told(Around(same, lambda z: z.abs()), "clean") == []


def test_wilsons_interval() -> None:
    """Newcombe (1998), Table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right / n, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1.0, 20)[1] == 1.0


def test_scores_hold_their_number_of_images() -> None:
    scores = fastadv.evaluate(Around(same, same), [images()], ("clean",), eps=0.01)
    assert scores == {"clean": 1.0}
    assert scores.n == 40
    assert scores.interval("clean") == wilson(1.0, 40)


def test_a_limit_evaluates_every_class_in_proportion() -> None:
    labels = torch.arange(4).repeat_interleave(25)  # sorted by class, as a folder is read
    pictures = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)

    def batches(rows: Tensor, batch_size: int) -> object:
        return eval_batches(pictures[rows], labels[rows], batch_size)

    whole = EvalBatches(batches, labels, batch_size=7)
    assert len(whole) == 100
    for limit in (4, 10, 99):
        few = whole.limited(limit)
        shown, classes = zip(*few, strict=True)
        counts = torch.cat(classes).bincount(minlength=4)
        assert len(few) == int(counts.sum()) == limit
        assert counts.max() - counts.min() <= 1
        again = torch.cat([x for x, _ in whole.limited(limit)])
        assert torch.equal(torch.cat(shown), again)
    assert len(whole.limited(1000)) == 100
