"""The engine for devices and compilers: a batch of fixed size, whose step a CUDA graph replays.

Nothing waits for the device between steps. The host copies the flags of the slots, queues the next
few steps, and reads the copy: an image leaves its slot some steps after it has ended. Until then
its slot goes on, and what was found stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.engine.cuda_graph import NotReplayable
from fastadv.errors import NotFiniteError, warn
from fastadv.evaluation.search.engine import NOT_FINITE, Engine
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.rows import Rows, chosen, count
from fastadv.evaluation.search.search import Search, State

LOOK_EVERY = 8  # steps, or a few more that end with the search's last phase
SMALLEST = 16  # slots, below which the batch is not halved any more


def _places(slots: list[int], device: torch.device) -> Tensor:
    return torch.tensor(slots).to(device, non_blocking=True)


class Replay(NamedTuple):
    """A recorded step, and its forward and backward passes of images."""

    step: Callable[[], None]
    forwards: int
    backwards: int


class FixedEngine(Engine):
    """``Engine`` for a device; steps are recorded if ``passes`` have a recorder."""

    def __init__(self, search: Search, passes: Passes, slots: int, *, exact: bool = False) -> None:
        super().__init__(search, passes, slots, exact=exact)
        self._near_is_known = True  # there is none: its slots would have to be read
        self._state: State = {}
        self._taken: list[bool] = []  # for each slot: an image is in it
        self._replays: dict[int, Replay] = {}  # of the step in each phase
        self._bad: Tensor | None = None

    def run(self, source: Iterator[Rows]) -> Iterator[Rows]:
        while True:
            yield from self._filled(source, sum(self._taken))
            rows = self.waits.take(self.slots - sum(self._taken))
            if count(rows):
                self._enter(self._entered(rows))
            if not any(self._taken):
                return
            self._halve()
            results = self._leaving(self._after_steps())
            if count(results):
                yield results

    def _enter(self, entered: State) -> None:
        n = count(entered)
        if not self._state:
            # Slots without an image hold a copy of one; there are no more images than slots then.
            self.slots = n if self._ended else self.slots
            rows = torch.arange(self.slots, device=entered["x"].device) % n
            self._state = {name: values[rows].clone() for name, values in entered.items()}
            self._taken = [True] * n + [False] * (len(rows) - n)
            return
        free = [slot for slot, taken in enumerate(self._taken) if not taken][:n]
        where = _places(free, entered["x"].device)
        for name, values in entered.items():
            self._state[name].index_copy_(0, where, values)
        for slot in free:
            self._taken[slot] = True

    def _halve(self) -> None:
        """Make the batch smaller, once no more images come and half of its slots are free."""
        size, in_use = len(self._taken), sum(self._taken)
        if not self._ended or self.waits.count:
            return
        while size > SMALLEST and 2 * in_use <= size:
            size = (size + 1) // 2
        if size == len(self._taken):
            return
        slots = [slot for slot, taken in enumerate(self._taken) if taken]
        slots += [slots[0]] * (size - len(slots))
        where = _places(slots, self._state["x"].device)
        self._state = {name: values[where] for name, values in self._state.items()}
        self._taken = [True] * in_use + [False] * (size - in_use)
        self.slots = size
        self._replays.clear()

    def _after_steps(self) -> list[list[bool]]:
        """The flags of all slots (done, fooled, not finite) as they are now, read after the next
        steps are queued."""
        state = self._state
        bad = self._bad_flag().expand_as(state["done"])
        flags = torch.stack([state["done"], state["fooled"], bad])
        copy, event = flags.to("cpu", non_blocking=True), None
        if flags.is_cuda:
            event = torch.cuda.Event()
            event.record()
        began = time.monotonic()
        phases = len(self.search.phases)
        for step in range(-(-LOOK_EVERY // phases) * phases):
            self.phase = step % phases
            self.passes.between()
            self.seen += sum(self._taken)
            self._advance()
        if event is not None:
            event.synchronize()
        self.seconds += time.monotonic() - began
        found: list[list[bool]] = copy.tolist()
        return found

    def _leaving(self, flags: list[list[bool]]) -> Rows:
        """The results of the images that had ended when ``flags`` were taken; their slots are
        free, or hold the next run."""
        done, fooled, bad = flags
        if any(bad):
            raise NotFiniteError(NOT_FINITE)
        slots = [
            slot for slot, taken in enumerate(self._taken) if taken and (done[slot] or fooled[slot])
        ]
        if not slots:
            return {}
        where = _places(slots, self._state["x"].device)
        out = chosen(self._state, where)
        if self.passes.confirms and not self.exact:
            out, slots = self._confirmed_rows(out, slots)
        for slot in slots:
            self._taken[slot] = False
        results, again = self._ended_runs(out)
        if count(again):
            self._enter(again)
        return results

    def _confirmed_rows(self, out: State, slots: list[int]) -> tuple[State, list[int]]:
        """Those of ``out``, in ``slots``, that have ended: a claim that the network's own precision
        does not confirm is taken back, and its run goes on."""
        logits = self.passes.logits(out["found"], exact=True)
        margin, wrong = self._verdict(logits, out["y"])
        refuted = out["fooled"] & ~wrong
        fooled = out["fooled"] & wrong
        if self.search.last_alone:  # of an image of which nothing has counted yet nothing is judged
            fooled = wrong & (out["strength"] > -float("inf"))
        out["margin"] = torch.where(
            out["fooled"] | fooled, margin.to(out["margin"].dtype), out["margin"]
        )
        out["fooled"] = fooled
        back = [slot for slot, is_back in zip(slots, refuted.tolist(), strict=True) if is_back]
        if not back:
            return out, slots
        where = _places(back, refuted.device)
        self._state["fooled"][where] = False
        ended = ~refuted | out["done"]
        self._state["margin"].index_copy_(0, where, out["margin"][refuted])
        kept = [slot for slot, over in zip(slots, ended.tolist(), strict=True) if over]
        return chosen(out, ended), kept

    def _advance(self) -> None:
        """One step of all slots."""
        replay = self._replays.get(self.phase) or self._recorded()
        if replay is None:
            self._in_place()
            return
        replay.step()
        self.passes.forwards += replay.forwards
        self.passes.backwards += replay.backwards

    def _in_place(self) -> None:
        state = self._state
        own = {id(values) for values in state.values()}
        told = self._told(state)
        moved = {
            # A value that moves to another name must be read before its place is written.
            name: values.clone() if id(values) in own else values
            for name, values in told.items()
            if values is not state[name]
        }
        for name, values in moved.items():
            state[name].copy_(values)

    def _recorded(self) -> Replay | None:
        """A replay of the step over the tensors of the present state, in the present phase; None if
        steps are called."""
        recorder = self.passes.recorder
        if recorder is None:
            return None
        before = {name: values.clone() for name, values in self._state.items()}
        counted = self.passes.forwards, self.passes.backwards
        try:
            recorder.warm_up(self._in_place)
            self.passes.forwards, self.passes.backwards = counted
            _, step = recorder(self._in_place)
        except NotReplayable as error:
            warn(
                f"{error.reason}: this search is not replayed as a CUDA graph and runs as written."
            )
            self.passes.recorder, step = None, None
        forwards, backwards = self.passes.forwards, self.passes.backwards
        self.passes.forwards, self.passes.backwards = counted
        for name, values in before.items():
            self._state[name].copy_(values)
        if step is None:
            return None
        replay = Replay(step, forwards - counted[0], backwards - counted[1])
        self._replays[self.phase] = replay
        return replay

    def _require_finite(self, finite: Tensor) -> None:
        self._bad_flag().logical_or_(~finite)

    def _bad_flag(self) -> Tensor:
        if self._bad is None:
            self._bad = torch.zeros((), dtype=torch.bool, device=self._state["x"].device)
        return self._bad

    def _passed(self, state: State) -> tuple[Tensor, Tensor, Tensor | None]:
        search = self.search
        steep = search.uses_gradient and search.phases[self.phase]
        return self._with_gradient(state) if steep else (*self._without(state), None)

    def _confirmed(
        self, state: State, wrong: Tensor, margin: Tensor, counts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return wrong, margin  # confirmed when the image leaves its slot
