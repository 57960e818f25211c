"""Turn typed settings into command-line options, so that no flag is written twice."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from fastadv.algorithms import plugins
from fastadv.algorithms.contract import Part
from fastadv.algorithms.options import all_options, default, option_types
from fastadv.algorithms.parts import PARTS, names
from fastadv.algorithms.slots import SLOTS
from fastadv.cli import invocation
from fastadv.cli.help_screen import Row
from fastadv.cli.settings import COMMON, SETTINGS
from fastadv.cli.value_words import shown
from fastadv.declared import (
    declared,
    describe,
    may_be_absent,
    may_be_auto,
    may_change,
    meanings,
    plain_type,
)
from fastadv.errors import UserError
from fastadv.run.config import RunConfig
from fastadv.run.defaults import DEFAULTS
from fastadv.run.origin import Origin
from fastadv.run.request import RunRequest, setting_types
from fastadv.run.resolve import ALSO_OPTIONS, resolve_run
from fastadv.run.spelling import as_flag

SWAP = "Swap a part of the method"
TYPES: Mapping[Any, str] = {int: "INT", float: "NUMBER", str: "TEXT"}


def groups(
    method: str | None = None, variant: str | None = None
) -> Iterator[tuple[str, list[Row]]]:
    """All options in their groups; with ``method`` those of its parts only, in its form
    ``variant``. Raises ``UserError`` for names that are none."""
    types = setting_types()
    for title, settings in SETTINGS.items():
        rows = [_setting(name, types[name], text) for name, text in settings.items()]
        yield title, [*rows, *invocation.rows()] if title == "The run" else rows
    chosen_form = method is not None or variant is not None
    config = resolve_run(RunRequest(method=method, variant=variant)) if chosen_form else None
    plan = None if config is None else config.plan
    chosen = {} if plan is None else plan.slots
    yield SWAP, [_slot(slot, chosen.get(slot)) for slot in PARTS]
    seen = set(types)
    for slot, parts in PARTS.items():
        for label, part in parts.items():
            if plan is not None and plan.slots[slot] != label:
                continue
            said = meanings(part)
            rows = []
            for name, hint in all_options([part]).items():
                if name in seen:
                    continue
                seen.add(name)
                value = default(part, name) if plan is None else plan.options[name]
                usual = shown(value)
                if config is not None and config.origins.get(name) is Origin.DATA:
                    usual = "preset"
                rows.append(_row(name, hint, said.get(name, ""), usual))
            if rows:
                yield f"Options of {slot} {label}", rows


def common_groups() -> Iterator[tuple[str, list[Row]]]:
    """The common settings in their groups, without the ranges of numbers."""
    types = setting_types()
    for title, settings in SETTINGS.items():
        rows = [
            _setting(name, types[name], text) for name, text in settings.items() if name in COMMON
        ]
        # A long list of choices is for --help-all.
        names = [row.flag.endswith("NAME") and len(row.allowed) < 100 for row in rows]
        rows = [r if n else r._replace(allowed="") for r, n in zip(rows, names, strict=True)]
        of_run = invocation.rows(invocation.COMMON)
        yield title, [*rows, *of_run] if title == "The run" else rows


def _setting(name: str, hint: Any, text: str) -> Row:
    if name in DEFAULTS:
        return _row(name, hint, text, shown(DEFAULTS[name]))
    absent = may_be_absent(declared(RunConfig)[name])
    return _row(name, hint, text, "" if absent else "preset")


def _slot(slot: str, chosen: str | None) -> Row:
    return Row(f"{as_flag(slot)} NAME", "part", ", ".join(names(slot)), chosen or "")


def _row(name: str, hint: Any, text: str, usual: str) -> Row:
    kind = plain_type(hint)
    flag = as_flag(name)
    if kind is bool:
        return Row(f"--[no-]{flag[2:]}", text, "", usual)
    if get_origin(kind) is Literal:
        return Row(f"{flag} NAME", text, ", ".join(map(str, get_args(kind))), usual)
    if get_origin(kind) is tuple:
        return Row(f"{flag} LIST", text, describe(hint), usual)
    allowed = describe(hint)
    return Row(f"{flag} {TYPES.get(kind, 'TEXT')}", text, allowed, usual)


def _as_text(hint: Any) -> Any:
    """All but flags and plain whole numbers is taken as text: fractions like 8/255, several values
    such as "3,4", values by epoch. ``declared.coerce`` reads it, and its words are ours."""
    kind = plain_type(hint)
    plain = kind in (bool, int) and not may_change(hint) and not may_be_auto(hint)
    return kind if plain else str


def _option(name: str, kind: Any) -> inspect.Parameter:
    flag = as_flag(name)
    flags = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, typer.Option(flags)],
    )


OF_THE_COMMAND = (*invocation.OPTIONS, "plugin", "help", "help_all")
"""The flags of ``fastadv train`` that are no settings of a run."""


def train_parameters() -> list[inspect.Parameter]:
    """Every option of ``fastadv train``: the run's settings, the slots, the parts' options."""
    plugins.load_installed()
    settings = setting_types()
    found = [
        # Of the run it is one number, of the command also several.
        _option(name, str if name == "seed" else _as_text(hint))
        for name, hint in settings.items()
    ]
    found += [_option(slot, str) for slot in PARTS]
    classes = [part for parts in PARTS.values() for part in parts.values()]
    for part in classes:
        _require_own_names(part, settings)
    found += [
        _option(name, _as_text(hint))
        for name, hint in all_options(classes).items()
        if name not in settings
    ]
    return [*invocation.parameters(), *found]


def _require_own_names(part: type[Part], settings: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if an option of ``part`` has the name of a slot or of a setting of the
    run, since no command could set it."""
    for name in option_types(part):
        taken = name in settings and name not in ALSO_OPTIONS
        if name in SLOTS or taken or name in OF_THE_COMMAND:
            raise UserError(
                f"{part.__name__} has an option {name!r}, which is a setting of every run: give "
                "the option another name."
            )
