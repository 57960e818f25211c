"""Counts the calls of the package's own functions in one step, by file and function."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import fastadv

PACKAGE = str(Path(fastadv.__file__).parent)
MODELS = str(Path(PACKAGE, "models"))


def package_calls(run: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """How often each function of fastadv, without its models, is entered while ``run`` runs.

    Keys are (file inside the package, function). A generator counts each time it is resumed.
    """
    calls: Counter[tuple[str, str]] = Counter()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(PACKAGE) and not path.startswith(MODELS):
            calls[path[len(PACKAGE) + 1 :], frame.f_code.co_qualname] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


def table(calls: Counter[tuple[str, str]]) -> str:
    """The calls per file, the most first, and per function below each."""
    files: Counter[str] = Counter()
    for (file, _), count in calls.items():
        files[file] += count
    lines = [f"{calls.total()} calls"]
    for file, count in files.most_common():
        lines.append(f"{count:5} {file}")
        own = Counter({name: n for (where, name), n in calls.items() if where == file})
        lines += [f"      {n:5} {name}" for name, n in own.most_common()]
    return "\n".join(lines)
