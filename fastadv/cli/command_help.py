"""The help of ``fastadv`` and of its commands but ``train``, in the layout of ``help_screen``.

It is read from the signatures of the commands, so that nothing is said twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fastadv.cli.help_screen import Row, laid_out
from fastadv.cli.value_words import shown
from fastadv.exit_codes import ExitCode
from fastadv.printing.layout import filled, page_columns
from fastadv.run.spelling import as_flag

_TYPES: Mapping[Any, str] = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}
_VERSION = Row("--version", "say which version this is")
_HELP = Row("-h, --help", "show this help; of a command: fastadv COMMAND -h")
_COMPLETION = (
    Row("--install-completion", "complete options and names with the tab key in this shell"),
    Row("--show-completion", "print the script that does it"),
)


def overview(commands: Mapping[str, str]) -> str:
    """``fastadv --help``; ``commands``: name -> what it does, in whole sentences."""
    width = page_columns()
    rows = [Row(name, text.partition(". ")[0].rstrip(".")) for name, text in commands.items()]
    codes = [Row(str(code.value), code.meaning) for code in ExitCode]
    lines = [
        "Usage: fastadv COMMAND [OPTIONS]",
        "",
        "Fast adversarial training: fastadv train --method apart --amp runs as it is.",
        "",
        *laid_out("Commands", rows, width, left=16),
        *laid_out("Options", [_VERSION, _HELP, *_COMPLETION], width),
        *laid_out("Exit codes", codes, width, left=8),
    ]
    return "\n".join(lines) + "\n"


def page(name: str, command: Callable[..., Any]) -> str:
    """``fastadv NAME --help``."""
    width = page_columns()
    arguments = [entry for entry in _entries(command) if entry.is_argument]
    usage = " ".join(f"[{each.flag}]" if each.optional else each.flag for each in arguments)
    about = " ".join((inspect.getdoc(command) or "").split()).replace("``", "")
    lines = [f"Usage: fastadv {name} {usage} [OPTIONS]".replace("  ", " "), ""]
    lines += [filled(about, width), ""]
    lines += laid_out("Arguments", [each.row() for each in arguments], width)
    groups: dict[str, list[Row]] = {}
    for entry in _entries(command):
        if not entry.is_argument:
            groups.setdefault(entry.group, []).append(entry.row())
    groups.setdefault("Options", []).append(Row("-h, --help", "show this help"))
    for title, rows in groups.items():
        lines += laid_out(title, rows, width)
    return "\n".join(lines) + "\n"


def options_of(command: Callable[..., Any]) -> list[Row]:
    """The rows of the options of ``command``."""
    return [entry.row() for entry in _entries(command) if not entry.is_argument]


def flags(command: Callable[..., Any]) -> dict[str, str]:
    """The parameters of ``command`` -> how a user writes them, without a value."""
    names = inspect.signature(command).parameters
    written = (entry.flag.partition(" ")[0] for entry in _entries(command))
    return dict(zip(names, written, strict=True))


class _Entry:
    """One parameter of a command: ``flag`` as the user writes it, its help and default."""

    def __init__(self, parameter: inspect.Parameter, hint: Any) -> None:
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        info = next(mark for mark in marks if hasattr(mark, "param_decls"))
        self.is_argument = type(info).__name__ == "ArgumentInfo"
        self.group = info.rich_help_panel or "Options"
        self.optional = parameter.default is not inspect.Parameter.empty
        self._help, self._default = info.help or "", parameter.default
        self._kind = next((each for each in get_args(kind) if each is not NoneType), kind)
        of_entries = get_args(self._kind) if get_origin(self._kind) is list else ()
        self._kind = of_entries[0] if of_entries else self._kind
        # typer takes the first of several for the default, as they stand in the call.
        said = [info.default, *(info.param_decls or ())]
        decls = [each for each in said if isinstance(each, str) and each.startswith("-")]
        flag = (decls or [as_flag(parameter.name)])[0]
        if self.is_argument:
            self.flag = info.metavar or parameter.name.upper()
        elif self._kind is bool:
            self.flag = flag
        else:
            self.flag = f"{flag} {info.metavar or _TYPES.get(self._kind, 'TEXT')}"

    def row(self) -> Row:
        usual = self._default
        silent = any(usual is each for each in (inspect.Parameter.empty, None, False))
        if silent or "[" in self._help:
            return Row(self.flag, self._help)
        return Row(self.flag, self._help, default=shown(usual))


def _entries(command: Callable[..., Any]) -> Iterator[_Entry]:
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        yield _Entry(parameter, hints[name])
