"""What ``fastadv methods NAME`` prints about one method, and the tables of ``docs/methods.md``."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping

import rich.console
import rich.text

from fastadv.algorithms import cost
from fastadv.algorithms.contract import passes as kinds
from fastadv.algorithms.options import all_options
from fastadv.algorithms.papers import PAPERS, entries, papers_in
from fastadv.algorithms.plan import Plan
from fastadv.algorithms.recipe import Recipe
from fastadv.algorithms.recipes.table import METHODS, recipe
from fastadv.algorithms.slots import NONE
from fastadv.cli.settings import SETTINGS
from fastadv.cli.sources import bibliography, papers_of
from fastadv.cli.value_words import shown
from fastadv.declared import describe, meanings
from fastadv.printing.layout import filled, page_columns
from fastadv.run.origin import Origin
from fastadv.run.presets import preset_of
from fastadv.run.request import RunRequest, setting_types
from fastadv.run.resolve import resolve_run


def explain(name: str, data: str, variant: str | None = None) -> rich.console.RenderableType:
    """One method: its published forms, its parts with their equations, its cost, and what a run of
    it on ``data`` takes where the user says nothing, each value with its origin."""
    config = resolve_run(RunRequest(method=name, data=data, variant=variant))
    plan = config.plan
    row = plan.recipe
    lines = [_indented(f"{name}: {row.what()}", ""), _indented(f"source: {row.source}", "")]
    if row.also:
        lines.append(_indented(f"also called: {', '.join(row.also)}", ""))
    if row.reported:
        lines.append(_indented(f"reported: {row.reported}", ""))
    if row.elsewhere:
        lines.append(_indented(f"elsewhere: {row.elsewhere}", ""))
    lines += _variants(recipe(name), row.variant) + _published(row)
    lines += _papers(recipe(name), row)
    lines += ["", _indented(f"passes per step: {passes(plan)}", ""), ""]
    for slot, part in plan.parts.items():
        lines += [f"{slot}: {plan.slots[slot]}", _indented(inspect.getdoc(type(part)) or ""), ""]
    lines.append("options:")
    classes = [type(part) for part in plan.parts.values()]
    hints = all_options(classes)
    said = {name: text for part in classes for name, text in meanings(part).items()}
    for key, value in plan.options.items():
        if key in setting_types():  # below, as one of the run
            continue
        lines += _value(key, value, config.origins[key], said.get(key, ""), describe(hints[key]))
    preset = f"training on {data} (data preset: {preset_of(data).source}):"
    lines += ["", _indented(preset, "")]
    texts = {key: text for group in SETTINGS.values() for key, text in group.items()}
    for key, hint in setting_types().items():
        if key in config.origins and key not in ("method", "data"):
            value = getattr(config, key)
            lines += _value(key, value, config.origins[key], texts[key], describe(hint))
    return rich.text.Text("\n".join(lines))


def _variants(row: Recipe, present: str) -> list[str]:
    """The published forms of the method ``row``, the ``present`` one marked."""
    if not row.variants:
        return []
    said = {row.variant: f"{row.note} [{row.source}]".strip()}
    said |= {name: f"{each.note} [{each.source}]" for name, each in row.variants.items()}
    said[present] = "the one shown here"
    heading = f"variants (--variant NAME; without it, {row.variant}):"
    return ["", heading, *(_indented(f"{name}: {text}", "  ") for name, text in said.items())]


def _published(row: Recipe) -> list[str]:
    """What the publication states, and where the recipe departs from it."""
    found = row.published
    if found is None:
        return []
    lines = ["", _indented(f"as published ({found.code}), on {found.data}:", "")]
    texts = {**found.settings(), "start of the attack": found.start}
    if texts.get("steps") == 0:  # each update of the weights is one of the attack, too
        texts["steps"] = "none of the attack alone"
    stated = ", ".join(f"{name} {shown(value)}" for name, value in texts.items())
    lines.append(_indented(stated, "  "))
    for name, reason in found.departs.items():
        lines.append(_indented(f"differs here: {name}: {reason}", "  "))
    return lines


def _papers(row: Recipe, form: Recipe) -> list[str]:
    """The papers of the method ``row`` and of its parts, and the entries of its own, as the
    ``form`` shown."""
    together = [*papers_of(row), *papers_of(form)]
    found = [paper for paper in PAPERS if paper in together]
    if not found:
        return []
    own = papers_in(row.source, form.source)
    lines = ["", "papers of the method, its forms and its parts:"]
    lines += [_indented(paper.line(), "  ") for paper in found]
    lines += ["", "BibTeX (all of them: --bibtex):"]
    return lines + textwrap.indent(entries(own or found), "  ").split("\n")


def _value(name: str, value: object, origin: Origin, meaning: str, allowed: str) -> list[str]:
    said = meaning + (f" ({allowed})" if allowed else "")
    return [f"  {name} = {shown(value)}  [{origin}]", _indented(said, "    ")]


PASS_WORDS = {
    kinds.FORWARD: "forward(s)",
    kinds.INPUT_GRADIENT: "input gradient(s)",
    kinds.SHARED: "forward(s) with one gradient for the attack and one for training",
    kinds.TRAINING: "training pass(es)",
    kinds.DOUBLE_BACKWARD: "training pass(es) with double backward",
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


def _by_kind(counts: Counter[kinds.Pass]) -> dict[str, int]:
    """kind -> count, over both modes of BatchNorm, the cheapest kind first."""
    total: Counter[str] = Counter()
    for (kind, _), count in counts.items():
        total[kind] += count
    return {kind: total[kind] for kind in PASS_WORDS if total[kind]}


def _indented(text: str, indent: str = "  ") -> str:
    """The paragraphs of ``text``, each filled to the width of the terminal; without the marks of
    code that docstrings have."""
    width = page_columns()
    blocks = text.replace("``", "").split("\n\n")
    return "\n\n".join("\n".join(_entries(each, width, indent)) for each in blocks)


def _entries(block: str, width: int, indent: str) -> Iterator[str]:
    """The lines of a paragraph or a list, filled; an entry of a list begins a line."""
    for entry in re.split(r"\n(?= *(?:-|[0-9]+\.) )", block):
        mark = re.match(r" *(?:(?:-|[0-9]+\.) +)?", entry)
        hang = indent + " " * (len(mark[0]) if mark else 0)
        yield filled(indent + " ".join(entry.split()), width, hang=hang)


def markdown() -> str:
    """docs/methods.md, but for the status that ``bench/tables.py`` fills in from measured rows."""
    lines = [
        "# Methods",
        "",
        "Every training method in a table of the papers fastadv follows and of FastAT_Benchmark,",
        "its recipe, and what the paper reports (test accuracy, %; best / last). `fastadv methods",
        "NAME` shows more: the settings as published with their source, and where a run departs",
        "from them and why. [As published](as-published.md) lists every difference from the",
        "released code that was found. A variant is the method as another code or paper has it:",
        "`--variant NAME`.",
        "",
        "`fastadv methods --markdown` writes this page from the recipes, `python bench/tables.py",
        "--write docs/methods.md` the status from `bench/results/`. Tests compare every part with",
        "independently written formulas, every recipe's settings with its publication's, and every",
        "recipe compiled with eager; they resume every recipe and train it on digits.",
        "",
        "<!-- bench:recipes -->",
        recipe_table(),
        "<!-- /bench:recipes -->",
        "",
        bibliography(),
    ]
    return "\n".join(lines) + "\n"


def recipe_table(status: Mapping[str, str] | None = None) -> str:
    """Every recipe as a row of a Markdown table; ``status`` adds a last column."""
    heads = ["recipe", "what it does", "parts", "options", "source", "reported"]
    heads += [] if status is None else ["status"]
    lines = [_row(heads), "|---" * len(heads) + "|"]
    for name, row in METHODS.items():
        options = ", ".join(f"{key}={_short(value)}" for key, value in row.all_options().items())
        reported = ". ".join(text for text in (row.reported, row.elsewhere) if text)
        cells = [f"`{name}`", _what(row), _parts(row), options, row.source, reported]
        cells += [] if status is None else [status.get(name, "")]
        lines.append(_row(cells))
    return "\n".join(lines)


def _what(row: Recipe) -> str:
    """What the method is, its other names, and its other published forms."""
    told = [row.what()]
    if row.also:
        told.append(f"also called {', '.join(row.also)}")
    others = [f"`{name}`" for name in row.variants if name != row.variant]
    if others:
        told.append(f"variants: {', '.join(others)}")
    return "; ".join(told)


def _parts(row: Recipe) -> str:
    """The adversary, with its loss and start in brackets, the objective, and the other parts; those
    that nearly every method has are left out."""
    usual, chosen = Recipe("", "").parts(), row.parts()
    attack = [chosen.pop(slot) for slot in ("attack_loss", "start") if chosen[slot] != usual[slot]]
    adversary = chosen["adversary"] + (f" ({', '.join(attack)})" if attack else "")
    others = [
        part
        for slot, part in chosen.items()
        if slot == "objective" or (slot != "adversary" and part != usual[slot])
    ]
    return " + ".join([adversary, *others] if adversary != NONE else others)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
