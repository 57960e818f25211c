"""The time left of a benchmark, and where it is shown."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fastadv.benchmark import progress
from fastadv.benchmark.progress import Estimate


def test_the_time_left_follows_what_was_taken():
    clock = [0.0]
    estimate = Estimate(candidates=3, turns=10, now=lambda: clock[0])
    assert estimate.candidate("a", None) == "warming up a, 1 of 3"
    clock[0] = 20.0  # a was built in 20 s, and a turn of it takes 2 s
    # Three candidates of 20 s each, then ten turns of 3 x 2 s; 20 s are over.
    assert estimate.candidate("b", 2.0) == "warming up b, 2 of 3; about 2 min left"
    clock[0] = 60.0
    estimate.candidate("c", 2.0)
    assert estimate.turn(0, 2.0) == "turn 1 of 10; about 60 s left"
    clock[0] = 100.0  # four turns took 10 s each, longer than alone
    assert estimate.turn(4, 2.0) == "turn 5 of 10; about 60 s left"


class Output(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def test_a_terminal_has_one_line_and_a_file_a_line_now_and_then(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = Output(terminal=False)
    monkeypatch.setattr(sys, "stderr", out)
    say = progress.progress()
    for second in range(100):
        clock[0] = 1000.0 + second
        say(f"turn {second}")
    say("")
    assert out.getvalue() == "turn 0\nturn 30\nturn 60\nturn 90\n"
    out = Output(terminal=True)
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("COLUMNS", "20")
    say = progress.progress()
    say("a sentence that is too long")
    say("")
    assert out.getvalue() == "\r\x1b[Ka sentence that is \r\x1b[K"


@pytest.mark.slow
def test_ctrl_c_of_a_real_run_writes_the_document(tmp_path):
    file = tmp_path / "a.json"
    words = "--methods fast --width 2 --image-size 8 --batch-size 4 --dtype fp32 --modes eager"
    command = [sys.executable, "-P", "-m", "fastadv", "bench", *words.split(), "--device", "cpu"]
    command += ["--repeats", "1000000", "--json", str(file), "--out", str(tmp_path / "rows")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        until = time.monotonic() + 120
        while not _turns(tmp_path) and time.monotonic() < until:
            time.sleep(0.2)
        os.kill(run.pid, signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "Traceback" not in err
    assert "training steps" in out
    found = json.loads(file.read_text())
    (step,) = (entry for entry in found["measurements"] if entry["kind"] == "step")
    assert (found["complete"], step["interleaved"]) == (False, True)
    assert len(step["turns_ms"]) >= 3


def _turns(folder):
    """True once interleaved turns are in the file of what is unfinished."""
    texts = (file.read_text() for file in folder.glob("rows/*.unfinished.jsonl"))
    return any('"over_passes"' in text for text in texts)
