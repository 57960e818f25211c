"""The speed-up by each saving of work: ``python bench/savings.py --threads 2``.

The same update is timed with a saving and without it, interleaved. That both are the same update is
tested in tests/test_regularizers.py, test_folding.py, test_weight_copies.py and
test_double_backward.py. The handling of freed memory is chosen once per process, so its two sides
are processes, started again for each pair of turns. The script takes some minutes on two cores; the
machine must do nothing else.
"""

import argparse
import multiprocessing
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
from fastadv.engine.model import network as engine_network
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError
from fastadv.training.training_step import Step

RESULTS = Path(__file__).parent / "results"


def unshared(step: Step) -> None:
    """Attack and outer pass each forward the centre of the ball."""
    step.internals.update._joint_center = lambda batch: None  # type: ignore[method-assign]


def unfolded(step: Step) -> None:
    """An attack in eval mode runs its BatchNorms unfolded."""
    step.internals.net.copies.folds = []


def uncopied(step: Step) -> None:
    """Autocast casts every weight in every pass."""
    step.internals.net.copies.installed = lambda *_, **__: nullcontext()  # type: ignore[method-assign, assignment]


def counted_alone(step: Step) -> None:
    """Every BatchNorm counts its batches itself."""
    step.internals.net.counters.leave()


def composed(step: Step) -> None:
    """BatchNorm's second derivative is composed by PyTorch."""
    step.internals.net.differentiates_twice = False


# name -> (method, network, the function that switches the saving off after the first step)
SAVINGS: dict[str, tuple[str, str, Callable[[Step], None]]] = {
    "the centre forwarded once": ("fgsm-n-advlc", "preact_resnet18", unshared),
    "weights cast once for all passes": ("pgd", "preact_resnet18", uncopied),
    "BatchNorm folded, PreActResNet-18": ("pgd:attack_bn=eval", "preact_resnet18", unfolded),
    "BatchNorm folded, ResNet-18": ("pgd:attack_bn=eval", "resnet18", unfolded),
    "BatchNorms counted in one launch": ("pgd", "preact_resnet18", counted_alone),
    "BatchNorm's second derivative, IGR": ("standard-igr", "preact_resnet18", composed),
    "BatchNorm's second derivative, GradAlign": ("fgsm-n-gradalign", "preact_resnet18", composed),
    "BatchNorm's second derivative, CURE": ("fgsm-n-cure", "preact_resnet18", composed),
}

FREED_MEMORY = "freed memory kept"
FREED_MEMORY_METHODS = ("standard", "fast", "apart", "pgd")
STEPS = 5  # timed steps of a process, after two warm-up steps


def main() -> None:
    """Parse the command line, time every pair, write and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [*SAVINGS, FREED_MEMORY]
    parser.add_argument("--names", nargs="+", choices=every, default=every, metavar="SAVING")
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

    def report(name: str, row: Row) -> None:
        append_rows(results_file(given.out, device), [{"saving": name} | row | origin])
        ratio = row["plain_over_saving"]
        spread = f"({ratio['p10']:.3f}-{ratio['p90']:.3f})"
        print(f"{name}, {row['method']}: {ratio['median']:.3f} {spread}")

    base = Setting("", given.width, given.batch_size, device=str(device))
    for name, (method, network, take_away) in SAVINGS.items():
        if name not in given.names:
            continue
        row = saving(replace(base, model=network), method, take_away, given.dtype, given.repeats)
        report(name, row)
    if device.type == "cpu" and FREED_MEMORY in given.names:
        for method in FREED_MEMORY_METHODS:
            setting = replace(base, model="preact_resnet18")
            report(FREED_MEMORY, freed_memory(setting, method, given.dtype, given.repeats))


def freed_memory(setting: Setting, method: str, dtype: str, repeats: int) -> Row:
    """Steps of processes that keep freed memory and of processes that return it."""
    times: dict[str, list[float]] = {"plain": [], "saving": []}
    work = (setting, method, dtype, torch.get_num_threads())
    for _ in range(repeats):
        for side, found in times.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(seconds_of_a_step, (*work, side == "plain")))
    return row_of(setting, method, dtype, times)


def seconds_of_a_step(
    setting: Setting, method: str, dtype: str, threads: int, plain: bool
) -> float:
    """The median of a few steps of a new process."""
    torch.set_num_threads(threads)
    if plain:
        engine_network.keep_freed_memory = lambda: False  # type: ignore[assignment]
    candidate = one_side(setting, method, dtype, None)
    return Spread.of([candidate.turn() for _ in range(STEPS)]).median


def saving(
    setting: Setting, method: str, take_away: Callable[[Step], None], dtype: str, repeats: int
) -> Row:
    """Time both sides, interleaved; the ratio is taken within the turns."""
    pair = [one_side(setting, method, dtype, take_away), one_side(setting, method, dtype, None)]
    return row_of(setting, method, dtype, interleave(pair, repeats))


def one_side(
    setting: Setting, method: str, dtype: str, take_away: Callable[[Step], None] | None
) -> Candidate:
    """A step after its warm-up; ``take_away`` switches a saving off."""
    (spec,) = parse_specs(method)
    step = make_step(setting, spec, dtype, "eager")
    batches = cycle(setting.batches(BATCHES, channels_last=True))

    def call() -> None:
        batch = next(batches)
        step(batch.x, batch.y, batch.index)

    call()
    if take_away is not None:
        take_away(step)
    call()
    name = "saving" if take_away is None else "plain"
    return Candidate(name, partial(seconds, call, torch.device(setting.device)))


def row_of(setting: Setting, method: str, dtype: str, times: dict[str, list[float]]) -> Row:
    """The row: milliseconds of both sides, and the ratio within the turns."""
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
