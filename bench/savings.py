"""What each saving of work is worth: ``python bench/savings.py --threads 2``.

The same update with a saving and without it, interleaved. That both are the same update is proved
in tests/test_regularizers.py, test_folding.py and test_attack_weights.py. The machine must do
nothing else; takes some minutes on two cores.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path

import torch

from fastadv.benchmark.arithmetic import Spread, paired_ratio
from fastadv.benchmark.clock import seconds
from fastadv.benchmark.interleave import Candidate, interleave
from fastadv.benchmark.ours import BATCHES, make_step
from fastadv.benchmark.rows import Row, append_rows, provenance, results_file
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import parse_specs
from fastadv.errors import UserError
from fastadv.session import choose_device
from fastadv.training_step import Step

RESULTS = Path(__file__).parent / "results"


def unshared(step: Step) -> None:
    """Attack and outer pass forward the centre of the ball each for itself."""
    step.walk._joint_center = lambda batch: None  # type: ignore[method-assign]


def unfolded(step: Step) -> None:
    """BatchNorms of an eval-mode attack stay."""
    step.net.attack_weights.folds = []


def uncopied(step: Step) -> None:
    """Autocast casts every weight in every pass."""
    step.net.attack_weights.in_place = lambda *_, **__: nullcontext()  # type: ignore[method-assign, assignment]


# name -> (method, network, what takes the saving away after the first step)
SAVINGS: dict[str, tuple[str, str, Callable[[Step], None]]] = {
    "the centre forwarded once": ("fgsm-n-advlc", "preact_resnet18", unshared),
    "weights cast once an attack": ("pgd", "preact_resnet18", uncopied),
    "BatchNorm folded, PreActResNet-18": ("pgd:attack_bn=eval", "preact_resnet18", unfolded),
    "BatchNorm folded, ResNet-18": ("pgd:attack_bn=eval", "resnet18", unfolded),
}


def main() -> None:
    """Parse the command line, time every pair, write and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    device = choose_device(given.device)
    origin = provenance(device)
    base = Setting("", given.width, given.batch_size, device=str(device))
    for name, (method, network, take_away) in SAVINGS.items():
        row = saving(replace(base, model=network), method, take_away, given.dtype, given.repeats)
        append_rows(results_file(given.out, device), [{"saving": name} | row | origin])
        ratio = row["plain_over_saving"]
        print(f"{name}: {ratio['median']:.3f} ({ratio['p10']:.3f}-{ratio['p90']:.3f})")


def saving(
    setting: Setting, method: str, take_away: Callable[[Step], None], dtype: str, repeats: int
) -> Row:
    """Both sides turn by turn; the ratio is taken within the turns."""
    (spec,) = parse_specs(method)
    device = torch.device(setting.device)

    def candidate(name: str, *, plain: bool) -> Candidate:
        step = make_step(setting, spec, dtype, "eager")
        batches = cycle(setting.batches(BATCHES, channels_last=True))

        def call() -> None:
            batch = next(batches)
            step(batch.x, batch.y, batch.index)

        call()
        if plain:
            take_away(step)
        call()
        return Candidate(name, partial(seconds, call, device))

    pair = [candidate("plain", plain=True), candidate("saving", plain=False)]
    times = interleave(pair, repeats)
    return {
        "kind": "saving",
        "method": method,
        "dtype": dtype,
        "ms": {name: Spread.of(found).times(1000).as_row() for name, found in times.items()},
        "plain_over_saving": paired_ratio(times["plain"], times["saving"]).as_row(),
        "config": {
            "model": setting.model, "width": setting.width, "batch_size": setting.batch_size,
        },
    }  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
