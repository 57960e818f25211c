"""Several processes on one batch: the results of their parts of it are averaged here.

A step runs several forward passes per backward pass and takes gradients without ``backward()``,
which the hooks of DDP do not see. (With TRADES they would even fail: DDP's buffer broadcast changes
tensors that the backward pass needs.) So the inner module runs in each process, and this module
averages the results. After every update all processes hold the same weights, buffers and state.
Quantities that are taken over a batch, or carried from one batch to the next, stay local to each
process: the batch statistics of BatchNorm, the largest entries of AdvLC, the normalised weights of
SAT and GAIRAT, Free's perturbation, the masks of dropout. With ``bn="global"`` all of them but
dropout's masks are those of the whole batch: nothing is averaged here then, see ``division.py``.

Gradients, statistics, loss and accuracy are the mean over the images of all processes, whatever the
sizes of their batches; DDP would give each process the same weight. All processes must make equally
many calls. The gradients of calls with ``update=False`` stay in their process until the update, as
in DDP's ``no_sync``.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from fastadv.engine.process import stop
from fastadv.engine.process.one_voice import first_to_speak, is_first
from fastadv.engine.process.peers import Peers
from fastadv.errors import ProcessLost, TrainingError, UserError
from fastadv.exit_codes import ExitCode

# The other processes wait while the first one decodes a data set, or evaluates more slowly.
GROUP_TIMEOUT = timedelta(hours=6)
# While all train, none is much slower than the others.
TRAINING_TIMEOUT = timedelta(minutes=15)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within this context the process is in the group that torchrun asks for in the environment;
    without torchrun nothing happens."""
    if world_size() > 1 or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    global _peers
    try:
        distributed.init_process_group(backend, timeout=GROUP_TIMEOUT)
        _peers = Peers(_store(), rank(), world_size())
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"The processes could not find each other ({_first_line(error)}): start all of them "
            "with torchrun, with the same address and number of processes."
        ) from None
    if device.type == "cuda":
        _peers.end_if_lost(_sentence_of_the_end, _end_here)
    try:
        with failure_told(final=True):
            yield
    finally:
        _peers.leave()
        _peers = None
        leave()


@contextmanager
def short_timeout() -> Iterator[None]:
    """Within this context no process waits longer for another than ``TRAINING_TIMEOUT``."""
    if world_size() == 1:
        yield
        return
    distributed.distributed_c10d._set_pg_timeout(TRAINING_TIMEOUT)
    try:
        yield
    finally:
        distributed.distributed_c10d._set_pg_timeout(GROUP_TIMEOUT)


def leave() -> None:
    """Leave the group, as the last thing before the process ends.

    A thread of gloo gives the tensor of the last message back shortly after the message has
    completed and needs Python for it; the process would abort if Python had ended before.
    """
    time.sleep(0.1)
    distributed.destroy_process_group()


def local_rank() -> int:
    """The number of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def speaks() -> bool:
    """True in the process that writes to the terminal, also before it has joined the others."""
    return is_first() if world_size() == 1 else rank() == 0


def wait() -> None:
    """Wait until every process has called this."""
    if world_size() > 1:
        _summed(torch.zeros(1, device=_where()))


@contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 runs the block before the others, which can then read the files it wrote."""
    if rank() != 0:
        wait()
    yield
    if rank() == 0:
        wait()


def world_size() -> int:
    """The number of processes that train together; 1 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def sharing() -> int:
    """The number of processes that hold parts of the present batch: 1 where each holds the whole of
    it (``alone``)."""
    if not _alone and distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def rank() -> int:
    """The number of this process; 0 without a process group."""
    return distributed.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def average(tensors: Sequence[Tensor], images: int = 1, unit: int = 1) -> None:
    """Replace each tensor, a mean over ``images`` images of this process, by the mean over those of
    all processes, in place, in one message per dtype.

    ``unit`` is a usual number of images, the same in all processes: no product is much larger than
    the tensors.
    """
    if world_size() == 1 or _alone:
        return
    # The number of images is exact in float32, in which it is sent.
    own = torch.full((1,), images, device=tensors[0].device, dtype=torch.float32)
    sent: list[tuple[list[Tensor], Tensor]] = []
    # A list, not a set: every process must send its messages in the same order.
    for dtype in dict.fromkeys([own.dtype, *(tensor.dtype for tensor in tensors)]):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        last = [own] if dtype == own.dtype else []
        flat = torch.cat([*(tensor.reshape(-1) for tensor in same), *last])
        values = flat[: len(flat) - len(last)]
        if images != unit:
            values *= images / unit
        _summed(flat)
        sent.append((same, values))
        own = flat[-1:] if last else own
    units = own.squeeze(0).double() / unit
    for same, values in sent:
        values /= units
        pieces = values.split([tensor.numel() for tensor in same])
        shaped = [piece.view(tensor.shape) for tensor, piece in zip(same, pieces, strict=True)]
        if same:  # no tensor has the dtype of the number of images
            torch._foreach_copy_(same, shaped)


def add_up(tensor: Tensor) -> None:
    """Replace ``tensor`` by its sum over all processes, in place."""
    if world_size() > 1:
        _summed(tensor)


@torch.no_grad()
def share_rows(stores: Sequence[Tensor], index: Tensor, room: int) -> None:
    """Copy the rows of ``stores`` (N,...) that other processes wrote, in place.

    Each process wrote its own rows ``index`` (B,). B may differ between processes up to ``room``,
    which is the same in all of them; messages are filled up to that length with the last row.
    """
    if world_size() == 1 or not stores or _alone:
        return
    index = torch.cat([index, index[-1:].expand(max(0, room - len(index)))])
    everywhere = _gathered(index)
    for store in stores:
        store.index_copy_(0, everywhere, _gathered(store[index]))


def every_row(part: Tensor) -> Tensor:
    """The parts (b,...) of all processes, of the same shape in all, one after another. All
    processes must call it."""
    return _gathered(part)


def _gathered(part: Tensor) -> Tensor:
    """The parts (B,...) of all processes, one after another."""
    parts = [torch.empty_like(part) for _ in range(world_size())]
    part = part.contiguous()
    _finished(part, lambda wait: distributed.all_gather(parts, part, async_op=not wait))
    return torch.cat(parts)


def _where() -> torch.device:
    """The device that the group's messages are on."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


def _summed(flat: Tensor) -> None:
    _finished(flat, lambda wait: distributed.all_reduce(flat, async_op=not wait))


# -- failures of other processes ------------------------------------------------------------------

LOOK_EVERY = timedelta(seconds=1)
# A process that failed in an earlier call and has reported nothing since: it may have caught its
# error and be on its way to the present call, so the others believe its report after this time.
BELIEVED_AFTER = timedelta(seconds=10)
_FAILED = "fastadv/failed"
_FINAL = 2**62
_BY = "asked by "
_alone = False
_messages = 0
_calls = 0
_told = ""
_received: BaseException | None = None
_peers: Peers | None = None


@contextmanager
def alone() -> Iterator[None]:
    """Within this context ``average`` and ``share_rows`` send nothing: the other processes do not
    call them now, or each has the whole batch (``division.py``)."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def failure_told(final: bool = False) -> Iterator[None]:
    """An error raised in the block is reported to the processes that wait for this one. All
    processes must enter equally many of these blocks. ``final``: this process ends after it."""
    global _calls, _told
    if world_size() == 1:
        yield
        return
    if _told:  # the caller caught the error and continues
        with suppress(RuntimeError):
            if _report() == _told:  # and not that of another process
                _store().set(_FAILED, "")  # not deleted: another process may be about to read it
        _told = ""
    _calls += 1
    try:
        yield
    except BaseException as error:
        if error is not _received:
            said = str(error).strip().splitlines()
            words = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
            if isinstance(error, stop.Stopped):
                words = f"{_BY}{error.by}"
            _told = f"{_FINAL if final else _calls} process {rank()} stopped ({words})"
            with suppress(RuntimeError):  # raised if the other processes have already ended
                _store().set(_FAILED, _told)
        raise


def in_step_after_error() -> bool:
    """True if all processes have begun equally many messages; otherwise a message of one would meet
    an older one of another.

    Called in the call after one that failed, by all processes: one that still waits in the call
    before ends it with an error, too. False also if another process does not come.
    """
    store, key = _store(), f"fastadv/messages before call {_calls} of process "
    store.set(f"{key}{rank()}", str(_messages))
    store.set(_FAILED, f"{_calls} process {rank()} stopped (see its error)")
    until = time.monotonic() + AGREEMENT_TIMEOUT.total_seconds()
    keys = [f"{key}{other}" for other in range(world_size())]
    while not all(map(_is_there, keys)):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    store.set(_FAILED, "")
    return len({store.get(key) for key in keys}) == 1


def _of_another(error: BaseException) -> BaseException:
    """The ``error`` of this process after another one has ended; it is not reported again."""
    global _received
    _received = error
    stop.ending()  # torchrun ends the others soon after it has found that one is gone
    return error


def _finished(tensor: Tensor, start: Callable[[bool], Any]) -> None:
    """Run a collective on ``tensor``; on a CPU check every ``LOOK_EVERY`` if another process has
    failed or is gone."""
    global _messages
    _messages += 1
    if tensor.device.type != "cpu":
        # Queued on the device; a thread ends this process if a message never comes.
        start(True)
        return
    since = time.monotonic()
    try:
        work = start(False)
    except RuntimeError as error:  # a process is gone already
        raise _of_another(_broken(error, since)) from None
    while True:
        try:
            work.wait(LOOK_EVERY)
            return
        except RuntimeError:
            _raise_failure(since)
        if work.is_completed():
            break
    try:
        work.wait()  # it may have completed in the meantime
    except RuntimeError as error:
        raise _of_another(_broken(error, since)) from None


def _broken(error: RuntimeError, since: float) -> BaseException:
    """What ends this process after a message has failed. The reason may come a little later."""
    until = time.monotonic() + 2 * LOOK_EVERY.total_seconds()
    while time.monotonic() < until:
        try:
            _raise_failure(since)
        except (TrainingError, stop.Stopped) as found:
            return found
        time.sleep(0.05)
    return ProcessLost(f"A message between the processes failed ({_first_line(error)}). {_AGAIN}")


_AGAIN = "The same command with --resume auto goes on from the last checkpoint."


def _first_line(error: BaseException) -> str:
    """The first sentence of torch's ``error``, without the place in its code."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line.rpartition("] ")[2].partition(". ")[0] or line


def _raise_failure(since: float) -> None:
    """Raise what another process has reported, or that one is gone. ``since``: when this process
    began to wait, a time of ``time.monotonic``."""
    report = _report()
    call, _, said = report.partition(" ")
    waited = time.monotonic() - since
    if report and (int(call) >= _calls or waited > BELIEVED_AFTER.total_seconds()):
        by = said.rpartition(f"({_BY}")[2].rstrip(")")
        if f"({_BY}" in said:
            raise _of_another(stop.Stopped(by))
        raise _of_another(TrainingError(f"This process stops here because {said}."))
    lost = None if _peers is None else _in_store(_peers.lost)
    if lost is not None:
        raise _of_another(ProcessLost(_gone(lost)))


def _gone(lost: int) -> str:
    return (
        f"Process {lost} has ended without a word: it was killed, perhaps for want of memory, or "
        f"its machine is gone. {_AGAIN}"
    )


def _report() -> str:
    """What a process has reported last, the number of its call first; empty if none has."""
    return _store().get(_FAILED).decode() if _is_there(_FAILED) else ""


def _is_there(key: str) -> bool:
    """True if a process has set ``key`` in the store, which process 0 or torchrun holds."""
    return bool(_in_store(lambda: _store().check([key])))


def _in_store(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except RuntimeError as error:
        if isinstance(error, TrainingError):
            raise
        sentence = f"This process stops here because process 0, or torchrun, has ended. {_AGAIN}"
        raise _of_another(ProcessLost(sentence)) from None


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()


def _sentence_of_the_end() -> str | None:
    """Why this process cannot go on, if another one is gone or has failed for good."""
    try:
        report = _report()
        call, _, said = report.partition(" ")
        if report and int(call) == _FINAL:
            return f"This process stops here because {said}."
        lost = None if _peers is None else _in_store(_peers.lost)
    except TrainingError as error:
        return str(error)
    return None if lost is None else _gone(lost)


def _end_here(sentence: str) -> None:
    """End this process, which waits for a device and hears nothing."""
    if first_to_speak():
        os.write(2, f"error: {sentence}\n".encode())
    os._exit(ExitCode.GO_ON)


# -- agreement of processes -----------------------------------------------------------------------

# For all agreements but the first, before which a process may decode a data set.
AGREEMENT_TIMEOUT = timedelta(minutes=10)
_agreements = 0


def told_by_all(own: str, timeout: timedelta) -> list[str]:
    """The texts ``own`` of all processes, in the order of ranks. All processes must call this
    equally often.

    They are sent through the group's store, where texts may differ in length. Raises ``UserError``
    if another process does not call it within ``timeout``.
    """
    global _agreements
    _agreements += 1
    store, key = _store(), f"fastadv/agreement {_agreements} of process "
    store.set(f"{key}{rank()}", own)
    found: list[str] = []
    since = time.monotonic()
    until = since + timeout.total_seconds()
    for other in range(world_size()):
        while not _is_there(f"{key}{other}"):
            _raise_failure(since)
            if time.monotonic() > until:
                raise UserError(
                    f"The model, the method or the batch size changed in process {rank()} and not "
                    f"in process {other}: all must make the same changes before the same call, and "
                    "the first batch must be the largest."
                )
            time.sleep(0.01)
        found.append(store.get(f"{key}{other}").decode())
    return found


class Signal:
    """A flag that any process can raise for all, which nobody waits for. All processes must make
    the same signals in the same order."""

    _made = 0

    def __init__(self, name: str) -> None:
        Signal._made += 1
        self._key = f"fastadv/signal {Signal._made} ({name})"
        self._given = False

    def give(self) -> None:
        """Raise the flag."""
        if not self._given and world_size() > 1:
            _store().set(self._key, "")
        self._given = True

    def is_given(self) -> bool:
        """True once a process has raised the flag; asks the process that holds it."""
        if not self._given and world_size() > 1:
            self._given = _is_there(self._key)
        return self._given


def collected(own: Any) -> list[Any]:
    """In process 0 the objects ``own`` of all processes, in the order of ranks; an empty list in
    the others."""
    if world_size() == 1:
        return [own]
    found: list[Any] = [None] * world_size() if rank() == 0 else []
    since = time.monotonic()
    try:
        distributed.gather_object(own, found or None)
    except RuntimeError as error:
        raise _of_another(_broken(error, since)) from None
    return found


def every_part(own: bytes) -> list[bytes]:
    """The ``own`` bytes of all processes, which may differ in length, in the order of ranks. All
    processes must call it."""
    if world_size() == 1:
        return [own]
    device = _where()
    length = torch.tensor([len(own)], device=device)
    lengths = _gathered(length).tolist()
    if not max(lengths):
        return [b""] * world_size()
    part = torch.zeros(max(lengths), dtype=torch.uint8)
    part[: len(own)] = torch.frombuffer(bytearray(own or b"\0"), dtype=torch.uint8)[: len(own)]
    whole = _gathered(part.to(device)).cpu().view(world_size(), -1)
    return [bytes(row[:n].numpy()) for row, n in zip(whole, lengths, strict=True)]


def any_process(said: bool, device: torch.device) -> bool:
    """True if ``said`` is true in any process. All processes must call it; waits for the device."""
    return bool(most([float(said)], device)[0])


def most(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each of ``values`` (float32) in any process. All processes must call it; waits
    for the device."""
    if world_size() == 1:
        return list(values)
    found = torch.tensor(values, device=device, dtype=torch.float32)
    largest = distributed.ReduceOp.MAX
    _finished(found, lambda wait: distributed.all_reduce(found, largest, async_op=not wait))
    return found.tolist()
