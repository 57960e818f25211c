"""Malicious data: no code runs, nothing is written elsewhere, no memory or hang, one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile_data
import pytest

MB = 2**20
# Decoding may hold this much at once, whatever the data (``fastadv.data.decode.IN_FLIGHT``).
MOST = 256 * MB


def opened(home: Path, first: int, count: int) -> list[dict[str, Any]]:
    """The results of the cases, run in their own process."""
    programs = home / "programs"
    programs.mkdir()
    for name in ("gs", "gswin32c", "inkscape", "convert"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {home}/ran\n")
        (programs / name).chmod(0o755)
    for name in ("home", "cache", "here"):
        (home / name).mkdir()
    settings = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(home / "home"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, hostile_data.__file__, str(home / "cases"), str(first), str(count)],
        cwd=home / "here",
        env={**os.environ, **settings},
        capture_output=True,
        timeout=60 + 2 * count,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    shown = done.stderr.replace(b"\n", b"").replace(b"\r", b"")
    assert b"\x1b]" not in shown
    assert b"\x1b[2J" not in shown
    assert not (home / "ran").exists(), "a program was run"
    assert os.listdir(home / "here") == []
    assert os.listdir(home / "home") == []
    assert set(os.listdir(home / "cache")) <= {"fastadv"}
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]], count: int) -> None:
    assert len(found) == count
    for facts in found:
        assert facts["outcome"] in ("data", "sentence"), facts
        assert facts["said"].isprintable(), facts
        assert facts["outside"] == ["precious"], facts
        assert facts["precious"] == "precious", facts
        assert facts["grew"] < MOST, facts
        assert facts["seconds"] < hostile_data.SECONDS / 2, facts


def test_data_meant_to_harm(tmp_path: Path) -> None:
    count = len(hostile_data.CASES)
    check(opened(tmp_path, 0, count), count)


@pytest.mark.slow
def test_much_data_meant_to_harm(tmp_path: Path) -> None:
    check(opened(tmp_path, 100, 340), 340)  # 20 of each kind
