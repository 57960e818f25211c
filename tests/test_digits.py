"""Training on real images: the accuracies that the first commands must reach."""

from __future__ import annotations

import pytest

from fastadv.run.console import Console
from fastadv.run.request import RunRequest
from fastadv.run.train import _run, train

EPS = 0.2


def summary_of(tmp_path, **settings) -> dict:
    return train(RunRequest(out=str(tmp_path / "run"), eval_every=1000, **settings), Console())


@pytest.mark.slow
def test_apart(tmp_path):
    last = summary_of(tmp_path, method="apart", amp=True)["last"]
    assert last["clean"] >= 0.94
    assert last["pgd-20"] >= 0.60


@pytest.mark.long
def test_pgd_7(tmp_path):
    last = summary_of(tmp_path, method="pgd", amp=True, options={"steps": 7})["last"]
    assert last["pgd-20"] >= 0.74


@pytest.mark.slow
def test_standard_training_is_not_robust(tmp_path):
    """The evaluation really attacks."""
    last = summary_of(tmp_path, method="standard", epochs=8)["last"]
    assert last["clean"] >= 0.97
    assert last["pgd-20"] <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "robust"), [(5, 0.2), (16, 0.5), (48, 0.65)])
def test_learned_steps_without_a_preset(epochs, robust, tmp_path, monkeypatch):
    """About 100, 330 and 1,000 updates: the rule for the rate makes an attack of each."""
    sessions = []

    def run(session, *others):
        sessions.append(session)
        return _run(session, *others)

    monkeypatch.setattr("fastadv.run.train._run", run)
    last = summary_of(tmp_path, method="apart", epochs=epochs, width=4)["last"]
    alpha = float(sessions[0].step.state["step_sizes"][0])
    assert EPS / 10 < alpha < 2 * EPS
    assert last["pgd-20"] >= robust


def test_a_learned_step_that_stays_small_is_reported(tmp_path, capsys):
    """At the paper's CIFAR rate the learned step never grows on so short a run."""
    rates = {"step_size_lr": 5e-8, "step_size_decay": 400.0}
    summary_of(tmp_path, method="apart", width=2, epochs=1, limit=256, options=rates)
    assert "below a tenth of eps" in capsys.readouterr().out.replace("\n", " ")
