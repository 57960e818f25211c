"""Replay an update as CUDA graphs.

There are three graphs per update: the passes, the optimizer, and the end of the update. The second
one exists for optimizers that can be captured (``replayed.py``). Any other optimizer steps as
usual; its launches are queued while the first graph is still running. Values that change between
updates are in tensors filled in place: the batch is copied into static inputs; learning rates,
schedules and the noise offset are 0-dim tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastadv.algorithms.contract import Batch, Teaches
from fastadv.engine.cuda_graph import CudaRecorder, NotReplayable
from fastadv.engine.model.buffers import Snapshot, copy_into
from fastadv.engine.model.network import Network
from fastadv.engine.model.parameter_hooks import first_hooked
from fastadv.engine.model.python_state import PythonState
from fastadv.engine.model.static import why_not_static
from fastadv.engine.optimizer.replayed import ReplayedUpdate, Replaying
from fastadv.engine.optimizer.updater import Updater
from fastadv.engine.process import distributed
from fastadv.errors import warn
from fastadv.training.grad_accumulators import with_fresh_grad_accumulators
from fastadv.training.inputs import NOWHERE, Homes
from fastadv.training.recording import Recording, copied, held_tensors
from fastadv.training.results import Gradients, PassResults
from fastadv.training.situation import situation
from fastadv.training.update import Update

MAX_RECORDINGS = 4  # two batch shapes, with and without a start given by the caller
# A recording costs about as much as this many steps, so it must be replayed at least as often.
WORTH = 20
# Recordings for a changed Python state, before it is assumed to change all the time.
MAX_RERECORDINGS = 4


class CapturedUpdate:
    """An ``Update`` whose passes and end are recorded once per situation and then replayed.

    A situation is everything that a recording has fixed: batch shapes, active parts, the addresses
    of parameters, buffers and states, train flags, precisions, and the state of Python
    (``python_state.py``: attributes of modules, globals). A new situation is recorded. Of more than
    ``MAX_RECORDINGS`` the least recently used one is dropped. All are dropped when the phase of a
    part changes, since the warm-up of the next recording needs their memory. A warm-up leaves no
    trace, since it runs as an update that does not count: parts do not change their state, and
    buffers and perturbed weights are restored exactly.

    An update that waits for the device cannot be recorded: with ``strict`` ``NotReplayable`` is
    raised, otherwise the user is warned and the update runs eagerly from then on. It also runs
    eagerly, whatever ``strict`` is, if a recording could be made but would be wrong: Python decides
    something anew in every forward pass (``static.py``), or the state of Python keeps changing.
    """

    def __init__(self, eager: Update, recorder: Any = None, *, strict: bool = True) -> None:
        self.eager = eager
        self.recorder = recorder or CudaRecorder(eager.net.device)
        self.strict = strict
        self.recorded = 0  # number of recordings of the passes, for tests and profiles
        self._entries: OrderedDict[Hashable, Recording] = OrderedDict()
        self._phase: Hashable = None
        self._current: Recording | None = None
        self._results: PassResults | None = None
        self._as_written = False
        self._python: PythonState | None = None
        self._states: set[int] = set()  # numbers of the recorded Python states
        self._replays = 0
        self._replaying: Replaying | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A recording is bound to its tensors, so a copy makes its own recordings.
        forgotten = ("_phase", "_current", "_results", "_replaying", "_python")
        empty: dict[str, Any] = {"_entries": OrderedDict(), "_states": set()}
        return vars(self) | dict.fromkeys(forgotten) | empty

    def forget(self) -> None:
        """Drop all recordings, whose memory others may take."""
        self._entries.clear()
        self._current = self._results = None

    def homes(self, x: Tensor, y: Tensor) -> Homes:
        """The inputs of the recording that was replayed last, if a batch like ``x`` (B,C,H,W) and
        ``y`` (B,...) fits into them: then nothing is copied there."""
        if self._current is None or self._as_written:
            return NOWHERE
        static = self._current.static
        homes = Homes(static.x, static.y, static.index)
        fits = all(
            (own.shape, own.dtype, own.stride()) == (new.shape, new.dtype, new.stride())
            for own, new in ((static.x, x), (static.y, y))
        )
        return homes if fits else NOWHERE

    def compute_gradients(self, batch: Batch, buffers: Snapshot | None = None) -> PassResults:
        """``Update.compute_gradients``, replayed. The returned tensors belong to the recording: the
        next replay overwrites them."""
        entry = None if self._as_written else self._entry(batch)
        if entry is None:
            return self.eager.compute_gradients(batch, buffers)
        self._current = entry
        entry.fill(batch)
        entry.replay_passes()
        # Copies of the lists, since the caller may replace gradients by scaled ones.
        weights, leaves, x_adv = entry.results.gradients
        own = Gradients(list(weights), list(leaves), x_adv)
        self._results = entry.results._replace(gradients=own)
        return self._results

    def apply_gradients(
        self, results: PassResults, updater: Updater, number: Tensor, update: bool
    ) -> tuple[Tensor, Tensor]:
        """``Update.apply_gradients``, replayed if the optimizer can be captured."""
        if self._as_written:
            return self.eager.apply_gradients(results, updater, number, update)
        entry = self._entry_of(results)
        if self._replaying is None:
            self._replaying = Replaying(updater, self.recorder)
        if entry.update is None:
            entry.update = ReplayedUpdate(self._replaying, entry.results.gradients.weights)
        return self.eager.apply_gradients(results, entry.update, number, update)

    def finish_update(self, results: PassResults, ok: Tensor, update: bool) -> None:
        """``Update.finish_update``, replayed unless ``update`` is False."""
        if self._as_written:
            self.eager.finish_update(results, ok, update)
            return
        entry = self._entry_of(results)
        if not update:
            self.eager.finish_update(results, ok, update)
            return
        entry.ok.copy_(ok)
        entry.replay_finish()

    def _entry_of(self, results: PassResults) -> Recording:
        if self._current is None or results is not self._results:
            raise RuntimeError("an update must be finished by the passes that began it")
        return self._current

    def _entry(self, batch: Batch) -> Recording | None:
        """The recording for the situation of ``batch``, or None if it cannot be recorded."""
        key = self._situation(batch)
        if key in self._entries:
            self._replays += 1
        else:
            if self._gives_up(batch):
                return None
            self._enter_phase()
            try:
                entry = self._record(batch)
            except NotReplayable as error:
                if self.strict:
                    raise
                warn(f"{error} Until then its passes are launched one by one.")
                self._as_written = True
                return None
            # The warm-up may have enlarged a state for a larger batch.
            key = self._situation(batch)
            self._entries[key] = entry
            while len(self._entries) > MAX_RECORDINGS:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        return self._entries[key]

    def _gives_up(self, batch: Batch) -> bool:
        """True if a recording would become wrong; the update runs eagerly from then on."""
        eager = self.eager
        python = self._python_state()
        number = python.number(eager.net.structure.version)
        again = len(self._states) - 1 if number in self._states else len(self._states)
        if again > MAX_RERECORDINGS and self._replays < WORTH * again:
            reason = f"{python.changed!r} keeps changing between the steps"
        else:
            images, attack_bn = batch.x, eager.plan.adversary.attack_bn
            losses = [partial(part.given_loss, y=batch.y) for part in eager.plan.given_losses]
            found = why_not_static(eager.net, python, images, attack_bn, losses)
            self._states.add(number)
            if found is None:
                return False
            reason = found
        warn(
            "The passes are launched one by one and not replayed as CUDA graphs, which would "
            f"repeat what Python decided at the recording: {reason}. Draw with torch on the "
            "model's device and keep what changes in buffers (documentation, 'Your model, your "
            "loop')."
        )
        self._as_written = True
        self.forget()
        return True

    def _python_state(self) -> PythonState:
        if self._python is None:
            parts = self.eager.plan.parts.values()
            models = {"": self.eager.net.model}
            for part in parts:
                networks = part.networks() if isinstance(part, Teaches) else ()
                for number, teacher in enumerate(networks):
                    models[f"teacher {number}"] = teacher
            output = self.eager.net.output
            self._python = PythonState(models, parts, [output] if callable(output) else [])
        return self._python

    def _enter_phase(self) -> None:
        """Drop the recordings that were made while other parts were active."""
        phase = tuple(part.phase() for part in self.eager.plan.parts.values())
        if phase != self._phase:
            self.forget()
            self._phase = phase

    def _situation(self, batch: Batch) -> Hashable:
        version = self.eager.net.structure.version
        return situation(self.eager, batch, self._python_state().number(version))

    def _record(self, batch: Batch) -> Recording:
        hooked = first_hooked(self.eager.parameters.named)
        if hooked is not None:
            raise NotReplayable(f"the parameter {hooked} has a hook, which Python runs")
        eager, static = self.eager, copied(batch)
        ok = torch.zeros((), dtype=torch.bool, device=eager.net.device)
        learned: list[bool] = []

        def both() -> None:
            results = eager.compute_gradients(static)
            learned[:] = _present(results.gradients.weights)
            eager.finish_update(results, ok, True)

        # Other processes may not be recording now; a captured message is not sent either.
        with _put_back_on_error(eager.net), distributed.alone():
            self.recorder.warm_up(both)
        with with_fresh_grad_accumulators(eager):
            results, replay_passes = self.recorder(lambda: eager.compute_gradients(static))
            _, replay_finish = self.recorder(lambda: eager.finish_update(results, ok, True))
        if _present(results.gradients.weights) != learned:
            raise NotReplayable("a module uses parameters that it does not look up by name")
        self.recorded += 1
        used = list(held_tensors(eager, set()))
        return Recording(static, ok, results, replay_passes, replay_finish, used)


@contextmanager
def _put_back_on_error(net: Network) -> Iterator[None]:
    """Restore parameters and buffers on an error, which may come while weights are perturbed."""
    tensors = [tensor.detach() for tensor in (*net.model.parameters(), *net.buffers)]
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        copy_into(tensors, before)
        raise


def _present(gradients: Sequence[Tensor | None]) -> list[bool]:
    return [gradient is not None for gradient in gradients]
