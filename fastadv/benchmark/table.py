"""Rows as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from fastadv.benchmark.rows import Row


def step_table(rows: Sequence[Row]) -> Table:
    """Every whole step: its time, and its ratio to the sum of its passes."""
    columns = ("batch", "ms per step", "95 %", "images/s", "over passes", "compile s")
    steps = _steps(rows)
    names, shared = _names(steps)
    table = brief_table(f"training steps{shared}", "candidate", columns)
    for row, name in zip(steps, names, strict=True):
        ms, passes = row["ms"], row.get("over_passes")
        table.add_row(
            name,
            str(row["config"]["batch_size"]),
            number(ms["median"]),
            interval(ms),
            number(row["images_per_s"]),
            number(passes["median"]) if passes else "",
            number(row.get("compile_s")),
        )
    return table


def rate_table(rows: Sequence[Row]) -> Table:
    """Every whole step: its share of the device's limits."""
    columns = ("batch", "TFLOP/s", "of matmul", "of copy", "over bound", "peak MiB", "idle")
    steps = _steps(rows)
    names, shared = _names(steps)
    table = brief_table(f"what the steps reach{shared}", "candidate", columns)
    for row, name in zip(steps, names, strict=True):
        table.add_row(
            name,
            str(row["config"]["batch_size"]),
            number(row.get("tflop_per_s")),
            percent(row.get("of_matmul")),
            percent(row.get("of_copy")),
            number(row.get("over_bound")),
            number(row.get("peak_mib")),
            percent(row.get("idle_share")),
        )
    return table


def brief_table(title: str, first: str, others: Sequence[str]) -> Table:
    """An empty table for 80 columns: no vertical lines, numbers on the right; a long name breaks
    between its words, or where none is short enough, within one."""
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def interval(spread: Mapping[str, float | None]) -> str:
    """The half width of a 95 % interval in percent of the median; empty if there is none."""
    low, high, median = spread.get("low95"), spread.get("high95"), spread["median"]
    if low is None or high is None or not median:
        return ""
    return f"±{50 * (high - low) / median:.1f} %"


def _steps(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "step"]


def _names(rows: Sequence[Row]) -> tuple[list[str], str]:
    """The names of the rows without their common last words, and these words."""
    words = [str(row["name"]).removeprefix("fastadv ").split() for row in rows]
    shared: list[str] = []
    while words and all(len(name) > 1 and name[-1] == words[0][-1] for name in words):
        shared.insert(0, words[0][-1])
        words = [name[:-1] for name in words]
    return [" ".join(name) for name in words], f", {' '.join(shared)}" if shared else ""


def speedup_table(rows: Sequence[Row]) -> Table:
    """How many times faster ours is than each peer."""
    columns = ("batch", "BN, peer and ours", "times", "95 %")
    table = brief_table("times faster than the peer, turn by turn", "peer", ())
    table.add_column("fastadv", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        if row["kind"] == "speedup":
            table.add_row(
                row["peer"],
                str(row["ours"]).removeprefix("fastadv "),
                str(row["config"]["batch_size"]),
                f"{row['peer_bn']}, {row['our_bn']}",
                f"{row['times']['median']:.2f}",
                interval(row["times"]),
            )
    return table


def norm_table(rows: Sequence[Row]) -> Table:
    """How many times faster each of our steps is with own BatchNorm kernels."""
    columns = ("batch", "ms with PyTorch's", "ms with own", "times", "95 %")
    title = "times faster with own BatchNorm kernels, turn by turn"
    table = brief_table(title, "fastadv", columns)
    for row in rows:
        if row["kind"] == "fused norm":
            ms = row["ms"]
            table.add_row(
                str(row["ours"]).removeprefix("fastadv "),
                str(row["config"]["batch_size"]),
                number(ms["pytorch"]["median"]),
                number(ms["own"]["median"]),
                f"{row['times']['median']:.3f}",
                interval(row["times"]),
            )
    return table


def pass_table(rows: Sequence[Row]) -> Table:
    """Passes alone."""
    columns = ("batch", "ms", "95 %", "bound, ms", "over bound")
    table = brief_table("passes, each alone", "pass", columns)
    for row in rows:
        if row["kind"] == "pass":
            name, batch = row["name"].removeprefix("pass: "), str(row["config"]["batch_size"])
            numbers = map(number, (row["bound_ms"], row["over_bound"]))
            table.add_row(name, batch, number(row["ms"]["median"]), interval(row["ms"]), *numbers)
    return table


def operator_table(rows: Sequence[Row]) -> Table:
    """Operators of ``fastadv.kernels``, each alone."""
    found = [row for row in rows if row["kind"] == "operator"]
    size = f", images {found[0]['size']}" if found else ""
    table = brief_table(f"kernels, each alone{size}", "kernel", ("runs as", "us", "95 %"))
    for row in found:
        ms, name = row["ms"], row["name"].removeprefix("kernel: ")
        table.add_row(name, row["backend"], number(1e3 * ms["median"]), interval(ms))
    return table


def number(value: float | None) -> str:
    """Rounded to three or four significant digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share in percent."""
    return "" if share is None else f"{100 * share:.1f} %"
