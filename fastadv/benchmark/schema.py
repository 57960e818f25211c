"""The form of what ``fastadv bench --json`` writes."""

from __future__ import annotations

from pathlib import Path


def schema_text() -> str:
    """The JSON Schema of the documents."""
    return Path(__file__).with_name("bench.schema.json").read_text(encoding="utf-8")
