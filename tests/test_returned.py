"""Parts of somebody else that return something of another shape are told so, before it counts."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from tiny import assert_same, tiny_batch, tiny_model, tiny_step
from torch import Tensor

from fastadv.algorithms.contract import (
    Adversarial,
    Adversary,
    AttackLoss,
    Batch,
    Context,
    Fit,
    Objective,
    Outputs,
    Part,
    Regularizer,
    Start,
    Target,
)
from fastadv.algorithms.objectives.ce import CrossEntropy
from fastadv.errors import UserError


class PairsOfImages(Objective):
    """(B,) times (B,1): the mean of (B,B) is another loss, and nothing else would show."""

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        losses = fit(outputs.adversarial, y, outputs.context)
        return losses * losses[:, None]


class MeanOfFit(Target):
    def fit(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, y)


class ValuePerImage(Regularizer):
    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        return outputs.adversarial.pow(2).sum(1)


class Column(AttackLoss):
    def per_sample(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        return fit(logits, y, context)[:, None]


class NoMean(AttackLoss):
    def mean(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        return fit(logits, y, context)


class OneChannel(Start):
    def point(self, batch: Batch, restart: int = 0) -> Tensor:
        return batch.x[:, :1]


class OtherType(Start):
    def point(self, batch: Batch, restart: int = 0) -> Tensor:
        return batch.x.float()


class HalfTheBatch(Adversary):
    def make(self, batch: Batch, context: Context) -> Adversarial:
        return Adversarial(batch.x[::2], batch.x, context)


class OnlyImages(Adversary):
    def make(self, batch: Batch, context: Context) -> Adversarial:
        return batch.x  # type: ignore[return-value]


WRONG: list[tuple[str, type[Part], str]] = [
    (
        "objective",
        PairsOfImages,
        r"PairsOfImages\.per_sample must return one value per image.*8",
    ),
    ("target", MeanOfFit, r"MeanOfFit\.fit must return one value per image"),
    ("regularizer", ValuePerImage, r"ValuePerImage\.term must return one number for the batch"),
    ("attack_loss", Column, r"Column\.per_sample must return one value per image.*\(8, 1\)"),
    ("attack_loss", NoMean, r"NoMean\.mean must return one number for the batch"),
    ("start", OneChannel, r"OneChannel\.point must return images of shape \(8, 3, 6, 6\)"),
    ("start", OtherType, r"OtherType\.point must return images .*float64, not .*float32"),
    ("adversary", HalfTheBatch, r"HalfTheBatch\.make must return images of shape"),
    ("adversary", OnlyImages, r"OnlyImages\.make must return Adversarial\(x_adv"),
]


@pytest.mark.parametrize(("slot", "part", "said"), WRONG)
def test_another_shape_is_told_and_nothing_changes(slot: str, part: type[Part], said: str) -> None:
    model = tiny_model()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    step = tiny_step(model, "pgd", **{slot: part()})
    with pytest.raises(UserError, match=said):
        step(*tiny_batch()[:3])
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert step.calls == 0


def test_restarts_and_perturbed_weights_look_too() -> None:
    for options in ({"restarts": 2, "attack_loss": Column()}, {"objective": PairsOfImages()}):
        with pytest.raises(UserError, match="must return one value per image"):
            tiny_step(tiny_model(), "rwp", **options)(*tiny_batch()[:3])


class Asks(Objective):
    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logit_train"})

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        return fit(outputs.adversarial, y, outputs.context)


class Keeps(Objective):
    def prepare(self, setup: Any) -> None:
        super().prepare(setup)
        self.state["rows"] = torch.zeros(20)

    def sample_state(self) -> tuple[str, ...]:
        return ("rowz",)

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        return fit(outputs.adversarial, y, outputs.context)


@pytest.mark.parametrize(
    ("part", "said"),
    [(Asks, "need of Asks.requires: 'natural_logit_train'; did you mean"),
     (Keeps, "state of Keeps.sample_state: 'rowz'; did you mean 'rows'")],
)  # fmt: skip
def test_a_misspelt_need_or_state_names_the_nearest(part: type[Part], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny_step(tiny_model(), "pgd", objective=part())(*tiny_batch()[:3])


class KeepsOne(Regularizer):
    kept: ClassVar[tuple[str, ...]] = ("mean",)

    def prepare(self, setup: Any) -> None:
        super().prepare(setup)
        self.state = {name: torch.zeros(3) for name in self.kept}

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        return outputs.adversarial.mean()


class KeepsTwo(KeepsOne):
    kept = ("mean", "spread")


# Two versions of one part.
KeepsOne.__name__ = KeepsTwo.__name__ = "Keeps"


@pytest.mark.parametrize(("old", "new"), [(KeepsOne, KeepsTwo), (KeepsTwo, KeepsOne)])
def test_a_state_of_other_names_is_refused_and_the_run_stays(
    old: type[KeepsOne], new: type[KeepsOne]
) -> None:
    step = tiny_step(tiny_model(), "pgd", steps=1, regularizer=old())
    step(*tiny_batch()[:3])
    later = tiny_step(tiny_model(), "pgd", steps=1, regularizer=new())
    with pytest.raises(UserError, match=r"saved state of the regularizer .* have changed since"):
        later.load_state_dict(step.state_dict())
    assert (later.calls, int(later.internals.offset)) == (0, 0)


class Threefold(CrossEntropy):
    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        return 3 * super().per_sample(outputs, y, fit)


class ThreefoldToo(Objective):
    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        return 3 * fit(outputs.adversarial, y, outputs.context)


def test_a_class_that_derives_from_ours_is_not_taken_for_it() -> None:
    """RWP has a short cut for the plain cross entropy."""
    models = []
    for part in (Threefold(), ThreefoldToo()):
        models.append(tiny_model())
        tiny_step(models[-1], "rwp", objective=part, steps=1)(*tiny_batch()[:3])
    assert_same(*models)
