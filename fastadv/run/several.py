"""The scores of one or several runs, as a table of a paper has them: methods and attacks, best and
last weights, the seeds of a method together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastadv.declared import parse_number
from fastadv.errors import UserError
from fastadv.evaluation.accuracy import specs_of
from fastadv.evaluation.intervals import wilson
from fastadv.evaluation.over_seeds import mean_and_deviation
from fastadv.run.alike import methods_of, open_alike, weights_named
from fastadv.run.eval_pass import EvalScores
from fastadv.run.finished import evaluate_run
from fastadv.storage.printable import printable


@dataclass(frozen=True)
class Score:
    """Accuracies in [0,1] on ``n`` images, one per seed of a method."""

    values: tuple[float, ...]
    n: int

    @property
    def mean(self) -> float:
        return mean_and_deviation(self.values)[0]

    @property
    def deviation(self) -> float | None:
        """The standard deviation over the seeds; None for a single one."""
        return mean_and_deviation(self.values)[1]

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of a single run; None for several seeds."""
        return wilson(self.values[0], self.n) if len(self.values) == 1 else None


@dataclass(frozen=True)
class MethodScores:
    """The scores of the ``runs`` of one method: weights -> attack -> score."""

    name: str
    runs: tuple[str, ...]
    scores: dict[str, dict[str, Score]]

    def difference(self, attack: str) -> float:
        """Accuracy of the best weights minus that of the last ones."""
        return self.scores["best"][attack].mean - self.scores["last"][attack].mean


@dataclass(frozen=True)
class ScoreTable:
    """What ``evaluate_runs`` found on ``n`` images. ``which``: the weights, in their order;
    ``said``: the threat and the precision; ``stored``: attacks with results from before."""

    methods: list[MethodScores]
    attacks: list[str]
    which: tuple[str, ...]
    n: int
    said: str
    stored: list[str]


def evaluate_runs(
    paths: Sequence[str],
    attacks: str,
    *,
    which: str = "best",
    eps: str | None = None,
    alpha: str | None = None,
    **options: Any,
) -> ScoreTable:
    """``evaluate_run`` of each run in ``paths``, with ``options``, for the table of a paper.

    ``which``: "best" or "last" weights, or "both". Raises ``UserError`` for runs that cannot be in
    one table, before the first is evaluated where that can be seen.
    """
    weights = weights_named(which)
    names = list(
        specs_of(attacks.split(","), None if alpha is None else parse_number(alpha, "alpha"))
    )
    configs = open_alike(paths, weights, eps=eps, alpha=alpha)
    found: dict[tuple[str, str], EvalScores] = {}
    for name in weights:
        for path in paths:
            scores = evaluate_run(path, attacks, which=name, eps=eps, alpha=alpha, **options)
            for other in paths[: paths.index(path)]:
                _require_another_network(other, found[name, other], path, scores)
            found[name, path] = scores
    methods = [
        MethodScores(
            method,
            tuple(runs),
            {
                name: {
                    attack: Score(
                        tuple(found[name, run][attack] for run in runs), found[name, runs[0]].n
                    )
                    for attack in names
                }
                for name in weights
            },
        )
        for method, runs in methods_of(configs).items()
    ]
    every = list(found.values())
    stored = [name for name in names if all(name in scores.stored for scores in every)]
    return ScoreTable(methods, names, weights, every[0].n, every[0].said, stored)


def _require_another_network(one: str, first: EvalScores, other: str, second: EvalScores) -> None:
    """Raise ``UserError`` unless the runs ``one`` and ``other`` hold different networks that were
    evaluated on the same images."""
    names = f"{printable(one)} and {printable(other)}"
    if first.facts["images"] != second.facts["images"] or first.n != second.n:
        raise UserError(
            f"{names} were evaluated on different images; evaluate them one by one, or train both "
            "on the same data set."
        )
    if first.facts["weights"] == second.facts["weights"]:
        raise UserError(f"{names} hold the same weights: one is a copy; give one of them.")
    if first.said != second.said:
        raise UserError(
            f"{names} were evaluated in different ways ({first.said}; {second.said}); evaluate "
            "them one by one."
        )
