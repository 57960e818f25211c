"""bf16 against float32 on paired seeds: ``python bench/precision.py --methods apart,pgd``.

Each seed trains twice, in float32 and with ``--amp``: the same initial weights, batches and noise.
One row per method holds both accuracies of every seed, and the differences bf16 - float32 in points
(percent of the test images) with their mean and its standard error.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

from fastadv.benchmark.rows import append_rows, provenance, results_file
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError
from fastadv.run.request import RunRequest
from fastadv.run.run_folder import RunFolder
from fastadv.run.train import train

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Parse the command line, train every pair, write one row per method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="apart,pgd")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--epochs", type=int)
    parser.add_argument(
        "--attack", default="pgd-20", help="attack under which accuracy is measured"
    )
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs/precision"), help="a new folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    device = choose_device(given.device)
    origin = provenance(device)
    for method in given.methods.split(","):
        config = RunRequest(
            method=method, data=given.data, epochs=given.epochs, device=given.device,
            eval_every=10**6, test_attacks=f"clean,{given.attack}",
        )  # fmt: skip
        seeds = [int(seed) for seed in given.seeds.split(",")]
        pairs = [pair(config, seed, given.runs) for seed in seeds]
        resolved = RunFolder(_folder(config, seeds[0], "bf16", given.runs)).read_config()
        row = summary(pairs, given.attack) | {
            "kind": "precision",
            "config": {
                "method": method, "data": given.data, "model": resolved.model,
                "width": resolved.width, "epochs": resolved.epochs, "eps": resolved.eps,
                "batch_size": resolved.batch_size, "mode": resolved.mode,
            },
        }  # fmt: skip
        append_rows(results_file(given.out, device), [row | origin])
        print(json.dumps(row, indent=2))


def pair(config: RunRequest, seed: int, runs: Path) -> dict[str, Any]:
    """The result of ``seed`` in float32 and in bf16: accuracies in [0,1] of the last weights."""
    found: dict[str, Any] = {"seed": seed}
    for dtype, amp in (("fp32", False), ("bf16", True)):
        folder = _folder(config, seed, dtype, runs)
        found[dtype] = train(replace(config, seed=seed, amp=amp, out=str(folder)))["last"]
    return found


def _folder(config: RunRequest, seed: int, dtype: str, runs: Path) -> Path:
    return runs / f"{config.method}-{config.data}-{seed}-{dtype}"


def summary(pairs: list[dict[str, Any]], attack: str) -> dict[str, Any]:
    """The differences bf16 - float32 in points, their mean and its standard error."""
    differences = [100 * (pair["bf16"][attack] - pair["fp32"][attack]) for pair in pairs]
    several = len(differences) > 1
    error = statistics.stdev(differences) / sqrt(len(differences)) if several else None
    return {
        "attack": attack,
        "differences": [round(difference, 3) for difference in differences],
        "mean": round(statistics.mean(differences), 3),
        "standard_error": None if error is None else round(error, 3),
        "each": pairs,
    }


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
