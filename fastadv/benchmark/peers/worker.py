"""Drives a peer in another Python process: one JSON object per line, one step per request.

Requests are ``{"op": "setup", ...}``, ``{"op": "step"}`` and ``{"op": "quit"}``. The answers hold
the result, or ``{"error": "a sentence"}``.
"""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

from fastadv.errors import UserError

TIMEOUT = 900.0
# OpenMP threads of the previously timed process keep spinning for 0.2 seconds.
PAUSE_SECONDS = 0.25


class Worker:
    """A peer's process. ``command`` starts it; nothing else may use its stdin and stdout."""

    def __init__(self, name: str, command: Sequence[str], *, timeout: float = TIMEOUT) -> None:
        self.name, self.timeout = name, timeout
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as self)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def setup(self, **config: Any) -> dict[str, Any]:
        """Build model, images and attack in the peer; returns its description."""
        return self._ask({"op": "setup", **config})

    def step(self) -> float:
        """One turn; returns the seconds of one of its steps as the worker measured them."""
        time.sleep(PAUSE_SECONDS)
        return float(self._ask({"op": "step"})["seconds"])

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None and self._process.stdin is not None:
            try:
                self._process.stdin.write('{"op": "quit"}\n')
                self._process.stdin.close()
                self._process.wait(10)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        self._errors.close()

    def _read(self) -> None:
        if self._process.stdout is not None:
            for line in self._process.stdout:
                self._answers.put(line)
        self._answers.put("")  # the end of its output

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            if self._process.stdin is None:
                raise RuntimeError("the worker was started without stdin")
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=self.timeout)
        except BrokenPipeError:
            line = ""
        except queue.Empty:
            self._process.kill()
            raise UserError(f"The peer {self.name} took over {self.timeout:.0f} s.") from None
        if not line:
            raise UserError(f"The peer {self.name} ended: {self._last_error()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(f"The peer {self.name} cannot run: {answer['error']}")
        return answer

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1] if lines else "it printed nothing"
