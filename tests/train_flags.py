"""The options of ``fastadv train`` as a sorted list: flag, type or choices, default.

``python tests/train_flags.py`` rewrites ``tests/golden/train_flags.txt``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from fastadv.algorithms.options import all_options, default, option_types
from fastadv.algorithms.parts import PARTS, names
from fastadv.cli.main import application
from fastadv.declared import describe, plain_type
from fastadv.run.defaults import DEFAULTS
from fastadv.run.request import setting_types

GOLDEN = Path(__file__).parent / "golden" / "train_flags.txt"
REWRITE = "python tests/train_flags.py"


def train_flags() -> list[str]:
    """One line per option that the command takes, sorted."""
    group: Any = typer.main.get_command(application("train"))
    found = []
    for option in group.commands["train"].params:
        flags = "/".join([*option.opts, *option.secondary_opts])
        found.append(f"{flags}: {_type_and_default(option.name)}")
    return sorted(found)


def _type_and_default(name: str) -> str:
    if name in PARTS:
        return _choices(names(name))
    classes = [part for parts in PARTS.values() for part in parts.values()]
    settings = setting_types()
    if name in settings:
        usual = DEFAULTS.get(name)
        return _type(settings[name]) + ("" if usual is None else f" [{usual}]")
    options = all_options(classes)
    if name not in options:
        return "of the command itself"
    usual_values = {
        label: default(part, name)
        for parts in PARTS.values()
        for label, part in parts.items()
        if name in option_types(part)
    }
    said = ", ".join(f"{label} {value}" for label, value in usual_values.items())
    return f"{_type(options[name])} [{said}]"


def _type(hint: Any) -> str:
    kind = plain_type(hint)
    if get_origin(kind) is Literal:
        return _choices(get_args(kind))
    if get_origin(kind) is tuple:
        return ",".join("..." if entry is ... else _type(entry) for entry in get_args(kind))
    within = describe(hint)
    return f"{kind.__name__} {within}".rstrip() if isinstance(kind, type) else str(kind)


def _choices(words: Any) -> str:
    return " | ".join(map(str, words))


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(train_flags()) + "\n")
