"""Runs a search over a stream of images, with every pass on a full batch.

A batch has a number of slots. An image that is fooled, or at the end of its last run, leaves its
slot, and the next one of the stream enters it: so images of a batch are in different iterations,
and no pass is spent on an image whose verdict is known. The stream may be the survivors of another
search, which then runs as far as it must to yield some (``cascade.py``).

On a CPU reading a value costs nothing, so slots are compacted after every pass, and images whose
next step needs no gradient get a forward pass alone. On a device the batch keeps its size, a step
is replayed as a CUDA graph, and the host looks at flags that were copied some steps ago.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastadv.errors import NotFiniteError
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.rows import Buffer, Rows, chosen, count, joined
from fastadv.evaluation.search.search import Images, Search, Seen, State, choose

GIVEN = ("x", "y", "index", "logits")
KEPT = (*GIVEN, "place", "segment", "found", "strength", "margin", "fooled", "flat")
"""What stays with an image over all its runs. ``place``: its number among all images; ``found``:
the adversarial image, or the strongest point so far; ``margin``: the smallest margin seen;
``flat``: the first gradient was exactly zero."""
ENTER_BELOW = 7 / 8  # of the slots in use: new images enter some at a time
LOOK_EVERY = 8  # steps between two looks of the host at a device's flags

NOT_FINITE = (
    "The network's outputs or their gradient at the images are not finite, so no attack is "
    "possible and the images would look robust; check for overflowing statistics or an operation "
    "without a gradient, evaluate an earlier checkpoint, or evaluate without amp."
)

Step = Callable[[], None]
Record = Callable[[Step], Step]
"""Makes a step over tensors at fixed places a replay of it."""


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """The logit of the label less the largest other one, (n,); ``y`` (n,) classes."""
    true = y[:, None] == torch.arange(logits.shape[1], device=y.device)
    other = logits.masked_fill(true, -float("inf")).amax(1)
    # Not gather: its backward sums in no fixed order on CUDA.
    return logits.masked_fill(~true, 0.0).sum(1) - other


def waiting(images: Images, place: Tensor, *, targeted: bool) -> Rows:
    """``images``, numbers ``place`` (n,) of all, as rows that wait for their first run."""
    x, y = images.x, images.y
    n = len(x)
    margin = margins(images.logits, y)
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

    ``record`` makes a replay of a step on a device (``cuda_graph.py``); None: steps are called.
    """

    def __init__(
        self, search: Search, passes: Passes, slots: int, record: Record | None = None
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, not {slots}.")
        self.search, self.passes, self.slots = search, passes, slots
        self.record = record
        self.waits = Buffer()

    def run(self, source: Iterator[Rows]) -> Iterator[Rows]:
        """The rows of ``source`` (as ``waiting`` makes them) with their results, a few at a time,
        in the order in which they end. Rows without images mean that ``source`` has none now."""
        state: State = {}
        ended = False
        phase = 0
        while True:
            in_use = count(state)
            if in_use == 0:
                phase = 0
            while phase == 0 and not ended and in_use + self.waits.count < self.slots:
                rows = next(source, None)
                if rows is None:
                    ended = True
                elif count(rows):
                    self.waits.put(rows)
                else:
                    yield {}
            enters = in_use == 0 or in_use <= self.slots * ENTER_BELOW or ended
            if phase == 0 and self.waits.count and enters:
                state = joined([state, self._entered(self.waits.take(self.slots - in_use))])
            if not count(state):
                return
            state, results = self._step(state)
            phase = (phase + 1) % len(self.search.phases)
            if count(results):
                yield results

    def _entered(self, rows: Rows) -> State:
        """``rows`` at the beginning of their runs."""
        parts = []
        segments = rows["segment"]
        for segment in sorted(set(segments.tolist())):
            part = chosen(rows, (segments == segment).nonzero().squeeze(1))
            images = Images(*(part[name] for name in GIVEN))
            own = self.search.start(images, segment)
            fresh = torch.ones(len(images.x), dtype=torch.bool, device=images.x.device)
            done = torch.zeros_like(fresh)
            parts.append({"done": done, **own, **part, "fresh": fresh})
        return joined(parts)

    def _step(self, state: State) -> tuple[State, Rows]:
        """The state after one pass, without the images that have ended, and those."""
        state = self._told(state)
        over = state["done"] | state["fooled"]
        if not bool(over.any()):
            return state, {}
        out = chosen(state, over)
        state = chosen(state, ~over)
        again = ~out["fooled"] & (out["segment"] + 1 < self.search.segments)
        results = {name: out[name][~again] for name in KEPT}
        if bool(again.any()):
            rows = {name: out[name][again] for name in KEPT}
            rows["segment"] = rows["segment"] + 1
            state = joined([state, self._entered(rows)])
        return state, results

    def _told(self, state: State) -> State:
        """The state after one pass."""
        logits, loss, gradient = self._passed(state)
        search, targeted = self.search, self.search.threat.targeted
        margin = margins(logits, state["y"])
        if targeted:
            margin = -margin
            wrong = logits.argmax(1) == state["y"]
        else:
            wrong = logits.argmax(1) != state["y"]
        counts = search.counts(state)
        if self.passes.confirms:
            wrong, margin = self._confirmed(state, wrong, margin, counts)
        seen = Seen(logits, loss, gradient, wrong)
        fooled = wrong if counts is None else wrong & counts
        strength = search.strength(seen, margin)
        better = fooled | (strength > state["strength"])
        if counts is not None:
            better = better & counts
            margin = torch.where(counts, margin, state["margin"])
        steepest = gradient.flatten(1).abs().amax(1)
        # A margin that is not finite comes of logits that are not.
        finite = steepest.isfinite().all() & logits.isfinite().all()
        if not bool(finite):
            raise NotFiniteError(NOT_FINITE)
        flat = state["flat"]
        if search.uses_gradient:
            flat = flat | (state["fresh"] & ~wrong & (steepest == 0))
        kept = {
            "found": choose(better, state["point"], state["found"]),
            "strength": torch.where(better, strength, state["strength"]),
            "margin": torch.minimum(state["margin"], margin),
            "fooled": fooled,
            "flat": flat,
            "fresh": torch.zeros_like(fooled),
        }
        return state | search.tell(state, seen) | kept

    def _passed(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n,classes), objective (n,) and gradient (n,...) at the points."""
        search = self.search
        wanted = search.wants_gradient(state) if search.uses_gradient else None
        if search.uses_gradient and (wanted is None or bool(wanted.all())):
            return self.passes.gradient(search, state)
        point = state["point"]
        if not search.uses_gradient or wanted is None or not bool(wanted.any()):
            logits = self.passes.logits(point)
            return logits, self._loss(logits, state), torch.zeros_like(point)
        with_gradient, without = wanted.nonzero().squeeze(1), (~wanted).nonzero().squeeze(1)
        logits, loss, steep = self.passes.gradient(search, chosen(state, with_gradient))
        rest = chosen(state, without)
        flat_logits = self.passes.logits(rest["point"])
        gradient = torch.zeros_like(point)
        gradient[with_gradient] = steep
        every_logits = torch.empty_like(logits[:1]).expand(len(point), -1).clone()
        every_loss = torch.empty_like(loss[:1]).expand(len(point)).clone()
        every_logits[with_gradient], every_logits[without] = logits, flat_logits
        every_loss[with_gradient], every_loss[without] = loss, self._loss(flat_logits, rest)
        return every_logits, every_loss, gradient

    def _loss(self, logits: Tensor, state: State) -> Tensor:
        if not self.search.uses_gradient:
            return torch.zeros_like(logits[:, 0])
        with torch.no_grad():
            return self.search.objective(logits, state)

    def _confirmed(
        self, state: State, wrong: Tensor, margin: Tensor, counts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``wrong`` and ``margin`` by passes in the network's own precision, for the points that
        would count; other points cannot fool the network."""
        claimed = wrong if counts is None else wrong & counts
        rows = claimed.nonzero().squeeze(1)
        if not len(rows):
            return wrong, margin
        logits = self.passes.exact(state["point"][rows])
        own, y = margins(logits, state["y"][rows]), state["y"][rows]
        found = logits.argmax(1) == y if self.search.threat.targeted else logits.argmax(1) != y
        wrong, margin = wrong.clone(), margin.clone()
        wrong[rows] = found
        margin[rows] = (-own if self.search.threat.targeted else own).to(margin.dtype)
        return wrong, margin
