"""Published forms of a method: chosen by name, in every entrance, and explained."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugin_files import forgotten_after

from fastadv import OnData, Recipe, Variant, register_recipe
from fastadv.algorithms.recipes.table import METHODS, recipe
from fastadv.algorithms.resolution import resolve
from fastadv.cli.explain import explain
from fastadv.errors import UserError
from fastadv.run.config_file import from_bytes, to_toml
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run, resolve_stored

FORMS = Recipe(
    "a method of two codes",
    "One et al. 2030",
    options={"steps": 7, "attack_bn": "eval"},
    training={"lr": 0.3, "epochs": 9},
    variant="one",
    variants={
        "two": Variant(
            "Two et al. 2031",
            "three steps from the image",
            parts={"start": "center"},
            options={"steps": 3},
            training={"lr": 0.5},
            on_data={"svhn": OnData({"epochs": 4})},
        )
    },
    also=("Two-Forms AT",),
)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with forgotten_after():
        register_recipe("two-forms", FORMS)
        yield


def test_a_variant_changes_what_it_names_and_nothing_else() -> None:
    own, other = resolve("two-forms"), resolve("two-forms", {"variant": "two"})
    assert (own.options["steps"], own.slots["start"]) == (7, "none")
    assert (other.options["steps"], other.slots["start"]) == (3, "center")
    assert own.options["attack_bn"] == other.options["attack_bn"] == "eval"
    assert resolve("two-forms", {"variant": "one"}).options == own.options
    assert resolve("two-forms", {"variant": "two", "steps": 5}).options["steps"] == 5


def test_a_run_takes_the_settings_of_its_variant_and_finds_them_again() -> None:
    config = resolve_run(RunRequest(method="two-forms", data="cifar10", variant="two"))
    assert (config.lr, config.epochs, config.plan.options["steps"]) == (0.5, 9, 3)
    svhn = resolve_run(RunRequest(method="two-forms", data="svhn", variant="two"))
    assert (svhn.lr, svhn.epochs) == (0.5, 4)
    assert resolve_run(RunRequest(method="two-forms", data="cifar10")).lr == 0.3
    again = resolve_stored(from_bytes(to_toml(config).encode(), Path("config.toml")))
    assert again.variant == "two"
    assert again == config
    assert again.plan.options == config.plan.options
    assert again.plan.recipe == config.plan.recipe


@pytest.mark.parametrize("entrance", [resolve, lambda method, given: resolve_run(
    RunRequest(method=method, **given)
)])  # fmt: skip
def test_an_unknown_variant_is_told_with_the_nearest_one(entrance: object) -> None:
    assert callable(entrance)
    with pytest.raises(UserError, match="did you mean 'two'"):
        entrance("two-forms", {"variant": "too"})
    with pytest.raises(UserError, match="one form only"):
        entrance("standard", {"variant": "two"})


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("two forms at", "is called 'two-forms' here"),
        ("TWO_FORMS", "is called 'two-forms' here"),
        ("RAT_LR", "is called 'rat-lr' here"),
        ("AT", "is called 'pgd' here"),
        ("AT-RWP", "is called 'rwp' here"),
        ("F+FGSM", "is called 'fast' here"),
        ("FGSM+", "is called 'fgsm-plus' here"),
        ("PGD-AT+TE", "is called 'te' here"),
        ("FGSM-N + KDSA + SWA", "is called 'fgsm-n-kdsa-swa' here"),
        ("APART (w/o perturbation initialization)", "is called 'apart-no-start' here"),
        ("PGD-AT", "is called 'pgd' or 'pgd-eval' here; `fastadv methods` says which"),
        ("CURE", "No method is called 'CURE' alone; take 'fgsm-n-cure' or 'pgd-cure'"),
        ("APRAT", "did you mean 'apart'"),
        ("qqqq", "`fastadv methods` lists all"),
        ("", "`fastadv methods` lists all"),
    ],
)
def test_a_name_that_others_use_leads_to_ours(asked: str, answer: str) -> None:
    with pytest.raises(UserError, match=re.escape(answer)):
        recipe(asked)


def test_the_variants_are_explained() -> None:
    text = str(explain("two-forms", "digits"))
    assert "one: the one shown here" in text
    assert "two: three steps from the image [Two et al. 2031]" in text
    assert "two: the one shown here" not in text
    other = str(explain("two-forms", "digits", "two"))
    assert "two: the one shown here" in other
    assert "one: [One et al. 2030]" in other
    assert "without it, one" in text
    assert "without it, one" in other


def test_a_variant_of_no_method_is_refused(fastadv_command) -> None:
    outcome = fastadv_command("methods", "--variant", "fastat")
    assert outcome.code == 2
    assert "name the method" in outcome.err


def test_a_run_says_its_variant_at_the_start(fastadv_command, tmp_path):
    small = ("--data", "digits", "--epochs", 1, "--width", 2, "--limit", 64, "--test-limit", 20)
    begun = ("train", "--method", "fgsm", *small, "--test-attacks", "clean", "--out")
    assert "fgsm on digits:" in fastadv_command(*begun, tmp_path / "own").out
    other = fastadv_command(*begun, tmp_path / "other", "--variant", "fastat")
    assert "fgsm, variant fastat, on digits:" in other.out


def test_a_variant_with_an_unknown_option_is_refused() -> None:
    wrong = Variant("x", "y", options={"stepps": 3})
    with pytest.raises(UserError, match="stepps"):
        register_recipe("wrong", Recipe("a", "b", variant="one", variants={"two": wrong}))


def test_every_form_of_every_recipe_can_be_resolved() -> None:
    for name, row in METHODS.items():
        assert bool(row.variants) == bool(row.variant), name
        for form in row.variants:
            resolve_run(RunRequest(method=name, data="cifar10", variant=form))


def test_no_two_methods_have_one_name_if_papers_do_not_give_it_to_both() -> None:
    given = Counter(name.lower() for row in METHODS.values() for name in row.also)
    assert {name for name, count in given.items() if count > 1} == {"pgd-at", "pgd-10"}
