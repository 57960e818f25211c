"""Changes after which a compiled step compiles again, and changes after which it does not.

``test_modes.py`` counts for every recipe over epochs with a short last batch; here are the counter
itself, epochs told by hand, and the real training loop.
"""

from pathlib import Path

import pytest
import torch
from every_recipe import call
from tiny import tiny_batch
from tiny_run import Counting, run
from tiny_staged import staged_model, staged_step

from fastadv.run.console import Console
from fastadv.run.request import RunRequest
from fastadv.run.train import train


def test_a_third_batch_shape_is_counted() -> None:
    done = run("fgsm", "compiled", "eager")
    assert sum(done.compilations) == 4
    backend = done.step.internals.net.runner.backend
    for size in (6, 4, 5, 5):
        call(done.step, 20, size)
    assert backend.count == 6


def test_epochs_set_by_the_user_compile_only_parts_that_become_active() -> None:
    counting = Counting("eager")
    step = staged_step(
        staged_model(), "awp", mode="compiled", backend=counting, steps=1, warmup_epochs=1,
        steps_per_epoch=None,
    )  # fmt: skip
    counts = []
    for epoch in range(4):
        step.set_epoch(epoch)
        for group in step.optimizer.param_groups:
            group["lr"] *= 0.5
        for count in (6, 6, 4):
            x, y, _, _ = tiny_batch(count, seed=epoch)
            step(x, y)
        counts.append(counting.count)
    assert counts == [4, 6, 6, 6]  # attack and outer pass, then the direction of the weights


@pytest.mark.slow
@pytest.mark.parametrize(("method", "regions"), [("apart", 2), ("awp", 3)])
def test_training_for_longer_compiles_no_more(
    method: str, regions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop of ``fastadv train``: evaluation, averaging, checkpoints and schedules between."""
    counting = Counting("eager")
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiler(*a, **k | {"backend": counting}))
    options = {"averaging": "swa", "average_start": 1} | ({"steps": 1} if method == "awp" else {})
    counts = []
    for epochs in (1, 3):
        counting.count = 0
        config = RunRequest(
            method=method, mode="compiled", width=2, limit=150, batch_size=64, epochs=epochs,
            test_limit=32, eval_every=1, out=str(tmp_path / str(epochs)), options=options,
        )  # fmt: skip
        train(config, Console())
        counts.append(counting.count)
    assert counts == [2 * regions] * 2  # a full and a short batch
