"""Square attack (Andriushchenko et al., 2020): random search with square windows, no gradient."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastadv.errors import UserError
from fastadv.evaluation.search import known, losses
from fastadv.evaluation.search.search import Images, Search, Seen, State, choose
from fastadv.evaluation.search.square_l2 import L2Moves
from fastadv.evaluation.search.square_linf import LinfMoves
from fastadv.evaluation.search.square_moves import Moves
from fastadv.threat import Threat

LOOK = 8  # proposals that are looked at together for one that is new
FARTHER = 8  # times as many, again and again, for the images where none was
ON_DEVICE = 128  # in place of these two, where the host cannot know


class Square(Search):
    """Up to ``steps`` proposals from each of ``segments`` random starts, each one taken if it
    lowers the margin (with targets: the cross entropy of the target).

    A proposal whose point was seen before needs no query: the loss of the best point only falls,
    so that an old point is no better, and it does not fool the network. Such proposals are passed
    over, with the same result. ``deterministic`` False, for a network that may answer differently
    the next time, queries them all.

    Unlike in the released code, each image has windows and signs of its own, which no other image
    of the batch changes; and an image whose best margin is exactly zero while the label still wins
    is searched further.
    """

    name: ClassVar[str] = "square"
    summary: ClassVar[str] = (
        "random search with square windows, without gradients (Andriushchenko et al., 2020)"
    )
    uses_gradient: ClassVar[bool] = False
    around: ClassVar[str | None] = "best"
    default_steps: ClassVar[int] = 5000
    numbers: ClassVar[tuple[str, str]] = ("QUERIES", "RESTARTS")

    def __init__(
        self,
        threat: Threat,
        seed: int = 0,
        segments: int | None = None,
        steps: int | None = None,
        *,
        deterministic: bool = True,
    ) -> None:
        super().__init__(threat, seed, segments, steps)
        self.deterministic = deterministic
        self._moves: Moves | None = None

    def start(self, images: Images, segment: int) -> State:
        x = images.x
        moves = self._moves_for(x)
        point, name, own = moves.start(images, segment)
        n = len(x)
        start = {
            "point": point,
            "best": point,
            "best_loss": images.logits.new_full((n,), float("inf")),
            "iteration": torch.zeros(n, dtype=torch.int64, device=x.device),
            "name": name,
            **own,
        }
        if self._passes_over(moves):
            start["known"] = known.empty(n, x.device)
            known.add(name, start["known"])
        return start

    def tell(self, state: State, seen: Seen) -> State:
        moves = self._moves_for(state["x"])
        loss = self._loss(seen.logits, state["y"])
        better = loss < state["best_loss"]
        best = choose(better, state["point"], state["best"])
        name, number = state["name"], state["iteration"]
        changed = moves.accepted(state, best, better, name)
        if self._passes_over(moves):
            number, name = self._next(moves, state | changed)
            known.add(name, state["known"])
        return {
            **changed,
            "point": moves.point(state, best, number.clamp(max=self.steps - 1)),
            "best": best,
            "best_loss": torch.where(better, loss, state["best_loss"]),
            "iteration": number + 1,
            "name": name,
            "done": number >= self.steps,
        }

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return losses.ce(logits, y) if self.threat.targeted else losses.lead(logits, y)

    def _moves_for(self, x: Tensor) -> Moves:
        if x.dim() != 4:
            raise UserError(
                f"Square changes windows of images (B,C,H,W), and these are {tuple(x.shape)}: "
                "leave it out, as in 'apgd-ce+apgd-t+fab-t'."
            )
        _, channels, height, width = x.shape
        shape = (channels, height, width)
        if self._moves is None or self._moves.shape != shape:
            kind = LinfMoves if self.threat.norm == "linf" else L2Moves
            self._moves = kind(self.threat, self.seed, shape, self.steps)
            self._moves.to(x.device)
        return self._moves

    def _passes_over(self, moves: Moves) -> bool:
        return self.deterministic and moves.names_are_exact

    def _next(self, moves: Moves, state: State) -> tuple[Tensor, Tensor]:
        """The number (n,) of the next proposal whose point is new, or ``steps`` or more, and its
        name. On a device it is the last of those looked at if none of them is new."""
        number = state["iteration"]
        rows = torch.arange(len(number), device=number.device)
        looks = LOOK if moves.reads_are_free else ON_DEVICE
        number, name, new = self._look(moves, state, rows, number, looks)
        while moves.reads_are_free and not bool(new.all()):
            looks = min(looks * FARTHER, self.steps)
            rows = (~new).nonzero().squeeze(1)
            number[rows], name[rows], new[rows] = self._look(
                moves, state, rows, number[rows] + 1, looks
            )
        return number, name

    def _look(
        self, moves: Moves, state: State, rows: Tensor, first: Tensor, looks: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of ``looks`` proposals from number ``first`` (r,) on, for the images ``rows`` (r,), the
        first one that is new, or else the last one: its number, its name, and whether it is."""
        ahead = torch.arange(looks, device=first.device)
        numbers = first[:, None] + ahead
        names = moves.names(state, rows, numbers.clamp(max=self.steps - 1))
        new = ~known.contains(names, state["known"], rows) | (numbers >= self.steps)
        at = torch.where(new, ahead, looks - 1).amin(1, keepdim=True)
        return first + at.squeeze(1), names.gather(1, at).squeeze(1), new.gather(1, at).squeeze(1)
