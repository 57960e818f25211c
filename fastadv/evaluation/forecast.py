"""How far a cascade is: the accuracy after each of its searches, and the time to come."""

from __future__ import annotations

import numpy as np

from fastadv.evaluation.ledger import ABSENT, Ledger
from fastadv.evaluation.search.cascade import Pipeline
from fastadv.evaluation.search.engine import Engine

WITH_GRADIENT = 3.0  # forward passes, which a pass with its gradient takes as long as
WHEN_FOOLED = 0.2  # of a search's passes: most images that it fools need few


class Forecast:
    """Of the evaluation of ``total`` images by ``pipeline``, with the verdicts in ``ledger``, which
    may hold some from before."""

    def __init__(self, ledger: Ledger, pipeline: Pipeline, total: int) -> None:
        self._ledger, self._pipeline, self._total = ledger, pipeline, total
        self._before = [self._ended(number) for number in self._numbers()]

    def shares(self) -> list[float]:
        """The accuracy in [0,1] without an attack, and after each search that has begun to give
        results: of the images that have arrived there, the share that it has not fooled so far,
        times the accuracy before it. Images under way count as right, so each number only falls
        until the search has ended."""
        fooled_by, passed = self._ledger.rows["fooled_by"], self._ledger.rows["passed"]
        looked_at = int((fooled_by != ABSENT).sum())
        if not looked_at:
            return []
        found = [1 - int((fooled_by == 0).sum()) / looked_at]
        for number in self._numbers():
            fooled, stayed = self._ended(number)
            if fooled + stayed == 0:
                break
            gone = (fooled_by >= 0) & (fooled_by < number)
            arrived = int(((fooled_by != ABSENT) & (passed >= number - 1) & ~gone).sum())
            found.append(found[-1] * (1 - fooled / arrived))
        return found

    def seconds_left(self) -> float:
        """The seconds that the searches will take for the other images; nan before the first pass.

        The time of a pass is measured; for a search that has not begun, it is that of the others.
        Images that stay robust take all passes of a search.
        """
        engines = self._pipeline.engines
        cost = sum(engine.seen * _cost(engine) for engine in engines)
        if not cost:
            return float("nan")
        pace = sum(engine.seconds for engine in engines) / cost
        shares = self.shares()
        left = 0.0
        for number, engine, before in zip(self._numbers(), engines, self._before, strict=True):
            fooled, stayed = self._ended(number)
            reaching = self._total * shares[min(number, len(shares)) - 1]
            most = engine.search.segments * (engine.search.steps + 1)
            stays = shares[number] / shares[number - 1] if 0 < number < len(shares) else 1.0
            each = _passes(1 - stays, stays, most)
            # What the images that have not ended have behind them.
            under_way = engine.seen - _passes(fooled - before[0], stayed - before[1], most)
            passes = (reaching - fooled - stayed) * each - max(0.0, under_way)
            own = engine.seconds / engine.seen if engine.seen else pace * _cost(engine)
            left += max(0.0, passes) * own
        return left

    def _numbers(self) -> range:
        return range(1, 1 + len(self._pipeline.engines))

    def _ended(self, number: int) -> tuple[int, int]:
        """The images for which search ``number`` has ended: those that it fooled, and the rest."""
        rows = self._ledger.rows
        fooled = int((rows["fooled_by"] == number).sum())
        return fooled, int(np.sum(rows["passed"] >= number)) - fooled


def seconds_of_a_run(pipeline: Pipeline, images: int) -> float:
    """The seconds of one run of the search at which ``pipeline`` has worked longest, on a full
    batch, or on ``images`` if there are no more; nan before the first pass. It is that of all runs
    if an interrupted image begins with the first."""
    engine = max(pipeline.engines, key=lambda each: each.seconds)
    if not engine.seen:
        return float("nan")
    runs = engine.search.segments if engine.search.remembers else 1
    points = runs * (engine.search.steps + 1) * min(engine.slots, images)
    return points * engine.seconds / engine.seen


def _passes(fooled: float, stayed: float, most: int) -> float:
    return (WHEN_FOOLED * fooled + stayed) * most


def _cost(engine: Engine) -> float:
    return WITH_GRADIENT if engine.search.uses_gradient else 1.0
