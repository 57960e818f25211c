"""Every recipe states its publication's settings, and takes them or says why not."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fastadv.algorithms import starting_words as words
from fastadv.algorithms.parts import PARTS
from fastadv.algorithms.plan import Plan
from fastadv.algorithms.publication import UNSTATED, Published
from fastadv.algorithms.recipes.table import METHODS
from fastadv.by_epoch import ByEpoch, Phases
from fastadv.models.preact_resnet import preact_resnet18
from fastadv.run.config import RunConfig
from fastadv.run.request import RunRequest, setting_types
from fastadv.run.resolve import resolve_run
from fastadv.threat import Threat

FORMS = [(method, form) for method, row in METHODS.items() for form in (row.variant, *row.variants)]
# What a row may say of its update, for which there is no setting.
OF_THE_UPDATE = {"bn", "box", "updates"}
TREES = ("imagenet", "tinyimagenet")  # data sets that are named with a folder


@cache
def resolved(method: str, form: str) -> RunConfig:
    """The run of one published form, on the data set of its publication."""
    row = METHODS[method].of_variant(form)
    assert row.published is not None, f"{method} {form} states nothing of its publication"
    data = row.published.data + (":/anywhere" if row.published.data in TREES else "")
    return resolve_run(RunRequest(method=method, data=data, variant=form or None))


def published_of(config: RunConfig) -> Published:
    found = config.plan.recipe.published
    assert found is not None
    return found


def taken(config: RunConfig) -> dict[str, Any]:
    """What the run takes: every setting and option, and what the attack does."""
    settings = {name: getattr(config, name) for name in setting_types()}
    if config.model == "preact_resnet18" and config.shortcut is None:
        settings["shortcut"] = inspect.signature(preact_resnet18).parameters["shortcut"].default
    plan = config.plan
    attack = {
        "steps": plan.adversary.gradient_steps,
        "alpha": step_of(plan, Threat(config.norm, config.eps)),
        "attack_bn": plan.adversary.attack_bn if plan.adversary.attacks else None,
    }
    return settings | plan.options | attack


def step_of(plan: Plan, threat: Threat) -> float | None:
    """The step of the attack in pixels, None if it has none of its own."""
    adversary = plan.adversary
    if not adversary.attacks or not adversary.takes_alpha:
        return None
    step = adversary.chosen_step
    if isinstance(step, ByEpoch):
        return max(step.values())
    return float(adversary.usual_step(threat) if step is None else step)


def same(stated: Any, found: Any) -> bool:
    if isinstance(stated, (tuple, list)):
        if not isinstance(found, (tuple, list)) or len(stated) != len(found):
            return False
        return all(map(same, stated, found))
    if isinstance(stated, (bool, str, Phases)) or stated is None or found is None:
        return bool(stated == found)
    return not isinstance(found, str) and math.isclose(stated, found, rel_tol=1e-9, abs_tol=1e-9)


def faults(published: Published, found: Mapping[str, Any]) -> list[str]:
    """What is wrong with a publication beside the run's values: one sentence each."""
    stated = published.settings()
    wrong = [f"{name} is no setting" for name in stated if name not in found]
    unsaid = set(published.departs) - set(stated) - OF_THE_UPDATE
    wrong += [f"{name} departs and is not stated" for name in unsaid]
    wrong += [
        f"{name} departs without a reason"
        for name, why in published.departs.items()
        if not why.strip()
    ]
    for name in stated.keys() & found.keys():
        value = stated[name]
        agrees = value == UNSTATED or same(value, found[name])
        if name in published.departs:
            if agrees:
                wrong.append(f"{name} departs and does not differ")
        elif not agrees:
            wrong.append(f"{name} is published as {value!r}, and the run takes {found[name]!r}")
    return wrong


@pytest.mark.parametrize(("method", "form"), FORMS)
def test_the_settings_are_the_published_ones_or_the_difference_has_a_reason(
    method: str, form: str
) -> None:
    config = resolved(method, form)
    assert faults(published_of(config), taken(config)) == []


OWN_STARTS = {
    "none": words.NO_ATTACK,
    "fgsm": words.IMAGE,
    "fgsm-r": words.UNIFORM,
    "fgsm-n": words.NOISY,
    "n-fgsm": words.WIDE,
    "fast": words.UNIFORM,
    "pgd": words.UNIFORM,
    "friendly": words.UNIFORM,
    "random-eps": words.IMAGE,
    "random-eps-pgd": words.UNIFORM,
    "ssat": words.UNIFORM,
    "zero-grad": words.UNIFORM,
    "free": words.KEPT,
    "fgsm-plus": words.LEARNED,
    "apart": words.LEARNED,
}
STARTS = {
    "center": words.IMAGE,
    "uniform": words.UNIFORM,
    "uniform-unclipped": words.UNCLIPPED,
    "gaussian": words.NEAR,
    "gradient": words.GRADIENT,
    "stored": words.STORED,
}


def start_of(plan: Plan) -> str | None:
    """The words for where the attack begins; None for parts that these tables do not know."""
    adversary, start = plan.slots["adversary"], plan.slots["start"]
    if start in STARTS:
        return STARTS[start]
    if start != "none":
        return None
    if adversary == "pgd" and plan.slots["attack_loss"] == "kl":
        return words.NEAR
    if plan.options.get("learned_start", plan.options.get("keep_delta")) is False:
        return words.IMAGE
    return OWN_STARTS.get(adversary)


@pytest.mark.parametrize(("method", "form"), FORMS)
def test_the_attack_begins_where_it_is_said_to(method: str, form: str) -> None:
    config = resolved(method, form)
    stated = published_of(config).start
    assert stated.strip()
    own = start_of(config.plan)
    if own is not None:
        assert stated in (own, UNSTATED)


def test_most_starts_are_compared() -> None:
    """The tables above know the parts of the rows of the papers fastadv follows."""
    known = [start_of(resolved(method, form).plan) is not None for method, form in FORMS]
    assert sum(known) >= 131


@pytest.mark.parametrize(("method", "form"), FORMS)
def test_a_publication_is_whole(method: str, form: str) -> None:
    found = published_of(resolved(method, form))
    assert found.code.strip()
    for name in ("model", "data", "schedule"):
        assert getattr(found, name).strip(), name
    stepped = found.schedule in ("piecewise", "multistep")
    assert stepped == isinstance(found.drops, tuple) or found.drops == UNSTATED
    for name in ("epochs", "batch_size", "lr", "weight_decay", "eps", "steps"):
        value = getattr(found, name)
        assert isinstance(value, str) or value >= 0, name
    if isinstance(found.alpha, float) and isinstance(found.eps, float):
        assert 0 < found.alpha <= 2 * found.eps  # in pixels of [0,1]


def example() -> tuple[Published, dict[str, Any]]:
    config = resolved("atta-10-cyclic", "")
    return published_of(config), taken(config)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"epochs": 31}, "epochs is published as 31, and the run takes 30"),
        ({"lr": 0.2000001}, "lr is published"),
        ({"steps": 9}, "steps is published"),
        ({"alpha": 0.007}, "alpha is published"),
        ({"attack_bn": "train"}, "attack_bn is published"),
        ({"drops": (0.5,)}, "drops is published"),
        ({"more": {"shortcut": "preact"}}, "shortcut is published"),
        ({"more": {"shortcutt": "raw"}}, "shortcutt is no setting"),
        ({"departs": {"lr": "a reason"}}, "lr departs and does not differ"),
        ({"departs": {"momentum": "a reason"}}, "momentum departs and is not stated"),
        ({"epochs": 31, "departs": {"epochs": " "}}, "epochs departs without a reason"),
        ({"epochs": UNSTATED, "departs": {"epochs": "x"}}, "epochs departs and does not differ"),
    ],
)
def test_a_wrong_statement_is_found(change: dict[str, Any], fault: str) -> None:
    published, found = example()
    (said,) = faults(replace(published, **change), found)
    assert said.startswith(fault)


def test_what_differs_with_a_reason_is_no_fault() -> None:
    published, found = example()
    other = replace(published, epochs=31, departs={"epochs": "a reason"})
    assert faults(published, found) == faults(other, found) == []


@pytest.mark.parametrize(
    ("method", "data", "expected"),
    [
        ("n-fgsm", "svhn", {"lr": 0.05, "peak": 2 / 5, "eps_warmup": 5.0, "alpha": 8 / 255}),
        ("rat-wp", "svhn", {"warmup_epochs": 5, "alpha": 1 / 255, "lr": 0.01}),
        ("at-awp-k", "svhn", {"warmup_epochs": 5}),
        ("rwp", "svhn", {"warmup_epochs": 5, "c_min": 1.7}),
        ("rwp", "cifar100", {"warmup_epochs": 0, "c_min": 4.0, "augmentation": "rotate"}),
        ("swa", "cifar100", {"augmentation": "base", "average_start": 0.275}),
        ("gairat", "cifar100", {"alpha": 0.007, "model": "wide_resnet32_10"}),
        ("rst", "cifar100", {"eps": 0.031, "alpha": 0.007}),
    ],
)
def test_other_data_sets_have_their_own_settings(
    method: str, data: str, expected: dict[str, Any]
) -> None:
    found = taken(resolve_run(RunRequest(method=method, data=data)))
    for name, value in expected.items():
        assert same(value, found[name]), name


def test_the_step_of_0_007_belongs_to_its_radius_and_ball() -> None:
    for method in ("rst", "rst-awp", "rst-rwp", "trades-sat", "gairat"):
        own = taken(resolve_run(RunRequest(method=method, data="cifar10")))
        assert (own["eps"], own["alpha"]) == (0.031, 0.007)
        wider = taken(resolve_run(RunRequest(method=method, data="cifar10", eps=8 / 255)))
        assert same(2 / 255, wider["alpha"])
        round_ball = taken(resolve_run(RunRequest(method=method, data="cifar10", norm="l2")))
        assert same(128 / 255, round_ball["eps"])
        # TRADES' own code: 2 eps in all of its 10 steps.
        assert same((15 if method == "gairat" else 2 * 128 / 10) / 255, round_ball["alpha"])


def test_digits_take_none_of_it() -> None:
    """A short run on small images has settings of its own, which were measured."""
    for method in METHODS:
        config = resolve_run(RunRequest(method=method))
        assert (config.epochs, config.batch_size, config.eps) == (30, 64, 0.2), method


PAGE = Path(__file__).parent.parent / "docs" / "as-published.md"


def test_the_page_names_tests_and_files_that_exist() -> None:
    text = PAGE.read_text()
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", text)
    assert len(named) > 20
    for file, name in named:
        assert name in functions_in(Path(__file__).parent / file), (file, name)
    package = PAGE.parent.parent / "fastadv"
    for file in re.findall(r"`(\w+/\w+\.py)`", text):
        assert list(package.glob(f"*/{file}")), file


def functions_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_page_names_recipes_that_exist() -> None:
    """In the first column of the tables of updates and settings; or a part."""
    found = 0
    for line in PAGE.read_text().splitlines():
        if not line.startswith("| `"):
            continue
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
            found += 1
            if name != "--dropout":
                parts = {part for names in PARTS.values() for part in names}
                assert any(fnmatch(each, name) for each in {*METHODS, *parts}), name
    assert found > 40
