"""The scores of one or several runs, as a table of a paper has them: methods and attacks, best and
last weights, the seeds of a method together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastadv.errors import UserError
from fastadv.evaluation.accuracy import specs_of, warn_of_ignored_alpha
from fastadv.evaluation.intervals import wilson
from fastadv.evaluation.over_seeds import mean_and_deviation
from fastadv.run.alike import methods_of, open_alike
from fastadv.run.eval_pass import EvalScores
from fastadv.run.finished import evaluate_run
from fastadv.run.which import one_named, weights_named
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
    """What ``evaluate_runs`` found on ``n`` images. ``on``: what they are; ``which``: the weights,
    in their order; ``said``: the threat and the precision; ``stored``: attacks with results from
    before; ``title``: what was evaluated, where that is one thing; ``unfinished``: sentences about
    attacks whose time ran out, which are not among ``attacks``; ``examples``: files that hold
    adversarial examples."""

    methods: list[MethodScores]
    attacks: list[str]
    which: tuple[str, ...]
    n: int
    on: str
    said: str
    stored: list[str]
    title: str | None = None
    unfinished: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()


def evaluate_runs(
    paths: Sequence[str],
    attacks: str,
    *,
    which: str = "best",
    eps: str | None = None,
    alpha: str | None = None,
    on: str = "test",
    **options: Any,
) -> ScoreTable:
    """``evaluate_run`` of each run in ``paths``, with ``options``, for the table of a paper.

    ``which``: "best" or "last" weights, "both", or the number of an epoch. Raises ``UserError``
    for runs that cannot be in one table, before the first is evaluated where that can be seen.
    """
    weights = weights_named(which)
    specs = specs_of(attacks, alpha)
    warn_of_ignored_alpha(specs, alpha)
    names = list(specs)
    configs = open_alike(paths, weights, eps=eps, alpha=alpha, on=on)
    options |= {"eps": eps, "alpha": alpha, "on": on}
    found: dict[tuple[str, str], EvalScores] = {}
    for name in weights:
        for path in paths:
            scores = evaluate_run(path, attacks, which=name, **options)
            for other in paths[: paths.index(path)]:
                _require_another_network(other, found[name, other], path, scores)
            found[name, path] = scores
    every = list(found.values())
    names = [name for name in names if all(name in scores for scores in every)]
    methods = [
        MethodScores(
            method,
            tuple(runs),
            {name: _over([found[name, run] for run in runs], names) for name in weights},
        )
        for method, runs in methods_of(configs).items()
    ]
    stored = [name for name in names if all(name in scores.stored for scores in every)]
    title = None
    if len(methods) == 1:
        title = paths[0] if len(paths) == 1 else f"{methods[0].name}, {len(paths)} seeds"
        title += f", {weights[0]} weights" if len(weights) == 1 else ""
    unfinished = tuple(
        sentence
        for (name, path), scores in found.items()
        for sentence in scores.unfinished(f"{printable(path)}, {name} weights")
    )
    first = every[0]
    return ScoreTable(
        methods, names, weights, first.n, first.on, first.said, stored, title, unfinished,
        tuple(file for scores in every for file in _examples(scores)),
    )  # fmt: skip


def table_of_run(path: str, which: str, scores: EvalScores) -> ScoreTable:
    """The table of the ``scores`` of one run's weights ``which``."""
    which = one_named(which)
    return _table_of_one(path, which, scores, f"{path}, {which} weights")


def table_of_file(path: str, scores: EvalScores) -> ScoreTable:
    """The table of the ``scores`` of the network in the file ``path``."""
    return _table_of_one(path, "accuracy", scores, path)


def _table_of_one(path: str, column: str, scores: EvalScores, title: str) -> ScoreTable:
    attacks = list(scores)
    method = MethodScores(path, (path,), {column: _over([scores], attacks)})
    return ScoreTable(
        [method], attacks, (column,), scores.n, scores.on, scores.said, scores.stored, title,
        tuple(scores.unfinished(printable(title))), _examples(scores),
    )  # fmt: skip


def _examples(scores: EvalScores) -> tuple[str, ...]:
    return tuple(str(path) for path in scores.examples.values())


def _over(seeds: Sequence[EvalScores], attacks: Sequence[str]) -> dict[str, Score]:
    return {
        attack: Score(tuple(scores[attack] for scores in seeds), seeds[0].n) for attack in attacks
    }


def _require_another_network(one: str, first: EvalScores, other: str, second: EvalScores) -> None:
    """Raise ``UserError`` unless the runs ``one`` and ``other`` hold different networks that were
    evaluated on the same images."""
    names = f"{printable(one)} and {printable(other)}"
    if first.facts["image_set"] != second.facts["image_set"] or first.n != second.n:
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
