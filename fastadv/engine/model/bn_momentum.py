"""BatchNorm's running statistics as if x and x' had been forwarded more often than once each.

A pass of momentum m moves a statistic r towards the batch's s: (1 - m) r + m s. TRADES' published
code forwards x, x' and x again, for the same activations: (1 - m)^3 r + (m + m (1 - m)^2) s +
m (1 - m) s'. One pass of x and then one of x', each of a momentum of its own, leave the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

from torch import nn

from fastadv.engine.model.bn_folding import NORMS

Pass = Literal["natural", "adversarial"]
NATURAL: Final = "natural"
ADVERSARIAL: Final = "adversarial"
DEFAULT_BN_UPDATES = (NATURAL, ADVERSARIAL)
"""The passes that are made, in their order."""


def equivalent_momenta(passes: Sequence[str], momentum: float) -> dict[str, float]:
    """The momentum of each kind of pass with which one pass of each (``DEFAULT_BN_UPDATES``) leaves
    the running statistics that all of ``passes`` with ``momentum`` would."""
    share = dict.fromkeys(DEFAULT_BN_UPDATES, 0.0)
    for later, which in enumerate(reversed(passes)):
        share[which] += momentum * (1 - momentum) ** later
    return {
        NATURAL: share[NATURAL] / (1 - share[ADVERSARIAL]),
        ADVERSARIAL: share[ADVERSARIAL],
    }


class EmaBatchNorms:
    """The BatchNorms of a network."""

    def __init__(self, model: nn.Module) -> None:
        kinds: tuple[Any, ...] = (*NORMS, nn.SyncBatchNorm)
        self.norms: list[Any] = [m for m in model.modules() if isinstance(m, kinds)]

    def all_forget(self) -> bool:
        """Whether each has a ``momentum``: without one a norm weighs all its passes alike."""
        return all(norm.momentum is not None for norm in self.norms)

    @contextmanager
    def bn_updates_as(self, passes: Sequence[str], which: str) -> Iterator[None]:
        """The one pass of ``which`` inside counts as all of ``passes``."""
        if tuple(passes) == DEFAULT_BN_UPDATES:
            yield
            return
        own = [norm.momentum for norm in self.norms]
        try:
            for norm, momentum in zip(self.norms, own, strict=True):
                norm.momentum = equivalent_momenta(passes, momentum)[which]
            yield
        finally:
            for norm, momentum in zip(self.norms, own, strict=True):
                norm.momentum = momentum
