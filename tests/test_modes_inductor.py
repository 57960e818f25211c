"""The code that Inductor generates for every shape of graph equals the eager step, in float64.

The other tests compile without code generation. Eight recipes and combinations hold every shape a
recipe can have; what a new part adds to the list belongs into ``CASES``. Where a double backward
multiplies a gradient by a thousand, training this small network amplifies rounding a millionfold
in three updates, in eager mode too: its weight is smaller here.
"""

from typing import Any

import pytest
import torch
from tiny import tiny_batch, tiny_model, tiny_step

from fastadv.algorithms.resolution import resolve
from fastadv.training.training_step import Step

# Attack step on CE; outer pass with one forward pass and one more input gradient.
CASES: dict[str, dict[str, Any]] = {
    # attack on KL + the target's term, natural logits, outer pass with two forward passes,
    # gradient of the weights, a memory of predictions
    "trades-te": {"weights": "rwp"},
    # gradients of blocks, noise in them, gradients of step sizes and of x', a stored start
    "apart": {},
    # attack steps that count, samples weighed by the count
    "gairat": {},
    # one pass for attack and loss, the largest changes of the logits
    "fgsm-n-advlc": {},
    # double backward
    "pgd-igr": {"reg_weight": 10.0},
    # the outer pass's gradient is the attack's
    "free": {},
    # teachers, two views, the worse of two attacks, a weakened perturbation
    "kd-swa": {"regularizer": "consistency", "restarts": 2, "flip_signs": 0.25},
    # a step without projection, the weights' gradient from samples of small loss
    "n-fgsm": {"weights": "rwp", "c_min": 1.5},
}
SHORT = {"steps": 2, "replays": 2, "weight_steps": 2, "te_start": 0, "gairat_start": 0}
SHORT |= {"warmup_epochs": 0}


def trained(method: str, mode: str) -> tuple[Step, list[torch.Tensor]]:
    """Four updates of the case called ``method``, and their losses."""
    changes = CASES[method]
    known = resolve(method, changes).options
    options = {name: value for name, value in SHORT.items() if name in known} | changes
    if "teachers" in known:
        options["teachers"] = [tiny_model(seed).eval() for seed in (7, 8)]
    step = tiny_step(
        tiny_model(), method, mode=mode, backend="inductor", total_steps=4, steps_per_epoch=2,
        **options,
    )  # fmt: skip
    losses = []
    for update in range(4):
        x, y, index, _ = tiny_batch(6, seed=update)
        second = tiny_batch(6, seed=50 + update)[0] if "second_view" in step.plan.needs else None
        losses.append(step(x, y, index, second=second)["loss"])
    return step, losses


@pytest.mark.slow
@pytest.mark.parametrize("method", CASES)
def test_inductor_equals_eager(method: str) -> None:
    (eager, losses), (compiled, others) = trained(method, "eager"), trained(method, "compiled")
    tolerance = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(losses, others, **tolerance)
    for own, other in (
        (eager.model.state_dict(), compiled.model.state_dict()),
        (eager.state, compiled.state),
    ):
        torch.testing.assert_close(dict(own), dict(other), **tolerance)
