"""The numbers of an epoch's line: those of a loop over what the steps returned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv.errors import Interrupted, UserError
from fastadv.run.console import Console
from fastadv.run.epoch_costs import EpochCosts
from fastadv.run.epoch_loop import EpochLoop
from fastadv.run.epoch_metrics import EpochMetrics
from fastadv.run.request import RunRequest
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint
from fastadv.training.training_step import Step

SMALL: dict[str, Any] = {
    "method": "fast", "width": 2, "epochs": 2, "limit": 100, "batch_size": 32, "test_limit": 16,
    "mode": "eager", "select_attack": "fgsm", "test_attacks": "clean", "eval_every": 10,
}  # fmt: skip
CPU = torch.device("cpu")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(out: Path, **settings: Any) -> list[dict[str, Any]]:
    train(RunRequest(**SMALL | settings, out=str(out)), Console())
    return lines(out)


def test_the_line_is_that_of_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch is smaller, so means over batches and over images differ."""
    seen: list[tuple[int, dict[str, float]]] = []
    step = Step.__call__

    def noting(self: Step, x: Tensor, *inputs: Any, **options: Any) -> dict[str, Tensor]:
        metrics = step(self, x, *inputs, **options)
        seen.append((len(x), {name: float(value) for name, value in metrics.items()}))
        return metrics

    monkeypatch.setattr(Step, "__call__", noting)
    found = trained(tmp_path / "run")
    each = len(seen) // 2
    for epoch, line in enumerate(found):
        own = seen[epoch * each : (epoch + 1) * each]
        assert len({images for images, _ in own}) == 2
        loss = right = norms = largest = 0.0
        for images, metrics in own:
            loss += metrics["loss"] / each
            right += metrics["accuracy"] * images
            norms += metrics["grad_norm"] / each
            largest = max(largest, metrics["grad_norm"])
        total = sum(images for images, _ in own)
        assert line["loss"] == pytest.approx(loss, rel=1e-12)
        found_percent = line["train_accuracy_percent"]
        assert found_percent == pytest.approx(100 * right / total, abs=1e-4)
        assert found_percent * total / 100 == pytest.approx(round(right), abs=1e-4)
        assert line["grad_norm"] == pytest.approx(norms, rel=1e-12)
        assert line["grad_norm_max"] == largest


def of(*rows: tuple[float, float, float], images: int = 10) -> dict[str, float]:
    metrics = EpochMetrics(5, CPU)
    for loss, accuracy, norm in rows:
        values = {"loss": loss, "accuracy": accuracy, "grad_norm": norm}
        metrics.add({name: torch.tensor(value) for name, value in values.items()}, images)
    return metrics.line()


def test_the_accuracy_counts_the_images_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has 3 images where this one has 1; a state holds both, and is not counted
    again after a resume with another number of processes."""

    def add(images: Tensor) -> None:
        images += 2

    metrics = EpochMetrics(5, CPU)
    for accuracy, images in ((1.0, 3), (0.0, 1)):
        metrics.add({"loss": torch.zeros(()), "accuracy": torch.tensor(accuracy)}, images)
    monkeypatch.setattr("fastadv.run.epoch_metrics.distributed.add_up", add)
    assert metrics.line()["train_accuracy_percent"] == pytest.approx(62.5)
    other = EpochMetrics(5, CPU)
    other.load_state(metrics.state())
    monkeypatch.undo()
    other.add({"loss": torch.zeros(()), "accuracy": torch.tensor(1.0)}, 2)
    assert other.line()["train_accuracy_percent"] == pytest.approx(70)


def test_norms_of_updates_that_a_loss_scale_skipped_are_left_out() -> None:
    found = of((1.0, 0.5, math.inf), (2.0, 0.5, 3.0), (3.0, 0.5, math.nan), (4.0, 0.5, 5.0))
    assert found == {
        "loss": 2.5,
        "train_accuracy_percent": 50.0,
        "grad_norm": 4.0,
        "grad_norm_max": 5.0,
    }
    assert of((1.0, 0.5, math.inf)) == {"loss": 1.0, "train_accuracy_percent": 50.0}


def test_labels_that_are_no_classes_have_no_accuracy() -> None:
    metrics = EpochMetrics(2, CPU)
    metrics.add({"loss": torch.tensor(1.0), "grad_norm": torch.tensor(2.0)}, 4)
    assert metrics.line() == {"loss": 1.0, "grad_norm": 2.0, "grad_norm_max": 2.0}


def test_a_wider_type_is_taken() -> None:
    metrics = EpochMetrics(1, CPU)
    wide = torch.tensor(0.5, dtype=torch.float64)
    metrics.add({"loss": wide, "accuracy": torch.tensor(1.0), "grad_norm": wide}, 4)
    assert metrics.line()["loss"] == 0.5


def test_a_step_costs_two_operations_and_reads_nothing() -> None:
    called: list[str] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(str(func))
            return func(*args, **kwargs or {})

    metrics = EpochMetrics(2, CPU)
    values = {name: torch.tensor(1.0) for name in ("loss", "accuracy", "grad_norm")}
    metrics.add(values, 4)
    with Noting():
        metrics.add(values, 4)
    assert len(called) <= 2, called
    assert not any("local_scalar" in name or "_to_copy" in name for name in called)


@pytest.mark.parametrize(
    "saved",
    [
        None,
        {},
        {"images": [4], "rows": torch.zeros(1, 3), "reports": {}},
        {"images": torch.tensor([4] * 6), "rows": torch.zeros(6, 3), "reports": {}},
        {"images": torch.tensor([4]), "rows": torch.zeros(2, 3), "reports": {}},
        {"images": torch.tensor([4]), "rows": torch.zeros(1, 3), "reports": 5},
    ],
)
def test_metrics_of_another_run_are_refused(saved: Any) -> None:
    with pytest.raises(UserError, match="restore the run's own"):
        EpochMetrics(5, CPU).load_state(saved)


# -- what the parts report ------------------------------------------------------------------------


def test_learned_step_sizes_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    found = trained(tmp_path / "run", method="apart")
    step = checkpoint.load(tmp_path / "run" / "last.pt")["step"]
    sizes = next(value for name, value in _leaves(step) if name == "step_sizes").tolist()
    told = [value for name, value in found[-1].items() if name.startswith("adversary/")]
    assert told == sizes
    assert len(sizes) == 2 + 8  # a preact_resnet18 has 8 blocks
    names = [name for name in found[-1] if name.startswith("adversary/")]
    blocks = [f"adversary/step_size_block_{number}" for number in range(1, 9)]
    assert names == ["adversary/step_size", "adversary/omega_rate", *blocks]
    assert found[0]["adversary/step_size"] != found[1]["adversary/step_size"]


def _leaves(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    found = []
    for name, value in tree.items():
        found += _leaves(value) if isinstance(value, dict) else [(name, value)]
    return found


def test_a_start_that_is_not_learned_has_no_rate(tmp_path: Path) -> None:
    found = trained(tmp_path / "run", method="apart", options={"learned_start": False})
    assert "adversary/omega_rate" not in found[-1]
    assert "adversary/step_size" in found[-1]


def test_a_rising_weight_is_reported_and_a_constant_one_is_not(tmp_path: Path) -> None:
    options = {"regularizer": "igr", "reg_weight": 0.5}
    rising = trained(tmp_path / "rising", options=options | {"reg_ramp": True})
    assert [line["regularizer/weight"] for line in rising] == [0.25, 0.5]
    constant = trained(tmp_path / "constant", options=options)
    assert all("regularizer/weight" not in line for line in constant)


def test_most_parts_report_nothing(tmp_path: Path) -> None:
    assert not any("/" in name for name in trained(tmp_path / "run")[0])


def test_a_weight_that_a_part_sets_by_itself_is_reported(tmp_path: Path) -> None:
    """That of ELLE-A, which is in the state of the checkpoint."""
    options = {"regularizer": "elle-a", "reg_sensitivity": 0.0}
    # Of weights that stay, so that the terms rise and fall.
    found = trained(tmp_path / "run", epochs=4, lr=0.0, options=options)
    step = checkpoint.load(tmp_path / "run" / "last.pt")["step"]
    weight = next(value for name, value in _leaves(step) if name == "elle_weight")
    assert found[-1]["regularizer/weight"] == float(weight) > 0
    assert found[0]["regularizer/weight"] == 0  # the first three terms are only collected


def test_a_run_stopped_after_the_last_batch_of_an_epoch_keeps_what_parts_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that continues trains no batch of that epoch, and its parts are not prepared yet."""

    def at_the_last_batch(self: EpochLoop) -> bool:
        self.stops.by = "the test"
        return self.progress.batch == len(self.session.data.loader)

    whole = trained(tmp_path / "whole", method="apart")
    with monkeypatch.context() as patched:
        patched.setattr(EpochLoop, "_asked_to_stop", at_the_last_batch)
        with pytest.raises(Interrupted):
            trained(tmp_path / "run", method="apart")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    resume(str(tmp_path / "run"), Console())
    reported = {name: value for name, value in whole[0].items() if "/" in name}
    assert "adversary/step_size" in reported
    assert reported == {name: lines(tmp_path / "run")[0].get(name) for name in reported}


# -- what an epoch costs --------------------------------------------------------------------------


def test_images_per_second_and_the_most_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [10.0], []
    monkeypatch.setattr("fastadv.run.epoch_costs.time.monotonic", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    gpu = torch.device("cuda", 1)
    costs = EpochCosts(gpu)
    costs.begin()
    for images in (64, 64, 22):
        costs.add(images)
    now[0] += 4
    costs.end()
    now[0] += 100  # the evaluation
    assert costs.line() == {"images_per_second": 37.5, "gpu_memory_peak_mib": 3.0}
    assert set(asked) == {gpu}
    costs = EpochCosts(CPU)  # of an epoch whose last batch was trained before a stop
    costs.begin()
    costs.end()
    assert costs.line() == {}
