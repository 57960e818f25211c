"""Every method for a few epochs on digits: ``python bench/digits.py [--methods te,sat]``.

Each is trained as ``fastadv train --method NAME --epochs 3`` does and evaluated on the whole test
set; one row per method. Teachers are trained first, with the default epochs, in run folders;
RST labels half of the training images with a network trained on the other half.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastadv.algorithms.recipes.table import METHODS, recipe
from fastadv.algorithms.resolution import resolve
from fastadv.benchmark.rows import append_rows, provenance, results_file
from fastadv.data import load
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError
from fastadv.run.pseudo_labels import write_pseudo_labels
from fastadv.run.request import RunRequest
from fastadv.run.run_folder import RunFolder
from fastadv.run.train import train

RESULTS = Path(__file__).parent / "results"
ATTACK = "pgd-20"
# Options of parts that would otherwise begin after three epochs: an earlier start.
EARLIER = {"sat_start": 0.5}


def main() -> None:
    """Parse the command line, train every method, write a row after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs/digits"), help="a new folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    names = given.methods.split(",")
    for name in names:
        recipe(name)
    usual = RunRequest(
        data="digits", amp=given.amp, seed=given.seed, device=given.device, eval_every=10**6,
        test_attacks=f"clean,{ATTACK}",
    )  # fmt: skip
    device = choose_device(given.device)
    origin = provenance(device)
    for name in names:
        row = digits_row(name, usual, given.epochs, given.runs)
        append_rows(results_file(given.out, device), [row | origin])


def digits_row(name: str, usual: RunRequest, epochs: int, runs: Path) -> dict[str, Any]:
    """Train ``name`` and report its accuracy."""
    settings, options = needed(name, usual, runs)
    folder = RunFolder(runs / name)
    chosen = vars(usual) | settings | {"method": name, "epochs": epochs, "out": str(folder.path)}
    result = train(RunRequest(**chosen | {"options": options}))
    config = folder.read_config()
    return {
        "kind": "digits",
        "method": name,
        "epochs": epochs,
        "last": result["last"],
        "loss": folder.read_metrics()[-1]["loss"],
        "train_seconds": result["train_seconds"],
        "eval_seconds": result["eval_seconds"],
        "config": {
            "model": config.model, "width": config.width, "batch_size": config.batch_size,
            "eps": config.eps, "limit": config.limit, "amp": config.amp, "mode": config.mode,
            "seed": config.seed,
        },
        "given": {key: value for key, value in options.items() if key in EARLIER},
    }  # fmt: skip


def needed(name: str, usual: RunRequest, runs: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and options that ``name`` requires."""
    plan = resolve(name)
    options: dict[str, Any] = {key: EARLIER[key] for key in EARLIER if key in plan.options}
    if "teachers" in plan.options:
        teachers = [_trained(method, usual, runs) for method in ("standard", "pgd")]
        options["teachers"] = ",".join(teachers)
    if "helper" in plan.options:
        options["helper"] = _trained("standard", usual, runs)
    settings = _halves(usual, runs) if "unlabelled_half" in plan.needs else {}
    return settings, options


def _trained(method: str, usual: RunRequest, runs: Path, limit: int | None = None) -> str:
    """The run folder of a network trained with the default epochs for digits."""
    folder = runs / f"teacher-{method}-{limit or 'all'}"
    if not folder.exists():
        chosen = vars(usual) | {"method": method, "limit": limit, "out": str(folder)}
        train(RunRequest(**chosen))
    return str(folder)


def _halves(usual: RunRequest, runs: Path) -> dict[str, Any]:
    """Settings that train on half of the images with their labels, and the others with
    pseudo-labels."""
    every = load("digits").train_images
    limit = len(every) // 2
    labelled = {bytes(image.numpy()) for image in load("digits", limit=limit).train_images}
    others = torch.stack([image for image in every if bytes(image.numpy()) not in labelled])
    teacher = _trained("standard", usual, runs, limit)
    images, out = runs / "unlabelled.npz", runs / "pseudo-labelled.npz"
    np.savez(images, images=others.permute(0, 2, 3, 1).numpy())
    write_pseudo_labels(teacher, str(images), str(out))
    return {"limit": limit, "unlabelled": str(out)}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
