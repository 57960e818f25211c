"""Rows of results: their provenance, and the files that hold them."""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fastadv
from fastadv.errors import UserError

Row = dict[str, Any]


def provenance(device: torch.device) -> Row:
    """Provenance in every row of one run: command, device, versions, date, commit, threads."""
    return {
        "run": secrets.token_hex(4),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "fastadv": fastadv.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


@cache
def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its cores and instructions for bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    told = information.read_text() if information.exists() else ""
    named = re.search(r"model name\s*:\s*(.+)", told)
    name = named.group(1).strip() if named else platform.processor() or platform.machine()
    instructions = re.findall(r"\b(amx_bf16|avx512_bf16)\b", told)
    best = ", AMX" if "amx_bf16" in instructions else ", AVX-512 bf16" if instructions else ""
    return f"{name}, {os.cpu_count()} cores{best}"


def repository() -> Path | None:
    """The checkout this package runs from, or None for an installed wheel."""
    root = Path(fastadv.__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").exists() and (root / "tests").is_dir() else None


@cache
def commit() -> str | None:
    """The checkout's commit, with "+changes" when files differ from it, rows apart.

    Without git, as in a checkout that was copied without its ``.git``, the environment variable
    ``FASTADV_COMMIT``; otherwise None.
    """
    return _commit_of_git() or os.environ.get("FASTADV_COMMIT", "").strip() or None


def _commit_of_git() -> str | None:
    root = repository()
    if root is None:
        return None
    status = ["status", "--porcelain", "-uno", "--", ".", ":!bench/results"]
    try:
        found = [
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
            for words in (["rev-parse", "--show-toplevel", "--short", "HEAD"], status)
        ]
    except OSError:  # no git here
        return None
    if found[0].returncode:
        return None
    top, head = found[0].stdout.splitlines()
    if Path(top).resolve() != root:  # another repository that contains this folder
        return None
    return head + ("+changes" if found[1].stdout.strip() else "")


def _triton_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def results_file(folder: Path, device: torch.device) -> Path:
    """One file per device and torch version."""
    name = f"{device_name(device)}-torch{torch.__version__}".lower()
    return folder / (re.sub(r"[^a-z0-9.]+", "-", name).strip("-") + ".jsonl")


class SoFar:
    """Results of an unfinished comparison: a file next to the results that is complete at any time,
    replaced by every ``write`` and deleted by ``remove``."""

    def __init__(self, results: Path, run: str) -> None:
        self.path = results.with_name(f"{results.stem}.{run}.unfinished.jsonl")

    def write(self, rows: Iterable[Row]) -> None:
        """Replace the content by ``rows``; a reader sees all old rows or all new ones."""
        fresh = self.path.with_suffix(".new")
        fresh.write_text(_lines(rows), encoding="utf-8")
        fresh.replace(self.path)

    def remove(self) -> None:
        """Delete the file, once the final rows are written."""
        self.path.unlink(missing_ok=True)


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append ``rows`` to the file, one line per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(rows))


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Every row of a file, or of all files in a folder; of a preliminary row and the final one of
    the same run, the final one."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            found += [json.loads(line) for line in lines if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"Cannot read the results in {file}: {error}.") from None
    return without_replaced(found)


def without_replaced(rows: Sequence[Row]) -> list[Row]:
    """``rows`` without the preliminary ones that a final row of the same run replaces."""
    final = {_what(row) for row in rows if not row.get("preliminary")}
    return [row for row in rows if not row.get("preliminary") or _what(row) not in final]


def _what(row: Row) -> str:
    names = ("run", "kind", "name", "peer", "ours", "dtype", "config")
    return json.dumps([row.get(name) for name in names], sort_keys=True)


def newest(rows: Sequence[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    """For each key the rows of the last run that has it, in the order they were written.

    A run that left preliminary rows only comes after every run with final ones, however old.
    """
    last: dict[Hashable, tuple[bool, str, str]] = {}
    for row in rows:
        last[key(row)] = max(last.get(key(row), (False, "", "")), _rank(row))
    return [row for row in rows if last[key(row)] == _rank(row)]


def newest_of_each(rows: Sequence[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    """The last row for each key; a run may time the same thing in several comparisons."""
    return list({key(row): row for row in newest(rows, key)}.values())


def _rank(row: Row) -> tuple[bool, str, str]:
    return not row.get("preliminary"), row["date"], row["run"]
