"""What a run takes beyond what ``--batch-size auto`` foresees: ``python bench/batch_reserve.py``.

A batch is foreseen to take what one step on it takes, which is tried. Here a whole short run with
that batch (training, evaluation, checkpoints) takes its memory; the share of it that was not
foreseen is what has to be kept in reserve (``fastadv.run.fitting.RESERVE``). Each run has a process
of its own, with one thread. Only memory is measured: the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastadv.benchmark.rows import append_rows, provenance
from fastadv.engine.process import memory
from fastadv.engine.process.host_memory import keep_freed_memory
from fastadv.run import fitting
from fastadv.run.request import RunRequest
from fastadv.run.train import train

RESULTS = Path(__file__).parent / "results" / "batch-reserve.jsonl"
CASES: dict[str, dict[str, Any]] = {
    "fast": {},
    "trades": {"options": {"steps": 1}},
    "awp": {"options": {"steps": 1, "warmup_epochs": 0}},
    "apart": {},
    "pgd, amp": {"options": {"steps": 1}, "amp": True},
}
BATCH, UPDATES = 512, 3


def main() -> None:
    """Parse the command line, run every case, and print and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measured(given.case)))
        return
    shared = provenance(torch.device("cpu")) | {"kind": "batch reserve", "threads": 1}
    for case in CASES:
        command = [sys.executable, __file__, "--case", case]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = shared | json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(row, indent=1))
        append_rows(given.out, [row])


def measured(case: str) -> dict[str, Any]:
    """The megabytes that were foreseen and taken, and the share that was not foreseen."""
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = request_of(case, folder)
        session = fitting.trial_session(request)
        fitting.free_what_is_kept()
        taken = fitting.taken_now(session.device)
        peaks = fitting.peak_of_first_step(session), fitting.peak_of_step(session, BATCH)
        foreseen = max(peak for peak in peaks if peak is not None) - taken
        del session
        fitting.free_what_is_kept()
        before = memory.resident()
        assert memory.forget_peak()
        train(request)
        taken = memory.peak() - before  # type: ignore[operator]
    return {
        "method": case,
        "batch_size": BATCH,
        "foreseen_mb": round(foreseen / 2**20, 1),
        "taken_mb": round(taken / 2**20, 1),
        "not_foreseen_percent": round(100 * (1 - foreseen / taken), 1),
    }


def request_of(case: str, folder: Path) -> RunRequest:
    """A run of some updates on random images of CIFAR's size."""
    rng = np.random.default_rng(0)
    sizes = {"train": BATCH + 8, "test": 100}
    arrays = {f"x_{of}": rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for of, n in sizes.items()}
    arrays |= {f"y_{of}": np.arange(n) % 2 for of, n in sizes.items()}
    np.savez(folder / "images.npz", **arrays)
    return RunRequest(
        method=case.partition(",")[0], data=f"npz:{folder}/images.npz", model="preact_resnet18",
        width=16, eps=8 / 255, epochs=UPDATES, eval_every=UPDATES, batch_size=BATCH, mode="eager",
        val_fraction=0.01, select_attack="pgd-2", test_attacks="clean,pgd-2",
        out=str(folder / "run"), **CASES[case],
    )  # fmt: skip


if __name__ == "__main__":
    main()
