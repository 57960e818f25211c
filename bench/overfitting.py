"""What the guard against catastrophic overfitting sees, in runs that overfit and in runs that do
not: ``python bench/overfitting.py``, three minutes on one core.

FGSM at a large radius overfits with some seeds; with a random start, or at the usual radius, it
does not. Which runs did is decided without the guard's images, by PGD-10 on the validation images
after every epoch: at most half of the best so far was left, of 20 points at least. One row per
setting holds, for each check of each seed, the accuracies that the guard compares (``guard.py``).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastadv.benchmark.rows import append_rows, provenance
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError
from fastadv.run.guard import FALL, KEPT, SHARE, Guard
from fastadv.run.request import RunRequest
from fastadv.run.run_folder import RunFolder
from fastadv.run.train import train

RESULTS = Path(__file__).parent / "results" / "guard.jsonl"
JUDGE = "pgd-10"
SETTINGS = [("fgsm", 0.3), ("n-fgsm", 0.3), ("fast", 0.3), ("fgsm", None)]


def main() -> None:
    """Parse the command line, train every setting with every seed, write a row after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--runs", type=Path, default=Path("runs/overfitting"), help="a new folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    origin = provenance(choose_device("cpu"))
    seeds = [int(seed) for seed in given.seeds.split(",")]
    for method, eps in SETTINGS:
        usual = RunRequest(
            method=method, eps=eps, data="digits", epochs=given.epochs, width=given.width,
            mode="eager", device="cpu", select_attack=JUDGE, test_attacks="clean", test_limit=10,
            guard_overfitting="tell",
        )  # fmt: skip
        runs = [_run(usual, seed, given.runs / f"{method}-{eps}-{seed}") for seed in seeds]
        row = {
            "kind": "guard",
            "method": method,
            "eps": runs[0].pop("eps"),
            "epochs": given.epochs,
            "rule": {"fall": FALL, "share": SHARE, "kept": KEPT},
            "each": [{name: value for name, value in run.items() if name != "eps"} for run in runs],
        }
        append_rows(given.out, [row | origin])
        print(json.dumps(row))


def _run(usual: RunRequest, seed: int, folder: Path) -> dict[str, Any]:
    """One run. ``checks``: accuracy of the guard's images under PGD-10, and of the attacked
    training batches before; ``largest_fall``: of the first from its best so far, with the ``share``
    that was left and what the second had ``lost`` since."""
    checks: list[tuple[float, float]] = []
    falls: list[tuple[float, float, float]] = []
    look, trained = Guard.look, Guard._trained
    last: list[float] = []

    def noting_trained(guard: Guard) -> float | None:
        found = trained(guard)
        last.append(-1.0 if found is None else found)
        return found

    def noting(guard: Guard) -> bool:
        best, then = guard.seen.best, guard.seen.trained
        found = look(guard)
        checks.append((guard.seen.now, last[-1]))
        if best:
            fall = best - guard.seen.now
            falls.append((fall, guard.seen.now / best, then - last[-1]))
        return found

    Guard.look, Guard._trained = noting, noting_trained  # type: ignore[method-assign]
    try:
        train(RunRequest(**vars(usual) | {"seed": seed, "out": str(folder)}))
    finally:
        Guard.look, Guard._trained = look, trained  # type: ignore[method-assign]
    lines = RunFolder(folder).read_metrics()
    judged = [line[f"val_{JUDGE}_percent"] for line in lines]
    fall, share, lost = max(falls)
    told = [line["epoch"] for line in lines if line.get("overfitting")]
    return {
        "seed": seed,
        "eps": RunFolder(folder).read_config().eps,
        "overfitted": _fell_by_half(judged),
        "noticed_in_epoch": told[0] if told else None,
        "largest_fall": round(fall, 4),
        "share": round(share, 4),
        "lost": round(lost, 4),
        JUDGE: judged,
        "checks": [[round(value, 4) for value in check] for check in checks],
    }


def _fell_by_half(values: list[float]) -> bool:
    """True if a value is at most half of one before it, which was 20 points at least."""
    best = 0.0
    for value in values:
        if best >= 20 and value <= best / 2:
            return True
        best = max(best, value)
    return False


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
