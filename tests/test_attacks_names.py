"""Attack names: their meaning, and the errors of bad ones."""

import re

import pytest

from fastadv.errors import UserError
from fastadv.evaluation.accuracy import specs_of
from fastadv.evaluation.attacks import attack, parse_attack
from fastadv.evaluation.attacks.names import EXAMPLES, OPTIONS
from fastadv.evaluation.search.catalogue import CASCADES


@pytest.mark.parametrize(
    ("name", "kind", "steps", "restarts", "sigma"),
    [
        ("clean", "clean", None, None, None),
        ("fgsm", "fgsm", None, None, None),
        ("fgsm-rwp", "fgsm-rwp", None, None, None),
        ("pgd", "pgd", None, None, None),
        ("pgd-20", "pgd", 20, None, None),
        ("pgd-50-10", "pgd", 50, 10, None),
        (" PGD-20 ", "pgd", 20, None, None),
        ("cw", "cw", None, None, None),
        ("cw-20", "cw", 20, None, None),
        ("cw-margin", "cw-margin", None, None, None),
        ("cw-margin-30-2", "cw-margin", 30, 2, None),
        ("noise-0.1", "noise", None, None, 0.1),
        ("noise-8/255", "noise", None, None, 8 / 255),
        ("noise-1e-2", "noise", None, None, 0.01),
        ("autoattack", "cascade", None, None, None),
    ],
)
def test_a_name_carries_its_numbers(name, kind, steps, restarts, sigma):
    spec = parse_attack(name)
    assert (spec.kind, spec.steps, spec.restarts, spec.sigma) == (kind, steps, restarts, sigma)


@pytest.mark.parametrize(
    ("name", "objective", "steps", "restarts"),
    [
        ("pgd-20", None, 20, None),
        ("pgd-kl", "kl", None, None),
        ("pgd-margin-20", "margin", 20, None),
        ("pgd-dlr-100-5", "dlr", 100, 5),
        ("pgd-logit-scaled-20", "logit-scaled", 20, None),
        ("pgd-probability-margin", "probability-margin", None, None),
    ],
)
def test_pgd_carries_its_objective(name, objective, steps, restarts):
    spec = parse_attack(name)
    assert (spec.kind, spec.objective) == ("pgd", objective)
    assert (spec.steps, spec.restarts) == (steps, restarts)
    with pytest.raises(UserError, match="contradicts the name"):
        parse_attack("pgd-dlr").with_options(objective="ce")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("pdg-20", "did you mean 'pgd-20'"),
        ("fgms", "did you mean 'fgsm'"),
        ("autoatack", "did you mean 'autoattack'"),
        ("", "Unknown attack"),
        ("pgd-0", "steps must be at least 1"),
        ("pgd-20-0", "restarts must be at least 1"),
        ("pgd-twenty", "pgd-STEPS"),
        ("pgd-", "pgd-STEPS"),
        ("pgd-20-2-2", "pgd-STEPS"),
        ("pgd--20", "pgd-STEPS"),
        ("fgsm-4", "takes no number"),
        ("autoattack-100", "did you mean 'autoattack'"),
        ("pgd-dlr-twenty", "pgd-STEPS"),
        ("pgd-20-dlr", "pgd-STEPS"),
        ("noise", "standard deviation"),
        ("noise-loud", "standard deviation"),
        ("noise--1", "at least 0"),
        ("apgd", "did you mean 'apgd-ce' or 'apgd-dlr' or 'apgd-t'"),
        ("autoattack-standard", "did you mean 'autoattack' or 'autoattack-plus' or"),
        ("square-1-2-3", "such as square-5000 or square-5000-2"),
        ("malt-1-2-3", "such as malt-100 or malt-100-9[.]"),
        ("apgd-ce+", "lacks an attack beside"),
    ],
)
def test_a_bad_name_is_refused_in_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_attack(name)


@pytest.mark.parametrize("name", [["pgd-20"], 20, None])
def test_what_is_no_text_is_no_name(name):
    with pytest.raises(UserError, match=r"named by a text .*, not by a (list|int|NoneType)"):
        parse_attack(name)


@pytest.mark.parametrize("names", [[20], [["pgd"]], ("clean", None)])
def test_what_is_no_text_is_no_name_in_a_list(names):
    with pytest.raises(UserError, match="named by a text"):
        specs_of(names)


def test_every_example_but_bare_noise_parses():
    for name in EXAMPLES:
        if name != "noise":
            assert parse_attack(name).name == name


def test_options_complete_the_name():
    spec = parse_attack("pgd-20").with_options(alpha=0.1, restarts=3, steps=None)
    assert (spec.steps, spec.restarts, spec.alpha) == (20, 3, 0.1)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("pgd-20", {"steps": 10}, "contradicts the name 'pgd-20'"),
        ("noise-0.1", {"steps": 10}, "takes no steps"),
        ("fgsm", {"restarts": 2}, "takes no restarts"),
        ("cw", {"objective": "kl"}, "takes no objective"),
        ("clean", {"start": object()}, "takes no start"),
        ("pgd", {"objective": "klm"}, "did you mean 'kl'"),
        ("pgd", {"alpha": 0.0}, "alpha must be above 0"),
        ("pgd", {"alpha": float("nan")}, "alpha must be above 0"),
        ("pgd", {"steps": 0}, "steps must be at least 1"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_attack(name).with_options(**options)


def test_the_step_of_an_evaluation_is_that_of_pgd_and_cw_wherever_they_are():
    """Also in a cascade; FGSM moves by eps, and Auto-PGD finds its own step."""
    found = specs_of("pgd-20+square,cw-margin,fgsm,apgd-ce", "8/255")
    assert [part.alpha for part in found["pgd-20+square"].parts] == [8 / 255, None]
    assert [found[name].alpha for name in ("cw-margin", "fgsm", "apgd-ce")] == [8 / 255, None, None]
    with pytest.raises(UserError, match="alpha must be above 0"):
        specs_of("apgd-ce", -0.1)


def test_the_docstring_of_attack_names_every_attack():
    for name in (*OPTIONS, *CASCADES):
        assert name == "cascade" or re.search(f'"{name}["-]', attack.__doc__), name
