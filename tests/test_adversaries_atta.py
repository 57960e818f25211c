"""ATTA against its loop on whole adversarial images, as it was published."""

import pytest
import torch
from tiny import EPS, assert_same, descend, sgd, tiny_batch, tiny_model, twin
from tiny_staged import PAD, gradient_at, put_back, staged_step, view_of, window
from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.sample_state import SampleStore
from fastadv.data.view import View
from fastadv.errors import UserError
from fastadv.training.training_step import Step

COUNT, ROWS = 5, 12


def stored_images(step: Step, padded: Tensor) -> Tensor:
    """The published store: padded adversarial images."""
    return padded + step.state["perturbations"]


def epoch_of(padded: Tensor, seed: int) -> tuple[Tensor, Tensor, View]:
    """The samples of a batch, their crops, and the offsets of these."""
    view = view_of(COUNT, seed)
    index = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[:COUNT]
    x = torch.stack([window(padded[i], view, row) for row, i in enumerate(index)])
    return index, x, view


def test_three_steps_are_the_published_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    padded = torch.rand(ROWS, 3, 6 + 2 * PAD, 6 + 2 * PAD, generator=generator).double()
    labels = torch.randint(0, 4, (ROWS,), generator=generator)
    model = tiny_model()
    by_hand, optimizer = twin(model), None
    step = staged_step(model, "atta-1", optimizer=sgd(model), steps=2, alpha=0.04, pad=PAD)
    optimizer = sgd(by_hand)
    images = None
    for seed in range(3):
        index, x, view = epoch_of(padded, seed)
        if images is None:
            step._calls.prepare(x, labels[index])  # the store exists from the first batch on
            images = stored_images(step, padded).clone()
            spread = (images - padded).std()
            assert 0.0008 < spread < 0.0012
        step(x, labels[index], index, view=view)
        by_hand.eval()
        x_adv = torch.stack([window(images[i], view, row) for row, i in enumerate(index)])
        for _ in range(2):
            x_adv = x_adv + 0.04 * gradient_at(by_hand, x_adv, labels[index]).sign()
            x_adv = (x + (x_adv - x).clamp(-EPS, EPS)).clamp(0, 1)
        by_hand.train()
        descend(optimizer, functional.cross_entropy(by_hand(x_adv), labels[index]))
        for row, i in enumerate(index):
            put_back(images[i], view, row, x_adv[row])
        torch.testing.assert_close(stored_images(step, padded), images)
    assert_same(model, by_hand)


def test_an_attack_continues_from_the_stored_perturbation() -> None:
    x, y, _, _ = tiny_batch(COUNT)
    index = torch.arange(COUNT)
    model = tiny_model()
    # Another model's optimizer: the weights do not change, the attack continues.
    step = staged_step(model, "atta-1", optimizer=sgd(twin(model)), alpha=EPS / 4, pad=0)
    losses = [float(step(0.2 + 0.6 * x, y, index)["loss"]) for _ in range(5)]
    assert losses[3] > losses[0] + 1e-3
    reached = step.state["perturbations"][:COUNT].abs().max()
    torch.testing.assert_close(reached, torch.tensor(EPS).double(), rtol=0.05, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_stored_windows_have_the_layout_of_the_images(layout: torch.memory_format) -> None:
    values = torch.rand(ROWS, 3, 6 + 2 * PAD, 6 + 2 * PAD)
    index, x, view = epoch_of(values, 1)
    x = x.contiguous(memory_format=layout)
    found = SampleStore(values, PAD).gather(index, view, x)
    assert found.equal(x)
    assert found.stride() == x.stride()


def test_stored_perturbations_are_reset_every_few_epochs() -> None:
    x, y, _, _ = tiny_batch(COUNT)
    index = torch.arange(COUNT)
    step = staged_step(tiny_model(), "atta-1", reset_every=2, steps_per_epoch=1, pad=0)
    sizes, stores = [], []
    for _ in range(5):
        step(x, y, index)
        sizes.append(step.state["perturbations"][:COUNT].abs().mean())
        stores.append(step.state["perturbations"][COUNT:].clone())
    # Counted from 1, epochs 2 and 4 begin at 0.001 N again, with new noise; 3 and 5 do not.
    assert sizes[1] < 1.1 * sizes[0]
    assert sizes[2] > 1.3 * sizes[1]
    assert sizes[3] < 1.1 * sizes[0]
    assert sizes[4] > 1.3 * sizes[3]
    assert not torch.equal(stores[0], stores[1])
    assert torch.equal(stores[1], stores[2])
    assert not torch.equal(stores[2], stores[3])


def test_training_without_a_known_epoch_is_refused() -> None:
    x, y, _, _ = tiny_batch(COUNT)
    index = torch.arange(COUNT)
    with pytest.raises(UserError, match="follows the epochs"):
        staged_step(tiny_model(), "atta-1", steps_per_epoch=None)(x, y, index)
    staged_step(tiny_model(), "atta-1", steps_per_epoch=None, reset_every=0)(x, y, index)


def test_a_resumed_run_does_not_reset_the_stored_perturbations_again() -> None:
    x, y, _, _ = tiny_batch(COUNT)
    index = torch.arange(COUNT)
    options = {"reset_every": 2, "steps_per_epoch": 2, "pad": 0}
    step = staged_step(tiny_model(), "atta-1", **options)
    for _ in range(5):
        step(x, y, index)  # the last one is the first of epoch 2
    resumed = staged_step(twin(step.model), "atta-1", **options)
    resumed.load_state_dict(step.state_dict())
    resumed(x, y, index)
    step(x, y, index)
    assert torch.equal(step.state["perturbations"], resumed.state["perturbations"])


@pytest.mark.parametrize(
    ("steps", "published"), [(1, 0.015), (2, 0.015), (3, 0.01), (10, 0.007), (20, 0.007)]
)
def test_the_usual_step_is_the_published_one_in_units_of_eps(steps: int, published: float) -> None:
    x, y, _, _ = tiny_batch(COUNT)
    index = torch.arange(COUNT)
    step = staged_step(tiny_model(), "atta-1", eps=0.031, steps=steps)
    step(x, y, index)
    assert step.plan.adversary.usual_step(step.threat) == pytest.approx(published)
    step = staged_step(tiny_model(), "atta-1", eps=0.062, steps=steps)
    step(x, y, index)
    assert step.plan.adversary.usual_step(step.threat) == pytest.approx(2 * published)


def test_num_samples_is_required() -> None:
    x, y, _, _ = tiny_batch(COUNT)
    with pytest.raises(UserError, match="index="):
        staged_step(tiny_model(), "atta-1")(x, y)
    with pytest.raises(UserError, match="num_samples="):
        staged_step(tiny_model(), "atta-1", num_samples=None)(x, y, torch.arange(COUNT))
