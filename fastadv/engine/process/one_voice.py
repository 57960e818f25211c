"""Of the processes that torchrun has started, one says what all have to say."""

from __future__ import annotations

import os
from pathlib import Path


def first_to_speak() -> bool:
    """True in one of the processes of this machine that call this before they end: in the first
    one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    # torchrun's own folder of this attempt, in which every process has one.
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if place:
        try:
            mark = Path(place).parents[1] / "fastadv-has-spoken"
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            return True
        except FileExistsError:
            return False
        except (OSError, IndexError):
            pass
    return is_first()


def is_first() -> bool:
    """True in the process that speaks where nothing is wrong, also before it has joined the
    others."""
    return os.environ.get("RANK", "0") == "0"
