"""Each value of a run says where it came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastadv.algorithms.adversaries.apart import APART
from fastadv.run.config_file import from_bytes, to_toml
from fastadv.run.origin import Origin
from fastadv.run.request import RunRequest, setting_types
from fastadv.run.resolve import resolve_run, resolve_stored

CASES = {
    "momentum": Origin.DEFAULT,
    "device": Origin.DEFAULT,
    "eps": Origin.DEFAULT,  # of the norm
    "epochs": Origin.USER,
    "method": Origin.USER,
    "lr": Origin.DATA,
    "eval_alpha": Origin.DATA,
    "schedule": Origin.RECIPE,
    "drops": Origin.RECIPE,
    "normalize": Origin.RECIPE,
    "weights": Origin.RECIPE,
    "regularizer": Origin.USER,
    "reg_weight": Origin.PART,
    "steps": Origin.USER,
    "beta": Origin.PART,
    "gamma": Origin.RECIPE,
    "attack_loss": Origin.RECIPE,
}


@pytest.mark.parametrize("name", CASES)
def test_the_origin_of_each_value(name: str) -> None:
    options = {"regularizer": "igr", "steps": 3}
    request = RunRequest(method="trades-awp", data="svhn", epochs=7, options=options)
    assert resolve_run(request).origins[name] == CASES[name]


def test_options_that_were_measured_on_a_data_set() -> None:
    on_digits = resolve_run(RunRequest(method="pgd-igr"))
    assert (on_digits.options["reg_weight"], on_digits.origins["reg_weight"]) == (1.0, Origin.DATA)
    on_svhn = resolve_run(RunRequest(method="rwp", data="svhn"))
    assert (on_svhn.options["alpha"], on_svhn.origins["alpha"]) == (1 / 255, Origin.RECIPE)


@pytest.mark.parametrize("method", ["apart", "pgd", "trades-awp", "rst", "kd-swa"])
@pytest.mark.parametrize("data", ["digits", "cifar10", "imagenet:/anywhere"])
def test_every_value_has_an_origin_and_what_is_absent_has_none(method: str, data: str) -> None:
    config = resolve_run(RunRequest(method=method, data=data))
    for name in setting_types():
        assert (name in config.origins) == (getattr(config, name) is not None), name
    assert set(config.options) <= set(config.origins)


def test_a_stored_value_is_the_run_folders(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(resolve_run(RunRequest(method="pgd"))))
    stored = resolve_stored(from_bytes(path.read_bytes(), path))
    assert stored.origins["lr"] == stored.origins["steps"] == Origin.STORED


def test_the_explanation_of_a_method_shows_them(fastadv_command) -> None:
    done = fastadv_command("methods", "rwp", "--data", "svhn")
    assert done.code == 0, done.err
    assert "lr = 0.01  [data preset]" in done.out
    assert "c_min = 1.7  [part]" in done.out
    assert "momentum = 0.9  [default]" in done.out
    assert "warmup_epochs = 5  [recipe]" in done.out


def test_the_parts_of_a_run_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    real = APART.__post_init__
    monkeypatch.setattr(APART, "__post_init__", lambda part: (built.append(part), real(part))[1])
    config = resolve_run(RunRequest(method="apart"))
    assert built == [config.plan.adversary]
