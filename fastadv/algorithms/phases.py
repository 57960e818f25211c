"""When something begins: a number of epochs, or a fraction of a run whose length is known."""

from __future__ import annotations

from fastadv.algorithms.contract import Setup
from fastadv.errors import UserError


def epoch_of(value: float, setup: Setup, name: str) -> float:
    """``value`` in epochs from the run's first one (0); below 1 it is a fraction of the run.

    Raises ``UserError`` for a negative value, and for a fraction of a run of unknown length.
    """
    if value < 0:
        raise UserError(f"{name} must be at least 0, not {value:g}.")
    if value == 0 or value >= 1:
        return value
    if setup.total_epochs is None:
        raise UserError(
            f"{name}={value:g} is a fraction of the run: pass total_steps= and steps_per_epoch=, "
            f"or {name}= as a number of epochs."
        )
    # Rounded, so that 0.445 of 200 epochs is epoch 89 and not the next one.
    return round(value * setup.total_epochs, 6)
