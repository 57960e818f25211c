"""What each setting is to a run is said once, and everything that asks has the same answer."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from fastadv.algorithms.options import all_options
from fastadv.algorithms.parts import PARTS
from fastadv.by_epoch import Phases, Points
from fastadv.errors import UserError
from fastadv.run import places, provenance
from fastadv.run.alike import methods_of
from fastadv.run.companions import left_out
from fastadv.run.config import RunConfig
from fastadv.run.onward import _of_this_time, _require_same
from fastadv.run.request import RunRequest, roles, setting_types, strangers
from fastadv.run.resolve import resolve_run
from fastadv.run.role import Effect
from fastadv.run.spelling import as_flag

PAGE = Path(__file__).parent.parent / "docs" / "running-on-a-cluster.md"

TRAINED: dict[str, Any] = {
    "method": "pgd", "variant": "b", "model": "resnet18", "width": 3, "depth": 16,
    "shortcut": "preact", "stem": "imagenet", "normalize": False, "dropout": 0.5,
    "blocks": ("layer1",), "batch_size": 7, "optimizer": "adamw",
    "optimizer_options": "eps=1e-6", "lr": 0.25, "schedule": "cosine",
    "points": Points([(0.0, 1.0)]), "end_factor": 0.5, "warmup": 1.0, "drops": (1.0,),
    "drop_factors": (0.5,),
    "peak": 0.25,
    "momentum": 0.5, "cycle_momentum": False, "nesterov": True, "weight_decay": 0.5,
    "decay_norms": False, "max_grad_norm": 1.0, "eps": 0.25, "eps_warmup": 1.0, "norm": "l2",
    "amp": True, "amp_dtype": "fp16", "attack_dtype": "bf16", "tf32": True, "bn": "global",
    "pad": 3, "flip": True, "padding": "grey", "augmentation": "rotate", "limit": 9,
    "label_noise": 0.5, "image_size": 9, "image_sizes": Phases([(0.0, 8)]), "loader": "device",
    "val_fraction": 0.25, "seed": 9,
}  # fmt: skip
CHOOSES: dict[str, Any] = {"select": "test", "select_attack": "pgd-20", "eval_alpha": 0.1}
PLACES: dict[str, Any] = {
    "data": "npz:elsewhere.npz", "data_root": "/data", "unlabelled": "b.npz", "init": "b.pt",
}  # fmt: skip
HARMLESS: dict[str, Any] = {
    "eval_every": 2, "eval_train": 8, "test_attacks": "fgsm", "test_limit": 9,
    "skip_broken": True, "download": True, "out": "elsewhere", "checkpoint_minutes": 1.0,
    "save_every": 3, "keep": ("last",),
}  # fmt: skip
OF_BITS: dict[str, Any] = {
    "device": "cuda:1", "mode": "compiled", "fused_norm": "off", "deterministic": True,
    "guard_overfitting": "tell",
}  # fmt: skip
BY_FILE: dict[str, Any] = {"epochs": 9}
OTHER = TRAINED | CHOOSES | PLACES | HARMLESS | OF_BITS | BY_FILE


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return resolve_run(RunRequest(method="fast", limit=96))


def said(config: RunConfig, name: str) -> tuple[RunRequest, RunConfig]:
    """A command that says another value of ``name``, and what it means."""
    return RunRequest(**{name: OTHER[name]}), dataclasses.replace(config, **{name: OTHER[name]})


def refused(call: Any) -> bool:
    try:
        call()
    except UserError:
        return True
    return False


def facts(config: RunConfig) -> dict[str, Any]:
    text = provenance.configuration(config)
    return {"configuration": text, "digests": {}, "machine": {}}


def test_every_setting_has_another_value_here(config: RunConfig) -> None:
    assert OTHER.keys() == setting_types().keys() == roles().keys()
    assert not [name for name in OTHER if OTHER[name] == getattr(config, name)]


@pytest.mark.parametrize("name", OTHER)
def test_the_command_and_the_file_are_refused_alike(config: RunConfig, name: str) -> None:
    request, asked = said(config, name)
    place = Path("run")
    by_command = refused(lambda: _require_same(request, asked, config, place, ended=False))
    by_file = refused(lambda: provenance.compare(facts(config), facts(asked)))
    assert by_file == (name in TRAINED | CHOOSES)
    # How long it trains is the one thing that only the file of a begun run can say.
    assert by_command == (by_file or name in BY_FILE)
    # A checkpoint of another run is found out by the same settings.
    saved = {"configuration": provenance.configuration(config)}
    foreign = refused(lambda: provenance.require_own(saved, asked, place))
    assert foreign == by_file
    now = _of_this_time(request, asked, config)
    assert now == ({name: OTHER[name]} if name in HARMLESS | OF_BITS else {})
    ended = refused(lambda: _require_same(request, asked, config, place, ended=True))
    assert ended == (by_command or roles()[name].effect is Effect.EVALUATION)


@pytest.mark.parametrize("name", OTHER)
def test_what_is_said_of_a_change(config: RunConfig, name: str) -> None:
    _, asked = said(config, name)
    if name in TRAINED | CHOOSES:
        why = "the best epoch is chosen by it" if name in CHOOSES else "what is trained"
        with pytest.raises(UserError, match=why):
            provenance.compare(facts(config), facts(asked))
        return
    sentences = provenance.compare(facts(config), facts(asked))
    kind = "change no weights" if name in HARMLESS | PLACES else "not bit for bit"
    silent = name in ("out", "checkpoint_minutes")
    assert [kind in sentence for sentence in sentences] == ([] if silent else [True])


def test_what_was_measured_is_not_asked_for_anew(config: RunConfig) -> None:
    for name, held in {"mode": "eager", "fused_norm": "off", "batch_size": 64}.items():
        found = dataclasses.replace(config, **{name: held})
        request = RunRequest(**{name: "auto"})
        asked = dataclasses.replace(config, **{name: "auto"})
        _require_same(request, asked, found, Path("run"), ended=False)
        assert not _of_this_time(request, asked, found)


def test_options_that_hold_networks_are_places_and_no_others() -> None:
    names = all_options(part for parts in PARTS.values() for part in parts.values())
    found = {name for name in (*names, *PARTS) if places.role_of_option(name).place}
    assert found == set(places.of_a_run()) - set(PLACES) == {"teachers", "helper"}
    assert set(places.SETTINGS) == set(PLACES)


def test_runs_that_differ_in_how_they_ran_are_seeds_of_one_method(config: RunConfig) -> None:
    alike = {
        "seed", "data", "data_root", "loader", "eval_alpha", "eval_train", "test_attacks",
        "test_limit", *OF_BITS, *HARMLESS,
    } - {"eval_every"}  # fmt: skip
    for name in OTHER:
        _, asked = said(config, name)
        assert (len(methods_of({"a": config, "b": asked})) == 1) == (name in alike), name


def test_the_page_names_what_may_differ() -> None:
    text = " ".join(PAGE.read_text().split())
    (sentence,) = re.findall(r"difference is named; [^.]*\. (.*?) may differ", text)
    named = set(re.findall(r"`(--[a-z-]+)`", sentence))
    assert named == {as_flag(name) for name in OTHER if roles()[name].of_invocation} - {"--out"}


def test_companions_are_settings_and_go_with_their_own() -> None:
    known = roles()
    assert {other.setting for role in known.values() for other in role.beside} <= set(known)
    assert strangers("optimizer", "sgd") == ()
    assert strangers("optimizer", "adamw") == ("momentum", "cycle_momentum", "nesterov")
    stepped = {"schedule": "piecewise", "drops": (1.0,), "drop_factors": (0.5,), "peak": None}
    assert left_out(stepped, {"schedule": "multistep"}) == {"peak"}
    assert left_out(stepped, {"schedule": "cosine"}) == {"drops", "drop_factors", "peak"}
    assert left_out(stepped, {"drops": (2.0,)}) == {"drop_factors"}
    assert left_out(stepped, {"schedule": "piecewise"}) == set()
    ending = {"schedule": "cosine", "end_factor": 0.1}
    assert left_out(ending, {"schedule": "linear"}) == set()
    assert left_out(ending, {"schedule": "constant"}) == {"end_factor"}
