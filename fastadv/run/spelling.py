"""Names and values of settings and options as a sentence shows them."""

from __future__ import annotations

from fastadv.storage.printable import printable


def in_dashes(name: str) -> str:
    """The setting or option ``name`` in a list of them: batch-size."""
    return name.replace("_", "-")


def as_flag(name: str) -> str:
    """The setting or option ``name`` as the command line writes it: --batch-size."""
    return f"--{in_dashes(name)}"


def as_typed(name: str, value: object) -> str:
    """The setting or option ``name`` with its value, as the command line writes it: --eps 0.1."""
    if type(value) is bool:
        return as_flag(name if value else f"no-{name}")
    return f"{as_flag(name)} {shown(value)}"


def shown(value: object) -> str:
    """``value`` with all its digits, several ones with commas; None is "not set"."""
    if value is None:
        return "not set"
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    if isinstance(value, float):
        short = f"{value:.6g}"
        return short if float(short) == value else repr(value)
    return printable(str(value))
