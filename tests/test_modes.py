"""Eager, compiled and captured steps compute the same, for every recipe, in float64."""

import pytest
from every_recipe import call, step_of
from tiny_run import Run, assert_same_run, run
from tiny_staged import staged_model

from fastadv.algorithms.recipes.table import METHODS

# One recipe with a pass that the loss shares, one with stored perturbations, one with noise inside
# the blocks; the others in the slow tier. Objectives, targets, regularizers and perturbed weights
# are compiled in their own tests (``test_combinations``), averages and rates act outside of what is
# compiled.
QUICK = ("fgsm-n", "atta-1", "apart")


def tiered(name: str) -> object:
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("method", [tiered(name) for name in METHODS])
def test_all_modes_agree_after_20_updates(method: str) -> None:
    eager, compiled, captured = run(method), run(method, "compiled"), run(method, "captured")
    assert eager.step.healthy()
    assert_same_run(eager, compiled, tolerance=1e-9)
    assert_same_run(eager, captured, tolerance=1e-9)
    assert sum(eager.compilations) == 0
    assert_compiled_once(compiled)
    # Neither evaluation nor a loaded state makes a recording stale.
    assert captured.step.internals.passes.recorded == 2 * len(set(captured.active))


def assert_compiled_once(done: Run) -> None:
    """Nothing is compiled after the first epoch, or after the first with other active parts.

    There, each region once for the full batch and once for the short one.
    """
    regions = len(done.step.internals.net.runner._compiled)
    for epoch, (count, active) in enumerate(zip(done.compilations, done.active, strict=True)):
        if active in done.active[:epoch]:
            assert count == 0, f"epoch {epoch}"
        else:
            assert count <= 2 * regions, f"epoch {epoch}"
    assert done.compilations[0] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["apart", "trades-rwp", "te"])
def test_captured_steps_may_be_compiled(method: str) -> None:
    both = run(method, "captured compiled")
    assert_same_run(run(method), both, tolerance=1e-9)
    assert both.compilations[0] >= 2


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
