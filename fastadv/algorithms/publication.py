"""What a publication states of its training, and where a recipe departs from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

UNSTATED: Final = "not stated"
"""The value of a setting that neither the paper nor its code gives."""


@dataclass(frozen=True)
class Published:
    """The settings of one published training, on one data set. A value is ``UNSTATED`` where
    neither the paper nor its code gives it.

    ``code`` is the file that was read, or the section of the paper where no code is published.
    ``model`` ... ``weight_decay`` are settings of a run, by the names and in the units of
    ``fastadv train``; ``drops`` is None for a schedule without drops. ``eps`` and ``alpha`` are in
    pixels of [0,1], ``alpha`` None for an attack without a step of its own; ``steps`` are the
    gradients that the attack takes beside those of the update. ``attack_bn`` is the mode of
    BatchNorm in the attack, None without an attack. ``start`` is the attack's initialisation, in
    words (``fastadv.algorithms.starting_words``). ``more`` are other settings and options, name ->
    value.

    ``departs`` is name -> why the recipe has another value; "bn", "box" and "updates" are of the
    update, where no setting makes it the published one. A test compares all values with those that
    a run of the recipe takes.
    """

    code: str
    model: str
    data: str
    epochs: float | str
    batch_size: int | str
    schedule: str
    lr: float | str
    weight_decay: float | str
    eps: float | str
    steps: int | str
    alpha: float | str | None
    attack_bn: str | None
    start: str
    drops: tuple[float, ...] | str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    departs: Mapping[str, str] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Every stated setting, name -> value, without those in words."""
        own = ("model", "epochs", "batch_size", "schedule", "lr", "weight_decay", "eps", "steps")
        found = {name: getattr(self, name) for name in (*own, "alpha", "attack_bn", "drops")}
        return {**found, **self.more}
