"""Weakened perturbations of any adversary: shrunk, or some of their signs flipped."""

import pytest
import torch
from tiny import EPS, assert_same, climb, descend, sgd, tiny_batch, tiny_model, tiny_step, twin
from tiny_staged import recorded, staged_step
from torch import Tensor, nn
from torch.nn import functional

from fastadv.errors import UserError
from fastadv.training.training_step import Step


def trained_on(step: Step, *batch: Tensor, **more: Tensor) -> Tensor:
    """The images that the outer pass of one call sees."""
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0].detach())

    handle = step.model.register_forward_pre_hook(note)
    step(*batch, **more)
    handle.remove()
    return seen[-1]


def test_shrunk_pgd_is_the_formula() -> None:
    x, y, index, start = tiny_batch()
    model = tiny_model()
    by_hand = twin(model)
    tiny_step(model, "pgd", steps=2, shrink=0.3)(x, y, index, start=start)
    optimizer = sgd(by_hand)
    x_adv = climb(by_hand, x, start, lambda z: functional.cross_entropy(z, y), EPS / 4, 2, "train")
    descend(optimizer, functional.cross_entropy(by_hand(x + 0.7 * (x_adv - x)), y))
    assert_same(model, by_hand)


def test_all_signs_flipped_is_the_mirrored_perturbation() -> None:
    x, y, index, start = tiny_batch()
    step = tiny_step(tiny_model(), "pgd", steps=2, flip_signs=1.0)
    made = recorded(step)
    seen = trained_on(step, x, y, index, start=start)
    torch.testing.assert_close(seen, (2 * x - made[0].x_adv).clamp(0, 1))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_flipped_elements_are_a_random_share(share: float) -> None:
    x, y, index, _ = tiny_batch(count=20)
    x = 0.2 + 0.6 * x
    step = tiny_step(tiny_model(), "fgsm", flip_signs=share, optimizer=sgd(tiny_model()))
    made = recorded(step)
    masks = []
    for update in range(2):
        seen = trained_on(step, x, y, index)
        delta, kept = made[update].x_adv - x, seen - x
        torch.testing.assert_close(kept.abs(), delta.abs())
        masks.append(kept.sign() != delta.sign())
    found = float(masks[0].double().mean())
    assert abs(found - share) < 0.04  # 2160 elements
    assert not torch.equal(*masks)  # drawn anew for each update


def test_weakening_by_zero_changes_nothing() -> None:
    x, y, index, start = tiny_batch()
    models = [tiny_model(), tiny_model()]
    tiny_step(models[0], "pgd", steps=2)(x, y, index, start=start)
    tiny_step(models[1], "pgd", steps=2, shrink=0.0, flip_signs=0.0)(x, y, index, start=start)
    assert_same(*models, tolerance=0)


def test_shrinking_by_one_is_training_on_the_centre() -> None:
    x, y, index, start = tiny_batch()
    step = tiny_step(tiny_model(), "fgsm-n", shrink=1.0)
    torch.testing.assert_close(trained_on(step, x, y, index, start=start), (x + start).clamp(0, 1))


@pytest.mark.parametrize("method", ["atta-1", "apart", "free", "n-fgsm"])
def test_every_adversary_can_be_weakened(method: str) -> None:
    """The outer pass sees the shrunk perturbation; what is stored is the whole one."""
    x, y, index, start = tiny_batch(count=6)
    index = torch.arange(6)
    weak = tiny_step(tiny_model(), method, shrink=0.5, total_steps=4, steps_per_epoch=2)
    made = recorded(weak)
    seen = trained_on(weak, x, y, index, start=start)
    torch.testing.assert_close(seen, x + 0.5 * (made[-1].x_adv - x))
    if method == "atta-1":
        stored = weak.state["perturbations"][index][:, :, 4:-4, 4:-4]
        torch.testing.assert_close(stored, made[0].x_adv - x)


def test_awp_maximises_the_loss_of_the_weakened_images() -> None:
    x, y, index, start = tiny_batch()
    step = staged_step(tiny_model(), "awp", steps=2, shrink=1.0, optimizer=sgd(tiny_model()))
    step(x, y, index % 12, start=start)
    clean = staged_step(tiny_model(), "awp", adversary="none", optimizer=sgd(tiny_model()))
    clean(x, y, index % 12)
    moved = [one.plan.weights.moved_by for one in (step, clean)]
    for first, second in zip(*moved, strict=True):
        torch.testing.assert_close(first, second)


def test_meaningless_strengths_are_refused() -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        tiny_step(tiny_model(), "pgd", shrink=1.5)
    with pytest.raises(UserError, match="there is none"):
        tiny_step(tiny_model(), "standard", flip_signs=0.5)
