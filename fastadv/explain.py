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
