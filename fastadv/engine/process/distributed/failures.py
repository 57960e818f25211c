"""What a process does while it waits for another one that has failed, or is gone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from torch import Tensor

from fastadv.engine.process import stop
from fastadv.engine.process.distributed import group
from fastadv.engine.process.one_voice import first_to_speak
from fastadv.errors import ProcessLost, TrainingError
from fastadv.exit_codes import ExitCode

LOOK_EVERY = timedelta(seconds=1)
# A process that failed in an earlier call and has reported nothing since: it may have caught its
# error and be on its way to the present call, so the others believe its report after this time.
BELIEVED_AFTER = timedelta(seconds=10)
_FAILED = "failed"
_FINAL = 2**62
_BY = "asked by "


@contextmanager
def failure_told(final: bool = False) -> Iterator[None]:
    """An error raised in the block is reported to the processes that wait for this one. All
    processes must enter equally many of these blocks. ``final``: this process ends after it."""
    if group.world_size() == 1:
        yield
        return
    state = group.state
    if state.told:  # the caller caught the error and continues
        with suppress(RuntimeError):
            if _report() == state.told:  # and not that of another process
                report("")  # not deleted: another process may be about to read it
        state.told = ""
    state.calls += 1
    try:
        yield
    except BaseException as error:
        if error is not state.received:
            said = str(error).strip().splitlines()
            words = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
            if isinstance(error, stop.Stopped):
                words = f"{_BY}{error.by}"
            call = _FINAL if final else state.calls
            state.told = f"{call} process {group.rank()} stopped ({words})"
            with suppress(RuntimeError):  # raised if the other processes have already ended
                report(state.told)
        raise


def of_another(error: BaseException) -> BaseException:
    """The ``error`` of this process after another one has ended; it is not reported again."""
    group.state.received = error
    stop.ending()  # torchrun ends the others soon after it has found that one is gone
    return error


def finished(tensor: Tensor, start: Callable[[bool], Any]) -> None:
    """Run a collective on ``tensor``; on a CPU check every ``LOOK_EVERY`` if another process has
    failed or is gone."""
    group.state.messages += 1
    if tensor.device.type != "cpu":
        # Queued on the device; a thread ends this process if a message never comes.
        start(True)
        return
    since = time.monotonic()
    try:
        work = start(False)
    except RuntimeError as error:  # a process is gone already
        raise of_another(broken(error, since)) from None
    while True:
        try:
            work.wait(LOOK_EVERY)
            return
        except RuntimeError:
            raise_failure(since)
        if work.is_completed():
            break
    try:
        work.wait()  # it may have completed in the meantime
    except RuntimeError as error:
        raise of_another(broken(error, since)) from None


def broken(error: RuntimeError, since: float) -> BaseException:
    """What ends this process after a message has failed. The reason may come a little later."""
    until = time.monotonic() + 2 * LOOK_EVERY.total_seconds()
    while time.monotonic() < until:
        try:
            raise_failure(since)
        except (TrainingError, stop.Stopped) as found:
            return found
        time.sleep(0.05)
    return ProcessLost(f"A message between the processes failed ({first_line(error)}). {_AGAIN}")


_AGAIN = "The same command with --resume auto goes on from the last checkpoint."


def first_line(error: BaseException) -> str:
    """The first sentence of torch's ``error``, without the place in its code."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line.rpartition("] ")[2].partition(". ")[0] or line


def raise_failure(since: float) -> None:
    """Raise what another process has reported, or that one is gone. ``since``: when this process
    began to wait, a time of ``time.monotonic``."""
    call, _, said = _report().partition(" ")
    waited = time.monotonic() - since
    if call and (int(call) >= group.state.calls or waited > BELIEVED_AFTER.total_seconds()):
        by = said.rpartition(f"({_BY}")[2].rstrip(")")
        if f"({_BY}" in said:
            raise of_another(stop.Stopped(by))
        raise of_another(TrainingError(f"This process stops here because {said}."))
    lost = _lost()
    if lost is not None:
        raise of_another(ProcessLost(_gone(lost)))


def _lost() -> int | None:
    peers = group.state.peers
    return None if peers is None else _in_store(peers.lost)


def _gone(lost: int) -> str:
    return (
        f"Process {lost} has ended without a word: it was killed, perhaps for want of memory, or "
        f"its machine is gone. {_AGAIN}"
    )


def report(said: str) -> None:
    """Tell all processes what has happened in this one: the number of its call, then words; ""
    takes it back."""
    group.store().set(_FAILED, said)


def _report() -> str:
    """What a process has reported last; empty if none has."""
    return group.store().get(_FAILED).decode() if is_there(_FAILED) else ""


def is_there(key: str) -> bool:
    """True if a process has set ``key`` in the store, which process 0 or torchrun holds."""
    return bool(_in_store(lambda: group.store().check([key])))


def _in_store(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except RuntimeError as error:
        if isinstance(error, TrainingError):
            raise
        sentence = f"This process stops here because process 0, or torchrun, has ended. {_AGAIN}"
        raise of_another(ProcessLost(sentence)) from None


def sentence_of_the_end() -> str | None:
    """Why this process cannot go on, if another one is gone or has failed for good."""
    try:
        call, _, said = _report().partition(" ")
        if call and int(call) == _FINAL:
            return f"This process stops here because {said}."
        lost = _lost()
    except TrainingError as error:
        return str(error)
    return None if lost is None else _gone(lost)


def end_here(sentence: str) -> None:
    """End this process, which waits for a device and hears nothing."""
    if first_to_speak():
        os.write(2, f"error: {sentence}\n".encode())
    os._exit(ExitCode.GO_ON)
