"""When a process began: the same for as long as it lives, and nothing afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastadv.engine.process.beginning import began, began_at, boot

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says it")


def test_of_a_process_of_any_name_until_it_has_ended() -> None:
    # The system shows the first 15 bytes of it: a bracket, a space and half a letter.
    name = b") 1 2 (\xff\n x"
    code = f"open('/proc/self/comm', 'wb').write({name!r}); print(flush=True); input()"
    before = time.time()
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdin is not None
    child.stdout.readline()
    when, at = began(child.pid), began_at(child.pid)
    assert when is not None
    assert at is not None
    assert before - 0.1 <= at <= time.time()  # the clock has ticks of 10 ms
    assert (began(child.pid), began(os.getpid()) == when) == (when, False)
    child.stdin.write(b"\n")
    child.stdin.close()
    until = time.monotonic() + 10
    while Path(f"/proc/{child.pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z":
        assert time.monotonic() < until
        time.sleep(0.01)
    assert began(child.pid) is None  # it has ended, though nobody has taken notice
    child.stdout.close()
    child.wait()
    assert began_at(child.pid) is None


def test_of_this_start_of_the_computer() -> None:
    assert len(boot()) == 36
    assert boot() == boot()


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert (began(os.getpid()), began_at(os.getpid()), boot()) == (None, None, "")
