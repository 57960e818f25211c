"""What a run takes when nobody says otherwise: rows, presets and what the user chose."""

from __future__ import annotations

import pytest
import torch

from fastadv.config import TrainConfig, from_toml, settled, to_toml
from fastadv.errors import UserError
from fastadv.plan import resolve
from fastadv.recipes import METHODS
from fastadv.schedules import Schedule


def rates(total: int, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = Schedule(optimizer, "piecewise", total, cycle_momentum=False, **options)
    found = []
    for update in range(total):
        schedule(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("method", METHODS)
def test_what_a_row_says_about_training_is_what_a_run_takes(method: str) -> None:
    chosen = settled(TrainConfig(method=method, data="cifar10"))
    for name, value in METHODS[method].training.items():
        assert getattr(chosen, name) == value


def test_the_user_comes_before_the_row() -> None:
    usual = settled(TrainConfig(method="rst", data="cifar10"))
    assert (usual.nesterov, usual.batch_size, usual.model) == (True, 256, "wide_resnet28_10")
    mine = settled(TrainConfig(method="rst", data="cifar10", nesterov=False, batch_size=64))
    assert (mine.nesterov, mine.batch_size) == (False, 64)


def test_the_rate_drops_where_published(tmp_path) -> None:
    """ATTA: 38 epochs, drops at 30 and 36; here 10 updates an epoch."""
    config = settled(TrainConfig(method="atta-10", data="cifar10"))
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    drops = from_toml(path).drops
    assert drops == config.drops
    found = rates(380, drops=drops)
    expected = [0.1] * 299 + [0.01] * 60 + [0.001] * 21
    torch.testing.assert_close(found, expected)
    # Rice et al. 2020: the rate of the update that completes epoch 100 of 200 is the lower one.
    torch.testing.assert_close(rates(200), [0.1] * 99 + [0.01] * 50 + [0.001] * 51)


def test_drops_belong_to_a_piecewise_schedule() -> None:
    cosine = settled(TrainConfig(method="atta-10", data="cifar10", schedule="cosine"))
    assert cosine.drops is None
    for changes in ({"schedule": "cosine", "drops": (3, 5)}, {"drops": (0, 5)}):
        with pytest.raises(UserError, match="--drops"):
            settled(TrainConfig(method="pgd", data="cifar10", **changes))


def test_published_eps_is_for_its_norm() -> None:
    assert settled(TrainConfig(method="atta-10", data="cifar10")).eps == 0.031
    assert settled(TrainConfig(method="atta-10", data="cifar10", norm="l2")).eps == 128 / 255


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("pgd-igr", {}, 1.0),
        ("trades", {"regularizer": "igr"}, 1.0),
        ("fgsm-n-igr", {"regularizer": "cure"}, 0.05),
        ("pgd-igr", {"reg_weight": 7.0}, 7.0),
        ("fgsm-n-advlc", {}, 0.55),
    ],
)
def test_strengths_on_digits_follow_the_regularizer(method, options, expected) -> None:
    assert settled(TrainConfig(method=method, options=options)).options["reg_weight"] == expected


def test_the_strength_of_one_regularizer_is_none_for_another() -> None:
    alone = resolve("pgd", {"regularizer": "igr"})
    swapped = resolve("advlc-tinyimagenet", {"regularizer": "igr"})
    for name in ("reg_weight", "reg_ramp"):
        assert swapped.options[name] == alone.options[name]
    assert resolve("advlc", {"regularizer": "advlc"}).options["reg_weight"] == 0.4


def test_an_option_that_only_a_preset_gave_goes_with_its_part() -> None:
    """On SVHN the preset of RWP sets options of weights that are swapped out here."""
    assert settled(TrainConfig(method="rwp", data="svhn")).options["warmup_epochs"] == 5
    chosen = settled(TrainConfig(method="rwp", data="svhn", options={"weights": "none"}))
    assert "warmup_epochs" not in chosen.options


def test_a_data_set_with_a_path_has_its_preset() -> None:
    chosen = settled(TrainConfig(method="apart-imagenet", data="imagenet:/anywhere"))
    assert chosen.options["step_size_lr"] == 4e-9
    shorter = settled(TrainConfig(method="apart-imagenet", data="imagenet:/anywhere", epochs=3))
    assert shorter.options["step_size_lr"] is None
