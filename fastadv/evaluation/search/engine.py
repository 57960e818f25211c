"""Runs a search over a stream of images, with every pass on a full batch.

A batch has a number of slots. An image that is fooled, or at the end of its last run, leaves its
slot, and the next one of the stream enters it: so images of a batch are in different iterations,
and no pass is spent on an image whose verdict is known. The stream may be the survivors of another
search, which then runs as far as it must to yield some (``cascade.py``).

On a CPU reading a value costs nothing, so slots are compacted after every pass, and images whose
next step needs no gradient get a forward pass alone. ``fixed.py`` is for devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastadv.errors import NotFiniteError
from fastadv.evaluation.search import losses
from fastadv.evaluation.search.near import Near
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.rows import Buffer, Rows, chosen, count, joined
from fastadv.evaluation.search.search import Images, Search, Seen, State, choose

GIVEN = ("x", "y", "index", "logits")
KEPT = (*GIVEN, "place", "segment", "found", "strength", "margin", "fooled", "flat")
"""What stays with an image over all its runs. ``place``: its number among all images; ``found``:
the adversarial image, or the strongest point so far; ``margin``: the smallest margin seen;
``flat``: the first gradient was exactly zero."""
SPLIT_FROM = 1 / 8  # of a batch needs no gradient: less does not pay for a pass of its own
ENTER_BELOW = 7 / 8  # of the slots in use: new images enter some at a time

NOT_FINITE = (
    "The network's outputs or their gradient at the images are not finite, so no attack is "
    "possible and the images would look robust: look for weights, statistics or a precision that "
    "overflow, and for an operation without a gradient."
)


def waiting(images: Images, place: Tensor, *, targeted: bool) -> Rows:
    """``images``, which have the numbers ``place`` (n,) among all, as rows that wait for their
    first run."""
    x, y = images.x, images.y
    n = len(x)
    margin = losses.lead(images.logits, y)
    return {
        **images._asdict(),
        "place": place,
        "segment": torch.zeros(n, dtype=torch.int64, device=x.device),
        "found": x,
        "strength": torch.full((n,), -float("inf"), dtype=margin.dtype, device=x.device),
        "margin": -margin if targeted else margin,
        "fooled": torch.zeros(n, dtype=torch.bool, device=x.device),
        "flat": torch.zeros(n, dtype=torch.bool, device=x.device),
    }


class Engine:
    """Runs ``search`` with ``passes`` on batches of ``slots`` images.

    With ``exact`` the search is in the network's own precision, whatever that of other searches.
    """

    def __init__(self, search: Search, passes: Passes, slots: int, *, exact: bool = False) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, not {slots}.")
        self.search, self.passes, self.slots, self.exact = search, passes, slots, exact
        self.waits = Buffer()
        self._ended = False
        self.ended_run: Callable[[Rows], None] = lambda rows: None  # told what begins its next run
        self.phase = 0  # of the search's ``phases``, that of the next pass
        self.seen = 0  # points at which the network was evaluated
        self.seconds = 0.0  # that the steps took
        self._near: Near | None = None
        self._near_is_known = search.around is None

    def run(self, source: Iterator[Rows]) -> Iterator[Rows]:
        """The rows of ``source`` (as ``waiting`` makes them) with their results, a few at a time,
        in the order in which they end. Rows without images mean that ``source`` has none now."""
        state: State = {}
        while True:
            if self.phase == 0:
                yield from self._filled(source, count(state))
                in_use = count(state)
                if self.waits.count and (in_use <= self.slots * ENTER_BELOW or self._ended):
                    state = joined([state, self._entered(self.waits.take(self.slots - in_use))])
            if not count(state):
                return
            self.passes.between()
            began = time.monotonic()
            self.seen += count(state)
            state, results = self._step(state)
            self.seconds += time.monotonic() - began
            self.phase = (self.phase + 1) % len(self.search.phases) if count(state) else 0
            if count(results):
                yield results

    def _filled(self, source: Iterator[Rows], in_use: int) -> Iterator[Rows]:
        """Wait until there are images for all slots, of which ``in_use`` are taken, or no more."""
        while not self._ended and in_use + self.waits.count < self.slots:
            rows = next(source, None)
            if rows is None:
                self._ended = True
            elif count(rows):
                self.waits.put(rows)
            else:
                yield {}

    def _entered(self, rows: Rows) -> State:
        """``rows`` at the beginning of their runs."""
        parts = []
        segments = rows["segment"]
        for segment in sorted(set(segments.tolist())):
            part = chosen(rows, (segments == segment).nonzero().squeeze(1))
            images = Images(*(part[name] for name in GIVEN))
            own = self.search.start(images, segment)
            fresh = torch.ones(len(images.x), dtype=torch.bool, device=images.x.device)
            parts.append({"done": torch.zeros_like(fresh), **own, **part, "fresh": fresh})
        return joined(parts)

    def _step(self, state: State) -> tuple[State, Rows]:
        """The state after one pass, without the images that have ended, and those."""
        state = self._told(state)
        over = state["done"] | state["fooled"]
        if not bool(over.any()):
            return state, {}
        results, again = self._ended_runs(chosen(state, over))
        return joined([chosen(state, ~over), again]), results

    def _ended_runs(self, out: State) -> tuple[Rows, State]:
        """Those of ``out`` that have ended for good, and the others in their next run."""
        again = ~out["fooled"] & (out["segment"] + 1 < self.search.segments)
        goes_on = self.search.goes_on(out)
        if goes_on is not None:
            again = again & goes_on
        results = chosen({name: out[name] for name in KEPT}, ~again)
        if not bool(again.any()):
            return results, {}
        names = (*KEPT, *self.search.remembers)
        rows = chosen({name: out[name] for name in names}, again)
        rows["segment"] = rows["segment"] + 1
        self.ended_run(rows)
        return results, self._entered(rows)

    def _told(self, state: State) -> State:
        """The state after one pass."""
        search, y = self.search, state["y"]
        logits, loss, gradient = self._passed(state)
        margin, wrong = self._verdict(logits, y)
        counts = search.counts(state)
        wrong, margin = self._confirmed(state, wrong, margin, counts)
        finite, flat = logits.isfinite().all(), state["flat"]
        if gradient is None:
            gradient = state["point"].new_zeros(()).expand_as(state["point"])  # takes no memory
            seen = Seen(logits, loss, gradient, wrong, steep=False)
        else:
            seen = Seen(logits, loss, gradient, wrong)
            steepest = gradient.flatten(1).abs().amax(1)
            finite = finite & steepest.isfinite().all()
            flat = flat | (state["fresh"] & ~wrong & (steepest == 0))
        self._require_finite(finite)

        # A slot of fixed size goes on for a while after its end, which changes no result.
        standing = ~(state["fooled"] | state["done"])
        fooled = wrong if counts is None else wrong & counts
        strength = search.strength(seen, margin)
        better = standing & (fooled | (strength > state["strength"]))
        seen_margin = torch.minimum(state["margin"], margin)
        if counts is not None:
            better = better & counts
            seen_margin = torch.where(counts, seen_margin, state["margin"])
        told = search.tell(state, seen)
        return {
            **state,
            **told,
            "done": state["done"] | told["done"],
            "found": choose(better, state["point"], state["found"]),
            "strength": torch.where(better, strength, state["strength"]),
            "margin": torch.where(standing, seen_margin, state["margin"]),
            "fooled": state["fooled"] | (standing & fooled),
            "flat": flat,
            "fresh": torch.zeros_like(fooled),
        }

    def _verdict(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) margins, from the point of view of the network, and (n,) bool: the attack has
        succeeded."""
        margin, is_y = losses.lead(logits, y), logits.argmax(1) == y
        return (-margin, is_y) if self.search.threat.targeted else (margin, ~is_y)

    def _require_finite(self, finite: Tensor) -> None:
        if not bool(finite):
            raise NotFiniteError(NOT_FINITE)

    def _passed(self, state: State) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits (n,classes), objective (n,) and gradient (n,...) at the points; no gradient if
        none of the images wants it."""
        search = self.search
        wanted = search.wants_gradient(state) if search.uses_gradient else None
        few = 0 if wanted is None else int((~wanted).sum())
        most = 0 if search.last_alone else SPLIT_FROM * count(state)
        if search.uses_gradient and few <= most:
            return self._with_gradient(state)
        if wanted is None or few == count(state):
            return *self._without(state), None
        steep, level = wanted.nonzero().squeeze(1), (~wanted).nonzero().squeeze(1)
        order = torch.cat([steep, level]).argsort()
        rest = chosen(state, level)
        pairs = zip(
            self._with_gradient(chosen(state, steep)),
            (*self._without(rest), torch.zeros_like(rest["point"])),
            strict=True,
        )
        logits, loss, gradient = (torch.cat(pair)[order] for pair in pairs)
        return logits, loss, gradient

    def _with_gradient(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        return self.passes.gradient(self.search, state, exact=self.exact)

    def _without(self, state: State) -> tuple[Tensor, Tensor]:
        """Logits and objective, by a forward pass alone."""
        exact = self.exact or self.search.last_alone
        logits = self._logits(state, exact)
        if not self.search.uses_gradient:
            return logits, torch.zeros_like(logits[:, 0])
        with torch.no_grad():
            return logits, self.search.objective(logits, state)

    def _logits(self, state: State, exact: bool) -> Tensor:
        if not self._near_is_known:
            self._near = self.passes.near(state["x"], self.slots, exact=exact)
            self._near_is_known = True
        around = self.search.around
        if self._near is None or around is None:
            return self.passes.logits(state["point"], exact=exact)
        return self._near.logits(state["point"], state[around], state["place"])

    def _confirmed(
        self, state: State, wrong: Tensor, margin: Tensor, counts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``wrong`` and ``margin`` by whole passes in the network's own precision for the points
        that would count, or that a lower precision cannot tell from such a point: of two equal
        logits the first one wins there."""
        if self._near is None and (self.exact or not self.passes.confirms):
            return wrong, margin
        claims = wrong | (margin <= 0)
        rows = (claims if counts is None else claims & counts).nonzero().squeeze(1)
        if not len(rows):
            return wrong, margin
        logits = self.passes.logits(state["point"][rows], exact=True)
        own, found = self._verdict(logits, state["y"][rows])
        return wrong.index_put((rows,), found), margin.index_put((rows,), own.to(margin.dtype))
