"""Runs comparisons one after another: rows to the results file, tables to the console."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from fastadv.benchmark.compare import Comparison, Outcome, Say, compared
from fastadv.benchmark.kernel_table import kernel_table
from fastadv.benchmark.parity import require_fused_parity, require_parity
from fastadv.benchmark.profiling import heaviest
from fastadv.benchmark.progress import progress
from fastadv.benchmark.results import idle_rows
from fastadv.benchmark.rows import Row, SoFar, append_rows, provenance, results_file
from fastadv.benchmark.table import (
    brief_table,
    norm_table,
    number,
    operator_table,
    pass_table,
    percent,
    rate_table,
    speedup_table,
    step_table,
)
from fastadv.engine.process import stop
from fastadv.errors import Interrupted, UserError
from fastadv.storage.printable import printable

WIDTH = 80  # of what is not a terminal


@dataclass
class Measured:
    """The rows of a benchmark (those of the results file), what was skipped, and whether Ctrl-C
    ended it early."""

    file: Path
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    interrupted: str = ""  # the signal that did


def wide_console(*, stderr: bool = False) -> Console:
    """A console with tables as wide as the terminal, or 80 columns in a file."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else WIDTH
    return Console(highlight=False, soft_wrap=True, width=width, stderr=stderr)


def raise_if_interrupted(measured: Measured) -> None:
    """Raise ``Interrupted`` if Ctrl-C ended the benchmark early."""
    if measured.interrupted:
        raise Interrupted(
            f"Stopped early; what was measured is in {printable(measured.file)}.",
            measured.interrupted,
        )


def run_comparisons(
    plan: Sequence[Comparison],
    out: Path,
    console: Console,
    *,
    with_profile: bool = False,
    say: Say | None = None,
) -> list[Row]:
    """Run every comparison as ``run_plan`` does and return the rows; raises ``Interrupted`` after
    Ctrl-C, when what was measured is written and shown."""
    measured = run_plan(plan, out, console, with_profile=with_profile, say=say)
    raise_if_interrupted(measured)
    return measured.rows


def run_plan(
    plan: Sequence[Comparison],
    out: Path,
    console: Console,
    *,
    with_profile: bool = False,
    say: Say | None = None,
) -> Measured:
    """Run every comparison; its rows are written to ``out`` when it is done, and returned. Ctrl-C
    ends the one that runs, whose rows are kept.

    Preliminary results of a comparison are in a file next to them, named after the run
    (``rows.SoFar``). If there are peers and a comparison has no ``parity``, the parity tests are
    run first; raises ``UserError`` if they fail. Steps with own BatchNorm kernels are compared with
    PyTorch's in the same way. ``say`` receives progress messages (None: they are shown).
    """
    plan = _with_fused_parity(_with_parity(plan, console), console)
    device = torch.device(plan[0].setting.device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make the folder {out}: {error.strerror}.") from None
    file, origin = results_file(out, device), provenance(device)
    unfinished = SoFar(file, origin["run"])
    measured = Measured(file)
    say = say or progress()
    for comparison in plan:
        setting = comparison.setting
        console.print(f"[bold]{setting.model}, batch {setting.batch_size}, {comparison.dtype}[/]")

        def so_far(rows: list[Row]) -> None:
            unfinished.write(row | origin for row in rows)

        with compared(comparison, say, so_far) as outcome, stop.held():
            say("")
            found = [row | origin for row in outcome.rows]
            append_rows(file, found)
            unfinished.remove()
            measured.rows += found
            measured.skipped += outcome.skipped
            for sentence in outcome.skipped:
                console.print(f"[yellow]skipped[/] {escape(sentence)}", soft_wrap=False)
            if outcome.interrupted:
                measured.interrupted = outcome.interrupted
                break
            if comparison.kernels:
                table = [row | origin for row in _kernels_of_first(comparison, outcome)]
                append_rows(file, table)
                measured.rows += table
            for idle in idle_rows(setting, outcome.candidates, device):
                append_rows(file, [idle | origin])  # immediately: a profile may take long
                _note_idle(found, idle)
            if with_profile:
                _show_profile(outcome, device, out, console)
        if stop.asked() is not None:  # while it was written
            measured.interrupted = str(stop.asked())
            break
    _show(measured.rows, console)
    console.print(f"rows: {escape(str(file))}")
    return measured


def _kernels_of_first(comparison: Comparison, outcome: Outcome) -> list[Row]:
    """A kernel table of the first candidate, if it is ours and on CUDA."""
    device, first = torch.device(comparison.setting.device), outcome.candidates[0]
    if device.type != "cuda" or first.once is None:
        return []
    about = {"candidate": first.name, **first.facts, "config": comparison.setting.as_row()}
    return kernel_table(first.once, device, outcome.launches, outcome.copy_rate, about)


def _with_parity(plan: Sequence[Comparison], console: Console) -> Sequence[Comparison]:
    """The plan with ``parity`` set in every comparison with peers."""
    asking = [comparison for comparison in plan if comparison.needs_parity]
    if not asking:
        return plan
    console.print("running the parity tests")
    specs = dict.fromkeys(spec for comparison in plan for spec in comparison.specs)
    modes = dict.fromkeys(mode for comparison in plan for mode in comparison.modes)
    looked_at = require_parity(specs, modes, torch.device(plan[0].setting.device))
    console.print(f"parity holds: {escape(looked_at)}")
    return [replace(each, parity=each.parity or looked_at) for each in plan]


def _with_fused_parity(plan: Sequence[Comparison], console: Console) -> Sequence[Comparison]:
    """The plan with ``fused_parity`` set in every comparison of steps with own BatchNorm
    kernels."""
    device = torch.device(plan[0].setting.device)
    asking = [each for each in plan if each.fused_parity is None]
    specs = dict.fromkeys(spec for each in asking for spec in each.specs)
    modes = dict.fromkeys(mode for each in asking for mode in each.modes)
    looked_at = require_fused_parity(specs, modes, device)
    if looked_at is None:
        return plan
    console.print(f"parity holds: {escape(looked_at)}")
    return [replace(each, fused_parity=each.fused_parity or looked_at) for each in plan]


def _note_idle(steps: Sequence[Row], idle: Row) -> None:
    for row in steps:
        if row["kind"] == "step" and row["name"] == idle["name"]:
            row["idle_share"] = idle["idle_share"]


SHOWN = (pass_table, step_table, rate_table, speedup_table, norm_table, operator_table)


def _show(rows: Sequence[Row], console: Console) -> None:
    for row in rows:
        if row["kind"] == "limits":
            console.print(
                f"{row['device']}, {row['dtype']}: copies {number(row['copy_gb_per_s'])} GB/s, "
                f"matrix products {number(row['matmul_tflop_per_s'])} TFLOP/s",
                soft_wrap=False,
            )
    for shown in SHOWN:
        table = shown(rows)
        if table.row_count:
            console.print(table)


def _show_profile(outcome: Outcome, device: torch.device, out: Path, console: Console) -> None:
    """Profile one step of each of our own candidates."""
    for candidate in outcome.candidates:
        if not candidate.is_our_step or candidate.once is None:
            continue
        name = f"{candidate.name} batch {outcome.batch_size}".replace(" ", "-").replace(":", "-")
        trace = out / f"{name}.trace.json"
        title = f"heaviest operations of {candidate.name}"
        table = brief_table(title, "operation", ("ms", "share"))
        for name, seconds, share in heaviest(candidate.once, device, trace):
            table.add_row(escape(name[:60]), number(seconds * 1e3), percent(share))
        console.print(table)
        console.print(f"trace: {escape(str(trace))}")
