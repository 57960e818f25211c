"""The user's own metric in an evaluation: the mean of one value per image, for each attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor

from fastadv.algorithms.user_loss import require_values
from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.evaluation.scores import Scores

Metric = Callable[[Tensor, Tensor], Tensor]


class Means:
    """Sums of the values of ``metric`` for each of ``attacks``, kept on the device until the end.

    Only float values are summed here: bool values are counted like right and wrong classes.
    """

    def __init__(self, metric: Metric, attacks: int, device: torch.device) -> None:
        self.metric = metric
        # Rows: sum, sum of squares, number of values.
        self._sums = torch.zeros(3, attacks, dtype=torch.float64, device=device)
        self._committed = self._sums.clone()
        self._bools: bool | None = None

    @torch.no_grad()
    def values(self, logits: Tensor, y: Tensor) -> Tensor:
        """The values (B,), bool or float. Raises ``UserError`` for anything else."""
        values = self.metric(logits, y)
        require_values("metric", values, len(logits), bools=True)
        bools = values.dtype == torch.bool
        if self._bools not in (None, bools):
            raise UserError("metric returns bool values and float values: return one kind.")
        self._bools = bools
        return values

    def add(self, position: int, values: Tensor) -> None:
        """Add the float ``values`` (B,) for the attack at ``position``."""
        wide = values.double()
        self._sums[:2, position] += torch.stack([wide.sum(), wide.square().sum()])
        self._sums[2, position] += len(wide)

    def commit(self) -> None:
        """Save the sums after a complete batch; an interrupted batch does not change them."""
        self._committed = self._sums.clone()

    def scores(self, attacks: Sequence[str], *, shared: bool) -> Scores | None:
        """The means of the values, of all processes if ``shared``; None if they are bool.
        Synchronises."""
        sums = self._committed.clone()
        if shared:
            distributed.add_up(sums)
        totals, squares, counts = sums.tolist()
        n = int(counts[0])
        if not n:
            return None
        means = [total / n for total in totals]
        deviations = [
            sqrt(max(square / n - mean * mean, 0.0) * n / max(n - 1, 1))
            for square, mean in zip(squares, means, strict=True)
        ]
        return Scores(
            dict(zip(attacks, means, strict=True)), n, dict(zip(attacks, deviations, strict=True))
        )
