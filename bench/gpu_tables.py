"""What a GPU measured: its rows taken over from a packed file, and its tables."""

import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastadv.benchmark.rows import append_rows, read_rows
from fastadv.benchmark.table import number, percent
from fastadv.errors import UserError

Row = dict[str, Any]
NONE_YET = "No GPU has run this version yet: there are no rows."
SHOWN_KERNELS = 25


def is_of_gpu(row: Row) -> bool:
    """Whether a row was measured on a GPU."""
    return row.get("cuda") is not None


def take(packed: Path, results: Path) -> list[Row]:
    """Add the rows in ``packed`` (what ``gpu_suite.py`` wrote) to the folder ``results``.

    A row that is there already is not added again, so a file may be taken twice. Returns the new
    rows. Raises ``UserError`` for a file that cannot be read.
    """
    found: dict[str, list[str]] = {}
    try:
        with tarfile.open(packed) as archive:
            for member in archive:
                opened = archive.extractfile(member)
                # Those of a training run lie in its own folder.
                mine = member.name.endswith(".jsonl") and "/" not in member.name
                if mine and opened is not None:
                    found[member.name] = opened.read().decode().splitlines()
    except (OSError, tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the packed results {packed}: {error}.") from None
    added = []
    for name, lines in found.items():
        file = results / name
        there = {json.dumps(row) for row in read_rows(file)} if file.exists() else set()
        new = [row for row in map(_whole, lines) if row is not None]
        new = [row for row in new if json.dumps(row) not in there]
        append_rows(file, new)
        added += new
    return added


def _whole(line: str) -> Row | None:
    """None for the row that was being written when the machine was taken away."""
    try:
        row: Row = json.loads(line)
    except ValueError:
        return None
    return row


def gpu_table(
    rows: list[Row], newest: Callable[[list[Row], Callable[[Row], Any]], list[Row]],
    caption: Callable[[Row], str],
) -> str:  # fmt: skip
    """Every step on a GPU: its rate, and how it stands to the bound, its passes and the peers."""
    steps = [row for row in rows if is_of_gpu(row) and row["kind"] == "step"]
    if not steps:
        return NONE_YET
    heads = ("network", "step", "batch", "ms", "10-90 %", "images/s", "of bound", "x passes")
    heads += ("of matmul", "peak MiB", "idle", "pgd is faster by")
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * 10]
    chosen = newest(steps, _step_key)
    idle = {
        (row["device"], row["name"], row["config"]["batch_size"]): row["idle_share"]
        for row in rows
        if row["kind"] == "idle"
    }
    for row in sorted(chosen, key=lambda row: (row["device"], *_order(row))):
        config, passes = row["config"], row.get("over_passes")
        over = row.get("over_bound")
        cells = [config["model"], row["name"] + (" *" if row.get("preliminary") else "")]
        cells += [str(config["batch_size"]), number(row["ms"]["median"])]
        cells += [f"{number(row['ms']['p10'])}-{number(row['ms']['p90'])}"]
        cells += [number(row["images_per_s"]), percent(1 / over) if over else ""]
        cells += [number(passes["median"]) if passes else "", percent(row.get("of_matmul"))]
        cells += [number(row.get("peak_mib"))]
        cells += [percent(idle.get((row["device"], row["name"], config["batch_size"])))]
        lines.append("| " + " | ".join([*cells, _faster(row, rows)]) + " |")
    if any(row.get("preliminary") for row in chosen):
        lines += ["", r"\* by itself, not turn by turn with the others: the time was up."]
    return "\n".join([*lines, "", *dict.fromkeys(map(caption, chosen))])


def _step_key(row: Row) -> tuple[Any, ...]:
    config = row["config"]
    return (row["device"], row["name"], config["model"], config["width"], config["batch_size"])


def _order(row: Row) -> tuple[Any, ...]:
    config = row["config"]
    ours = row["by"] != "fastadv"
    return (config["model"], -config["batch_size"], ours, row["method"], row["ms"]["median"])


def _faster(row: Row, rows: Sequence[Row]) -> str:
    """For a peer: how many times as fast our fastest step of the same work was, in its turns."""
    ratios = [
        other["times"]["median"]
        for other in rows
        if other["kind"] == "speedup"
        and (other["run"], other["peer"]) == (row["run"], row["name"])
        and other["our_bn"] == other["peer_bn"]
        and other["config"] == row["config"]
    ]
    return f"{max(ratios):.2f}x" if ratios else ""


def replay_table(
    rows: list[Row], newest: Callable[[list[Row], Callable[[Row], Any]], list[Row]],
    caption: Callable[[Row], str],
) -> str:  # fmt: skip
    """The kernels of one captured replay that take longest."""
    kernels = [row for row in rows if row["kind"] == "kernel"]
    if not kernels:
        return NONE_YET
    last = newest(kernels, lambda row: (row["device"], row["kernel"]))
    lines = [
        "| kernel | launches | us | share | MB | of copy |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    total = sum(row["us"] for row in last)
    for row in sorted(last, key=lambda row: -row["us"])[:SHOWN_KERNELS]:
        moved = row.get("bytes")
        cells = [f"`{row['kernel'][:70]}`", str(row["count"]), number(row["us"])]
        cells += [percent(row["us"] / total), number(moved / 1e6) if moved else ""]
        lines.append("| " + " | ".join([*cells, percent(row.get("of_copy"))]) + " |")
    return "\n".join([*lines, "", *dict.fromkeys(map(caption, last))])
