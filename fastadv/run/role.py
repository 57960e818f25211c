"""What a setting is to its run, said once, where the setting is declared (``RunRequest``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Effect(Enum):
    """What becomes another with a setting, all else being equal."""

    WEIGHTS = "what is trained"
    LENGTH = "how long it is trained"
    BITS = "how it is computed: the same training, rounded otherwise"
    EVALUATION = "what is measured of it"
    NOTHING = "where things are and what is kept; the content is compared"


@dataclass(frozen=True)
class For:
    """What a setting is for: some value of another one, ``setting``. ``values``: those that take
    it; (): it was chosen for the very value beside which it stands."""

    setting: str
    values: tuple[str, ...] = ()

    def fits(self, before: object, now: object) -> bool:
        """True if a value chosen beside ``before`` is still one beside ``now``."""
        return now == before or now in self.values


@dataclass(frozen=True)
class Role:
    """The facts about one setting, each of which holds by itself. As a setting that says nothing
    is taken, another value is another training of another method.

    ``chooses``: the best epoch is chosen by it. ``of_method``: runs that differ in it are other
    methods, and not seeds of one. ``place``: it names where something is, with ``may_be_missing``
    if a begun run can do without. ``each_process``: processes on different machines may have
    different values. ``measured``: "auto" stands for what is measured, and the run then holds that.
    ``of_folder``: which files its folder has is a matter of the newest value, so that one is noted.
    ``beside``: the settings that it accompanies.
    """

    effect: Effect = Effect.WEIGHTS
    chooses: bool = False
    of_method: bool = True
    place: bool = False
    may_be_missing: bool = False
    each_process: bool = False
    measured: bool = False
    of_folder: bool = False
    beside: tuple[For, ...] = ()

    @property
    def may_change(self) -> bool:
        """True if a run that goes on may have another value."""
        return self.effect is not Effect.WEIGHTS and not self.chooses

    @property
    def only_measures(self) -> bool:
        """True if it decides what is said about a run and nothing of the run itself."""
        return self.may_change and self.effect is Effect.EVALUATION

    @property
    def noted(self) -> bool:
        """True if the file of a run has the value with which it went on last: what is in its folder
        is of that one."""
        return self.only_measures or (self.may_change and self.of_folder)

    @property
    def harmless(self) -> bool:
        """True if such a run has the same weights, bit for bit."""
        return self.may_change and self.effect in (Effect.EVALUATION, Effect.NOTHING)

    @property
    def of_invocation(self) -> bool:
        """True if a command that continues a run may say another value.

        Not so the length: without that word the run would end elsewhere the next time, so only its
        file says it. A place is said for good.
        """
        return self.may_change and self.effect is not Effect.LENGTH and not self.place


def setting(*beside: For, effect: Effect = Effect.WEIGHTS, **facts: bool) -> Any:
    """The field of a setting that may be left open, with its ``Role``."""
    return field(default=None, metadata={"role": Role(effect, beside=beside, **facts)})
