"""Whether a run has ended."""

from __future__ import annotations

from typing import Any

from fastadv.errors import UserError
from fastadv.run.config import RunConfig
from fastadv.run.run_folder import RunFolder

EPOCHS = "epochs"
"""The entry of summary.json with the number of epochs after which it was written."""


def ended(
    folder: RunFolder, config: RunConfig, trained: int | None = None
) -> dict[str, Any] | None:
    """The summary of the run of ``config`` in ``folder``, if it has ended; None for any other.

    It has not if it is to be longer now. ``trained``: the epochs in the checkpoint from which it
    would go on; where the last one is lost, the end is trained and tested again. Raises
    ``UserError`` for a damaged summary.
    """
    summary = folder.read_summary()
    if summary is None:
        return None
    epochs = summary.get(EPOCHS)
    reached = type(epochs) is int and epochs >= config.epochs
    return summary if reached and (trained is None or trained >= config.epochs) else None


def has_ended(folder: RunFolder, config: RunConfig) -> bool:
    """True if the run has ``ended``, or has a summary that is damaged: it was written then."""
    try:
        return ended(folder, config) is not None
    except UserError:
        return True
