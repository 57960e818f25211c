"""The scripts of docs/running-on-a-cluster.md, from sbatch to a finished run, with a stand-in for
SLURM."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastadv.cli.max_time import seconds_of
from fastadv.run.run_folder import RunFolder

PAGE = Path(__file__).parents[1] / "docs" / "running-on-a-cluster.md"
SMALL = "--width 2 --limit 320 --batch-size 32 --epochs 12 --mode eager --test-limit 20"
STUBS = {
    "srun": 'echo $$ > "$STAND_IN/step"; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else touch "$STAND_IN/requeued"; fi',
    "fastadv": f'exec {sys.executable} -P -m fastadv "$@"',
    "fastadv-torchrun": f'exec {sys.executable} -P -m fastadv.cli.torchrun "$@"',
}


def script(name: str) -> str:
    """The script of the page that is called ``name``."""
    found = re.search(rf"<!-- sbatch: {name} -->\n```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def smaller(text: str, **replaced: str) -> str:
    for old, new in replaced.items():
        before = {"amp": "--amp", "batch": "--batch-size 512 ", "gpus": "--nproc-per-node 4"}
        before |= {"port": ":29400"}
        assert before[old] in text
        text = text.replace(before[old], new)
    return text


def sbatch(text: str, place: Path, run: Path | None) -> list[tuple[int, str]]:
    """Exit code and output of every time that the job ran. The first time SIGUSR1 comes to its step
    once it has saved in ``run``, as ``--signal=USR1@120`` would send it."""
    stand_in = place / "stand-in"
    stand_in.mkdir()
    for name, body in STUBS.items():
        (stand_in / name).write_text(f"#!/bin/bash\n{body}\n")
        (stand_in / name).chmod(0o755)
    job = place / "job.sh"
    job.write_text(text)
    environment = os.environ | {
        "PATH": f"{stand_in}:{os.environ['PATH']}",
        "STAND_IN": str(stand_in),
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "node",
        "OMP_NUM_THREADS": "1",
    }
    told: list[tuple[int, str]] = []
    while len(told) < 4:
        process = subprocess.Popen(
            ["bash", str(job)],
            cwd=place,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if run is not None and not told:
            until = time.monotonic() + 120
            while not (run / "last.pt").exists() and time.monotonic() < until:
                time.sleep(0.02)
            os.kill(int((stand_in / "step").read_text()), signal.SIGUSR1)
        said, _ = process.communicate(timeout=300)
        told.append((process.returncode, said))
        requeued = stand_in / "requeued"
        if not requeued.exists():
            break
        requeued.unlink()
    return told


@pytest.mark.slow
def test_one_gpu_from_sbatch_to_the_finished_run(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "apart"
    first, second = sbatch(smaller(script("one"), amp=SMALL), tmp_path, run)
    assert first[0] == 75
    assert "Stopped by SIGUSR1; continue with: fastadv train --resume runs/apart" in first[1]
    assert second[0] == 0, second[1]
    assert "test accuracy" in second[1]
    assert (run / "summary.json").exists()


@pytest.mark.slow
def test_several_gpus_from_sbatch_to_the_finished_run(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = tmp_path / "runs" / "pgd"
    text = smaller(
        script("several"), amp=SMALL, batch="", gpus="--nproc-per-node 2", port=f":{port}"
    )
    text = text.replace("--method pgd", "--method fast")
    first, second = sbatch(text, tmp_path, run)
    assert first[0] == 75, first[1]
    assert first[1].count("Stopped by ") == 1
    assert "Traceback" not in first[1]
    assert second[0] == 0, second[1]
    assert "2 processes share each batch" in second[1]
    assert (run / "summary.json").exists()


@pytest.mark.slow
def test_a_mistake_is_not_queued_again(tmp_path: Path) -> None:
    ((code, said),) = sbatch(smaller(script("one"), amp="--nonsense"), tmp_path, None)
    assert code == 2
    assert "Unknown option '--nonsense'" in said


def test_the_times_leave_room_before_the_end() -> None:
    for name in ("one", "several"):
        text = script(name)
        (whole,) = re.findall(r"--time=(\S+)", text)
        (most,) = re.findall(r"--max-time (\S+)", text)
        (warned,) = re.findall(r"--signal=USR1@(\d+)", text)
        assert 60 <= seconds_of(whole) - seconds_of(most) <= 600
        assert int(warned) >= 60


def test_max_time_saves_and_stops(fastadv_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastadv.engine.process import stop
    from fastadv.run.epoch_loop import EpochLoop

    words = f"train --method fast {SMALL} --epochs 3000 --out run --resume auto".split()
    real, allow, given = EpochLoop.epochs, stop.allow, []

    def epochs(loop: EpochLoop) -> None:
        """The time begins here, however long the building took."""
        monkeypatch.setattr(stop, "started", time.time)
        allow(*given)
        real(loop)

    monkeypatch.setattr(stop, "allow", given.append)
    monkeypatch.setattr(EpochLoop, "epochs", epochs)
    stopped = fastadv_command(*words, "--max-time", "2s")
    assert stopped.code == 75, stopped.err
    assert "Stopped by --max-time" in stopped.err
    assert "max_time" not in (Path("run") / "config.toml").read_text()
    before = {path: path.read_bytes() for path in Path("run").iterdir() if path.name != "lock"}
    monkeypatch.setattr(EpochLoop, "epochs", real)
    monkeypatch.setattr(stop, "allow", allow)
    monkeypatch.setattr(stop, "started", lambda: time.time() - 100)
    for folder in ("run", "new"):  # nothing is done: the same command would end like this for ever
        ended = fastadv_command(*words, "--out", folder, "--max-time", "99s")
        assert ended.code == 2
        assert re.match(r"Stopped by --max-time 10\d s after the start, .*longer", ended.err)
        assert len(ended.err.splitlines()) == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # others have had the time
    assert fastadv_command(*words, "--max-time", "99s").code == 75
    assert not Path("new").exists()
    assert all(path.read_bytes() == held for path, held in before.items())
    refused = fastadv_command(*words, "--max-time", "soon")
    assert (refused.code, "--max-time is a time such as" in refused.err) == (2, True)


def test_every_file_of_a_run_is_on_the_page() -> None:
    table = PAGE.read_text().partition("## What is written where")[2].partition("\n## ")[0]
    files = {place.name for place in RunFolder(Path("run")).files()}
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = [name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(named) == sorted([*files, "events.out.tfevents.*"])
    page = PAGE.with_name("run-folder.md").read_text()
    assert not [name for name in files if f"`{name}`" not in page and f"`{name}/`" not in page]
