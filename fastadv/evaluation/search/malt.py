"""MALT (Melamed et al., 2024): Auto-PGD towards the classes that a linear network would reach
first."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastadv.evaluation.search import losses
from fastadv.evaluation.search.apgd import ApgdT
from fastadv.evaluation.search.norms import slope
from fastadv.evaluation.search.search import Images, Search, Seen, State, at, choose
from fastadv.threat import Threat

CANDIDATES = 100  # most likely classes that are looked at


class Malt(ApgdT):
    """``ApgdT`` with its targets in another order: by (z_y - z_j)/|grad z_y - grad z_j|, the
    distance of class j if the network were linear around the image.

    The norm is the dual of the threat's: L1 for Linf, L2 for L2. Before the first run a pass at the
    image itself is made for each of the ``candidates`` most likely other classes.
    """

    name: ClassVar[str] = "malt"
    summary: ClassVar[str] = (
        "apgd-t, with the classes first that a linear network would reach (Melamed et al., 2024)"
    )
    remembers: tuple[str, ...] = ("distances",)

    def __init__(
        self,
        threat: Threat,
        seed: int = 0,
        segments: int | None = None,
        steps: int | None = None,
        candidates: int = CANDIDATES,
    ) -> None:
        super().__init__(threat, seed, segments, steps)
        self.candidates = candidates

    @classmethod
    def of(
        cls,
        threat: Threat,
        seed: int,
        classes: int,
        steps: int | None,
        segments: int | None,
        **options: Any,
    ) -> Search:
        made = super().of(threat, seed, classes, steps, segments, **options)
        candidates = min(max(CANDIDATES, made.segments), classes - 1)
        return cls(threat, seed, made.segments, steps, candidates)

    def start(self, images: Images, segment: int) -> State:
        """Iterations below 0 are those at the image itself."""
        state = super().start(images, segment)
        # Infinity: the classes that are not looked at come last, and ``y`` never.
        state["distances"] = torch.full_like(images.logits, float("inf"))
        if segment == 0:
            state["point"] = images.x
            state["iteration"] = state["iteration"] - self.candidates
        return state

    def objective(self, logits: Tensor, state: State) -> Tensor:
        own, y = losses.of_class, state["y"]
        nearer = own(logits, self._looked_at(state)) - own(logits, y)
        target = at(state["distances"].argsort(dim=1), state["segment"])
        return torch.where(state["iteration"] < 0, nearer, losses.dlr_targeted(logits, y, target))

    def tell(self, state: State, seen: Seen) -> State:
        iteration, distances = state["iteration"], state["distances"]
        looks = iteration < 0
        run = super().tell({**state, "iteration": iteration.clamp(min=0)}, seen)
        over = run.pop("done") & ~looks
        told = {name: choose(looks, state[name], values) for name, values in run.items()}
        told["done"] = over
        # The random point waits in "before" until the passes at the image are over.
        told["point"] = choose(iteration == -1, state["before"], told["point"])
        told["iteration"] = iteration + 1
        classes = torch.arange(distances.shape[1], device=distances.device)
        here = looks[:, None] & (self._looked_at(state)[:, None] == classes)
        distance = -seen.loss / (slope(self.threat.norm, seen.gradient) + losses.TINY)
        told["distances"] = torch.where(here, distance[:, None], distances)
        return told

    def _looked_at(self, state: State) -> Tensor:
        """The class (n,) whose distance the pass at the image measures."""
        logits = state["logits"]
        others = logits.masked_fill(losses.is_class(state["y"], logits), -float("inf"))
        ranked = others.argsort(dim=1, descending=True)
        return at(ranked, state["iteration"] + self.candidates)
