"""What ``fastadv bench`` does with its options (``cli/bench.py``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from fastadv.algorithms.contract.passes import UNITS
from fastadv.benchmark.asked import Asked, checked, plan_of, selected, with_eval
from fastadv.benchmark.document import Document, Target, document, read_document
from fastadv.benchmark.peer_list import usual_peers
from fastadv.benchmark.plot import plot_batches, require_matplotlib
from fastadv.benchmark.regression import change_table, regression, sentences
from fastadv.benchmark.running import Measured, raise_if_interrupted, run_plan, wide_console
from fastadv.benchmark.shift import THRESHOLD
from fastadv.benchmark.specs import parse_specs
from fastadv.engine.process import stop
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError
from fastadv.exit_codes import ExitCode
from fastadv.storage.printable import printable, safe_sentence

USUAL_MODES = {"cpu": ("eager", "compiled"), "cuda": ("eager", "compiled", "captured")}


def run(
    *,
    methods: str | None,
    only: str | None,
    model: str | None,
    width: int | None,
    batch_size: str | None,
    image_size: int | None,
    dtype: str | None,
    modes: str | None,
    repeats: int | None,
    peers: bool,
    profile: bool,
    plot: Path | None,
    out: Path,
    threads: int | None,
    device: str,
    json_file: str | None,
    compare: str | None,
    with_file: str | None,
    threshold: float | None,
) -> None:
    """Compare two files, or measure, show and write; the parameters are the options of the
    command."""
    target = None if json_file is None else Target(json_file)
    console = wide_console(stderr=target is not None and target.is_stdout)
    settings = {
        "methods": methods, "model": model, "width": width, "batch-size": batch_size,
        "image-size": image_size, "dtype": dtype, "modes": modes, "repeats": repeats,
        "threads": threads, "peers": peers or None,
    }  # fmt: skip
    limit = _threshold(threshold, compare)
    old = None if compare is None else _read(compare)
    if target is not None:
        target.require_writable()
    if old is not None:
        _require_alone(settings, "--compare measures with the settings of its file")
    if with_file is not None:
        if old is None:
            raise UserError("--with is the second file of --compare: add --compare OLD.json.")
        _judge(old, _read(with_file), limit, target, console)
        return
    if plot is not None:
        require_matplotlib()
    chosen = choose_device(device)
    if old is None:
        asked = _asked(settings, only, chosen)
    else:
        asked = _asked_again(old, only, chosen)
    if plot is not None and not asked.steps:
        raise UserError("--plot draws training steps: name a method in --only too.")
    torch.set_num_threads(asked.threads)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # graphs and streams are made on the current one
    measured = run_plan(plan_of(asked, chosen), out, console, with_profile=profile)
    with stop.held():  # a first signal does not end what writes the document
        _finish(measured, asked, old, limit, target, plot, console)


def _finish(
    measured: Measured,
    asked: Asked,
    old: Document | None,
    limit: float,
    target: Target | None,
    plot: Path | None,
    console: Console,
) -> None:
    found = document(measured.rows, asked, measured.skipped, complete=not measured.interrupted)
    if plot is not None and any(row["kind"] == "step" for row in measured.rows):
        plot_batches(measured.rows, plot)
        console.print(f"wrote {escape(str(plot))}")
    if old is None or measured.interrupted:
        _write(found, target, console)
        raise_if_interrupted(measured)
        return
    _judge(old, found, limit, target, console)


def _read(name: str) -> Document:
    """A document with which another one can be compared: it can be compared with itself."""

    def compared_with_itself(found: Document) -> None:
        itself = regression(found, found)
        change_table(itself)
        list(sentences(itself))
        itself.as_json(found)

    return read_document(name, compared_with_itself)


def _judge(
    old: Document, new: Document, threshold: float, target: Target | None, console: Console
) -> None:
    """Show the comparison of two documents and write the new one with it; ends with ``DOUBT`` if a
    row is slower."""
    found = regression(old, new, threshold)
    console.print(change_table(found))
    for sentence in sentences(found):
        console.print(escape(safe_sentence(sentence)), soft_wrap=False)  # with names from files
    _write(new | {"comparison": found.as_json(old)}, target, console)
    if found.slower:
        raise typer.Exit(ExitCode.DOUBT)


def _write(found: Document, target: Target | None, console: Console) -> None:
    if target is not None:
        target.write(found)
        if not target.is_stdout:
            console.print(f"wrote {escape(printable(target.name))}")


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


def _sizes(text: str) -> tuple[int, ...]:
    entries = _entries(text)
    if not entries or not all(entry.isdecimal() and int(entry) > 1 for entry in entries):
        raise UserError(f"--batch-size takes whole numbers above 1 such as 64,128, not {text!r}.")
    return tuple(map(int, entries))


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",")]
