"""The results of the sections (``record.json``), and the waivers (``waivers.toml``).

A waiver gives the reason why a section need not run again after a change of its files. It holds for
the digest of one state of the files, not for later states.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import digest

RECORD = digest.HERE / "record.json"
WAIVERS = digest.HERE / "waivers.toml"
# Section -> name of its file of golden numbers.
GOLDEN = {
    "recipes": "launches",
    "generated": "generated",
    "steps": "steps",
    "ranks": "ranks",
    "shapes": "graphs",
}


def read() -> dict[str, Any]:
    """The record of every section that has run."""
    found: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return found


def write(section: str, entry: dict[str, Any]) -> None:
    """Write the record of ``section`` to the file."""
    known = read() | {section: entry}
    ordered = {name: known[name] for name in digest.COVERED if name in known}
    RECORD.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def complaints(
    record: dict[str, Any] | None = None, waivers: list[dict[str, str]] | None = None
) -> list[str]:
    """A message for each section whose files have changed since it ran, or that has failed."""
    record = read() if record is None else record
    waivers = tomllib.loads(WAIVERS.read_text()).get("waiver", []) if waivers is None else waivers
    waived = {(each["section"], each["digest"]) for each in waivers if each.get("reason")}
    found = []
    for section in digest.COVERED:
        entry, now = record.get(section), digest.digest(section)
        command = f"run `python tools/pretend_cuda/run.py {section}`"
        if entry is None:
            found.append(f"Section {section!r} has never been recorded: {command}.")
        elif entry["digest"] != now and (section, now) not in waived:
            found.append(
                f"Files of section {section!r} have changed since its run on {entry['date']}: "
                f"{command} (tools/pretend_cuda/README.md says what it needs), or append this to "
                "tools/pretend_cuda/waivers.toml with the reason why no run is needed:\n"
                f'[[waiver]]\nsection = "{section}"\ndigest = "{now}"\nreason = ""\n'
            )
        elif entry["counts"].get("failed"):
            found.append(
                f"Section {section!r} was recorded with {entry['counts']['failed']} failures: fix "
                f"them and {command}."
            )
    return found


def golden(section: str) -> Path:
    """The file of golden numbers of ``section``."""
    return digest.HERE / "golden" / f"{GOLDEN[section]}.json"


def read_golden(section: str) -> dict[str, Any]:
    """The golden numbers of ``section``; {} if there is no file yet."""
    file = golden(section)
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def write_golden(section: str, numbers: dict[str, Any]) -> None:
    """Write golden numbers, one entry per line, so that a diff shows which have changed."""
    golden(section).parent.mkdir(exist_ok=True)
    lines = (f"{json.dumps(name)}: {json.dumps(each)}" for name, each in numbers.items())
    golden(section).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def differences(old: Any, new: Any, place: tuple[str, ...] = ()) -> list[str]:
    """Each number that differs: its place, the old and the new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in dict.fromkeys([*old, *new])
            for line in differences(old.get(key), new.get(key), (*place, str(key)))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for number, (one, other) in enumerate(zip(old, new, strict=True))
            for line in differences(one, other, (*place, f"number {number}"))
        ]
    if old == new:
        return []
    words = ["nothing" if value is None else json.dumps(value) for value in (old, new)]
    return [f"{', '.join(place)}: {' -> '.join(words)}"]
