"""How near the attack ``quick`` comes to AutoAttack, and at what cost:
``python bench/quick_attack.py runs/a runs/b --images 200``.

Each run folder is a network: its last weights are attacked on its test images, at its own radius.
AutoAttack ``standard`` is the package pyautoattack, unchanged; it takes minutes per network, so
its verdicts are kept in ``--reference`` and read from there the next time. One row per network.

Passes are counted in images: an image through the network, and a gradient back through it. Both
counts are averages over all images, those that are wrong without an attack among them, and include
the pass that says so. PGD-20 takes 21 forward and 20 backward passes for every image.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counted_passes import Counted
from torch import Tensor, nn

from fastadv.benchmark.rows import append_rows, provenance, results_file
from fastadv.errors import UserError
from fastadv.evaluation.attacks import inputs
from fastadv.evaluation.attacks.names import parse_attack
from fastadv.evaluation.attacks.searched import stages_of
from fastadv.evaluation.search import cascade
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.rows import joined
from fastadv.evaluation.search.search import Images
from fastadv.run.config import RunConfig
from fastadv.run.loaded import load_run
from fastadv.storage.digests import digest
from fastadv.threat import Threat

RESULTS = Path(__file__).parent / "results"
BATCH = 200


def main() -> None:
    """Parse the command line, attack every network, write a row after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--attacks", default="quick", help="separated by commas")
    parser.add_argument("--reference", type=Path, default=Path("runs/autoattack"))
    parser.add_argument("--only-reference", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the attacks; AutoAttack's is 0")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    cpu = torch.device("cpu")
    for run in given.runs:
        config, data, model = load_run(run, "last", device=None).evaluated
        model.eval()
        x, y = (torch.cat(part) for part in zip(*data.test.limited(given.images), strict=True))
        reference = autoattack(model, x, y, config, given.reference, 0)
        if given.only_reference:
            continue
        for attack in given.attacks.split(","):
            row = compared(attack, model, x, y, config, reference, given.seed)
            append_rows(results_file(given.out, cpu), [row | provenance(cpu)])
            print(Path(run).name, row)


def autoattack(
    model: nn.Module, x: Tensor, y: Tensor, config: RunConfig, kept: Path, seed: int
) -> dict[str, Any]:
    """``right`` (N,) bool, and the passes of AutoAttack, read from ``kept`` if they are there."""
    facts = [dict(model.state_dict()), x, y, float(config.eps), config.norm, seed]
    file = kept / f"{digest(facts)}.npz"
    if not file.exists():
        from pyautoattack import AutoAttack  # an optional package

        counted = Counted(model.eval().requires_grad_(False))
        norm = {"linf": "Linf", "l2": "L2"}[config.norm]
        adversary = AutoAttack(counted, eps=config.eps, norm=norm, seed=seed)
        x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=BATCH)
        passes = np.array([counted.forwards, counted.backwards])
        with torch.no_grad():
            right = model(x_adv).argmax(1) == y
        kept.mkdir(parents=True, exist_ok=True)
        np.savez(file, right=right.numpy(), passes=passes)
    with np.load(file, allow_pickle=False) as stored:
        return {"right": torch.from_numpy(stored["right"]), "passes": stored["passes"].tolist()}


def compared(
    attack: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    config: RunConfig,
    reference: Any,
    seed: int,
) -> dict[str, Any]:
    """Accuracy under ``attack`` beside AutoAttack's, and the passes per image of both."""
    right, forwards, backwards = attacked(attack, model, x, y, config, seed)
    strong, n = reference["right"], len(x)
    return {
        "kind": "quick attack",
        "attack": attack,
        "network": {
            "method": config.method, "data": config.data.split(":")[0], "model": config.model,
            "width": config.width, "epochs": config.epochs, "limit": config.limit,
            "eps": config.eps, "norm": config.norm, "alpha": config.plan.options.get("alpha"),
        },
        "n": n,
        "clean": round(float((_logits(model, x).argmax(1) == y).float().mean()), 4),
        "autoattack": round(int(strong.sum()) / n, 4),
        "accuracy": round(int(right.sum()) / n, 4),
        "difference": round((int(right.sum()) - int(strong.sum())) / n, 4),
        "missed": int((right & ~strong).sum()),
        "found": int((~right & strong).sum()),
        "passes": [round(forwards / n, 2), round(backwards / n, 2)],
        "autoattack_passes": [round(count / n, 1) for count in reference["passes"]],
        "pyautoattack": version("pyautoattack"),
    }  # fmt: skip


def attacked(
    attack: str, model: nn.Module, x: Tensor, y: Tensor, config: RunConfig, seed: int
) -> tuple[Tensor, int, int]:
    """(N,) bool: right under the attack; forward and backward passes, the clean one among them."""
    threat, index = Threat(config.norm, config.eps), torch.arange(len(x))
    net = inputs.attacked_network(model, torch.device("cpu"), False, None)
    with Passes(net) as passes:
        passes.prepare(x)
        logits = torch.cat([passes.logits(part, exact=True) for part in x.split(BATCH)])
        stages = stages_of(parse_attack(attack), threat, seed, logits.shape[1], again=False)
        rows = cascade.entering(Images(x, y, index, logits), index, targeted=False)
        found = joined(cascade.run(stages, iter([rows]), passes, BATCH))
    right = torch.empty(len(x), dtype=torch.bool)
    right[found["place"]] = ~found["fooled"]
    return right, passes.forwards, passes.backwards


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return logits


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
