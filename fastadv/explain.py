"""What ``fastadv methods`` prints: the table of methods, or all there is to know about one."""

from __future__ import annotations

import inspect

import rich.console
import rich.text
from rich.table import Table

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
    steps = plan.options.get("steps", 0 if plan.slots["adversary"] == "none" else 1)
    forwards, inputs = int(steps), int(steps)
    if "natural_logits_attack" in plan.needs or "natural_logits_eval" in plan.needs:
        forwards += 1
    outer = 2 if "natural_logits_train" in plan.needs else 1
    text = f"{forwards} F + {inputs} input gradients, then {outer} F + 1 backward"
    if plan.weights is not None:
        rounds = plan.options.get("weight_steps", 1)
        text += f"; weights: up to {rounds} x ({outer} F + 1 backward)"
    return text


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
