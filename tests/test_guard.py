"""The guard against catastrophic overfitting: what it notices, and what the run then does."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from two_processes import in_two_processes

from fastadv.algorithms.adversaries.pgd import PGD
from fastadv.algorithms.parts import PARTS
from fastadv.errors import Interrupted, TrainingError, UserError
from fastadv.run.epoch_loop import EpochLoop
from fastadv.run.guard import MOST_BACKS, Guard, Seen, _size
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint
from fastadv.storage.trust import trusting

SETTINGS: dict[str, Any] = {
    "method": "fgsm",
    "model": "small_net:SmallNet",
    "epochs": 3,
    "batch_size": 32,
    "limit": 300,
    "lr": 0.05,
    "mode": "eager",
    "select_attack": "pgd-1",
    "test_attacks": "clean",
    "test_limit": 20,
    "eval_every": 2,
}
COLLAPSE = 13  # the update after which the pretended accuracy is low


@pytest.fixture
def collapsing(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A network that overfits after update ``COLLAPSE`` until the step is halved; the updates and
    the number of times gone back at which it was asked for."""
    asked: list[tuple[int, int]] = []

    def accuracy(self: Guard) -> float:
        calls, backs = self.session.step.calls, self.seen.backs
        asked.append((calls, backs))
        return 0.1 if calls > COLLAPSE and not backs else 0.6

    monkeypatch.setattr(Guard, "_accuracy", accuracy)
    monkeypatch.setattr(Guard, "_trained", lambda self: 0.8)
    monkeypatch.setattr("fastadv.run.guard._size", lambda plan, images: (4, 64, 0.03))
    return asked


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def judged(*found: tuple[float, float]) -> list[bool]:
    """What ``look`` says of checks with these robust and training accuracies."""
    guard = Guard.__new__(Guard)
    guard.seen = Seen()
    told = []
    for robust, trained in found:
        guard._accuracy = lambda robust=robust: robust  # type: ignore[method-assign,misc]
        guard._trained = lambda trained=trained: trained  # type: ignore[method-assign,misc]
        told.append(guard.look())
    return told


def test_the_rule() -> None:
    collapse = judged((0.2, 0.3), (0.5, 0.6), (0.45, 0.6), (0.1, 0.7), (0.0, 0.9), (0.05, 0.9))
    assert collapse == [False, False, False, True, False, False]  # said once
    assert judged((0.5, 0.6), (0.1, 0.4)) == [False, False]  # it unlearns both
    assert judged((0.5, 0.6), (0.31, 0.7)) == [False, False]  # 19 points
    assert judged((0.9, 0.9), (0.6, 0.9)) == [False, False]  # 30 points, but most is left
    assert judged((0.2, 0.6), (0.0, 0.7)) == [False, True]
    again = judged((0.5, 0.6), (0.1, 0.7), (0.25, 0.7), (0.1, 0.7), (0.45, 0.7), (0.1, 0.7))
    assert again == [False, True, False, False, False, True]  # said anew after it had recovered


def test_it_costs_three_percent_at_most_of_usual_sets() -> None:
    for method in ("fast", "fgsm", "free", "pgd", "apart", "n-fgsm"):
        plan = resolve_run(RunRequest(method=method, data="cifar10")).plan
        checks, count, share = _size(plan, 49_000)
        assert share <= 0.03
        assert count >= 64
        assert checks >= 2
        assert _size(plan, 1_200_000)[:2] == (4, 128)
    assert _size(plan, 1_000)[:2] == (1, 64)


def test_tell(tmp_path: Path, collapsing: object, capsys: pytest.CaptureFixture[str]) -> None:
    train(RunRequest(**SETTINGS, guard_overfitting="tell", out=str(tmp_path / "run")))
    said = " ".join(capsys.readouterr().out.split())
    assert "fell from 60 % to 10 %" in said
    assert said.count("catastrophic overfitting after step 14") == 1
    found = lines(tmp_path / "run")
    assert [line.get("overfitting", False) for line in found] == [False, True, False]
    assert [line["guard_pgd-10_percent"] for line in found] == [60.0, 10.0, 10.0]


def test_stop(tmp_path: Path, collapsing: object) -> None:
    out = tmp_path / "run"
    asked = RunRequest(**SETTINGS | {"eval_every": 1}, guard_overfitting="stop", out=str(out))
    with pytest.raises(TrainingError, match=r"overfitting after step 14.*best\.pt holds the best"):
        train(asked)
    assert (out / "best.pt").exists()
    assert checkpoint.load(out / "last.pt")["progress"]["epoch"] == 1


def test_it_changes_no_bit_of_the_run(tmp_path: Path) -> None:
    """With the real attack: its noise is the evaluation's, and no generator moves."""
    train(RunRequest(**SETTINGS, out=str(tmp_path / "without")))
    train(RunRequest(**SETTINGS, guard_overfitting="tell", out=str(tmp_path / "with")))
    own, other = (checkpoint.load(tmp_path / name / "last.pt") for name in ("without", "with"))
    for name, value in own["model"].items():
        assert torch.equal(value, other["model"][name]), name
    assert torch.equal(own["processes"][0]["rng"], other["processes"][0]["rng"])


def test_back_halves_the_step_from_the_last_sound_check(
    tmp_path: Path, collapsing: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[float] = []
    sizes = Guard.step_sizes

    def noted(self: Guard, x: torch.Tensor) -> torch.Tensor | None:
        found = sizes(self, x)
        steps.append(0.0 if found is None else float(found[0]))
        return found

    monkeypatch.setattr(Guard, "step_sizes", noted)
    out = tmp_path / "run"
    train(RunRequest(**SETTINGS, guard_overfitting="back", out=str(out)))
    # 9 batches an epoch, looked at after 3, 5, 7 and 9 of them.
    calls = [at for at, _ in collapsing]
    assert calls[:7] == [3, 5, 7, 9, 12, 14, 14]  # noticed at 14, taken up again after 12
    assert steps[:14] == [0.0] * 14
    assert steps[14:] == pytest.approx([0.2 / 2] * 15)
    assert len(lines(out)) == 3
    assert checkpoint.load(out / "last.pt")["guard"]["backs"] == 1
    assert not (out / "guarded.pt").exists()  # of no use once the run has finished


def test_back_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "_trained", lambda self: 0.8)
    monkeypatch.setattr(
        Guard, "_accuracy", lambda self: 0.1 if self.session.step.calls > COLLAPSE else 0.6
    )
    monkeypatch.setattr("fastadv.run.guard._size", lambda plan, images: (4, 64, 0.03))
    asked = RunRequest(**SETTINGS, guard_overfitting="back", out=str(tmp_path / "run"))
    with pytest.raises(TrainingError, match=f"after going back {MOST_BACKS} times"):
        train(asked)


def interrupted(out: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run in ``out``, stopped after ``at`` batches of all, and continued."""
    watch, seen = EpochLoop._watch, 0

    def stopping(self: EpochLoop, *given: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            self.stops.by = signal.SIGTERM.name
        watch(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(EpochLoop, "_watch", stopping)
        try:
            train(RunRequest(**SETTINGS, guard_overfitting="back", out=str(out)))
        except Interrupted:
            with trusting(True):
                resume(str(out))


@pytest.mark.parametrize(
    "at", [13, *(pytest.param(at, marks=pytest.mark.slow) for at in (4, 12, 14, 15, 20))]
)
def test_back_is_resumed_bit_for_bit(
    tmp_path: Path, at: int, collapsing: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(RunRequest(**SETTINGS, guard_overfitting="back", out=str(tmp_path / "whole")))
    interrupted(tmp_path / "parts", at, monkeypatch)
    own, other = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    for name, value in own["model"].items():
        assert torch.equal(value, other["model"][name]), name
    assert own["guard"] == other["guard"]
    for first, second in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert first["loss"] == second["loss"]
        assert first["guard_pgd-10_percent"] == second["guard_pgd-10_percent"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": "fgsm-plus"}, "the attack of fgsm-plus takes none of a chosen size"),
        ({"options": {"alpha": "0.2@0,0.05@1"}}, "--alpha 0.2@0,0.05@1 changes with the epoch"),
        ({"options": {"alpha": "0.1..0.2@2"}}, "--alpha 0.1..0.2@2 changes with the epoch"),
        ({"eps_warmup": 2.0}, "without --alpha it follows the eps of --eps-warmup"),
        ({"method": "random-eps"}, "random-eps has another one for each image unless --alpha"),
    ],
)
def test_back_needs_an_attack_with_one_step(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=f"{why}.*: take stop or tell"):
        train(RunRequest(**SETTINGS | changes, guard_overfitting="back"))


def test_every_adversary_says_its_chosen_step() -> None:
    said = []
    for name, part in PARTS["adversary"].items():
        if not part.takes_alpha:
            assert part().chosen_step is None, name
            continue
        said.append(name)
        assert part().chosen_step is None, name
        assert part(alpha=0.03).chosen_step == 0.03, name
    assert {"fgsm", "pgd", "free", "atta"} <= set(said)


@pytest.mark.parametrize("changes", [{"eps_warmup": 2.0}, {"method": "random-eps"}])
def test_a_chosen_step_is_halved_whatever_the_radius(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Guard] = []
    monkeypatch.setattr(EpochLoop, "epochs", lambda self: made.append(self._guard))
    monkeypatch.setattr(EpochLoop, "final_test", lambda self: {"n": 0, "last": {}, "best": None})
    monkeypatch.setattr("fastadv.run.train.Console.finish", lambda *given: None)
    monkeypatch.setattr("fastadv.run.events.Events.finish", lambda *given: None)
    asked = SETTINGS | changes | {"options": {"alpha": "0.04"}, "out": str(tmp_path / "run")}
    train(RunRequest(**asked, guard_overfitting="back"))
    (guard,) = made
    guard.seen.backs = 1
    assert guard.step_sizes(torch.zeros(2, 1, 8, 8)).tolist() == pytest.approx([0.02, 0.02])


@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_a_lost_state_is_replaced_by_the_last_checkpoint(
    damage: str, tmp_path: Path, collapsing: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    look = Guard.look

    def losing(self: Guard) -> bool:
        if self.session.step.calls == COLLAPSE + 1 and damage == "missing":
            (out / "guarded.pt").unlink(missing_ok=True)
        elif self.session.step.calls == COLLAPSE + 1:
            (out / "guarded.pt").write_bytes((out / "guarded.pt").read_bytes()[:1000])
        return look(self)

    monkeypatch.setattr(Guard, "look", losing)
    train(RunRequest(**SETTINGS, guard_overfitting="back", out=str(out)))
    assert len(lines(out)) == 3
    assert checkpoint.load(out / "last.pt")["guard"]["backs"] == 1


def test_without_any_state_it_stops_and_does_not_advise_what_it_has(
    tmp_path: Path, collapsing: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastadv.run.going_back.sound_state", lambda folder, config: None)
    with pytest.raises(TrainingError, match=r"\(--start uniform\)\.$"):
        train(RunRequest(**SETTINGS, guard_overfitting="back", out=str(tmp_path / "run")))
    with pytest.raises(TrainingError, match=r"or with --guard-overfitting back\.$"):
        train(RunRequest(**SETTINGS, guard_overfitting="stop", out=str(tmp_path / "other")))


class Telling(PGD):
    """PGD with a report. A class of its own: Python remembers that a class has the methods of a
    protocol, also where a patch added one for a while."""

    def report(self) -> dict[str, torch.Tensor]:
        return {"size": torch.tensor(3.0)}


def test_an_epoch_taken_up_after_its_last_batch_has_its_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back to the check after batch 9 of 9 of the first epoch."""
    monkeypatch.setattr(Guard, "_trained", lambda self: 0.8)
    monkeypatch.setattr("fastadv.run.guard._size", lambda plan, images: (1, 64, 0.03))
    monkeypatch.setattr(
        Guard,
        "_accuracy",
        lambda self: 0.1 if self.session.step.calls > 10 and not self.seen.backs else 0.6,
    )
    monkeypatch.setitem(PARTS["adversary"], "pgd", Telling)
    out = tmp_path / "run"
    train(RunRequest(**SETTINGS | {"method": "pgd"}, guard_overfitting="back", out=str(out)))
    assert [line["adversary/size"] for line in lines(out)] == [3.0, 3.0, 3.0]


def _in_a_process(rank: int, port: int, out: str) -> None:
    import os

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    patch = pytest.MonkeyPatch()
    accuracy: Callable[[Guard], float] = Guard._accuracy

    def pretended(self: Guard) -> float:
        found = accuracy(self)
        assert found is not None
        return 0.1 if self.session.step.calls > COLLAPSE and not self.seen.backs else 0.6

    patch.setattr(Guard, "_accuracy", pretended)
    patch.setattr("fastadv.run.guard._size", lambda plan, images: (4, 64, 0.03))
    patch.setattr(Guard, "_trained", lambda self: 0.8)
    train(RunRequest(**SETTINGS, guard_overfitting="back", device="cpu", out=out))


@pytest.mark.slow
def test_two_processes_go_back_together(tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    in_two_processes(_in_a_process, port, str(tmp_path / "run"))
    assert checkpoint.load(tmp_path / "run" / "last.pt")["guard"]["backs"] == 1
    assert len(lines(tmp_path / "run")) == 3


REAL = {
    "data": "digits",
    "width": 8,
    "mode": "eager",
    "select_attack": "pgd-1",
    "test_attacks": "clean",
    "test_limit": 10,
}


@pytest.mark.slow
def test_a_run_that_really_overfits_is_noticed_within_an_epoch(tmp_path: Path) -> None:
    """FGSM from the image itself at a large radius: the single step stops to be an attack."""
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match="catastrophic overfitting after step"):
        train(
            RunRequest(
                **REAL, method="fgsm", eps=0.3, epochs=15, guard_overfitting="stop", out=str(out)
            )
        )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fast", "trades"])
def test_sound_runs_raise_no_alarm(tmp_path: Path, method: str) -> None:
    """Other runs and seeds: ``bench/results/guard.jsonl``."""
    out = tmp_path / "run"
    train(RunRequest(**REAL, method=method, epochs=8, guard_overfitting="tell", out=str(out)))
    assert not any(line.get("overfitting") for line in lines(out))


@pytest.mark.parametrize(("checks", "often"), [(1, "once"), (4, "4 times")])
def test_the_cost_of_the_guard_is_said(checks: int, often: str) -> None:
    found = Guard.sentence(Mock(checks=checks, count=64, share=0.1234))
    assert found == (
        f"guard against overfitting: pgd-10 on 64 training images, {often} per epoch; that adds "
        "12.3 % to the passes of an epoch"
    )
