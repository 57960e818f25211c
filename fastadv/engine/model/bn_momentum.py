"""BatchNorm's running statistics as if x and x' had been forwarded more than once each.

A pass with momentum m moves a statistic r towards the batch's s: (1 - m) r + m s. TRADES' published
code forwards x, x' and x again, for the same activations: (1 - m)^3 r + (m + m (1 - m)^2) s +
m (1 - m) s'. One pass of x and then one of x', each with its own momentum, give the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor, nn

from fastadv.engine.model.agreement import draws_kept, host_draws_kept, moved_alike
from fastadv.engine.model.bn_counters import BatchNormCounters
from fastadv.engine.model.bn_fold import NORMS
from fastadv.engine.model.buffers import Layout, kept
from fastadv.engine.model.guard import train_flags

Pass = Literal["natural", "adversarial"]
NATURAL: Final = "natural"
ADVERSARIAL: Final = "adversarial"
DEFAULT_BN_UPDATES = (NATURAL, ADVERSARIAL)
"""The passes that are really made, in their order."""


def equivalent_momenta(bn_updates: Sequence[str], momentum: float) -> dict[str, float]:
    """Kind of pass -> momentum, such that one pass of each kind (``DEFAULT_BN_UPDATES``) gives the
    same running statistics as all of ``bn_updates`` with ``momentum``; 0 for a kind that is not
    among them."""
    share = dict.fromkeys(DEFAULT_BN_UPDATES, 0.0)
    for later, which in enumerate(reversed(bn_updates)):
        share[which] += momentum * (1 - momentum) ** later
    left = 1 - share[ADVERSARIAL]  # 0 if nothing stays of what was before
    return {NATURAL: share[NATURAL] / left if left else 0.0, ADVERSARIAL: share[ADVERSARIAL]}


class Network(Protocol):
    """The attributes of the network (``network.py``) that are used here."""

    model: nn.Module
    device: torch.device
    counters: BatchNormCounters

    @property
    def kept_buffers(self) -> Layout: ...

    def logits(self, x: Tensor, block_noise: list[Tensor] | None = None) -> Tensor: ...

    def in_own_dtype(self) -> AbstractContextManager[None]: ...


class BatchNormMomenta:
    """Gives BatchNorm the state after a published sequence of passes of x and x'.

    If that is enough, one pass of each is made with adjusted momenta and counters; otherwise every
    pass of the sequence is made.
    """

    def __init__(self, net: Network) -> None:
        self._net = net
        self._norms: list[Any] = []
        self.stands = True  # True if one pass of each kind leaves the same buffers (``probe``)
        # The answer from a checkpoint: a new probe would not see a power iteration that converged.
        self.known_to_stand: bool | None = None
        self.follow()

    def follow(self) -> None:
        """Take over the BatchNorms of the present model."""
        kinds: tuple[Any, ...] = (*NORMS, nn.SyncBatchNorm)
        self._norms = [m for m in self._net.model.modules() if isinstance(m, kinds)]

    def suffices(self, bn_updates: Sequence[str]) -> bool:
        """True if one pass of each kind leaves the same buffers as ``bn_updates``. For a BatchNorm
        with momentum=None, which keeps a cumulative average, no equivalent momentum exists."""
        if tuple(bn_updates) == DEFAULT_BN_UPDATES:
            return True
        return self.stands and all(norm.momentum is not None for norm in self._norms)

    def forwards(
        self,
        bn_updates: Sequence[str],
        x: Tensor,
        x_adv: Tensor,
        block_noise: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The logits (B,classes) of ``x`` and of ``x_adv``, both (B,C,H,W). The buffers are then as
        after all ``bn_updates``."""
        net = self._net
        if self.suffices(bn_updates):
            with self.updates_as(bn_updates, NATURAL):
                natural = net.logits(x)
            with self.updates_as(bn_updates, ADVERSARIAL):
                return natural, net.logits(x_adv, block_noise)
        made: dict[str, Tensor] = {}
        # A pass that ought to move nothing is made with the others here.
        passes = bn_updates if NATURAL in bn_updates else (NATURAL, *bn_updates)
        for which in passes:
            given, added = (x, None) if which == NATURAL else (x_adv, block_noise)
            with torch.set_grad_enabled(torch.is_grad_enabled() and which not in made):
                logits = net.logits(given, added)
            made.setdefault(which, logits)
        return made[NATURAL], made[ADVERSARIAL]

    @contextmanager
    def updates_as(self, bn_updates: Sequence[str], which: str) -> Iterator[None]:
        """Within this context one pass of the kind ``which`` ("natural" or "adversarial") updates
        BatchNorm's statistics and counters as all passes of this kind in ``bn_updates`` would."""
        if tuple(bn_updates) == DEFAULT_BN_UPDATES:
            yield
            return
        own = [norm.momentum for norm in self._norms]
        try:
            for norm, momentum in zip(self._norms, own, strict=True):
                norm.momentum = equivalent_momenta(bn_updates, momentum)[which]
            yield
        finally:
            for norm, momentum in zip(self._norms, own, strict=True):
                norm.momentum = momentum
        self._net.counters.count(bn_updates.count(which) - 1)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Passes within this context leave BatchNorm's running statistics and counters as they
        are, in training mode also. It may be entered while an earlier pass waits for its
        backward, which forbids to copy old statistics back."""
        own = [norm.momentum for norm in self._norms]
        try:
            for norm in self._norms:
                norm.momentum = 0.0
            with self._net.counters.stopped():
                yield
        finally:
            for norm, momentum in zip(self._norms, own, strict=True):
                norm.momentum = momentum

    def probe(self, x: Tensor, bn_updates: Sequence[str]) -> None:
        """Find out with the images ``x`` (B,C,H,W) if one pass of each kind is equivalent to
        ``bn_updates``, and store it in ``stands``."""
        known, self.known_to_stand = self.known_to_stand, None
        if tuple(bn_updates) != DEFAULT_BN_UPDATES:
            self.stands = self._one_pass_stands(x, bn_updates) if known is None else known

    def _one_pass_stands(self, x: Tensor, bn_updates: Sequence[str]) -> bool:
        """True if all buffers are the same after one pass of each kind as after ``bn_updates``.
        Momenta cannot account for norms that are called twice or without their module, for power
        iterations and for the model's own statistics."""
        model = self._net.model
        if not any(True for _ in model.buffers()):
            return True
        weight = next(p for p in model.parameters() if p.is_floating_point())
        x = x.to(weight.dtype)
        try:
            with self._net.in_own_dtype():
                before, once = self._left(x, ()), self._left(x, DEFAULT_BN_UPDATES, bn_updates)
                return moved_alike(before, once, self._left(x, bn_updates))
        except Exception:  # a model that fails here takes the slower, safe way
            return False

    def _left(
        self, x: Tensor, made: Sequence[str], standing_for: Sequence[str] = DEFAULT_BN_UPDATES
    ) -> list[Tensor]:
        """The buffers after the passes ``made`` with momenta adjusted for ``standing_for``."""
        net = self._net
        images = {NATURAL: x, ADVERSARIAL: 1 - x}
        with kept(net.kept_buffers), train_flags(net.model, True), torch.no_grad():
            with net.counters.detached():
                for which in made:
                    adjusted = self.updates_as(standing_for, which)
                    # Dropout must draw the same in every pass, or the buffers would differ by it.
                    with adjusted, draws_kept(net.device), host_draws_kept():
                        net.logits(images[which])
            return [buffer.detach().clone() for buffer in net.model.buffers()]
