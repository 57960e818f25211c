"""What ``fastadv methods`` prints: the table of methods, or all there is to know about one."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping

import rich.console
import rich.text
from rich.table import Table

from fastadv.algorithms import cost
from fastadv.algorithms.options import all_options
from fastadv.algorithms.plan import Plan
from fastadv.algorithms.recipes.table import METHODS
from fastadv.declared import describe
from fastadv.run.origin import Origin
from fastadv.run.presets import preset_of
from fastadv.run.request import RunRequest, setting_types
from fastadv.run.resolve import resolve_run


def table() -> Table:
    """Every method in a line: name, what it is, its source."""
    listing = Table(title="methods")
    for column in ("method", "what it does", "source", "reported, %"):
        listing.add_column(column, overflow="fold")
    for name, row in METHODS.items():
        listing.add_row(name, row.summary, row.source, row.reported)
    return listing


def explain(name: str, data: str) -> rich.console.RenderableType:
    """One method: its parts with their equations, its cost, and what a run of it on ``data`` takes
    where the user says nothing, each value with its origin."""
    config = resolve_run(RunRequest(method=name, data=data))
    plan = config.plan
    lines = [f"{name}: {plan.recipe.summary}", f"source: {plan.recipe.source}"]
    if plan.recipe.reported:
        lines.append(f"reported: {plan.recipe.reported}")
    if plan.recipe.elsewhere:
        lines.append(f"elsewhere: {plan.recipe.elsewhere}")
    lines += ["", f"passes a step: {passes(plan)}", ""]
    for slot, part in plan.parts.items():
        lines += [f"{slot}: {plan.slots[slot]}", _indented(inspect.getdoc(type(part)) or ""), ""]
    lines.append("options:")
    hints = all_options(type(part) for part in plan.parts.values())
    lines += [
        _value(key, value, config.origins[key], describe(hints[key]))
        for key, value in plan.options.items()
    ]
    lines += ["", f"training on {data} (data preset: {preset_of(data).source}):"]
    lines += [
        _value(key, getattr(config, key), config.origins[key], describe(hint))
        for key, hint in setting_types().items()
        if key in config.origins and key not in ("method", "data")
    ]
    return rich.text.Text("\n".join(lines))


def _value(name: str, value: object, origin: Origin, allowed: str) -> str:
    return f"  {name} = {value}  [{origin}]" + (f"  ({allowed})" if allowed else "")


PASS_WORDS = {
    cost.FORWARD: "forward(s)",
    cost.INPUT_GRADIENT: "input gradient(s)",
    cost.SHARED: "pass(es) of which attack and training each take a gradient",
    cost.TRAINING: "training pass(es)",
    cost.DOUBLE_BACKWARD: "training pass(es) with double backward",
}


def passes(plan: Plan) -> str:
    """The passes of one update, as a sentence."""
    found = cost.passes(plan)
    words = [f"{count} {PASS_WORDS[kind]}" for kind, count in _by_kind(found.others).items()]
    rounds = _by_kind(found.weights)
    words += [f"{count} {PASS_WORDS[kind]} for the weights" for kind, count in rounds.items()]
    many = plan.updates_per_batch
    before = f"{many} updates, each " if many > 1 else ""
    most = " at most" if rounds else ""
    return f"{before}{', '.join(words)}: {found.units} forward passes' work{most}"


def _by_kind(counts: Counter[cost.Pass]) -> dict[str, int]:
    """kind -> how many, BatchNorm's modes together, the lightest first."""
    total: Counter[str] = Counter()
    for (kind, _), count in counts.items():
        total[kind] += count
    return {kind: total[kind] for kind in PASS_WORDS if total[kind]}


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def markdown() -> str:
    """docs/methods.md, but for the status that ``bench/tables.py`` fills in from measured rows."""
    lines = [
        "# Methods",
        "",
        "Every training method in a table of the papers fastadv follows, its recipe, and what",
        "the paper reports (test accuracy, %; best / last). `fastadv methods --markdown` writes",
        "this page from the recipes, `python bench/tables.py --write docs/methods.md` the status",
        "from `bench/results/`; `fastadv methods NAME` tells all about one. Tests hold the parts",
        "to formulas written independently, run every recipe compiled against eager and resumed,",
        "and train every recipe on digits.",
        "",
        "<!-- bench:recipes -->",
        recipe_table(),
        "<!-- /bench:recipes -->",
    ]
    return "\n".join(lines) + "\n"


def recipe_table(status: Mapping[str, str] | None = None) -> str:
    """Every recipe as a line of a Markdown table, with a last column where ``status`` is given."""
    heads = ["recipe", "what it does", "parts", "options", "source", "reported"]
    heads += [] if status is None else ["status"]
    lines = [_row(heads), "|---" * len(heads) + "|"]
    for name, row in METHODS.items():
        parts = [
            part for part in row.parts().values() if part not in ("none", "uniform", "one-hot")
        ]
        options = ", ".join(f"{key}={_short(value)}" for key, value in row.all_options().items())
        reported = ". ".join(text for text in (row.reported, row.elsewhere) if text)
        cells = [f"`{name}`", row.summary, " + ".join(parts), options, row.source, reported]
        cells += [] if status is None else [status.get(name, "")]
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
