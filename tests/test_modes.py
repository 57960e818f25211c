"""Compiled steps compute what eager ones do, for every recipe, in float64."""

import pytest
import torch
from every_recipe import call, step_of
from tiny import assert_same, tiny_batch, twin
from tiny_staged import staged_model, staged_step

from fastadv.recipes import METHODS

# One recipe for every part that these need not share with another in the list; the others in the
# slow tier. Objectives, targets and regularizers are compiled in their own tests.
QUICK = ("fgsm-n", "n-fgsm", "free", "atta-1", "pgd-flipped", "trades-awp", "rwp", "rat-lr")
QUICK += ("at-fix-param-k", "fgsm-plus", "apart", "swa")


def tiered(name: str) -> object:
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("method", [tiered(name) for name in METHODS])
def test_compiled_equals_eager(method: str) -> None:
    eager = step_of(method, staged_model())
    compiled = step_of(method, twin(eager.model), mode="compiled")
    for update in range(4):
        first, second = call(eager, update), call(compiled, update)
        torch.testing.assert_close(first["loss"], second["loss"])
        assert torch.isfinite(first["loss"])
    assert_same(eager.model, compiled.model, tolerance=1e-9)
    for name, tensor in eager.state.items():
        torch.testing.assert_close(tensor, compiled.state[name], msg=lambda m, n=name: f"{n}: {m}")
    averages = [step.plan.averaging for step in (eager, compiled) if step.plan.averaging]
    assert all(part.average() is not None for part in averages)


def test_a_short_last_batch_compiles_too() -> None:
    models = [staged_model(), staged_model()]
    steps = [
        staged_step(model, "apart", pad=0, mode=mode)
        for model, mode in zip(models, ("eager", "compiled"), strict=True)
    ]
    for count in (6, 4, 6, 4):
        x, y, _, _ = tiny_batch(count, seed=count)
        for step in steps:
            step(x, y, torch.arange(count))
    assert_same(*models, tolerance=1e-9)
    torch.testing.assert_close(steps[0].state["omega"], steps[1].state["omega"])


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_the_model_is_left_as_it_was_found(mode: str) -> None:
    model = staged_model()
    model.layer2.eval()
    model.conv1.weight.requires_grad_(False)
    flags = [module.training for module in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    step = step_of("awp", model, mode)
    for update in range(2):
        call(step, update)
    assert flags == [module.training for module in model.modules()]
    assert learning == [parameter.requires_grad for parameter in model.parameters()]
