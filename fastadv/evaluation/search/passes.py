"""The passes of searches: in the precision of the search, and in the network's own to confirm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from fastadv.engine.gradient import input_gradient, leaf
from fastadv.engine.model.network import Network
from fastadv.engine.model.precision import autocast
from fastadv.evaluation.search.search import Search, State
from fastadv.ranges import require_logits


class Passes:
    """Forward and backward passes of one network under attack, counted.

    ``network`` computes in its own precision; ``fast``, the same network in a lower one, searches
    (None: ``network`` does). Within ``with passes:`` the network is in eval mode and frozen.
    ``forwards`` and ``backwards`` are numbers of images, of all passes so far. ``repeats`` passes
    are averaged into each gradient (a network with noise; EOT, Athalye et al., 2018).
    """

    def __init__(self, network: Network, fast: Network | None = None, repeats: int = 1) -> None:
        self.network = network
        self.fast = fast
        self.repeats = repeats
        self.forwards = self.backwards = 0
        self._inside: ExitStack | None = None
        self._current: Network | None = None

    @property
    def confirms(self) -> bool:
        """True if what fools the network must be confirmed in its own precision."""
        return self.fast is not None

    def prepare(self, x: Tensor) -> None:
        """Look at the network with a few images ``x`` (B,C,H,W): which of its BatchNorms can be
        folded. Then as ``own``."""
        for network in (self.network, self.fast):
            if network is not None and not network.looks:
                network.probe(x[:PROBED])
                self._leave()  # what was found is installed on the way in
        self.own()

    def __enter__(self) -> Passes:
        for network in (self.network, self.fast):
            if network is not None:
                network.copies.invalidate()  # the caller may have changed the weights since
        self.own()
        return self

    def __exit__(self, *error: Any) -> None:
        self._leave()

    def own(self) -> Network:
        """The network, ready for passes of other code in its own precision."""
        return self._in(self.network)

    def exact(self, x: Tensor) -> Tensor:
        """Logits (n,classes) of ``x`` (n,...) in the network's own precision."""
        return self._forward(self.own(), x)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (n,classes) of ``x`` (n,...) in the precision of the search."""
        return self._forward(self._in(self.fast or self.network), x)

    def gradient(self, search: Search, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n,classes), objective (n,) and its gradient (n,...) at the points of ``state``,
        in the precision of the search."""
        network = self._in(self.fast or self.network)
        self.forwards += self.repeats * len(state["point"])
        self.backwards += self.repeats * len(state["point"])
        total: Tensor | None = None
        for _ in range(self.repeats):
            logits, loss, gradient = network.run(self._region, network, search, state)
            total = gradient if total is None else total + gradient
        if total is None:
            raise ValueError("repeats must be at least 1")
        return logits, loss, total if self.repeats == 1 else total / self.repeats

    def _region(
        self, network: Network, search: Search, state: State
    ) -> tuple[Tensor, Tensor, Tensor]:
        point = leaf(state["point"])
        logits = self._logits(network, point)
        loss = search.objective(logits, state)
        scale = network.loss_scale(1)
        gradient = input_gradient(loss.sum() * scale if scale != 1 else loss.sum(), point)
        if scale != 1:
            gradient = gradient / scale
        return logits.detach(), loss.detach(), gradient

    def _forward(self, network: Network, x: Tensor) -> Tensor:
        self.forwards += len(x)
        with torch.no_grad():
            return self._logits(network, x)

    def _logits(self, network: Network, x: Tensor) -> Tensor:
        logits = network.logits(x)
        require_logits(logits)
        return logits

    def _in(self, network: Network) -> Network:
        """``network``, with its weights in place. Only one network's can be."""
        if self._current is not network:
            self._leave()
            self._inside = stack = ExitStack()
            stack.enter_context(_attackable(network))
            self._current = network
        return network

    def _leave(self) -> None:
        if self._inside is not None:
            self._inside.close()
        self._inside = self._current = None


PROBED = 16  # images are enough to see how a network is built


@contextmanager
def _attackable(network: Network) -> Iterator[None]:
    off: AbstractContextManager[Any] = autocast(network.device, None)
    with torch.inference_mode(False), off, network.attacking("eval"):
        yield
