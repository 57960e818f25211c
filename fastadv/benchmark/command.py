"""``fastadv bench``: time training steps against the device's limits and against peers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import rich.console
import torch
import typer
from rich.markup import escape
from rich.table import Table

from fastadv.benchmark.compare import Comparison, Outcome, Say, compared
from fastadv.benchmark.kernel_table import kernel_table
from fastadv.benchmark.limits import ELEMENT_BYTES
from fastadv.benchmark.ours import require_mode
from fastadv.benchmark.parity import require_fused_parity, require_parity
from fastadv.benchmark.peer_list import usual_peers
from fastadv.benchmark.plot import plot_batches, require_matplotlib
from fastadv.benchmark.profiling import heaviest
from fastadv.benchmark.results import idle_rows
from fastadv.benchmark.rows import Row, SoFar, append_rows, provenance, results_file
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import Spec, parse_specs
from fastadv.benchmark.table import (
    norm_table,
    number,
    pass_table,
    percent,
    rate_table,
    speedup_table,
    step_table,
)
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError, unknown

USUAL_MODES = {"cpu": ("eager", "compiled"), "cuda": ("eager", "compiled", "captured")}
EVAL_PEERS_NEED = Spec("pgd", (("attack_bn", "eval"),))


def bench(
    methods: Annotated[
        str,
        typer.Option(
            help="methods with commas, or all; options as in pgd:attack_bn=eval; "
            "pgd:fused_norm=on runs own BatchNorm kernels on CUDA"
        ),
    ] = "pgd",
    model: Annotated[str, typer.Option(help="network")] = "preact_resnet18",
    width: Annotated[int | None, typer.Option(help="the network's width")] = None,
    batch_size: Annotated[
        str, typer.Option(help="images per step; several, separated by commas, for --plot")
    ] = "128",
    image_size: Annotated[int, typer.Option(help="height and width of the images")] = 32,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; several with commas")] = "bf16",
    modes: Annotated[
        str | None,
        typer.Option(
            help="eager, compiled, captured or captured-eager, with commas [the first that this "
            "device has]"
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="interleaved turns")] = 9,
    peers: Annotated[
        bool, typer.Option("--peers", help="also time common PyTorch loops, torchattacks and ART")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="write a trace and print the heaviest operations")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="draw images/s against batch size")] = None,
    out: Annotated[Path, typer.Option(help="folder for rows and traces")] = Path("runs/bench"),
    threads: Annotated[int | None, typer.Option(help="CPU threads, also of the peers")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
) -> None:
    """Time training steps against the device's limits, their own passes, and peers."""
    if plot is not None:
        require_matplotlib()
    if threads is not None:
        torch.set_num_threads(_at_least_one("threads", threads))
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # graphs and streams are made on the current one
    specs = parse_specs(methods)
    plan = [
        Comparison(
            Setting(
                model, width, size, _at_least_one("image-size", image_size), device=str(chosen)
            ),
            _with_eval(specs) if peers else specs,
            kind,
            _modes(modes, chosen),
            _at_least_one("repeats", repeats),
            usual_peers(str(chosen)) if peers else (),
        )
        for size in _sizes(batch_size)
        for kind in _dtypes(dtype)
    ]
    console = wide_console()
    rows = run_comparisons(plan, out, console, with_profile=profile)
    if plot is not None:
        plot_batches(rows, plot)
        console.print(f"wrote {escape(str(plot))}")


def wide_console() -> rich.console.Console:
    """A console with tables of full width, unless a terminal is narrower."""
    width = None if sys.stdout.isatty() else 120
    return rich.console.Console(highlight=False, soft_wrap=True, width=width)


def run_comparisons(
    plan: Sequence[Comparison],
    out: Path,
    console: rich.console.Console,
    *,
    with_profile: bool = False,
    say: Say | None = None,
) -> list[Row]:
    """Run every comparison; its rows are written to ``out`` when it is done, and returned.

    Preliminary results of a comparison are in a file next to them, named after the run
    (``rows.SoFar``). If there are peers and a comparison has no ``parity``, the parity tests are
    run first; raises ``UserError`` if they fail. Steps with own BatchNorm kernels are compared with
    PyTorch's in the same way. ``say`` receives progress messages (None: a line of the terminal, if
    there is one).
    """
    plan = _with_fused_parity(_with_parity(plan, console), console)
    device = torch.device(plan[0].setting.device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make the folder {out}: {error.strerror}.") from None
    file, origin = results_file(out, device), provenance(device)
    unfinished = SoFar(file, origin["run"])
    rows: list[Row] = []
    for comparison in plan:
        setting = comparison.setting
        console.print(f"[bold]{setting.model}, batch {setting.batch_size}, {comparison.dtype}[/]")

        def so_far(rows: list[Row]) -> None:
            unfinished.write(row | origin for row in rows)

        with compared(comparison, say or _progress(console), so_far) as outcome:
            found = [row | origin for row in outcome.rows]
            append_rows(file, found)
            unfinished.remove()
            rows += found
            if comparison.kernels:
                append_rows(file, [row | origin for row in _kernels_of_first(comparison, outcome)])
            for idle in idle_rows(setting, outcome.candidates, device):
                append_rows(file, [idle | origin])  # immediately: a profile may take long
                _note_idle(found, idle)
            for sentence in outcome.skipped:
                console.print(f"[yellow]skipped[/] {escape(sentence)}")
            if with_profile:
                _show_profile(outcome, device, out, console)
    _show(rows, console)
    console.print(f"rows: {escape(str(file))}")
    return rows


def _kernels_of_first(comparison: Comparison, outcome: Outcome) -> list[Row]:
    """A kernel table of the first candidate, if it is ours and on CUDA."""
    device, first = torch.device(comparison.setting.device), outcome.candidates[0]
    if device.type != "cuda" or first.once is None:
        return []
    about = {"candidate": first.name, **first.facts, "config": comparison.setting.as_row()}
    return kernel_table(first.once, device, outcome.launches, outcome.copy_rate, about)


def _with_parity(plan: Sequence[Comparison], console: rich.console.Console) -> Sequence[Comparison]:
    """The plan with ``parity`` set in every comparison with peers."""
    asking = [comparison for comparison in plan if comparison.peers and not comparison.parity]
    if not asking:
        return plan
    console.print("running the parity tests")
    specs = dict.fromkeys(spec for comparison in plan for spec in comparison.specs)
    modes = dict.fromkeys(mode for comparison in plan for mode in comparison.modes)
    looked_at = require_parity(specs, modes, torch.device(plan[0].setting.device))
    console.print(f"parity holds: {escape(looked_at)}")
    return [replace(each, parity=each.parity or looked_at) for each in plan]


def _with_fused_parity(
    plan: Sequence[Comparison], console: rich.console.Console
) -> Sequence[Comparison]:
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


def _show(rows: Sequence[Row], console: rich.console.Console) -> None:
    for row in rows:
        if row["kind"] == "limits":
            console.print(
                f"{row['device']}, {row['dtype']}: copies {number(row['copy_gb_per_s'])} GB/s, "
                f"matrix products {number(row['matmul_tflop_per_s'])} TFLOP/s"
            )
    for shown in (pass_table, step_table, rate_table, speedup_table, norm_table):
        table = shown(rows)
        if table.row_count:
            console.print(table)


def _show_profile(
    outcome: Outcome, device: torch.device, out: Path, console: rich.console.Console
) -> None:
    """Profile one step of each of our own candidates."""
    for candidate in outcome.candidates:
        if not candidate.is_our_step or candidate.once is None:
            continue
        name = f"{candidate.name} batch {outcome.batch_size}".replace(" ", "-").replace(":", "-")
        trace = out / f"{name}.trace.json"
        table = Table(title=f"heaviest operations of {candidate.name}")
        for name in ("operation", "ms", "share"):
            table.add_column(name, justify="left" if name == "operation" else "right")
        for name, seconds, share in heaviest(candidate.once, device, trace):
            table.add_row(escape(name[:80]), number(seconds * 1e3), percent(share))
        console.print(table)
        console.print(f"trace: {escape(str(trace))}")


def _progress(console: rich.console.Console) -> Say:
    """Progress on one line of a terminal; nothing if the output is not a terminal."""

    def say(sentence: str) -> None:
        if console.is_terminal:
            print(f"\r\033[K{sentence}", end="", file=sys.stderr, flush=True)

    return say


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise UserError(f"--{name} must be at least 1, not {value}.")
    return value


def _sizes(text: str) -> list[int]:
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entry.isdigit() and int(entry) > 1 for entry in entries):
        raise UserError(f"--batch-size takes whole numbers above 1 such as 64,128, not {text!r}.")
    return [int(entry) for entry in entries]


def _dtypes(text: str) -> list[str]:
    entries = [entry.strip() for entry in text.split(",")]
    for entry in entries:
        if entry not in ELEMENT_BYTES:
            raise unknown("precision", entry, ELEMENT_BYTES)
    return entries


def _modes(text: str | None, device: torch.device) -> list[str]:
    if text is None:
        return list(USUAL_MODES[device.type])
    entries = [entry.strip() for entry in text.split(",")]
    for entry in entries:
        require_mode(entry, device)
    return entries


def _with_eval(specs: Sequence[Spec]) -> list[Spec]:
    """Some peers attack in eval mode only; adds our attack in that mode for them."""
    if not any(spec.is_the_peers for spec in specs):
        raise UserError("The peers train PGD-10 AT: add pgd to --methods to compare with them.")
    return [*specs, *([] if EVAL_PEERS_NEED in specs else [EVAL_PEERS_NEED])]
