"""How long an evaluation takes beside other programs, and how many passes it needs:
``python bench/evaluation.py runs/digits16 --images 360 --threads 2``.

Each run folder is a network, taken in PyTorch's own layout; its best weights are attacked on its
test images, at its own radius or ``--eps``. AutoAttack ``standard``: ours in float32 and with
searches in bf16 beside the package pyautoattack, unchanged. PGD (``--pgd 100``): ours beside
torchattacks' (installed without its own requirements: ``pip install --no-deps torchattacks``). With
``--modes eager,compiled`` ours run in both modes; a turn then includes compiling, the first from
nothing, later ones from the compiler's cache on disk. All are timed in turn in one process; the
machine must do nothing else. One row for each program and network.

With ``--passes`` the passes are counted and no time is taken: those of images that both leave
robust, and apart from them those of images that are right without an attack and fooled by one of
the two. A forward equivalent is as many multiplications as one forward pass has; a backward pass to
the images is one.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from counted_passes import Counted, Multiplications
from pyautoattack import AutoAttack
from torch import Tensor, nn

from fastadv.benchmark.arithmetic import Spread, paired_ratio
from fastadv.benchmark.interleave import Candidate, interleave
from fastadv.benchmark.rows import Row, append_rows, provenance
from fastadv.declared import parse_number
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError
from fastadv.evaluation.accuracy import verdicts_of
from fastadv.evaluation.tally import Tally
from fastadv.run.config import RunConfig
from fastadv.run.loaded import load_run

RESULTS = Path(__file__).parent / "results" / "evaluation.jsonl"
CANONICAL, TORCHATTACKS = "pyautoattack", "torchattacks"
SEARCH_DTYPES = ("float32", "bf16")
PLAIN = ("auto", "eager")  # modes that a program's name leaves out


@dataclass
class Problem:
    """What is attacked: a network in eval mode, images with labels, the radius, the batch size."""

    model: nn.Module
    x: Tensor
    y: Tensor
    norm: str
    eps: float
    batch: int

    def of(self, rows: Tensor) -> "Problem":
        """The problem of the images at ``rows`` (n,)."""
        return Problem(self.model, self.x[rows], self.y[rows], self.norm, self.eps, self.batch)


@dataclass
class Found:
    """``right`` (N,) bool: classified correctly under the attack; the seconds of its stages."""

    right: Tensor
    stages: dict[str, float] = field(default_factory=dict)


Program = Callable[[Problem], Found]


def ours(attack: str, search_dtype: str, mode: str, problem: Problem) -> Found:
    """``fastadv.evaluate``, with the seconds that the steps of each search took."""
    tallies: list[Tally] = []

    def keep(tally: Tally) -> None:
        if not tallies:
            tallies.append(tally)

    batches = zip(problem.x.split(problem.batch), problem.y.split(problem.batch), strict=True)
    found = verdicts_of(
        problem.model, batches, [attack], eps=problem.eps, norm=problem.norm, alpha=None, seed=0,
        search_dtype=search_dtype, mode=mode, between=keep,
    )  # fmt: skip
    pipeline = tallies[0].pipelines[attack]
    names = found.stages[attack][1:]
    stages = {
        name: round(engine.seconds, 3) for name, engine in zip(names, pipeline.engines, strict=True)
    }
    return Found(torch.from_numpy(found.ledgers[attack].right), stages)


def canonical(problem: Problem) -> Found:
    """pyautoattack's standard version, with the seconds between what it logs of its attacks."""
    norm = {"linf": "Linf", "l2": "L2"}[problem.norm]
    adversary = AutoAttack(problem.model, eps=problem.eps, norm=norm, seed=0)
    with torch.no_grad():
        classes = problem.model(problem.x[:1]).shape[1]
    adversary.apgd_targeted.n_target_classes = min(9, classes - 1)
    adversary.fab.n_target_classes = min(9, classes - 1)
    with logged() as times:
        _, y_adv = adversary.run_standard_evaluation(problem.x, problem.y, batch_size=problem.batch)
    return Found(y_adv == problem.y, times)


@contextmanager
def logged() -> Iterator[dict[str, float]]:
    """The seconds of each attack, filled in at the end."""
    begun: list[tuple[str, float]] = []
    found: dict[str, float] = {}

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said = record.getMessage()
            if said.startswith("running "):
                begun.append((said.removeprefix("running "), time.perf_counter()))

    logger, handler = logging.getLogger("auto-attack"), Heard(logging.DEBUG)
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates
        ends = [at for _, at in begun[1:]] + [time.perf_counter()]
        found |= {name: round(end - at, 3) for (name, at), end in zip(begun, ends, strict=True)}


def torchattacks_pgd(steps: int, problem: Problem) -> Found:
    """torchattacks' PGD with our usual step, and the accuracy on what it returns."""
    import torchattacks

    if problem.norm == "linf":
        attack = torchattacks.PGD(
            problem.model, eps=problem.eps, alpha=problem.eps / 4, steps=steps, random_start=True
        )
    else:
        attack = torchattacks.PGDL2(
            problem.model, eps=problem.eps, alpha=problem.eps * 15 / 128, steps=steps
        )
    torch.manual_seed(0)
    right = []
    for x, y in zip(problem.x.split(problem.batch), problem.y.split(problem.batch), strict=True):
        x_adv = attack(x, y)
        with torch.no_grad():
            right.append(problem.model(x_adv).argmax(1) == y)
    return Found(torch.cat(right))


def passes(program: Program, problem: Problem) -> dict[str, float]:
    """Forward and backward passes per image of ``problem``."""
    counted, n = Counted(problem.model), len(problem.x)
    with Multiplications() as one, torch.no_grad():
        problem.model(problem.x[:1])
    with Multiplications() as all_passes:
        program(Problem(counted, problem.x, problem.y, problem.norm, problem.eps, problem.batch))
    equivalents = all_passes.count / one.count
    return {
        "forwards": round(counted.forwards / n, 1),
        "backwards": round(counted.backwards / n, 1),
        "forward_equivalents": round(equivalents / n, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, or ``arguments``; time the programs, and write their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--eps", help="in place of the run's")
    parser.add_argument("--attack", default="autoattack", help="autoattack, or none")
    parser.add_argument("--pgd", type=int, metavar="STEPS", help="also PGD of so many steps")
    parser.add_argument("--search-dtypes", default=",".join(SEARCH_DTYPES))
    parser.add_argument(
        "--modes", default="auto", help="of fastadv.evaluate, such as eager,compiled"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--passes", action="store_true", help="count passes in place of time")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    device = choose_device(given.device)
    for run in given.runs:
        config, data, model = load_run(run, "best", device=None).evaluated
        x, y = (
            torch.cat(part).to(device)
            for part in zip(*data.test.limited(given.images), strict=True)
        )
        eps = config.eps if given.eps is None else parse_number(given.eps, "eps")
        # In PyTorch's own layout, as other programs get it.
        model = model.to(device, memory_format=torch.contiguous_format).eval().requires_grad_(False)
        problem = Problem(model, x, y, config.norm, eps, given.batch)
        for attack, programs in compared(given).items():
            if given.passes:
                rows = counted(attack, programs, problem)
            else:
                rows = timed(attack, programs, problem, given.repeats, device)
            shared = {"network": described(config), "n": len(x), "eps": eps, "batch": given.batch}
            append_rows(given.out, [row | shared | provenance(device) for row in rows])


def compared(given: argparse.Namespace) -> dict[str, dict[str, Program]]:
    """By attack, the programs to compare; the last one is what the others are compared with."""
    found: dict[str, dict[str, Program]] = {}
    if given.attack == "autoattack":
        found["autoattack"] = own_programs("autoattack", given)
        found["autoattack"][CANONICAL] = canonical
    elif given.attack != "none":
        raise UserError(f"--attack is autoattack or none, not {given.attack!r}.")
    if given.pgd:
        name = f"pgd-{given.pgd}"
        found[name] = own_programs(name, given)
        found[name][TORCHATTACKS] = partial(torchattacks_pgd, given.pgd)
    return found


def own_programs(attack: str, given: argparse.Namespace) -> dict[str, Program]:
    """By name, ours in each search dtype and mode."""
    modes = given.modes.split(",")
    if len(set(modes) & set(PLAIN)) > 1:
        raise UserError(f"--modes {given.modes}: auto and eager would have one name; give one.")
    found: dict[str, Program] = {}
    for dtype in given.search_dtypes.split(","):
        for mode in modes:
            name = f"fastadv {dtype}" if mode in PLAIN else f"fastadv {dtype} {mode}"
            found[name] = partial(ours, attack, dtype, mode)
    return found


def timed(
    attack: str,
    programs: dict[str, Program],
    problem: Problem,
    repeats: int,
    device: torch.device,
) -> list[Row]:
    """A row for each of ``programs``, which take turns."""
    found: dict[str, list[Found]] = {name: [] for name in programs}

    def turn(name: str) -> float:
        began = time.perf_counter()
        found[name].append(programs[name](problem))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    candidates = [Candidate(name, partial(turn, name)) for name in programs]
    seconds = interleave(candidates, repeats)
    other = list(programs)[-1]
    rows = []
    for name in programs:
        spread = Spread.of(seconds[name])
        row: Row = {
            "kind": "evaluation",
            "attack": attack,
            "name": name,
            "seconds": spread.as_row(),
            "accuracy": round(float(found[name][0].right.float().mean()), 4),
        }
        stages = found[name][0].stages
        if stages:
            row["stages"] = {
                stage: Spread.of([each.stages.get(stage, 0.0) for each in found[name]]).median
                for stage in stages
            }
        if name == other:
            row["version"] = version(other)
        else:
            row["faster"] = paired_ratio(seconds[other], seconds[name]).as_row()
        rows.append(row)
        print(f"{attack} {name}: {row}", flush=True)
    return rows


def counted(attack: str, programs: dict[str, Program], problem: Problem) -> list[Row]:
    """A row for each of ``programs``, with its passes."""
    found = {name: program(problem) for name, program in programs.items()}
    *_, other = programs
    rows = []
    for name, program in programs.items():
        row: Row = {"kind": "passes of an evaluation", "attack": attack, "name": name}
        row["passes"] = passes_by_fate(program, problem, found[other], found[name])
        rows.append(row)
        print(f"{attack} {name}: {row}", flush=True)
    return rows


def passes_by_fate(program: Program, problem: Problem, one: Found, other: Found) -> dict[str, Any]:
    """The passes per image of those that both leave robust, and of those that are right without an
    attack and that one of them fooled."""
    with torch.no_grad():
        clean = problem.model(problem.x).argmax(1) == problem.y
    robust = one.right.to(clean.device) & other.right.to(clean.device)
    told: dict[str, Any] = {}
    for fate, rows in (("robust", robust), ("fooled", clean & ~robust)):
        count = int(rows.sum())
        told[fate] = {"n": count}
        if count:
            told[fate] |= passes(program, problem.of(rows.nonzero().squeeze(1)))
    return told


def described(config: RunConfig) -> dict[str, Any]:
    """What the network is, for a row."""
    return {
        "method": config.method, "data": config.data.split(":")[0], "model": config.model,
        "width": config.width, "epochs": config.epochs, "norm": config.norm,
    }  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
