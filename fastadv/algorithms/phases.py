"""The time at which something begins: a number of epochs, or a fraction of a run of known
length."""

from __future__ import annotations

from fastadv.algorithms.contract import Setup
from fastadv.errors import UserError


def epoch_of(value: float, setup: Setup, name: str) -> float:
    """``value`` in epochs, counted from 0; a value between 0 and 1 is a fraction of the run.

    ``name`` is the option's name, for the errors. Raises ``UserError`` for a negative value, and
    for a fraction of a run of unknown length.
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
    # Rounded, since 0.275 * 200 is 55.00000000000001 and would begin one epoch late.
    return round(value * setup.total_epochs, 6)
