"""Rows of results: what they say about where they come from, and the files they live in."""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fastadv
from fastadv.errors import UserError

Row = dict[str, Any]


def provenance(device: torch.device) -> Row:
    """What every row of one run carries: command, device, versions, date, commit, threads."""
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
    """The checkout's commit, with "+changes" when files differ from it, rows apart."""
    root = repository()
    if root is None:
        return None
    status = ["status", "--porcelain", "-uno", "--", ".", ":!bench/results"]
    try:
        found = [
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
            for words in (["rev-parse", "--short", "HEAD"], status)
        ]
    except OSError:  # no git here
        return None
    if found[0].returncode:
        return None
    return found[0].stdout.strip() + ("+changes" if found[1].stdout.strip() else "")


def _triton_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def results_file(folder: Path, device: torch.device) -> Path:
    """One file for a device and torch version."""
    name = f"{device_name(device)}-torch{torch.__version__}".lower()
    return folder / (re.sub(r"[^a-z0-9.]+", "-", name).strip("-") + ".jsonl")


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add ``rows`` to the file, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Every row of a file, or of all files in a folder."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            found += [json.loads(line) for line in lines if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"Cannot read the results in {file}: {error}.") from None
    return found
