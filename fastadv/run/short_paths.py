"""Paths as a table shows them: as little of their ends as tells them apart."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path


def short_paths(paths: Collection[str]) -> dict[str, str]:
    """Each of ``paths``, which may be several with commas -> its last name, or as many of its last
    names as no other of them ends with."""
    deepest = max(path.count("/") + path.count("\\") for path in paths)
    for count in range(1, deepest + 2):
        short = {path: ",".join(_end(each, count) for each in path.split(",")) for path in paths}
        if len(set(short.values())) == len(short):
            return short
    return {path: path for path in paths}


def _end(path: str, count: int) -> str:
    names = Path(path.strip()).parts
    return path.strip() if count >= len(names) else str(Path(*names[-count:]))
