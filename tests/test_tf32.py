"""TF32 is a choice of the run, and torch's own setting returns afterwards."""

import pytest
import torch

from fastadv.config import TrainConfig
from fastadv.console import Console
from fastadv.engine.precision import tf32
from fastadv.train import train


def flags():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("allowed", [True, False, None])
def test_tf32_is_put_back(allowed):
    before = flags()
    with tf32(allowed):
        assert flags() == (before if allowed is None else (allowed, allowed))
    assert flags() == before


def precisions():
    """By torch's newer interface; "none" is not "ieee" to a compiler that caches."""
    places = torch.backends.cudnn, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    return [place.fp32_precision for place in (*places, torch.backends.cuda.matmul)]


@pytest.mark.parametrize("allowed", [True, False, None])
def test_the_newer_settings_are_put_back(allowed):
    before = precisions()
    with tf32(allowed):
        pass
    assert precisions() == before
    flags()  # and both interfaces can still be read


@pytest.mark.parametrize("allowed", [True, False])
def test_a_run_trains_and_judges_with_it(allowed, tmp_path, monkeypatch):
    seen = []
    forward = torch.nn.Conv2d.forward
    monkeypatch.setattr(
        torch.nn.Conv2d, "forward", lambda *a: (seen.append(flags()), forward(*a))[1]
    )
    config = TrainConfig(width=2, epochs=1, limit=64, test_limit=32, tf32=allowed)
    before = flags()
    train(TrainConfig(**vars(config) | {"out": str(tmp_path / "run")}), Console())
    assert set(seen[1:]) >= {(allowed, allowed)}
    assert seen[-1] == (allowed, allowed)
    assert flags() == before
