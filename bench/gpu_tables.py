"""Rows measured on a GPU: taking them from a packed file, and their tables."""

import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_pack import DRY, whole_rows

from fastadv.benchmark.rows import append_rows, newest, newest_of_each
from fastadv.benchmark.table import number, percent
from fastadv.errors import UserError
from fastadv.kernels.dispatch import OPERATORS

Row = dict[str, Any]
NONE_YET = "No GPU has run this version yet: there are no rows."
SHOWN_KERNELS = 25
LARGE = 128 * 2**20  # bytes, beyond an H200's cache
UNFINISHED = re.compile(r"\.[0-9a-f]+\.unfinished\.jsonl$")


def is_of_gpu(row: Row) -> bool:
    """True if the row was measured on a GPU."""
    return row.get("cuda") is not None


def take(packed: Path, results: Path) -> list[Row]:
    """Add the rows in ``packed`` (what ``gpu_suite.py`` wrote) to the folder ``results``.

    A row that is already there is not added again, so a file may be taken twice. The results of a
    stage that was killed are added as its preliminary rows. Returns the new rows. Raises
    ``UserError`` for a file that cannot be read.
    """
    found: dict[str, list[str]] = {}
    try:
        with tarfile.open(packed) as archive:
            if DRY in archive.getnames():
                raise UserError(
                    f"{packed} is of a dry run, whose rows are not measurements; take one of a GPU."
                )
            for member in archive:
                opened = archive.extractfile(member)
                # The files of a training run are in its own folder.
                mine = member.name.endswith(".jsonl") and "/" not in member.name
                if mine and opened is not None:
                    name = UNFINISHED.sub(".jsonl", member.name)
                    found.setdefault(name, []).extend(opened.read().decode().splitlines())
    except (OSError, tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read the packed results {packed} ({error}); give a .tar.gz of gpu_suite.py."
        ) from None
    added = []
    for name, lines in found.items():
        file = results / name
        there = set(file.read_text(encoding="utf-8").splitlines()) if file.exists() else set()
        new = list(whole_rows(line for line in lines if line not in there))
        append_rows(file, new)
        added += new
    return added


def gpu_table(rows: list[Row], caption: Callable[[Row], str]) -> str:
    """Every step on a GPU: its rate, and its time against the bound, its passes and the peers."""
    steps = [row for row in rows if is_of_gpu(row) and row["kind"] == "step"]
    if not steps:
        return NONE_YET
    heads = ("network", "step", "batch", "ms", "10-90 %", "images/s", "of bound", "over its passes")
    heads += ("of matmul", "peak MiB", "idle", "pgd is faster by")
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * 10]
    chosen = newest_of_each(steps, _step_key)
    idle = {
        (row["run"], *_step_key(row)): row["idle_share"] for row in rows if row["kind"] == "idle"
    }
    for row in sorted(chosen, key=lambda row: (row["device"], *_order(row))):
        config, passes = row["config"], row.get("over_passes")
        over = row.get("over_bound")
        cells = [config["model"], row["name"] + (" *" if row.get("alone") else "")]
        cells += [str(config["batch_size"]), number(row["ms"]["median"])]
        cells += [f"{number(row['ms']['p10'])}-{number(row['ms']['p90'])}"]
        cells += [number(row["images_per_s"]), percent(1 / over) if over else ""]
        cells += [number(passes["median"]) if passes else "", percent(row.get("of_matmul"))]
        cells += [number(row.get("peak_mib"))]
        cells += [percent(idle.get((row["run"], *_step_key(row))))]
        lines.append("| " + " | ".join([*cells, _faster(row, rows)]) + " |")
    if any(row.get("alone") for row in chosen):
        lines += [
            "",
            r"\* timed alone, not interleaved with the others: the time limit was reached.",
        ]
    return "\n".join([*lines, "", *dict.fromkeys(map(caption, chosen))])


def _step_key(row: Row) -> tuple[Any, ...]:
    config = row["config"]
    return (row["device"], row["name"], config["model"], config["width"], config["batch_size"])


def _order(row: Row) -> tuple[Any, ...]:
    config = row["config"]
    ours = row["by"] != "fastadv"
    return (config["model"], -config["batch_size"], ours, row["method"], row["ms"]["median"])


def _faster(row: Row, rows: Sequence[Row]) -> str:
    """For a peer: its time over that of our fastest step of the same work, within turns."""
    ratios = [
        other["times"]["median"]
        for other in rows
        if other["kind"] == "speedup"
        and (other["run"], other["peer"]) == (row["run"], row["name"])
        and other["our_bn"] == other["peer_bn"]
        and other["config"] == row["config"]
    ]
    return f"{max(ratios):.2f}x" if ratios else ""


def fused_table(rows: list[Row], caption: Callable[[Row], str]) -> str:
    """Every step on a GPU with own BatchNorm kernels against the same with PyTorch's."""
    found = [row for row in rows if row["kind"] == "fused norm" and is_of_gpu(row)]
    if not found:
        return NONE_YET
    lines = [
        "| network | step | batch | with PyTorch's, ms | with own, ms | faster by | 10-90 % |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    chosen = newest_of_each(found, lambda row: (row["ours"], *_place(row)))
    for row in sorted(chosen, key=lambda row: (*_place(row), row["ours"])):
        config, times = row["config"], row["times"]
        cells = [config["model"], row["ours"].removeprefix("fastadv "), str(config["batch_size"])]
        cells += [number(row["ms"][which]["median"]) for which in ("pytorch", "own")]
        cells += [f"{times['median']:.3f}x", f"{times['p10']:.3f}-{times['p90']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *dict.fromkeys(map(caption, chosen))])


def _place(row: Row) -> tuple[Any, ...]:
    config = row["config"]
    return (row["device"], config["model"], config["width"] or 0, config["batch_size"])


def replay_table(rows: list[Row], caption: Callable[[Row], str]) -> str:
    """The slowest kernels of the newest captured replay, and its total."""
    found = [row for row in rows if row["kind"] in ("kernel", "kernels")]
    if not found:
        return NONE_YET
    parts = []
    last = newest(found, _replay_key)
    for key in dict.fromkeys(map(_replay_key, last)):
        here = [row for row in last if _replay_key(row) == key]
        parts.append(_replay_lines(here, caption))
    return "\n\n".join(parts)


def _replay_key(row: Row) -> tuple[Any, ...]:
    return (row["device"], row["candidate"], row["config"]["batch_size"])


def _replay_lines(rows: list[Row], caption: Callable[[Row], str]) -> str:
    (whole,) = [row for row in rows if row["kind"] == "kernels"]
    kernels = [row for row in rows if row["kind"] == "kernel"]
    batch, times = whole["config"]["batch_size"], (whole["kernel_us"], whole["wall_us"])
    at_work, wall = (f"{number(us / 1e3)} ms" for us in times)
    lines = [
        f"{whole['candidate']}, batch {batch}: {whole['count']:,} kernels, {at_work} in {wall}.",
        "",
        "| kernel | launches | us | share | MB | of copy |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(kernels, key=lambda row: -row["us"])[:SHOWN_KERNELS]:
        moved = row["bytes"]
        cells = [f"`{row['name'][:70]}`", str(row["count"]), number(row["us"])]
        cells += [percent(row["us"] / whole["kernel_us"]), number(moved / 1e6) if moved else ""]
        lines.append("| " + " | ".join([*cells, percent(row["of_copy"])]) + " |")
    return "\n".join([*lines, "", caption(whole)])


def kernels_table(rows: list[Row]) -> str:
    """Our kernels alone on a GPU, each as a share of a copy's rate."""
    found = [row for row in rows if row["kind"] == "kernel speed" and row["device_seconds"]]
    if not found:
        return NONE_YET
    last = {(row["device"], row["kernel"], row["size"], row["backward"]): {} for row in found}
    for row in found:
        last[row["device"], row["kernel"], row["size"], row["backward"]][row["backend"]] = row
    lines = [
        "| kernel | size | launches | us | GB/s | of copy | reference, us | by hand, us |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (_, kernel, size, backward), timed in last.items():
        row = timed.get("triton")
        if row is None:
            continue
        rate = row["gigabytes_per_second"]
        name = f"{kernel}, backward" if backward else kernel
        cells = [
            name,
            size,
            str(row["launches"]),
            number(1e6 * row["device_seconds"]),
            number(rate),
        ]
        # A smaller case stays in the cache between replays; its rate is not the memory's.
        large = row["bytes"] >= LARGE
        cells.append(percent(rate / row["copy_gigabytes_per_second"]) if large else "")
        for backend in ("reference", "by hand"):
            taken = timed.get(backend, {}).get("device_seconds")
            cells.append(number(1e6 * taken) if taken else "")
        lines.append("| " + " | ".join(cells) + " |")
    said = {
        f"{row['device']}, torch {row['torch']}, fastadv {row['fastadv']} ({row['commit']}), "
        f"{row['time'][:10]}"
        for row in found
    }
    return "\n".join([*lines, "", *sorted(said)])


def shares_table(rows: list[Row]) -> str:
    """The share of a copy's rate that each of our kernels reaches in its largest case on a GPU."""
    lines = ["| kernel | share of a copy's rate | size | device |", "|---|---:|---|---|"]
    for kernel in sorted(OPERATORS):
        for backward in (False, True):
            found = [
                row
                for row in rows
                if (row["kind"], row.get("backend")) == ("kernel speed", "triton")
                and (row["kernel"], row["backward"]) == (kernel, backward)
                and row["device_seconds"]
                and row["bytes"] >= LARGE
            ]
            name = f"`{kernel}`, backward" if backward else f"`{kernel}`"
            if found:
                row = max(enumerate(found), key=lambda each: (each[1]["bytes"], each[0]))[1]
                share = percent(row["gigabytes_per_second"] / row["copy_gigabytes_per_second"])
                lines.append(f"| {name} | {share} | {row['size']} | {row['device']} |")
            elif not backward:
                lines.append(f"| {name} | unknown | | |")
    return "\n".join(lines)


def training_table(rows: list[Row], caption: Callable[[Row], str]) -> str:
    """Training runs on a GPU."""
    found = [row for row in rows if row["kind"] == "training run" and is_of_gpu(row)]
    if not found:
        return NONE_YET
    chosen = newest_of_each(found, lambda row: (row["device"], row["method"], row["data"]))
    lines = [
        "| method | data | epochs | training s | s per epoch | test accuracy, % | images |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    for row in chosen:
        scores = [f"{name} {100 * value:.1f}" for name, value in row["last"].items()]
        cells = [row["method"], row["data"], str(row["epochs"]), number(row["train_seconds"])]
        cells += [number(row["epoch_seconds"]), ", ".join(scores), f"{row['n']:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *dict.fromkeys(map(caption, chosen))])
