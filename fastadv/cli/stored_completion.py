"""Makes ``completion.json`` from the options and names that there are."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

from fastadv.algorithms.options import all_options
from fastadv.algorithms.parts import PARTS
from fastadv.algorithms.parts import names as part_names
from fastadv.algorithms.recipes.table import METHODS
from fastadv.cli.flags import groups
from fastadv.cli.help_screen import Row
from fastadv.cli.score_table import FORMATS
from fastadv.data.catalogue import DATA_SETS
from fastadv.declared import plain_type
from fastadv.evaluation.attacks.inputs import SEARCH_DTYPES
from fastadv.evaluation.attacks.names import EXAMPLES
from fastadv.models import MODELS
from fastadv.run.request import setting_types
from fastadv.run.source import SETS
from fastadv.run.spelling import as_flag
from fastadv.run.which import BOTH, WEIGHTS

_NAMES_OF = {
    "--method": "method",
    "--data": "data",
    "--model": "model",
    "--test-attacks": "attacks",
    "--select-attack": "attacks",
}


def content() -> str:
    """The text of ``completion.json``."""
    names: dict[str, list[str]] = {
        "method": list(METHODS),
        "data": list(DATA_SETS),
        "model": list(MODELS),
        "attacks": list(EXAMPLES),
        "--on": list(SETS),
        "--which": [*WEIGHTS, BOTH],
        "--search-dtype": list(SEARCH_DTYPES),
        "--format": ["table", *FORMATS],
    }
    names |= {as_flag(slot): part_names(slot) for slot in PARTS}
    classes = [part for parts in PARTS.values() for part in parts.values()]
    for name, hint in {**all_options(classes), **setting_types()}.items():
        kind = plain_type(hint)
        if get_origin(kind) is Literal:
            names[as_flag(name)] = [str(word) for word in get_args(kind)]
    rows = {"train": [row for _, rows in groups() for row in rows]}
    commands = {name: [_entry(row, names) for row in found] for name, found in rows.items()}
    lines = ["{", '"names": {']
    lines += _lines([f"{json.dumps(kind)}: {json.dumps(each)}" for kind, each in names.items()])
    lines += ["},", '"commands": {']
    for place, (name, entries) in enumerate(commands.items()):
        lines += [f"{json.dumps(name)}: [", *_lines([json.dumps(each) for each in entries])]
        lines.append("]," if place + 1 < len(commands) else "]")
    return "\n".join([*lines, "}}"]) + "\n"


def _lines(entries: list[str]) -> list[str]:
    return [f"{entry}," for entry in entries[:-1]] + entries[-1:]


def _entry(row: Row, names: dict[str, list[str]]) -> list[Any]:
    """Flags, whether a value follows, the kind of its names, the meaning."""
    flag, _, value = row.flag.partition(" ")
    if flag.startswith("--[no-]"):
        plain = "--" + flag.removeprefix("--[no-]")
        return [[f"{plain}/--no-{plain[2:]}"], False, "", row.meaning]
    kind = _NAMES_OF.get(flag, flag if flag in names else "")
    return [[flag], bool(value), kind, row.meaning]
