"""Two networks on the same images: interval, test, sample size, words."""

from __future__ import annotations

from itertools import product
from math import comb, lgamma
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fastadv.errors import UserError
from fastadv.evaluation.over_seeds import mean_and_deviation
from fastadv.evaluation.paired import Paired
from fastadv.evaluation.verdicts import Verdicts

FACTS: dict[str, Any] = {
    "attack": "pgd-20",
    "norm": "linf",
    "eps": 0.2,
    "alpha": 0.05,
    "seed": 0,
    "weights": "first",
    "images": "i",
    "precision": "float32",
}


def verdicts(right: list[int], **facts: Any) -> Verdicts:
    """Verdicts on the images 0, 1, 2, ..., whose labels are their rows modulo 3."""
    outcome = np.array(right, bool)
    rows = np.arange(len(right))
    return Verdicts.collected(
        {
            "index": facts.pop("index", rows),
            "label": facts.pop("label", rows % 3),
            "right": outcome,
            "margin": np.full(len(right), np.nan),
            "fooled_by": np.where(outcome, -1, 0),
        },
        ["pgd-20"],
        FACTS | facts,
    )


def test_counts_of_images() -> None:
    found = Paired.of(verdicts([1, 1, 1, 0, 0, 1]), verdicts([1, 0, 0, 1, 0, 1], weights="second"))
    assert (found.both, found.first, found.second, found.neither) == (2, 2, 1, 1)
    assert found.n == 6
    assert found.difference == pytest.approx(1 / 6)


def test_the_interval_of_a_published_example() -> None:
    """Complete response before and after therapy (Cavo et al. 2012), the square-and-add interval in
    Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables, Chapter 8."""
    found = Paired(59, 6, 16, 80)
    assert round(found.difference, 4) == -0.0621
    assert tuple(round(end, 4) for end in found.interval) == (-0.1186, -0.0046)


def test_the_interval_of_many_images_is_that_of_the_normal_distribution() -> None:
    found = Paired(52_000_00, 6_000_00, 5_000_00, 37_000_00)
    n, b, c = found.n, found.first, found.second
    error = ((b + c - (b - c) ** 2 / n) ** 0.5) / n
    reach = NormalDist().inv_cdf(0.975) * error
    expected = (found.difference - reach, found.difference + reach)
    assert found.interval == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    "p", [(0.4, 0.15, 0.15, 0.3), (0.5, 0.2, 0.1, 0.2), (0.05, 0.1, 0.25, 0.6)]
)
def test_the_interval_holds_the_truth_95_times_in_100(p: tuple[float, ...]) -> None:
    """The exact coverage: the sum of the probabilities of all tables of 30 images whose interval
    holds the true difference."""
    n, truth = 30, p[1] - p[2]
    covered = total = 0.0
    for a, b, c in product(range(n + 1), repeat=3):
        d = n - a - b - c
        if d < 0:
            continue
        counts = (a, b, c, d)
        logs = sum(k * np.log(q) - lgamma(k + 1) for k, q in zip(counts, p, strict=True))
        probability = np.exp(logs + lgamma(n + 1))
        low, high = Paired(*counts).interval
        total += probability
        covered += probability * (low <= truth <= high)
    assert total == pytest.approx(1)
    assert 0.94 < covered < 0.98


@pytest.mark.parametrize(
    "table",
    [(50, 0, 0, 50), (100, 0, 0, 0), (0, 0, 0, 9), (0, 7, 0, 0), (0, 0, 5, 0), (3, 4, 4, 2)],
)
def test_the_interval_of_extreme_tables(table: tuple[int, ...]) -> None:
    found = Paired(*table)
    low, high = found.interval
    assert -1 <= low <= found.difference <= high <= 1
    assert low < high or found.first + found.second == 0
    swapped = Paired(table[0], table[2], table[1], table[3]).interval
    assert swapped == pytest.approx((-high, -low))


@pytest.mark.parametrize(
    ("b", "c"),
    [(0, 0), (1, 0), (5, 0), (3, 3), (10, 2), (2, 10), (60, 61), (480, 370), (9000, 8600)],
)
def test_mcnemars_exact_test(b: int, c: int) -> None:
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert Paired(20, b, c, 30).p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemars_exact_test_by_hand() -> None:
    """Ten images, nine to one: 2 (1 + 10) / 1024."""
    assert Paired(5, 9, 1, 5).p_value == pytest.approx(22 / 1024)
    assert sum(comb(10, k) for k in range(2)) == 11


def test_the_images_needed_tell_the_difference_four_times_in_five() -> None:
    """The power of McNemar's test at that number, summed over the discordant images."""
    share, odds = 0.1, 0.6  # of the images one network alone is right, of these 60 % the first
    found = Paired(50_000, 6_000, 4_000, 40_000)
    needed = found.images_needed
    assert needed is not None
    tosses = np.arange(int(0.6 * share * needed), int(1.4 * share * needed))
    critical = stats.binom.ppf(0.025, tosses, 0.5)  # fewer than this many are told by p < 0.05
    told = stats.binom.cdf(critical - 1, tosses, 1 - odds)
    power = float((stats.binom.pmf(tosses, needed, share) * told).sum())
    assert 0.76 < power < 0.82  # the exact test is a little conservative
    assert Paired(5, 3, 3, 5).images_needed is None


def test_a_point_of_difference_on_ten_thousand_images_is_told_or_not() -> None:
    """100 images of 10,000: enough where the networks fail on the same images, else not."""
    alike, apart = Paired(5000, 300, 200, 4500), Paired(3000, 2300, 2200, 2500)
    assert alike.difference == apart.difference == 0.01
    assert alike.is_told
    assert not apart.is_told
    assert alike.sentence("A", "B") == (
        "A is 1.00 points higher (95 % interval 0.56 to 1.44, p < 0.001, 10,000 images): "
        "a difference"
    )
    assert apart.sentence("A", "B") == (
        "A is 1.00 points higher (95 % interval -0.31 to 2.31, p = 0.14, 10,000 images): no "
        "difference can be told from these images; about 36,000 images would be needed"
    )


def test_the_higher_one_is_named() -> None:
    assert Paired(50, 2, 20, 28).sentence("A", "B").startswith("B is 18.00 points higher (95 % ")
    low, high = Paired(50, 2, 20, 28).interval
    assert f"interval {-100 * high:.2f} to {-100 * low:.2f}," in Paired(50, 2, 20, 28).sentence(
        "A", "B"
    )
    reach = f"{100 * Paired(5, 2, 2, 5).interval[1]:.2f}"
    assert Paired(5, 2, 2, 5).sentence("A", "B") == (
        f"A and B are equal (95 % interval -{reach} to {reach}, p = 1.00, 14 images): no "
        "difference can be told from these images"
    )


def test_the_exact_test_is_stricter_than_the_interval() -> None:
    """Five images to none: the interval excludes 0, and the exact test says 1 in 16."""
    found = Paired(10, 5, 0, 10)
    assert found.interval[0] > 0
    assert found.p_value == pytest.approx(0.0625)
    assert not found.is_told


def test_where_the_test_tells_a_difference_0_is_not_in_the_interval() -> None:
    told = 0
    for both, first, second, neither in product((0, 5, 100), range(31), range(31), (0, 5, 100)):
        if both + first + second + neither == 0:
            continue
        found = Paired(both, first, second, neither)
        if found.is_told:
            low, high = found.interval
            assert not low <= 0 <= high, found
            told += 1
    assert told > 1000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": "j"}, "other images"),
        ({"index": [0, 1, 2, 4]}, "not the same ones; evaluate both with the same --limit"),
        ({"label": [0, 1, 2, 1]}, "not the same ones"),
        ({"eps": 0.1}, "eps 0.2 and 0.1, .* the same --eps"),
        ({"norm": "l2"}, "norm linf and l2, .* of one norm"),
        ({"alpha": None}, "alpha 0.05 and None, .* the same --alpha"),
        ({"attack": "fgsm"}, "attack pgd-20 and fgsm, .* under the same attack"),
        ({"precision": "bfloat16"}, "precision float32 and bfloat16"),
    ],
)
def test_what_is_not_comparable_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Paired.of(verdicts([1, 0, 1, 0]), verdicts([1, 0, 1, 0], **changes))


def test_fewer_images_are_refused() -> None:
    with pytest.raises(UserError, match="4 and 3 images"):
        Paired.of(verdicts([1, 0, 1, 0]), verdicts([1, 0, 1]))


def test_mean_and_deviation_over_seeds() -> None:
    values = [0.5012, 0.4931, 0.5107]
    mean, deviation = mean_and_deviation(values)
    assert mean == pytest.approx(np.mean(values))
    assert deviation == pytest.approx(np.std(values, ddof=1))
    assert mean_and_deviation([0.5]) == (0.5, None)
