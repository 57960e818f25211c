"""What a network was built for besides its configuration: the images and classes of its data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastadv.errors import UserError
from fastadv.storage.printable import printable


@dataclass(frozen=True)
class BuiltFor:
    """Images (B,in_channels,*image_size) in [0,1] whose channels have ``mean`` and ``std``, and
    ``num_classes`` classes, with their names where they have some."""

    num_classes: int
    in_channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()

    @classmethod
    def read(cls, saved: Mapping[str, Any], path: Path) -> BuiltFor:
        """From the checkpoint ``saved``, read from ``path``. Raises ``UserError`` where it does not
        say all."""
        try:
            found = saved["built_for"]
            height, width = found["image_size"]
            own = cls(
                found["num_classes"],
                found["in_channels"],
                (height, width),
                tuple(found["mean"]),
                tuple(found["std"]),
                tuple(found["classes"]),
            )
        except (KeyError, TypeError, ValueError):
            own = None
        if own is None or not own._is_sound():
            raise UserError(
                f"{printable(path)} does not say which images and classes its network is for: "
                "restore the run's own file."
            )
        return own

    def _is_sound(self) -> bool:
        counts = (self.num_classes, self.in_channels, *self.image_size)
        numbers = (*self.mean, *self.std)
        return (
            all(type(count) is int and count > 0 for count in counts)
            and len(self.mean) == len(self.std) == self.in_channels
            and all(type(each) is float and math.isfinite(each) for each in numbers)
            and len(self.classes) in (0, self.num_classes)
            and all(isinstance(name, str) for name in self.classes)
        )

    def saved(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return asdict(self)

    def facts(self) -> dict[str, Any]:
        """The keywords of ``build_model``."""
        return {name: value for name, value in asdict(self).items() if name != "classes"}
