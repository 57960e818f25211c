"""The passes of searches: in the precision of the search, and in the network's own to confirm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastadv.engine.cuda_graph import CudaRecorder
from fastadv.engine.gradient import gradients, leaf
from fastadv.engine.model.channels_last import kernels_channels_last
from fastadv.engine.model.network import Network
from fastadv.engine.model.precision import autocast
from fastadv.engine.model.python_state import PythonState
from fastadv.engine.model.static import why_not_static
from fastadv.errors import warn
from fastadv.evaluation.search.local_part import local_part
from fastadv.evaluation.search.near import Near, agrees, near, pays
from fastadv.evaluation.search.search import Search, State, choose
from fastadv.ranges import require_logits


class Passes:
    """Forward and backward passes of one network under attack, counted.

    ``network`` computes in its own precision; ``fast``, the same network in a lower one, searches
    (None: ``network`` does). Within ``with passes:`` the network is in eval mode and frozen, on a
    CPU with its kernels in ``channels_last``.
    ``forwards`` and ``backwards`` are numbers of images, of all passes so far. ``repeats`` passes
    are averaged into each gradient (a network with noise; EOT, Athalye et al., 2018). On a device
    ``recorder`` records steps as CUDA graphs; None: they are called. ``between`` is called before
    every step of a search, and may raise to end it.
    """

    def __init__(
        self,
        network: Network,
        fast: Network | None = None,
        repeats: int = 1,
        recorder: CudaRecorder | None = None,
    ) -> None:
        self.network = network
        self.fast = fast
        self.repeats = repeats
        self.recorder = recorder
        self.forwards = self.backwards = 0
        self.between: Callable[[], None] = lambda: None
        self._layout = ExitStack()
        self._inside: ExitStack | None = None
        self._current: Network | None = None

    @property
    def confirms(self) -> bool:
        """True if what fools the network must be confirmed in its own precision."""
        return self.fast is not None

    def prepare(self, x: Tensor) -> None:
        """Look at the network with a few images ``x`` (B,C,H,W): which of its BatchNorms can be
        folded, and whether its passes can be recorded. Then as ``own``."""
        if self.network.looks:
            return
        self._leave()
        for network in (self.network, self.fast):
            if network is not None:
                network.probe_evaluation(x[:PROBED])
        if self.recorder is not None:
            state = PythonState({"": self.network.model})
            reason = why_not_static(self.network, state, x[:PROBED], "eval")
            if reason is not None:
                warn(f"Attacks run as written, not as CUDA graphs: {reason}.")
                self.recorder = None
        self.own()

    def __enter__(self) -> Passes:
        with ExitStack() as layout:
            layout.enter_context(kernels_channels_last(self.network.model))
            for network in (self.network, self.fast):
                if network is not None:
                    network.copies.invalidate()  # the caller may have changed the weights since
            self.own()
            self._layout = layout.pop_all()  # not reached by a model that cannot be attacked
        return self

    def __exit__(self, *error: Any) -> None:
        self._leave()
        self._layout.close()

    def own(self) -> Network:
        """The network, ready for passes of other code in its own precision."""
        return self._in(self.network)

    def logits(self, x: Tensor, *, exact: bool = False) -> Tensor:
        """Logits (n,classes) of ``x`` (n,...) in the precision of the search, with ``exact`` in the
        network's own."""
        network = self._network(exact)
        self.forwards += len(x)
        with torch.no_grad():
            return self._logits(network, x)

    def near(self, x: Tensor, slots: int, *, exact: bool = False) -> Near | None:
        """Passes at points near known ones, for images like ``x`` (n,C,H,W), at most ``slots`` at
        a time; None if they save nothing or are not those of this network. Precision as in
        ``logits``."""
        low = (self.network if exact or self.fast is None else self.fast).attack_dtype is not None
        # In bfloat16 a pass is so fast that the copies cost what the windows save.
        if x.dim() != 4 or x.device.type != "cpu" or self.repeats != 1 or low:
            return None
        network = self.network
        self._leave()
        try:
            with network.evaluating(), torch.no_grad():
                part = local_part(network.model, network.logits, x[:1])
            if part is None or not pays(part, x, slots):
                return None
            if not agrees(part, partial(self._as_written, exact=True), x):
                return None
        except Exception:  # a model that fails in windows gets whole images
            return None
        finally:
            self.own()
        return near(part, partial(self._as_written, exact=exact), x, slots)

    def _as_written(self, x: Tensor, *, exact: bool) -> Tensor:
        """``logits`` without compiled code, which would be compiled for each size of windows."""
        with self._network(exact).as_written():
            return self.logits(x, exact=exact)

    def gradient(
        self, search: Search, state: State, *, exact: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n,classes), objective (n,) and its gradient (n,...) at the points of ``state``,
        in the precision of the search, with ``exact`` in the network's own."""
        network = self._network(exact)
        self.forwards += self.repeats * len(state["point"])
        total: Tensor | None = None
        for _ in range(self.repeats):
            logits, loss, gradient, taken = network.run(self._region, network, search, state)
            self.backwards += taken * len(state["point"])
            total = gradient if total is None else total + gradient
        if total is None:
            raise ValueError("repeats must be at least 1")
        return logits, loss, total if self.repeats == 1 else total / self.repeats

    def _network(self, exact: bool) -> Network:
        return self._in(self.network if exact or self.fast is None else self.fast)

    def _region(
        self, network: Network, search: Search, state: State
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Logits, objective, its gradient, and the number of backward passes."""
        point = leaf(state["point"])
        logits = self._logits(network, point)
        objectives = search.objectives(logits, state)
        last = len(objectives) - 1
        loss, gradient = _gradient(network, objectives[0], point, keep_graph=last > 0)
        if last:
            distance = search.distance(loss, gradient)
        for number, objective in enumerate(objectives[1:], 1):
            other, its_gradient = _gradient(network, objective, point, keep_graph=number < last)
            its_distance = search.distance(other, its_gradient)
            nearer = its_distance < distance
            loss = torch.where(nearer, other, loss)
            gradient = choose(nearer, its_gradient, gradient)
            distance = torch.where(nearer, its_distance, distance)
        return logits.detach(), loss, gradient, len(objectives)

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


def _gradient(
    network: Network, objective: Tensor, point: Tensor, *, keep_graph: bool
) -> tuple[Tensor, Tensor]:
    """``objective`` (n,) detached, and its gradient at ``point`` (n,...)."""
    scale = network.loss_scale(1)
    total = objective.sum() * scale if scale != 1 else objective.sum()
    (gradient,) = gradients(total, [point], keep_graph=keep_graph)
    return objective.detach(), gradient / scale if scale != 1 else gradient


PROBED = 16  # images are enough to see how a network is built


@contextmanager
def _attackable(network: Network) -> Iterator[None]:
    off: AbstractContextManager[Any] = autocast(network.device, None)
    with torch.inference_mode(False), off, network.attacking("eval"):
        yield
