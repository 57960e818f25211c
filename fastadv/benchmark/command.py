"""``fastadv bench``: time training steps against the device's limits and against peers."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from fastadv.algorithms.contract.passes import UNITS
from fastadv.benchmark.asked import Asked, checked, plan_of, selected, with_eval
from fastadv.benchmark.compare import Comparison, Outcome, Say, compared
from fastadv.benchmark.document import Document, Target, document, read_document, schema_text
from fastadv.benchmark.kernel_table import kernel_table
from fastadv.benchmark.parity import require_fused_parity, require_parity
from fastadv.benchmark.peer_list import usual_peers
from fastadv.benchmark.plot import plot_batches, require_matplotlib
from fastadv.benchmark.profiling import heaviest
from fastadv.benchmark.progress import progress
from fastadv.benchmark.regression import FAILED, THRESHOLD, change_table, regression, sentences
from fastadv.benchmark.results import idle_rows
from fastadv.benchmark.rows import Row, SoFar, append_rows, provenance, results_file
from fastadv.benchmark.specs import parse_specs
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
from fastadv.engine.process.device import choose_device
from fastadv.errors import Interrupted, UserError
from fastadv.storage.printable import printable

USUAL_MODES = {"cpu": ("eager", "compiled"), "cuda": ("eager", "compiled", "captured")}
WIDTH = 80  # of what is not a terminal


@dataclass
class Measured:
    """The rows of a benchmark (those of the results file), what was skipped, and whether Ctrl-C
    ended it early."""

    file: Path
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    interrupted: bool = False


def bench(
    methods: Annotated[
        str | None,
        typer.Option(
            help="methods with commas, or all; options as in pgd:attack_bn=eval; "
            "pgd:fused_norm=on runs own BatchNorm kernels on CUDA",
            show_default="pgd",
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="time only these rows: methods, passes, kernels, peers, with commas; * and ? "
            "stand for letters, kernel:* for all kernels"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="network", show_default="preact_resnet18")
    ] = None,
    width: Annotated[int | None, typer.Option(help="the network's width")] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help="images per step; several, separated by commas, for --plot", show_default="128"
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="height and width of the images", show_default="32")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="fp32, bf16 or fp16; several with commas", show_default="bf16"),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help="eager, compiled, captured or captured-eager, with commas; the first one's passes "
            "are timed first",
            show_default="all but captured-eager that this device has",
        ),
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="interleaved turns", show_default="9")] = None,
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
    json_file: Annotated[
        str | None,
        typer.Option("--json", help="write all as one JSON document; - for standard output"),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON Schema of these documents")
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(
            help="a --json file: measure its rows again, print new over old; exit code 3 if a row "
            "is slower beyond noise"
        ),
    ] = None,
    with_file: Annotated[
        str | None,
        typer.Option("--with", help="with --compare: another --json file instead of measuring"),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="with --compare: slower means a whole interval above this",
            show_default=str(THRESHOLD),
        ),
    ] = None,
) -> None:
    """Time training steps against the device's limits, their own passes, and peers."""
    if schema:
        print(schema_text(), end="")
        return
    target = None if json_file is None else Target(json_file)
    console = wide_console(stderr=target is not None and target.is_stdout)
    settings = {
        "methods": methods, "model": model, "width": width, "batch-size": batch_size,
        "image-size": image_size, "dtype": dtype, "modes": modes, "repeats": repeats,
        "threads": threads, "peers": peers or None,
    }  # fmt: skip
    limit = _threshold(threshold, compare)
    old = None if compare is None else read_document(compare)
    if target is not None:
        target.require_writable()
    if old is not None:
        _require_alone(settings, "--compare measures with the settings of its file")
    if with_file is not None:
        if old is None:
            raise UserError("--with is the second file of --compare: add --compare OLD.json.")
        _require_alone({"only": only}, "--with measures nothing")
        _judge(old, read_document(with_file), limit, target, console)
        return
    if plot is not None:
        require_matplotlib()
    chosen = choose_device(device)
    if old is None:
        asked = _asked(settings, only, chosen)
    else:
        asked = _asked_again(old, only, chosen)
    torch.set_num_threads(asked.threads)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # graphs and streams are made on the current one
    measured = run_plan(plan_of(asked, chosen), out, console, with_profile=profile)
    found = document(measured.rows, asked, measured.skipped, complete=not measured.interrupted)
    if plot is not None and any(row["kind"] == "step" for row in measured.rows):
        plot_batches(measured.rows, plot)
        console.print(f"wrote {escape(str(plot))}")
    if old is None or measured.interrupted:
        _write(found, target, console)
        _raise_if_interrupted(measured)
        return
    _judge(old, found, limit, target, console)


def _judge(
    old: Document, new: Document, threshold: float, target: Target | None, console: Console
) -> None:
    """Show the comparison of two documents and write the new one with it; ends with exit code 3 if
    a row is slower."""
    found = regression(old, new, threshold)
    console.print(change_table(found))
    for sentence in sentences(found):
        console.print(escape(sentence), soft_wrap=False)
    _write(new | {"comparison": found.as_json(old)}, target, console)
    if found.slower:
        raise typer.Exit(FAILED)


def _write(found: Document, target: Target | None, console: Console) -> None:
    if target is not None:
        target.write(found)
        if not target.is_stdout:
            console.print(f"wrote {escape(printable(target.name))}")


def _raise_if_interrupted(measured: Measured) -> None:
    if measured.interrupted:
        raise Interrupted(f"Stopped early; what was measured is in {printable(measured.file)}.")


def _require_alone(given: Mapping[str, object], reason: str) -> None:
    flags = [f"--{name}" for name, value in given.items() if value is not None]
    if flags:
        raise UserError(f"{reason}: omit {', '.join(flags)}.")


def _threshold(given: float | None, compare: str | None) -> float:
    if given is None:
        return THRESHOLD
    if compare is None:
        raise UserError("--threshold belongs to --compare: add --compare OLD.json.")
    if not 1 <= given < math.inf:
        raise UserError(f"--threshold is a ratio of at least 1 such as {THRESHOLD}, not {given:g}.")
    return given


def _asked(settings: Mapping[str, Any], only: str | None, device: torch.device) -> Asked:
    """What the options ask for."""
    threads, modes = settings["threads"], settings["modes"]
    asked = Asked(
        methods=tuple(str(spec) for spec in parse_specs(settings["methods"] or "pgd")),
        model=settings["model"] or "preact_resnet18",
        width=settings["width"],
        batch_sizes=_sizes(settings["batch-size"] or "128"),
        image_size=32 if settings["image-size"] is None else settings["image-size"],
        dtypes=tuple(_entries(settings["dtype"] or "bf16")),
        modes=USUAL_MODES[device.type] if modes is None else tuple(_entries(modes)),
        repeats=9 if settings["repeats"] is None else settings["repeats"],
        peers=tuple(usual_peers(str(device))) if settings["peers"] else (),
        steps=True,
        passes=tuple(UNITS),
        operators=(),
        device_type=device.type,
        threads=torch.get_num_threads() if threads is None else threads,
    )
    if only is not None:
        listed = asked.methods if settings["methods"] is not None else None
        asked = selected(asked, only, methods=listed)
    elif settings["peers"]:
        asked = with_eval(asked)
    return checked(asked, device)


def _asked_again(old: Document, only: str | None, device: torch.device) -> Asked:
    """What was asked for when ``old`` was measured."""
    asked = Asked.from_json(old["settings"])
    if asked.device_type != device.type:
        raise UserError(
            f"That benchmark is of a {asked.device_type} device and this one is {device.type}; "
            f"choose with --device, or measure on such a machine and use --with NEW.json."
        )
    return checked(asked if only is None else selected(asked, only, among=asked), device)


def wide_console(*, stderr: bool = False) -> Console:
    """A console with tables as wide as the terminal, or 80 columns in a file."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else WIDTH
    return Console(highlight=False, soft_wrap=True, width=width, stderr=stderr)


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
    _raise_if_interrupted(measured)
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

        with compared(comparison, say, so_far) as outcome:
            say("")
            found = [row | origin for row in outcome.rows]
            append_rows(file, found)
            unfinished.remove()
            measured.rows += found
            measured.skipped += outcome.skipped
            for sentence in outcome.skipped:
                console.print(f"[yellow]skipped[/] {escape(sentence)}", soft_wrap=False)
            if outcome.interrupted:
                measured.interrupted = True
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


def _sizes(text: str) -> tuple[int, ...]:
    entries = _entries(text)
    if not entries or not all(entry.isdecimal() and int(entry) > 1 for entry in entries):
        raise UserError(f"--batch-size takes whole numbers above 1 such as 64,128, not {text!r}.")
    return tuple(map(int, entries))


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",")]
