"""Meaningless options are refused in one sentence, wherever they come from."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tiny import EPS, sgd, tiny_batch, tiny_model
from torch import nn

import fastadv
from fastadv.algorithms.options import option_types
from fastadv.algorithms.parts import PARTS
from fastadv.algorithms.recipes.table import METHODS
from fastadv.algorithms.resolution import resolve
from fastadv.errors import UserError
from fastadv.run.config_file import from_bytes, to_toml
from fastadv.run.request import RunRequest, setting_types
from fastadv.run.resolve import resolve_run, resolve_stored

NAN, INF = math.nan, math.inf
# Every number a part takes: the smallest and largest that mean something, and the nearest on
# either side that do not (None: none).
NUMBERS: dict[str, tuple[float, float, float | None, float | None]] = {
    "shrink": (0, 1, -1e-9, 1.001),
    "flip_signs": (0, 1, -1e-9, 1.001),
    "alpha": (0, 3e38, -1e-9, None),
    "start_scale": (0, 1, -1e-9, 1.001),
    "noise_scale": (0, 3e38, -1, None),
    "steps": (1, 10_000, 0, 10**9),
    "restarts": (1, 64, 0, 65),
    "replays": (1, 10_000, 0, 10**9),
    "weight_steps": (1, 10_000, 0, 10**9),
    "reset_every": (0, 10**9, -1, None),
    "pad": (0, 10**9, -1, None),
    "step_size_init": (0, 3e38, -1e-9, None),
    "omega_rate_init": (0, 3e38, -1e-9, None),
    "omega_std": (0, 3e38, -1e-9, None),
    "step_size_lr": (0, 3e38, -1, None),
    "step_size_decay": (0, 3e38, -1, None),
    "step_size_momentum": (0, 0.999, -0.1, 1),
    "hidden_decay": (0, 3e38, -1, None),
    "hidden_decay_lr": (0, 3e38, -1, None),
    "block_step_init": (0, 3e38, -1e-9, None),
    "leave_out_below": (0, 3e38, -0.5, None),
    "beta": (0, 3e38, -1, None),
    "mix_start": (0, 1, -0.1, 1.1),
    "mix_end": (0, 1, -0.1, 1.1),
    "mix_epochs": (0, 3e38, -1, None),
    "clean_weight": (0, 1, -0.1, 1.1),
    "gairat_start": (0, 3e38, -1, None),
    "gairat_lambda": (-3e38, 3e38, None, None),
    "smoothing": (0, 0.999, -0.1, 1),
    "attack_smoothing": (0, 0.999, -0.1, 1),
    "te_weight": (0, 3e38, -5, None),
    "te_momentum": (0, 0.999, -0.1, 1),
    "te_start": (0, 3e38, -1, None),
    "te_end": (0, 3e38, -1, None),
    "sat_momentum": (0, 1, -0.1, 1.1),
    "sat_start": (0, 3e38, -1, None),
    "temperature": (1e-9, 3e38, 0, None),
    "reg_weight": (0, 3e38, -3, None),
    "top_fraction": (1e-9, 1, 0, 1.1),
    "cure_length": (1e-9, 3e38, 0, None),
    "align_noise": (0, 3e38, -1, None),
    "js_temperature": (1e-9, 3e38, 0, None),
    "gamma": (0, 3e38, -1, None),
    "warmup_epochs": (0, 10**9, -1, None),
    "c_min": (0, 3e38, -1, None),
    "fixed_lr": (0, 3e38, -0.1, None),
    "average_start": (0, 3e38, -1, None),
    "average_every": (1, 10**9, 0, None),
    "average_decay": (0, 0.999, -0.1, 1),
    "tau": (0, 10**9, -1, None),
    "step_noise": (0, 3e38, -1e-9, None),
    "attack_start": (0, 3e38, -1, None),
    "helper_scale": (0, 3e38, -1, None),
    "ce_weight": (0, 3e38, -1, None),
    "mse_weight": (0, 3e38, -1, None),
    "class_temperature": (1e-9, 3e38, 0, None),
    "renew_every": (1, 10**9, 0, None),
    "min_mask": (0, 0.5, -1e-9, 1.001),
    "max_mask": (0.1, 1, -1e-9, 1.001),
    "momentum_decay": (0, 3e38, -1, None),
    "ramp_end": (1e-9, 1, 0, 1.1),
    "reg_sensitivity": (0, 3e38, -1, None),
    "reg_decay": (0, 1, -0.1, 1.1),
    "zero_share": (0, 1, -1e-9, 1.001),
    "step_parts": (1, 10_000, 0, 10**9),
    "step_scale": (0, 3e38, -1, None),
    "universal_groups": (1, 10**9, 0, None),
    "universal_scale": (0, 3e38, -1, None),
    "loss_stride": (0, 3e38, -1, None),
    "fall_weight": (0, 3e38, -1, None),
    "change_weight": (0, 3e38, -1, None),
    "change_limit": (0, 3e38, -1, None),
}
CHOICES = {
    "attack_bn": ("train", "eval"),
    "box": ("image", "delta"),
    "momentum_of": ("update", "attack"),
    "edge_gradient": ("whole", "half", "none"),
    "l2_form": ("robust-overfitting", "trades"),
    "step_size_schedule": ("triangular", "constant"),
    "block_noise_at": ("conv1", "input"),
    "te_on": ("code", "paper"),
    "kind": ("top-n", "l1", "squared-l2", "kl", "js", "nuclear"),
    "norm_scope": ("tensor", "global"),
    "split": ("stages", "quarters"),
    "accumulate": ("sum", "renormalise"),
    "rwp_loss": ("total", "adversarial"),
    "rate_form": ("group", "gradient"),
    "smooth_over": ("others", "all"),
    "average_at": ("update", "epoch"),
}
SWITCHES = ("over_batch", "learned_start", "layerwise", "reg_ramp", "cure_squared")
SWITCHES += ("clip_start", "average_warmup", "average_buffers", "keep_delta", "follow_crops")
SEVERAL = {
    "bn_passes": [("natural",), ("natural", "clean"), "natural,nan", (NAN,), 3, ()],
    "kd_weights": [(NAN, 1, 1), (-1, 1, 1), (INF, 1, 1), "0.3,x,1", (), (0.0, 0.0, 0.0), object()],
    "loss_range": [(NAN, 1), (0, INF), (-1, 1), (2, 1), (1,), "0,1,2", object(), 0.5],
    "groups": [(), (NAN,), (None,), (3.5,), NAN],
    "layer_groups": [(), (NAN,), (None,), (3.5,), NAN],
    "teachers": [3.5, NAN, (1, 2), {"a": 1}, True],
    "helper": [3.5, NAN, (1,), ("a", "b"), (), {"a": 1}, True],
}
# What a part cannot do without, and what it has to be without.
BESIDE = {"atta": {"start": "stored"}}
USELESS = {("none", "shrink"), ("none", "flip_signs")}
ALL = [
    (slot, part, name)
    for slot, parts in PARTS.items()
    for part, cls in parts.items()
    for name in option_types(cls)
]


@cache
def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 4))


def step(method: str = "pgd", **options: Any) -> fastadv.training.training_step.Step:
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    return fastadv.step(network(), optimizer, method, mode="eager", **options)


def refused(name: str, value: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        step(**{name: value}, **more)
    text = str(caught.value)
    assert name in text, text
    assert "\n" not in text
    return text


def test_every_option_of_every_part_is_covered() -> None:
    known = {*NUMBERS, *CHOICES, *SWITCHES, *SEVERAL}
    assert {name for _, _, name in ALL} == known


@pytest.mark.parametrize(("slot", "part", "name"), ALL, ids=lambda value: value)
def test_a_bad_option_is_refused_with_its_allowed_values(slot: str, part: str, name: str) -> None:
    here: dict[str, Any] = {slot: part, **BESIDE.get(part, {})}
    if name in NUMBERS:
        low, high, below, above = NUMBERS[name]
        for outside in (below, above):
            if outside is not None:
                assert f"{outside:g}" in refused(name, outside, **here)
        wrong = (NAN, INF, -INF, 1e39, -1e39, 10**400, "nan", "many", "1e400", True, [1], object())
        for value in wrong:
            refused(name, value, **here)
        if (part, name) in USELESS:
            assert "there is none" in refused(name, high, **here)
            high = low
        for value in (low, high, str(low), np.float32(low) if low < 1e30 else low):
            # A triangular schedule lowers this one by 0.1, and has its own error for it.
            more = {"step_size_schedule": "constant"} if name == "step_size_momentum" else {}
            got = getattr(PARTS[slot][part](**more, **{name: value}), name)
            assert got == pytest.approx(float(value), rel=1e-6)
            assert type(got) in (int, float)
    elif name in CHOICES:
        for value in ("kll", "", 3, NAN, True, ["ce"], None if slot == "x" else object()):
            refused(name, value, **here)
        for value in CHOICES[name]:
            assert resolve("pgd", {**here, name: value}).options[name] == value
    elif name in SWITCHES:
        for value in ("maybe", 3, NAN, [], object()):
            refused(name, value, **here)
        for value in (True, False, "yes", "false"):
            got = resolve("pgd", {**here, name: value}).options[name]
            assert got is (value in (True, "yes"))
    else:
        for value in SEVERAL[name]:
            if value == (3.5,):
                continue  # no layer group; the network says which it has
            refused(name, value, **here)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awp", {"gamma": -1}),
        ("awp", {"gamma": NAN}),
        ("rwp", {"c_min": NAN}),
        ("trades", {"beta": -1}),
        ("te", {"te_weight": -5}),
        ("advlc", {"reg_weight": -3}),
        ("fgsm-plus", {"attack_loss": "kll"}),
    ],
)
def test_bad_options_of_methods_are_refused(method: str, options: dict[str, Any]) -> None:
    refused(*next(iter(options.items())), method=method, num_samples=8, total_steps=9)
    with pytest.raises(UserError, match="lr must be at least 0"):
        fastadv.param_groups(network(), "uniform", lr=NAN)


def test_a_part_that_is_built_directly_is_also_checked() -> None:
    with pytest.raises(UserError, match="gamma must be at least 0"):
        PARTS["weights"]["rwp"](gamma=-1)
    assert PARTS["adversary"]["pgd"](alpha="2/255").alpha == 2 / 255


@pytest.mark.parametrize("method", METHODS)
def test_published_options_pass_unchanged(method: str, tmp_path) -> None:
    row = METHODS[method]
    path = tmp_path / "config.toml"
    for data in ("digits", "svhn"):
        config = resolve_run(RunRequest(method=method, data=data))
        path.write_text(to_toml(config))
        stored = resolve_stored(from_bytes(path.read_bytes(), path))
        assert stored == config
        assert stored.options == config.options
    found = resolve(method).options
    for name, value in row.all_options().items():
        assert found[name] == value
        assert type(found[name]) is type(value) or isinstance(value, (int, float))


BAD_SETTINGS: dict[str, list[Any]] = {
    "lr": [NAN, INF, -0.1, "fast"],
    "weight_decay": [NAN, INF, -1],
    "momentum": [NAN, -0.1, 1, 2],
    "dropout": [NAN, -0.1, 1, 2],
    "eps": [NAN, INF, -0.1, 2.0, "8/0"],
    "eps_warmup": [NAN, INF, 0, -1, "long"],
    "blocks": [NAN, (3.5,)],
    "drops": [(NAN,), (0,), (-1,), (INF,), "0.5,x"],
    "drop_factors": [(NAN,), (0,), (1,), (2,), "0.5,x"],
    "peak": [NAN, 0, 1, -0.5],
    "val_fraction": [NAN, 0, 1, -0.5],
    "checkpoint_minutes": [NAN, -1, INF],
    "eval_alpha": [NAN, 0, -1, INF],
    "max_grad_norm": [NAN, 0, -1, INF],
    "epochs": [0, -1, 1.5, NAN, "ten"],
    "batch_size": [0, -1, 1.5, NAN],
    "width": [0, -1, 10**9, 1.5],
    "depth": [0, -4, 10**9],
    "pad": [-1, NAN, 1.5],
    "limit": [0, -1],
    "test_limit": [0, -1],
    "label_noise": [NAN, -0.1, 1.5, "some"],
    "image_size": [0, -1, 10**9],
    "image_sizes": [0, -1, 1.5, NAN, 10**9, "4..8@2", "4@0,0@1", "4@0,8"],
    "eval_every": [0, -1],
    "eval_train": [0, -1, 1.5],
    "keep_every": [0, -1, 1.5],
    "seed": [-1, 2**63, 1.5, NAN],
    "norm": ["l1", 3, NAN],
    "schedule": ["linear", 1],
    "padding": ["white"],
    "amp": ["perhaps", 3],
    "method": [3, "pgdd"],
    "data": [3],
    "out": [3],
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_bad_setting_of_a_run_is_refused_with_its_allowed_values(name: str, tmp_path) -> None:
    usual: dict[str, Any] = {"drops": {"schedule": "multistep"}}
    usual["drop_factors"] = usual["drops"]
    for value in BAD_SETTINGS[name]:
        with pytest.raises(UserError) as caught:
            resolve_run(RunRequest(**{name: value}, **usual.get(name, {})))
        # A method or data set is named as what it is.
        word = {"method": "method", "data": "data"}.get(name, name)
        assert word.replace("_", "-") in str(caught.value)
        if isinstance(value, (int, float)) and name not in ("method", "data", "out"):
            lines = to_toml(resolve_run(RunRequest())).splitlines()
            kept = [line for line in lines if not line.startswith(f"{name} =")]
            path = tmp_path / "config.toml"
            path.write_text("\n".join([f"{name} = {value!r}", *kept]))
            with pytest.raises(UserError, match=name):
                resolve_stored(from_bytes(path.read_bytes(), path))


def test_every_number_of_a_run_is_covered() -> None:
    plain = {"deterministic", "download", "flip", "nesterov", "normalize", "skip_broken", "tf32"}
    plain |= {"cycle_momentum", "decay_norms"}
    choices = {"shortcut", "stem", "amp_dtype", "attack_dtype", "mode", "augmentation", "loader"}
    choices |= {"guard_overfitting"}
    choices |= {"select", "fused_norm", "optimizer"}
    texts = {
        "variant",
        "model",
        "unlabelled",
        "data_root",
        "select_attack",
        "test_attacks",
        "device",
    }
    assert set(setting_types()) == {*BAD_SETTINGS, *plain, *choices, *texts}
    for name in choices:
        with pytest.raises(UserError, match=name.replace("_", "-")):
            resolve_run(RunRequest(**{name: "kll"}))
    for name in plain:
        with pytest.raises(UserError, match=name.replace("_", "-")):
            resolve_run(RunRequest(**{name: "kll"}))  # type: ignore[arg-type]
    for name in texts:
        with pytest.raises(UserError, match=name.replace("_", "-")):
            resolve_run(RunRequest(**{name: 3}))  # type: ignore[arg-type]


def test_momentum_that_a_cycle_would_turn_negative() -> None:
    with pytest.raises(UserError, match="no-cycle-momentum"):
        resolve_run(RunRequest(momentum=0.05, schedule="triangular"))
    assert resolve_run(RunRequest(momentum=0.05, schedule="cosine")).momentum == 0.05
    assert resolve_run(RunRequest(momentum=0.0, schedule="triangular")).momentum == 0
    with pytest.raises(UserError, match="step_size_momentum"):
        step("apart", step_size_momentum=0.05, num_samples=4)


def test_a_seed_above_2_to_the_53_is_kept_exactly() -> None:
    seed = 2**53 + 1  # the first whole number that a float cannot hold
    assert resolve_run(RunRequest(seed=seed)).seed == seed
    assert step(seed=seed).internals.update.regions.seed == seed


@pytest.mark.parametrize("lost", ["eps", "lr", "epochs", "adversary", "steps"])
def test_a_run_folder_that_lacks_a_setting_is_refused(lost: str, tmp_path) -> None:
    text = to_toml(resolve_run(RunRequest(method="pgd")))
    path = tmp_path / "config.toml"
    path.write_text("\n".join(x for x in text.splitlines() if not x.startswith(f"{lost} =")))
    assert from_bytes(path.read_bytes(), path).method == "pgd"
    with pytest.raises(UserError, match=f"lacks {lost}"):
        resolve_stored(from_bytes(path.read_bytes(), path))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_samples", [0, -1, NAN, 1.5, "many", True]),
        ("num_classes", [0, -1, NAN]),
        ("total_steps", [0, -1, INF, 2.5]),
        ("steps_per_epoch", [0, -1, NAN]),
        ("max_grad_norm", [0, -1, NAN, INF]),
        ("seed", [-1, NAN, 2**63]),
        ("eps", [-1, NAN, INF, 1e39, "8/", True]),
        ("norm", ["l1", 3]),
        ("blocks", [[], [3.5]]),
    ],
)
def test_bad_arguments_of_a_step_are_refused(name: str, values: list[Any]) -> None:
    for value in values:
        refused(name, value)
        if name == "eps":
            refused(name, value, norm="l2")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eps", {"eps": NAN}),
        ("alpha", {"alpha": NAN}),
        ("alpha", {"alpha": -1}),
        ("alpha", {"alpha": INF}),
        ("steps", {"steps": 2.5}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": NAN}),
        ("restarts", {"restarts": 10**9}),
        ("objective", {"objective": "kll"}),
        ("random_start", {"random_start": "maybe"}),
        ("seed", {"seed": 1.5}),
        ("seed", {"seed": NAN}),
    ],
)
def test_numbers_of_an_attack(name: str, options: dict[str, Any]) -> None:
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    with pytest.raises(UserError, match=name):
        fastadv.attack(network(), x, y, "pgd", **options)
    evaluated = {key: value for key, value in options.items() if key in ("eps", "alpha", "seed")}
    if evaluated:
        with pytest.raises(UserError, match=name):
            fastadv.evaluate(network(), [(x, y)], ["pgd-2"], **evaluated)
    for bad in ("noise-nan", "noise-1e400", "noise--1", "pgd-0", "pgd-99999999"):
        with pytest.raises(UserError):
            fastadv.attack(network(), x, y, bad)


def test_the_command_line_gives_the_same_sentence(fastadv_command) -> None:
    for words, sentence in (
        (("--method", "awp", "--gamma", "-1"), "gamma must be at least 0, not -1."),
        (("--method", "awp", "--gamma", "nan"), "gamma must be a number"),
        (("--lr", "1e400"), "--lr must be at least 0 and finite, not inf."),
        (("--method", "trades", "--beta", "1e39"), "beta must be at least 0 and a number that"),
        (("--method", "pgd", "--attack-loss", "kll"), "attack_loss 'kll'"),
    ):
        outcome = fastadv_command("train", *words)
        assert outcome.code == 2
        assert sentence in outcome.err
        assert len(outcome.err.strip().splitlines()) == 1
    told = fastadv_command("methods", "awp")
    assert "gamma = 0.01  [part]\n" in told.out
    assert "(at least 0)" in told.out


def test_a_step_larger_than_the_range_of_a_pixel_is_refused() -> None:
    """2 was meant as 2/255: with such a step the attack is too weak."""
    x, y, _, _ = tiny_batch()
    model = tiny_model()
    refused = pytest.raises(UserError, match="did you mean 2/255")
    for method in ("pgd", "free", "fast"):
        with refused:
            fastadv.step(model, sgd(model), method, eps=EPS, alpha=2)
    with refused:
        fastadv.attack(model, x, y, "pgd", eps=EPS, alpha=2)
    with refused:
        fastadv.evaluate(model, [(x, y)], ["pgd-2"], eps=EPS, alpha=2)
    with refused:
        resolve_run(RunRequest(eval_alpha=2))
    step = fastadv.step(model, sgd(model), "pgd", norm="l2", eps=4, alpha=2, mode="eager")
    step(x, y)


def test_an_option_of_another_part_is_told_where_it_belongs() -> None:
    with pytest.raises(
        UserError, match=r"^'steps' is an option of adversary 'pgd', .*apart as set"
    ):
        resolve("apart", {"steps": 10})
    with pytest.raises(UserError, match=r"^Unknown option 'stps'; did you mean 'steps'\?$"):
        resolve("pgd", {"stps": 10})
