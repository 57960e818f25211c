"""Searches one after another: each takes the images that those before it did not fool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.evaluation.search.engine import KEPT, Engine, waiting
from fastadv.evaluation.search.fixed import FixedEngine
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.rows import Rows, chosen, count
from fastadv.evaluation.search.search import Images, Search

PASSED = "passed"
"""Number of the cascade's searches that have ended for an image; 0 for a new one."""
FOOLED_BY = "fooled_by"
"""Number of the search that fooled the network, from 1; 0: it was wrong without an attack; -1: no
search has."""

Ended = Callable[[Rows], None]
"""Takes rows for which a search, or a run of it, has ended, as soon as it has."""


def entering(images: Images, place: Tensor, *, targeted: bool, spares: bool = True) -> Rows:
    """``images``, which have the numbers ``place`` (n,) among all, as rows for ``run``.

    An image that the network already gets wrong counts as fooled, without a search, if ``spares``.
    Otherwise it is searched as the others are, and only what the search finds counts: its margin
    without an attack is not kept.
    """
    rows = waiting(images, place, targeted=targeted)
    right = images.logits.argmax(1) == images.y
    fooled = right if targeted else ~right
    if not spares:
        rows["margin"] = torch.where(fooled, float("inf"), rows["margin"])
        fooled = torch.zeros_like(fooled)
    done = torch.zeros_like(images.index)
    return rows | {
        "fooled": fooled,
        PASSED: done,
        FOOLED_BY: torch.where(fooled, 0, torch.full_like(done, -1)),
    }


class Stage(NamedTuple):
    """One search of a cascade; ``exact``: in the network's own precision, whatever that of the
    others; ``name``: with its numbers."""

    search: Search
    exact: bool = False
    name: str = ""


def run(
    stages: Sequence[Stage],
    source: Iterator[Rows],
    passes: Passes,
    slots: int,
    ended: Ended = lambda rows: None,
    engines: list[Engine] | None = None,
) -> Iterator[Rows]:
    """The rows of ``source`` (made by ``entering``) with their verdicts, a few at a time.

    A row that has ``passed`` k searches enters the next one, in its run ``segment``. The engine of
    each search is appended to ``engines``.

    Each search draws its images from the one before. All are at work at the same time, but only as
    far as the last one needs: memory is that of a batch for each search, whatever the number of
    images.
    """
    stream = source
    for number, stage in enumerate(stages, 1):
        engine = _engine(stage, passes, slots)
        if engines is not None:
            engines.append(engine)
        stream = _survivors(number, engine, stream, ended)
    return stream


def _engine(stage: Stage, passes: Passes, slots: int) -> Engine:
    network = passes.network
    if network.syncs_are_free and not network.runner.compiles:
        return Engine(stage.search, passes, slots, exact=stage.exact)
    return FixedEngine(stage.search, passes, slots, exact=stage.exact)


def _survivors(number: int, engine: Engine, source: Iterator[Rows], ended: Ended) -> Iterator[Rows]:
    """The rows of ``source``; those that are not fooled and have not passed this stage yet, after
    the search of ``engine``."""
    others: list[Rows] = []

    def told(rows: Rows, passed: int) -> Rows:
        by = torch.where(rows["fooled"], number, torch.full_like(rows["index"], -1))
        rows = rows | {PASSED: torch.full_like(by, passed), FOOLED_BY: by}
        ended(rows)
        return rows

    def told_run(rows: Rows) -> None:
        told(rows, number - 1)

    engine.ended_run = told_run

    def candidates() -> Iterator[Rows]:
        for rows in source:
            if not count(rows):
                yield rows
                continue
            here = ~rows["fooled"] & (rows[PASSED] < number)
            if not bool(here.all()):
                others.append(chosen(rows, ~here))
            if bool(here.any()):
                entered = chosen(rows, here)
                if engine.search.remembers:  # what is not stored: an interrupted image starts anew
                    entered["segment"] = torch.zeros_like(entered["segment"])
                yield {name: entered[name] for name in KEPT}

    for rows in engine.run(candidates()):
        yield from _drained(others)
        if not count(rows):
            yield rows
        else:
            # The next search begins with its first run.
            rows = rows | {"segment": torch.zeros_like(rows["segment"])}
            yield told(rows, number)
    yield from _drained(others)


def _drained(others: list[Rows]) -> Iterator[Rows]:
    while others:
        yield others.pop(0)


class Pipeline:
    """A cascade that is given its images batch by batch, and gives results as they fall."""

    def __init__(
        self,
        stages: Sequence[Stage],
        passes: Passes,
        slots: int,
        ended: Ended = lambda rows: None,
    ) -> None:
        self._waits: list[Rows] = []
        self._ended = False
        self.engines: list[Engine] = []
        self._results = run(stages, self._source(), passes, slots, ended, self.engines)

    def feed(self, rows: Rows) -> Iterator[Rows]:
        """The results that come with ``rows`` (of ``entering``): full batches are searched, the
        other images wait."""
        self._waits.append(rows)
        yield from self._available()

    def finish(self) -> Iterator[Rows]:
        """The results of all images that are left."""
        self._ended = True
        yield from self._available()

    def _available(self) -> Iterator[Rows]:
        for rows in self._results:
            if count(rows):
                yield rows
            elif not self._waits and not self._ended:
                return

    def _source(self) -> Iterator[Rows]:
        while self._waits or not self._ended:
            yield self._waits.pop(0) if self._waits else {}
