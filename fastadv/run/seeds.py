"""The same run with several seeds, one after another, and what they found together."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fastadv.declared import coerce
from fastadv.engine.process.one_voice import is_first
from fastadv.errors import Interrupted, TrainingError, UserError
from fastadv.evaluation.over_seeds import interval_of_mean, mean_and_deviation
from fastadv.run.console import Console, as_interval
from fastadv.run.fitting import AUTO
from fastadv.run.onward import train_or_resume
from fastadv.run.request import RunRequest, setting_types
from fastadv.run.resolve import resolve_run
from fastadv.run.run_folder import RunFolder, usual_place
from fastadv.storage import checkpoint, sealed
from fastadv.storage.printable import printable

WEIGHTS = ("best", "last")
_SUMMARY = "summary.json"


def seeds_in(text: object) -> list[int | None]:
    """The seeds in ``text``, such as "0,1,2"; [None] where none is named. Raises ``UserError`` for
    one that is named twice, and for what is no seed."""
    if text is None:
        return [None]
    kind = setting_types()["seed"]
    found: list[int | None] = []
    for part in str(text).split(","):
        seed = coerce("--seed", part.strip(), kind)
        if seed in found:
            raise UserError(f"--seed names {seed} twice; name each seed once.")
        found.append(seed)
    return found


def train_seeds(
    request: RunRequest, seeds: Sequence[int], console: Console | None = None
) -> dict[str, Any]:
    """Train as ``request`` says with each of ``seeds``; returns the summary over them, which is
    also written.

    With ``request.out`` DIR the runs are DIR/seed0, DIR/seed1, ... and the summary is
    DIR/summary.json; without, runs/METHOD-DATA-seed0, ... and runs/METHOD-DATA-seeds.json. Finished
    seeds are not trained again, and an interrupted one continues. A seed that diverges does not end
    the others: when all are done, ``TrainingError`` names it.
    """
    console = console or Console()
    _require_no_run(request)
    summaries: dict[int, dict[str, Any]] = {}
    failed: dict[int, str] = {}
    for seed in seeds:
        request = _with_batch_of(summaries.keys() | failed.keys(), request)
        own = replace(request, seed=seed, out=str(_place(request, seed)))
        console.out.print(f"[bold]seed {seed}[/] of {', '.join(map(str, seeds))}")
        try:
            summaries[seed] = train_or_resume(own, console)
        except TrainingError as error:
            failed[seed] = str(error)
            console.warn(f"seed {seed}: {error}")
        except Interrupted as stopped:
            raise Interrupted(
                f"Stopped by {stopped.by} in seed {seed}; the same command continues.", stopped.by
            ) from None
    found = _together(request, summaries, failed)
    place = _summary_place(request)
    if is_first():  # the group of the last run has been left
        checkpoint.write_text(place, sealed.seal_value(found))
    if summaries:
        console.out.print(_table(found))
    console.out.print(f"saved in {escape(printable(place))}")
    if failed:
        which = ", ".join(map(str, failed))
        raise TrainingError(
            f"{len(failed)} of {len(seeds)} seeds did not finish, {which}: {failed[min(failed)]}"
        )
    return found


def _with_batch_of(begun: Collection[int], request: RunRequest) -> RunRequest:
    """``request``; where it asks for a batch that fits, with what the first of the seeds ``begun``
    has found: with batches of different sizes they would not be the same run."""
    if not begun or resolve_run(request).batch_size != AUTO:
        return request
    folder = RunFolder(_place(request, min(begun)))
    if not folder.config.exists():
        return request
    return replace(request, batch_size=folder.read_config().batch_size)


def _require_no_run(request: RunRequest) -> None:
    """Raise ``UserError`` if their summary would take the place of that of a run."""
    if request.out is not None and os.path.lexists(RunFolder(Path(request.out)).config):
        out = printable(request.out)
        raise UserError(
            f"{out} holds a run, and several seeds write their runs and summary beside each other: "
            "choose another --out or --name."
        )


def _base(request: RunRequest) -> Path:
    return usual_place(resolve_run(request))


def _place(request: RunRequest, seed: int) -> Path:
    if request.out is not None:
        return Path(request.out) / f"seed{seed}"
    base = _base(request)
    return base.with_name(f"{base.name}-seed{seed}")


def _summary_place(request: RunRequest) -> Path:
    if request.out is not None:
        return Path(request.out) / _SUMMARY
    base = _base(request)
    return base.with_name(f"{base.name}-seeds.json")


def _together(
    request: RunRequest, summaries: Mapping[int, dict[str, Any]], failed: Mapping[int, str]
) -> dict[str, Any]:
    """What the seeds found: for each weights and attack the mean, the standard deviation and the
    95 % interval of the mean, and the value of each seed."""
    found: dict[str, Any] = {
        "seeds": list(summaries),
        "runs": {str(seed): _place(request, seed).name for seed in (*summaries, *failed)},
        "not_finished": {str(seed): sentence for seed, sentence in failed.items()},
    }
    if not summaries:
        return found
    first, *_ = summaries.values()
    found["n"] = first["n"]
    for which in WEIGHTS:
        found[which] = {
            attack: _score([summary[which][attack] for summary in summaries.values()])
            for attack in first["last"]
            if all(summary[which] is not None for summary in summaries.values())
        }
    return found


def _score(values: list[float]) -> dict[str, Any]:
    mean, deviation = mean_and_deviation(values)
    return {
        "mean": mean,
        "deviation": deviation,
        "interval": interval_of_mean(values),
        "values": values,
    }


def _table(found: Mapping[str, Any]) -> Table:
    """Of at most 80 columns."""
    many = len(found["seeds"])
    table = Table(
        title=f"test accuracy, % of {found['n']:,} images, over {many} "
        f"{'seed' if many == 1 else 'seeds'}: mean, std, 95 % interval"
    )
    table.add_column("attack")
    for which in WEIGHTS:
        for name in (which, "std", ""):
            table.add_column(name, justify="right")
    for attack in found["last"]:
        cells = [cell for which in WEIGHTS for cell in _cells(found[which].get(attack))]
        table.add_row(escape(printable(attack)), *cells)
    return table


def _cells(score: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if score is None:
        return "", "", ""
    mean = f"{100 * score['mean']:.2f}"
    if score["deviation"] is None:
        return mean, "", ""
    low, high = score["interval"]
    return mean, f"{100 * score['deviation']:.2f}", as_interval((max(low, 0), min(high, 1)))
