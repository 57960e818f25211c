"""Replay an update as CUDA graphs.

There are three graphs per update: the passes, the optimizer, and the end of the update. The second
one exists for optimizers that can be captured (``replayed.py``). Any other optimizer steps as
usual; its launches are queued while the first graph is still running. Values that change between
updates are in tensors filled in place: the batch is copied into static inputs; learning rates,
schedules and the noise offset are 0-dim tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules import module as torch_module

from fastadv.algorithms.contract import Batch
from fastadv.engine.cuda_graph import CudaRecorder, NotReplayable
from fastadv.engine.model.buffers import Snapshot, copy_into
from fastadv.engine.model.network import Network
from fastadv.engine.model.parameter_hooks import first_hooked
from fastadv.engine.model.precision import float32_settings
from fastadv.engine.model.python_state import PythonState
from fastadv.engine.model.static import why_not_static
from fastadv.engine.optimizer.replayed import ReplayedUpdate, Replaying
from fastadv.engine.optimizer.updater import Updater
from fastadv.engine.process import distributed
from fastadv.errors import warn
from fastadv.training.results import Gradients, PassResults
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
    ``MAX_RECORDINGS`` the least recently used one is dropped. All are dropped when ``active`` of a
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
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._phase: Hashable = None
        self._current: _Entry | None = None
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

    def _entry_of(self, results: PassResults) -> _Entry:
        if self._current is None or results is not self._results:
            raise RuntimeError("an update must be finished by the passes that began it")
        return self._current

    def _entry(self, batch: Batch) -> _Entry | None:
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
            found = why_not_static(eager.net, python, images, attack_bn)
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
        self._entries.clear()
        self._current = self._results = None
        return True

    def _python_state(self) -> PythonState:
        if self._python is None:
            parts = self.eager.plan.parts.values()
            models = {"": self.eager.net.model}
            for part in parts:
                for number, teacher in enumerate(part.networks()):
                    models[f"teacher {number}"] = teacher
            self._python = PythonState(models, parts)
        return self._python

    def _enter_phase(self) -> None:
        """Drop the recordings that were made while other parts were active."""
        phase = tuple(part.active for part in self.eager.plan.parts.values())
        if phase != self._phase:
            self._entries.clear()
            self._current = self._results = None
            self._phase = phase

    def _situation(self, batch: Batch) -> Hashable:
        net, parts = self.eager.net, self.eager.plan.parts.values()
        return (
            tuple((t.shape, t.dtype, t.stride()) for t in _tensors(batch)),
            tuple(value is None for value in batch),
            tuple(part.active for part in parts),
            tuple(tensor.data_ptr() for part in parts for tensor in part.state.values()),
            tuple(_standing(net.model)),
            self._python_state().number(net.structure.version),
            (net.structure.version, first_hooked(self.eager.named), self.eager.threat),
            (net.outer_dtype, net.attack_dtype, net.looks),
            (_switches(), self.eager.room),
        )

    def _record(self, batch: Batch) -> _Entry:
        hooked = first_hooked(self.eager.named)
        if hooked is not None:
            raise NotReplayable(f"the parameter {hooked} has a hook, which Python runs")
        eager, static = self.eager, _copied(batch)
        ok = torch.zeros((), dtype=torch.bool, device=eager.net.device)
        learned: list[bool] = []

        def both() -> None:
            results = eager.compute_gradients(static)
            learned[:] = _present(results.gradients.weights)
            eager.finish_update(results, ok, True)

        # Other processes may not be recording now; a captured message is not sent either.
        with _put_back_on_error(eager.net), distributed.alone():
            self.recorder.warm_up(both)
        with _with_fresh_grad_accumulators(eager):
            results, replay_passes = self.recorder(lambda: eager.compute_gradients(static))
            _, replay_finish = self.recorder(lambda: eager.finish_update(results, ok, True))
        if _present(results.gradients.weights) != learned:
            raise NotReplayable("a module uses parameters that it does not look up by name")
        self.recorded += 1
        used = list(_held(eager, set()))
        return _Entry(static, ok, results, replay_passes, replay_finish, used)


class _Entry:
    """One recording: static inputs, outputs, the replays, and the tensors they work on."""

    def __init__(
        self,
        static: Batch,
        ok: Tensor,
        results: PassResults,
        replay_passes: Callable[[], None],
        replay_finish: Callable[[], None],
        used: list[Tensor],
    ) -> None:
        self.static, self.ok, self.results = static, ok, results
        self.replay_passes, self.replay_finish = replay_passes, replay_finish
        # A part may replace its scratch tensors for another situation; the graph writes to these.
        self.used = used
        self.update: ReplayedUpdate | None = None  # set when the optimizer first steps for it

    def fill(self, batch: Batch) -> None:
        """Copy ``batch`` into the static inputs; the noise offset is always the same tensor."""
        every = zip(_tensors(self.static), _tensors(batch), strict=True)
        pairs = [(own, new) for own, new in every if own is not new]
        if pairs:
            torch._foreach_copy_([own for own, _ in pairs], [new for _, new in pairs])


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


@contextmanager
def _with_fresh_grad_accumulators(eager: Update) -> Iterator[None]:
    """Replace the parameters by aliases if any of them has an autograd node from before.

    Autograd binds a parameter's AccumulateGrad node to the stream of its first use, and keeps the
    node while any graph references it (DDP always does). A capture on another stream would fail,
    so within this context the model has parameters over the same storage with fresh nodes.
    """
    parameters = [p for p in eager.net.model.parameters() if p.requires_grad]
    # A compiled region creates no autograd nodes when it runs.
    if eager.net.runner.compiles or not any(_in_somebodys_graph(p) for p in parameters):
        yield
        return
    modules = list(eager.net.model.modules())
    own = [dict(module._parameters) for module in modules]
    structure, named = eager.net.structure, eager.named
    known = structure.parameters
    fresh = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in named.values()}
    try:
        eager.named = {name: fresh[id(parameter)] for name, parameter in named.items()}
        structure.parameters = {name: fresh[id(each)] for name, each in known.items()}
        for module, mine in zip(modules, own, strict=True):
            found = {name: p if p is None else fresh[id(p)] for name, p in mine.items()}
            module._parameters.update(found)
        yield
    finally:
        eager.named, structure.parameters = named, known
        for module, mine in zip(modules, own, strict=True):
            module._parameters.update(mine)


def _in_somebodys_graph(parameter: Tensor) -> bool:
    """True if another graph keeps the parameter's node of the autograd graph alive."""
    mark = "fastadv"
    # The type stubs of torch declare a method where a node has a dictionary.
    notes: Any = get_gradient_edge(parameter).node.metadata
    notes[mark] = True
    notes = get_gradient_edge(parameter).node.metadata
    return notes.pop(mark, None) is not None


def _standing(model: nn.Module) -> list[Hashable]:
    """The addresses of parameters and buffers, requires_grad of each parameter, and the train flag
    of each module.

    Called before every replay; ``named_modules`` would take many times as long.
    """
    found: list[Hashable] = []
    seen, waiting = {model}, [model]
    while waiting:
        module = waiting.pop()
        found.append(module.training)
        for parameter in module._parameters.values():
            if parameter is not None:
                found += (parameter.data_ptr(), parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None:
                found.append(buffer.data_ptr())
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return found


def _switches() -> Hashable:
    """The settings of the process that decide which kernels run, and the hooks on all modules."""
    hooks = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        float32_settings(),
        torch._C._get_cudnn_deterministic(),
        torch._C._get_cudnn_enabled(),
        tuple(each for kind in hooks for each in (*kind, *kind.values())),
    )


def _present(gradients: Sequence[Tensor | None]) -> list[bool]:
    return [gradient is not None for gradient in gradients]


def _held(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors reachable from ``value`` through containers and objects of this package, without
    modules."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, (list, tuple)):
        inside = list(value)
    elif type(value).__module__.startswith("fastadv.") and not isinstance(value, nn.Module):
        inside = list(getattr(value, "__dict__", {}).values())
    else:
        return
    for each in inside:
        yield from _held(each, seen)


def _tensors(batch: Batch) -> list[Tensor]:
    """All tensors of a batch, including those of its view."""
    found: list[Tensor] = []
    for value in batch:
        if isinstance(value, Tensor):
            found.append(value)
        elif value is not None:
            found += list(value)
    return found


def _copied(batch: Batch) -> Batch:
    """A copy of the batch with the same offset tensor."""
    own: dict[str, Any] = {
        name: value.clone()
        for name, value in batch._asdict().items()
        if isinstance(value, Tensor) and name != "offset"
    }
    if batch.view is not None:
        own["view"] = type(batch.view)(*(tensor.clone() for tensor in batch.view))
    return batch._replace(**own)
