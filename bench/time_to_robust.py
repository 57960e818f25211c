"""Minutes of training to a robust accuracy: ``python bench/time_to_robust.py --target 0.45``.

Trains a method once per seed and evaluates its accuracy under the attack after every epoch. The
reported time is the run's training time, with compilation and without evaluation. One row holds all
seeds, with mean and standard deviation over the runs that reached the target; the others are
counted as not reached.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastadv.benchmark.rows import append_rows, provenance, results_file
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError
from fastadv.run.request import RunRequest
from fastadv.run.train import train

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Parse the command line, train every seed, write one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="apart")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--model", default="preact_resnet18")
    parser.add_argument("--width", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument(
        "--attack", default="pgd-20", help="attack under which accuracy is measured"
    )
    parser.add_argument("--target", type=float, default=0.45, help="accuracy in [0,1]")
    parser.add_argument("--select", default="test", choices=("test", "val"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs/time-to-robust"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    config = RunRequest(
        method=given.method, data=given.data, model=given.model, width=given.width,
        epochs=given.epochs, limit=given.limit, batch_size=given.batch_size, mode=given.mode,
        amp=given.amp, select=given.select, select_attack=given.attack,
        test_attacks=f"clean,{given.attack}", device=given.device,
    )  # fmt: skip
    seeds = [int(seed) for seed in given.seeds.split(",")]
    runs = [_one(config, seed, given) for seed in seeds]
    device = choose_device(given.device)
    row = summary(runs, given.target) | {
        "kind": "time to robust",
        "config": {
            "method": given.method, "data": given.data, "model": given.model,
            "width": given.width, "batch_size": given.batch_size, "amp": given.amp,
            "mode": given.mode, "attack": given.attack, "judged_on": given.select,
        },
    }  # fmt: skip
    append_rows(results_file(given.out, device), [row | provenance(device)])
    print(json.dumps(row, indent=2))


def _one(config: RunRequest, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    folder = given.runs / f"{given.method}-{given.data}-{seed}"
    result = train(replace(config, seed=seed, out=str(folder)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = reached(lines, f"{given.select}_{given.attack}", given.target)
    return {"seed": seed, "last": result["last"], **found}


def reached(lines: list[dict[str, Any]], score: str, target: float) -> dict[str, Any]:
    """The first epoch whose ``score`` is at least ``target``, and the training minutes to it."""
    for line in lines:
        if line.get(f"{score}_percent", -1.0) >= 100 * target:
            return {"epoch": line["epoch"], "minutes": round(line["train_seconds"] / 60, 4)}
    return {"epoch": None, "minutes": None}


def summary(runs: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """Mean and standard deviation over the seeds that reached the target."""
    minutes = [run["minutes"] for run in runs if run["minutes"] is not None]
    return {
        "target": target,
        "seeds": len(runs),
        "reached": len(minutes),
        "mean_minutes": round(statistics.mean(minutes), 4) if minutes else None,
        "std_minutes": round(statistics.stdev(minutes), 4) if len(minutes) > 1 else None,
        "each": runs,
    }


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
