"""A run is reproducible on request, otherwise fast; torch's switches are restored."""

import os

import pytest
import torch

from fastadv.engine.process.determinism import CUBLAS, reproducible
from fastadv.run.console import Console
from fastadv.run.request import RunRequest
from fastadv.run.train import train


def switches():
    deterministic = torch.are_deterministic_algorithms_enabled()
    return deterministic, torch.backends.cudnn.benchmark, os.environ.get(CUBLAS)


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(CUBLAS, raising=False)


@pytest.mark.parametrize("wanted", [True, False])
def test_switches_are_restored(wanted):
    before = switches()
    with reproducible(wanted):
        assert switches() == (wanted, not wanted, ":4096:8" if wanted else None)
    assert switches() == before


def test_the_users_workspace_setting_has_precedence(monkeypatch):
    monkeypatch.setenv(CUBLAS, ":16:8")
    with reproducible(True):
        assert os.environ[CUBLAS] == ":16:8"
    assert os.environ[CUBLAS] == ":16:8"


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_trains_and_evaluates_with_them(wanted, tmp_path, monkeypatch):
    seen = []
    forward = torch.nn.Conv2d.forward
    monkeypatch.setattr(
        torch.nn.Conv2d, "forward", lambda *a: (seen.append(switches()[:2]), forward(*a))[1]
    )
    out = str(tmp_path / "run")
    config = RunRequest(width=2, epochs=1, limit=64, test_limit=32, deterministic=wanted, out=out)
    before = switches()
    train(config, Console())
    assert set(seen) == {(wanted, not wanted)}
    assert switches() == before


def test_a_fast_run_does_not_touch_the_switch_of_algorithms(monkeypatch):
    """Setting it imports the compiler: an interruption in there would hide the one it came from."""
    touched = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *a, **k: touched.append(a))
    with pytest.raises(KeyboardInterrupt), reproducible(False):
        raise KeyboardInterrupt
    assert not touched
