"""Words of the processes to each other, through the group's store: no device is waited for."""

from __future__ import annotations

import time
from datetime import timedelta

from fastadv.engine.process.distributed import group
from fastadv.engine.process.distributed.failures import is_there, raise_failure, report
from fastadv.errors import UserError

# For all agreements but the first, before which a process may decode a data set.
AGREEMENT_TIMEOUT = timedelta(minutes=10)


def told_by_all(own: str, timeout: timedelta) -> list[str]:
    """The texts ``own`` of all processes, in the order of ranks. All processes must call this
    equally often.

    They are sent through the group's store, where texts may differ in length. Raises ``UserError``
    if another process does not call it within ``timeout``.
    """
    state = group.state
    state.agreements += 1
    store, key = group.store(), f"agreement {state.agreements} of process "
    store.set(f"{key}{group.rank()}", own)
    found: list[str] = []
    since = time.monotonic()
    until = since + timeout.total_seconds()
    for other in range(group.world_size()):
        while not is_there(f"{key}{other}"):
            raise_failure(since)
            if time.monotonic() > until:
                raise UserError(
                    "The model, the method or the batch size changed in process "
                    f"{group.rank()} and not in process {other}: all must make the same changes "
                    "before the same call, and the first batch must be the largest."
                )
            time.sleep(0.01)
        found.append(store.get(f"{key}{other}").decode())
    return found


def in_step_after_error() -> bool:
    """True if all processes have begun equally many messages; otherwise a message of one would meet
    an older one of another.

    All processes ask this at the start of the call after one that failed. A process that still
    waits in the failed call then ends that call with an error. If another process does not come,
    the answer is False.
    """
    store, state = group.store(), group.state
    key = f"messages before call {state.calls} of process "
    store.set(f"{key}{group.rank()}", str(state.messages))
    report(f"{state.calls} process {group.rank()} stopped (see its error)")
    until = time.monotonic() + AGREEMENT_TIMEOUT.total_seconds()
    keys = [f"{key}{other}" for other in range(group.world_size())]
    while not all(map(is_there, keys)):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    report("")
    return len({store.get(key) for key in keys}) == 1


class Signal:
    """A flag that any process can raise for all, which nobody waits for. All processes must make
    the same signals in the same order."""

    def __init__(self, name: str) -> None:
        group.state.signals += 1
        self._key = f"signal {group.state.signals} ({name})"
        self._given = False

    def give(self) -> None:
        """Raise the flag."""
        if not self._given and group.world_size() > 1:
            group.store().set(self._key, "")
        self._given = True

    def is_given(self) -> bool:
        """True once a process has raised the flag; asks the process that holds it."""
        if not self._given and group.world_size() > 1:
            self._given = is_there(self._key)
        return self._given
