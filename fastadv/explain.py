"""What ``fastadv methods`` prints: the table of methods, or all there is to know about one."""

from __future__ import annotations

import inspect

import rich.console
import rich.text
from rich.table import Table

from fastadv import cost
from fastadv.plan import Plan, resolve
from fastadv.recipes import METHODS


def table() -> Table:
    """Every method in a line: name, what it is, its source."""
    listing = Table(title="methods")
    for column in ("method", "what it does", "source", "reported, %"):
        listing.add_column(column, overflow="fold")
    for name, row in METHODS.items():
        listing.add_row(name, row.summary, row.source, row.reported)
    return listing


def explain(name: str) -> rich.console.RenderableType:
    """One method: its parts with their equations, its options, its cost."""
    plan = resolve(name)
    lines = [f"{name}: {plan.recipe.summary}", f"source: {plan.recipe.source}"]
    if plan.recipe.reported:
        lines.append(f"reported: {plan.recipe.reported}")
    lines += ["", f"passes a step: {passes(plan)}", ""]
    for slot, part in plan.parts.items():
        lines += [f"{slot}: {plan.slots[slot]}", _indented(inspect.getdoc(type(part)) or ""), ""]
    lines.append("options:")
    lines += [f"  {key} = {value}" for key, value in plan.options.items()]
    return rich.text.Text("\n".join(lines))


def passes(plan: Plan) -> str:
    """Forward and backward passes of one update, as a sentence."""
    found = cost.passes(plan)
    words = [
        (found.forwards, "forward"),
        (found.input_gradients, "input gradient(s)"),
        (found.training, "training pass(es)"),
        (found.weight_rounds, "pass(es) for the weights at most"),
    ]
    said = ", ".join(f"{count} {word}" for count, word in words if count)
    return f"{said}: {found.units:g} forward passes' work"


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def markdown() -> str:
    """docs/methods.md: every row of the papers' tables with its recipe, parts and source."""
    lines = [
        "# Methods",
        "",
        "Every training method in a table of the papers fastadv follows, its recipe, and what",
        "the paper reports (test accuracy, %; best / last). `fastadv methods --markdown` writes",
        "this page from the recipes; `fastadv methods NAME` tells all about one. Tests hold the",
        "parts to formulas written independently, and run every recipe compiled against eager and",
        "resumed. What a recipe reaches on a data set has a row in `bench/results/` where it was",
        "run to its end.",
        "",
        "| recipe | what it does | parts | options | source | reported |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in METHODS.items():
        parts = [
            part for part in row.parts().values() if part not in ("none", "uniform", "one-hot")
        ]
        options = ", ".join(f"{key}={_short(value)}" for key, value in row.options.items())
        cells = (f"`{name}`", row.summary, " + ".join(parts), options, row.source, row.reported)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
