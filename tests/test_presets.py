"""The values of a run: defaults, recipes, presets and the user's choices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastadv.algorithms.recipes.table import METHODS
from fastadv.algorithms.resolution import resolve
from fastadv.errors import UserError
from fastadv.run.config_file import from_bytes, to_toml
from fastadv.run.configured_model import configured_model
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.schedules import Schedule, factor


def rates(total: int, kind: str = "piecewise", **options: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = Schedule(optimizer, kind, total, cycle_momentum=False, **options)
    found = []
    for update in range(total):
        schedule(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_run_takes_the_training_settings_of_its_row(method: str) -> None:
    chosen = resolve_run(RunRequest(method=method, data="cifar10"))
    for name, value in METHODS[method].training.items():
        # Perturbations that are kept cannot follow it (tests/test_data_resized_crop.py).
        kept = name == "augmentation" and chosen.plan.keeps_perturbations
        assert getattr(chosen, name) == ("base" if kept else value)


def test_the_users_settings_have_precedence_over_the_row() -> None:
    usual = resolve_run(RunRequest(method="rst", data="cifar10"))
    assert (usual.nesterov, usual.batch_size, usual.model) == (True, 256, "wide_resnet28_10")
    mine = resolve_run(RunRequest(method="rst", data="cifar10", nesterov=False, batch_size=64))
    assert (mine.nesterov, mine.batch_size) == (False, 64)


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        # Rice et al. 2020: the update that completes epoch 100 of 200 has the lower rate.
        ("pgd", (999, 500, 501)),
        # Epochs that count from 1, the 100th (TRADES), 75th (SAT) and 30th (ATTA) begin with it.
        ("trades", (990, 500, 510)),
        ("trades-awp", (990, 500, 510)),
        ("trades-sat", (740, 150, 100, 10)),
        ("atta-10", (290, 60, 30)),
        # MultiStepLR, stepped after each epoch.
        ("te", (1000, 500, 500)),
        ("kd-swa", (500, 1000, 500)),
    ],
)
def test_the_learning_rate_drops_at_the_published_epochs(
    method: str, kept: tuple[int, ...], tmp_path
) -> None:
    """Updates at 0.1, 0.01, ..., with ten updates per epoch."""
    config = resolve_run(RunRequest(method=method, data="cifar10"))
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    read = from_bytes(path.read_bytes(), path)
    assert (read.schedule, read.drops) == (config.schedule, config.drops)
    options = {} if read.drops is None else {"drops": read.drops}
    found = rates(10 * config.epochs, config.schedule, **options)
    expected = [0.1**power for power, count in enumerate(kept, start=1) for _ in range(count)]
    torch.testing.assert_close(found, expected)


def test_a_drop_is_at_its_epoch_in_spite_of_rounding() -> None:
    for epochs in range(2, 300):
        for after in range(1, epochs):
            around = [
                factor("multistep", at, epochs, (after / epochs,)) for at in (after - 1, after)
            ]
            assert around == [1.0, 0.1]


def test_drops_belong_to_a_stepped_schedule() -> None:
    cosine = resolve_run(RunRequest(method="atta-10", data="cifar10", schedule="cosine"))
    assert cosine.drops is None
    for changes in ({"schedule": "cosine", "drops": (3, 5)}, {"drops": (0, 5)}):
        with pytest.raises(UserError, match="--drops"):
            resolve_run(RunRequest(method="pgd", data="cifar10", **changes))


def test_a_shortcut_is_for_the_network_that_has_two() -> None:
    assert resolve_run(RunRequest(method="apart", data="cifar10")).shortcut == "raw"
    wide = resolve_run(RunRequest(method="apart", data="cifar10", model="wide_resnet34_10"))
    assert wide.shortcut is None
    mine = resolve_run(RunRequest(method="apart", data="cifar10", shortcut="preact"))
    assert mine.shortcut == "preact"


def test_imagenet_has_the_seven_by_seven_stem() -> None:
    methods = ("pgd", "apart-imagenet", "fast-imagenet", "free-4-imagenet", "atta-2-imagenet")
    for method in methods:
        chosen = resolve_run(RunRequest(method=method, data="imagenet:/anywhere"))
        assert (chosen.model, chosen.stem) == ("resnet50", "imagenet")
    wide = RunRequest(method="pgd", data="imagenet:/anywhere", model="wide_resnet28_10")
    assert resolve_run(wide).stem is None
    model = configured_model(
        resolve_run(RunRequest(method="apart-imagenet", data="imagenet:/anywhere", width=2)),
        num_classes=3,
        in_channels=3,
        image_size=None,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    assert model.conv1.kernel_size == (7, 7)


@pytest.mark.parametrize(("method", "scaled"), [("pgd", True), ("trades", False)])
def test_images_are_scaled_as_published(method: str, scaled: bool) -> None:
    config = resolve_run(RunRequest(method=method, data="cifar10", width=2))
    numbers = {"mean": (0.25,) * 3, "std": (0.125,) * 3}
    model = configured_model(config, num_classes=3, in_channels=3, image_size=None, **numbers)
    image = torch.full((1, 3, 2, 2), 0.5)
    assert torch.equal(model.normalize(image), 4 * image if scaled else image)
    assert ("normalize.mean" in model.state_dict()) == scaled


@pytest.mark.parametrize("method", ["apart", "apart-no-layers", "apart-no-start", "fgsm-plus"])
@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_learned_steps_have_the_published_rates_at_every_radius(method: str, data: str) -> None:
    for eps in (None, 0.031, 2 / 255):
        chosen = resolve_run(RunRequest(method=method, data=data, eps=eps)).options
        assert (chosen["step_size_lr"], chosen["step_size_decay"]) == (5e-8, 400.0)
    longer = resolve_run(RunRequest(method=method, data=data, epochs=60)).options
    assert longer["step_size_lr"] is longer["step_size_decay"] is None


def test_svhn_is_attacked_and_evaluated_in_steps_of_one_grey_level() -> None:
    for method in ("pgd", "awp", "rwp", "rat-lr", "at-fix-lr-k", "at-awp-k", "swa"):
        chosen = resolve_run(RunRequest(method=method, data="svhn"))
        assert chosen.eval_alpha == chosen.options["alpha"] == 1 / 255
    assert resolve_run(RunRequest(method="te", data="svhn")).eval_alpha == 2 / 255
    # Another ball has its own usual step.
    assert resolve_run(RunRequest(method="pgd", data="svhn", norm="l2")).eval_alpha is None
    assert resolve_run(RunRequest(method="pgd", data="svhn", eps=4 / 255)).eval_alpha is None
    mine = resolve_run(RunRequest(method="pgd", data="svhn", eps=4 / 255, eval_alpha=0.01))
    assert mine.eval_alpha == 0.01
    with pytest.raises(UserError, match="--eval-alpha"):
        resolve_run(RunRequest(method="pgd", eval_alpha=0.0))


def test_published_eps_is_for_its_norm() -> None:
    assert resolve_run(RunRequest(method="atta-10", data="cifar10")).eps == 0.031
    assert resolve_run(RunRequest(method="atta-10", data="cifar10", norm="l2")).eps == 128 / 255


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
    assert resolve_run(RunRequest(method=method, options=options)).options["reg_weight"] == expected


def test_the_strength_of_one_regularizer_is_none_for_another() -> None:
    alone = resolve("pgd", {"regularizer": "igr"})
    swapped = resolve("advlc-tinyimagenet", {"regularizer": "igr"})
    for name in ("reg_weight", "reg_ramp"):
        assert swapped.options[name] == alone.options[name]
    assert resolve("advlc", {"regularizer": "advlc"}).options["reg_weight"] == 0.4


def test_an_option_set_only_by_a_preset_is_dropped_with_its_part() -> None:
    """On SVHN the preset of RWP sets options of weights that are swapped out here."""
    assert resolve_run(RunRequest(method="rwp", data="svhn")).options["warmup_epochs"] == 5
    chosen = resolve_run(RunRequest(method="rwp", data="svhn", options={"weights": "none"}))
    assert "warmup_epochs" not in chosen.options


def test_a_data_set_with_a_path_has_its_preset() -> None:
    chosen = resolve_run(RunRequest(method="apart-imagenet", data="imagenet:/anywhere"))
    assert chosen.options["step_size_lr"] == 4e-9
    shorter = resolve_run(RunRequest(method="apart-imagenet", data="imagenet:/anywhere", epochs=3))
    assert shorter.options["step_size_lr"] is None


def test_stored_perturbations_are_padded_by_the_loaders_shift() -> None:
    """--pad is the loader's; the part that stores perturbations must know the same border."""
    found = resolve_run(RunRequest(method="apart", data="digits", pad=7))
    assert (found.pad, found.options["pad"]) == (7, 7)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_held_out_must_leave_images_on_both_sides(share: float) -> None:
    with pytest.raises(UserError, match="--val-fraction"):
        resolve_run(RunRequest(val_fraction=share))


def test_a_path_of_any_letters_comes_back_from_the_run_folder(tmp_path: Path) -> None:
    config = RunRequest(data='folder:/images "of" all\\kinds', options={"teachers": 'a"b\\c'})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert from_bytes(path.read_bytes(), path) == config
