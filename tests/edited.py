"""Change a run's config.toml as a user would."""

from __future__ import annotations

from pathlib import Path


def edit(config: Path, old: str, new: str) -> None:
    """Replace ``old`` by ``new`` and remove the line with the checksum, as a user may."""
    lines = config.read_text().replace(old, new, 1).splitlines(keepends=True)
    assert any(new in line for line in lines)
    config.write_text("".join(line for line in lines if not line.startswith("# checksum")))
