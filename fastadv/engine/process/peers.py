"""Which of the processes that train together still run.

A process that was killed says nothing. On this machine the others look for its number among the
processes; on another machine they count the beats of its heart, which it puts into the group's
store.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fastadv.engine.process.beginning import began, boot

BEAT_EVERY = 5.0  # seconds
LOST_AFTER = 60.0  # seconds without a beat: longer than Python may be busy in one call
LOOK_EVERY = 1.0
ENDS_AFTER = 10.0  # seconds that a process has to end by itself after another one was lost
_KEY = "process"


class Peers:
    """The ``world`` processes of a group with the store ``store``; this one is number ``rank``."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store, self._rank = store, rank
        self._ended = threading.Event()
        store.set(f"{_KEY} {rank}", json.dumps([*_place(), os.getpid(), began(os.getpid())]))
        told = {
            other: json.loads(store.get(f"{_KEY} {other}")) for other in range(world)
        }  # waits for all
        here = told.pop(rank)[:2]
        self._near = {r: (int(t[2]), t[3]) for r, t in told.items() if t[:2] == here}
        self._far = {r: (-1, time.monotonic()) for r in told if r not in self._near}
        self._looked = 0.0
        if self._far:
            threading.Thread(target=self._beat, daemon=True).start()

    def leave(self) -> None:
        """This process ends in order: it is not lost."""
        self._ended.set()
        with suppress(RuntimeError):
            self._store.set(f"{_KEY} {self._rank} left", "")

    def lost(self) -> int | None:
        """The number of a process that has ended without a word. Raises ``RuntimeError`` if the
        store has."""
        for rank, (pid, when) in self._near.items():
            if began(pid) != when and not self._left(rank):
                return rank
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY:
            return None
        self._looked = now
        for rank, (beats, since) in self._far.items():
            counted = self._store.add(f"{_KEY} {rank} beats", 0)
            if counted != beats:
                self._far[rank] = counted, now
            elif now - since > LOST_AFTER and not self._left(rank):
                return rank
        return None

    def end_if_lost(self, sentence: Callable[[], str | None], end: Callable[[str], None]) -> None:
        """Call ``end`` with the ``sentence`` about another process that has ended, from a thread of
        its own, once this one has had time to end by itself. It cannot where it waits for its
        device."""

        def watch() -> None:
            while not self._ended.wait(LOOK_EVERY):
                said = sentence()
                if said is not None and not self._ended.wait(ENDS_AFTER):
                    end(said)

        threading.Thread(target=watch, daemon=True).start()

    def _left(self, rank: int) -> bool:
        return bool(self._store.check([f"{_KEY} {rank} left"]))

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_EVERY):
            try:
                self._store.add(f"{_KEY} {self._rank} beats", 1)
            except RuntimeError:  # the store has ended
                return


def _place() -> tuple[str, str]:
    """The machine and, as containers have their own, its table of processes."""
    try:
        return f"{socket.gethostname()} {boot()}", os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}", ""  # not Linux: hearts alone
