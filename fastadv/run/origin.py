"""Where a value of a run came from."""

from __future__ import annotations

from enum import StrEnum


class Origin(StrEnum):
    """The home of a default, or who replaced it; later ones come before earlier ones."""

    PART = "part"
    DEFAULT = "default"
    DATA = "data preset"
    RECIPE = "recipe"
    FILE = "file"
    USER = "user"
    STORED = "run folder"
