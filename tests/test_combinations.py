"""Parts of different slots together: one float64 step equals the composed formula.

The quick tier takes 24 of the 360 combinations, every part of every slot among them.
"""

import itertools
import random

import pytest
import torch
from composed import OPTIONS, Composed
from tiny import assert_same, tiny_batch, tiny_model, tiny_step

SLOTS = {
    "adversary": ("pgd", "fast", "fgsm-n", "apart", "atta"),
    "objective": ("ce", "trades"),
    "target": ("one-hot", "label-smoothing", "temporal-ensembling"),
    "regularizer": ("none", "advlc"),
    "weights": ("none", "awp", "rwp"),
    "averaging": ("none", "swa"),
}
GRID = [dict(zip(SLOTS, parts, strict=True)) for parts in itertools.product(*SLOTS.values())]
SAMPLE = random.Random(7).sample(GRID, 24)


def name(slots):
    return "-".join(slots.values())


def check(slots, mode="eager"):
    x, y, index, start = tiny_batch()
    model, other = tiny_model(), tiny_model()
    options = {
        key: value for part in slots.values() for key, value in OPTIONS.get(part, {}).items()
    }
    parts = {slot: part for slot, part in slots.items() if slot != "objective"}
    if slots["adversary"] == "atta":
        parts["start"] = "stored"
    method = "trades" if slots["objective"] == "trades" else "pgd"
    step = tiny_step(model, method, mode=mode, steps_per_epoch=1, total_steps=9, **parts, **options)
    step(x, y, index, start=start)
    composed = Composed(other, slots)
    composed.step(x, y, index, start)
    assert_same(model, other, 1e-9)
    if composed.ensembles:
        torch.testing.assert_close(step.state["predictions"], composed.predictions)
    if slots["adversary"] == "atta":
        torch.testing.assert_close(step.state["perturbations"][index], composed.kept)
    if slots["adversary"] == "apart":
        torch.testing.assert_close(step.state["omega"][index], composed.kept)
        torch.testing.assert_close(step.state["step_sizes"], composed.step_sizes)
    if composed.average is not None:
        with step.evaluation_weights():
            for parameter, mean in zip(model.parameters(), composed.average, strict=True):
                torch.testing.assert_close(parameter.detach(), mean)


def test_the_grid_is_whole_and_the_sample_has_every_part():
    assert len(GRID) == 360
    for slot, parts in SLOTS.items():
        assert {slots[slot] for slots in SAMPLE} == set(parts)


@pytest.mark.parametrize("slots", SAMPLE, ids=name)
def test_a_combination_is_the_composed_formula(slots):
    check(slots)


@pytest.mark.parametrize("slots", SAMPLE[:4], ids=name)
def test_a_combination_compiled(slots):
    check(slots, "compiled")


@pytest.mark.slow
@pytest.mark.parametrize("slots", GRID, ids=name)
def test_every_combination_is_the_composed_formula(slots):
    check(slots)
