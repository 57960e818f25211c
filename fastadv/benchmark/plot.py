"""Images per second against the batch size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fastadv.benchmark.rows import Row
from fastadv.errors import UserError


def require_matplotlib() -> None:
    """Raise ``UserError`` with the way out if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401 (only checked here; used in plot_batches)
    except ImportError:
        raise UserError(
            "--plot needs matplotlib, which is not installed; run `pip install 'fastadv[report]'`."
        ) from None


def plot_batches(rows: Sequence[Row], path: Path) -> None:
    """One line per candidate, written to ``path`` (.png, .svg or .pdf by its ending)."""
    require_matplotlib()
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "step":
            lines[row["name"]].append((row["config"]["batch_size"], row["images_per_s"]))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        points.sort()
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("batch size")
    axes.set_ylabel("images/s")
    axes.set_title(_title(rows))
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _title(rows: Sequence[Row]) -> str:
    first = next(row for row in rows if row["kind"] == "step")
    return f"{first['config']['model']}, {first.get('device', '')}, torch {first.get('torch', '')}"
