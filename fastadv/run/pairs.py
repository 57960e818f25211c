"""Two runs on the same test images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastadv.errors import UserError
from fastadv.evaluation.accuracy import specs_of, warn_of_ignored_alpha
from fastadv.evaluation.paired import Paired
from fastadv.evaluation.verdicts import Verdicts
from fastadv.run.alike import open_alike
from fastadv.run.finished import evaluate_run
from fastadv.run.which import weights_named
from fastadv.storage.printable import printable


@dataclass(frozen=True)
class RunPair:
    """Two runs under one attack, with their ``which`` weights."""

    attack: str
    which: str
    first: Verdicts
    second: Verdicts
    paired: Paired


def compare_runs(
    first: str,
    second: str,
    attacks: str,
    *,
    which: str = "best",
    eps: str | None = None,
    alpha: str | None = None,
    on: str = "test",
    **options: Any,
) -> Iterator[RunPair]:
    """The two runs under each attack, one after another; ``options`` are those of
    ``evaluate_run``. Raises ``UserError`` for runs that cannot be compared."""
    weights = weights_named(which)
    specs = specs_of(attacks, alpha)
    warn_of_ignored_alpha(specs, alpha)
    names = list(specs)
    open_alike([first, second], weights, eps=eps, alpha=alpha, on=on)
    options |= {"eps": eps, "alpha": alpha, "on": on}
    for name in weights:
        for attack in names:
            one, other = (
                evaluate_run(path, attack, which=name, **options).verdicts[attack]
                for path in (first, second)
            )
            if one.facts["weights"] == other.facts["weights"]:
                raise UserError(
                    f"{printable(first)} and {printable(second)} hold the same weights, so there "
                    "is nothing to compare; give another run."
                )
            yield RunPair(attack, name, one, other, Paired.of(one, other))
