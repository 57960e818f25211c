"""Rows as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from fastadv.benchmark.rows import Row


def step_table(rows: Sequence[Row]) -> Table:
    """Every whole step: its time, and its ratio to the sum of its passes."""
    columns = ("batch", "ms per step", "10-90 %", "images/s", "x passes", "compile s")
    steps = _steps(rows)
    names, shared = _names(steps)
    table = _table(f"training steps{shared}", "candidate", columns)
    for row, name in zip(steps, names, strict=True):
        ms, passes = row["ms"], row.get("over_passes")
        table.add_row(
            name,
            str(row["config"]["batch_size"]),
            number(ms["median"]),
            f"{number(ms['p10'])}-{number(ms['p90'])}",
            number(row["images_per_s"]),
            number(passes["median"]) if passes else "",
            number(row.get("compile_s")),
        )
    return table


def rate_table(rows: Sequence[Row]) -> Table:
    """Every whole step: its share of the device's limits."""
    columns = ("batch", "TFLOP/s", "of matmul", "of copy", "x bound", "peak MiB", "idle")
    steps = _steps(rows)
    names, shared = _names(steps)
    table = _table(f"what the steps reach{shared}", "candidate", columns)
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


def _table(title: str, first: str, others: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


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
    columns = ("batch", "peer's BN", "our BN", "times", "10-90 %")
    table = Table(title="times faster than the peer, turn by turn")
    table.add_column("peer")
    table.add_column("fastadv")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        if row["kind"] == "speedup":
            times = row["times"]
            table.add_row(
                row["peer"],
                str(row["ours"]).removeprefix("fastadv "),
                str(row["config"]["batch_size"]),
                row["peer_bn"],
                row["our_bn"],
                f"{times['median']:.2f}",
                f"{times['p10']:.2f}-{times['p90']:.2f}",
            )
    return table


def norm_table(rows: Sequence[Row]) -> Table:
    """How many times faster each of our steps is with own BatchNorm kernels."""
    columns = ("batch", "ms with PyTorch's", "ms with own", "times", "10-90 %")
    table = _table("times faster with own BatchNorm kernels, turn by turn", "fastadv", columns)
    for row in rows:
        if row["kind"] == "fused norm":
            times, ms = row["times"], row["ms"]
            table.add_row(
                str(row["ours"]).removeprefix("fastadv "),
                str(row["config"]["batch_size"]),
                number(ms["pytorch"]["median"]),
                number(ms["own"]["median"]),
                f"{times['median']:.3f}",
                f"{times['p10']:.3f}-{times['p90']:.3f}",
            )
    return table


def pass_table(rows: Sequence[Row]) -> Table:
    """Passes alone."""
    table = _table("passes, each alone", "pass", ("batch", "ms", "bound, ms", "x bound"))
    for row in rows:
        if row["kind"] == "pass":
            cells = (row["ms"]["median"], row["bound_ms"], row["over_bound"])
            name, batch = row["name"].removeprefix("pass: "), str(row["config"]["batch_size"])
            table.add_row(name, batch, *map(number, cells))
    return table


def number(value: float | None) -> str:
    """Rounded to three or four significant digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share in percent."""
    return "" if share is None else f"{100 * share:.1f} %"
