"""The CPU time of fastadv itself in an eager step: ``python bench/own_time.py --against PYTHON``.

With a network of width 2 and 8 images, most of a step is the work around the passes. fastadv's own
time is the CPU time of a step minus that of a bare PyTorch loop of the same passes. With --width 64
and --batch-size 128 the whole steps of two versions are compared at their usual size. PYTHON is the
interpreter of an environment with another version of fastadv. Each version has one process with one
thread, and the processes take turns, so that the load of the machine affects both alike.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import fastadv

RESULTS = Path(__file__).parent / "results"
METHODS = {"fgsm": 1, "pgd": 10}  # and the number of attack steps of the bare loop
EPS = 8 / 255
RESAMPLINGS = 2000


def main() -> None:
    """Parse the command line, time all methods, and print and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--against", help="Python of an environment with another version of fastadv"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, help=f"folder of the results, such as {RESULTS}")
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.width, given.batch_size)
        return
    pythons = {"new": sys.executable} | ({"old": given.against} if given.against else {})
    for method in given.methods:
        sizes = {"width": given.width, "batch_size": given.batch_size}
        found, old = measure(pythons, method, given.rounds, given.steps, sizes)
        row = row_of(method, found) | sizes | ({"against": old} if old else {})
        if given.width > 2:  # its own time drowns in the noise of the passes
            row.pop("new_over_old", None)
            row.pop("interval", None)
        print(json.dumps(row, indent=1))
        if given.out:
            write(given.out, row)


def work(method: str, width: int, batch_size: int) -> None:
    """The worker process: for each line with a number of steps, print the CPU milliseconds of one
    step and of one iteration of the bare loop, which are run alternately."""
    torch.set_num_threads(1)
    loops = [ours(method, width, batch_size), bare(METHODS[method], width, batch_size)]
    for _ in range(5 if width < 16 else 1):
        for loop in loops:
            loop()
    print(fastadv.__file__, flush=True)
    for line in sys.stdin:
        spent = [0.0, 0.0]
        for _ in range(int(line)):
            for place, loop in enumerate(loops):
                begin = time.process_time()
                loop()
                spent[place] += time.process_time() - begin
        print(*(1000 * seconds / int(line) for seconds in spent), flush=True)


def ours(method: str, width: int, batch_size: int) -> Callable[[], Any]:
    """One step of ``method`` on a fixed batch."""
    model, optimizer, x, y = ingredients(width, batch_size)
    step = fastadv.step(model, optimizer, method, mode="eager")
    return lambda: step(x, y)


def bare(steps: int, width: int, batch_size: int) -> Callable[[], None]:
    """The same passes in plain PyTorch: ``steps`` of the attack (a single one starts at x, as FGSM
    does), and one of the weights."""
    model, optimizer, x, y = ingredients(width, batch_size)
    alpha = EPS if steps == 1 else EPS / 4

    def update() -> None:
        x_adv = x
        if steps > 1:
            x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            loss = functional.cross_entropy(model(x_adv), y)
            (gradient,) = torch.autograd.grad(loss, x_adv)
            away = (x_adv.detach() + alpha * gradient.sign() - x).clamp(-EPS, EPS)
            x_adv = (x + away).clamp(0, 1)
        optimizer.zero_grad()
        functional.cross_entropy(model(x_adv), y).backward()
        optimizer.step()

    return update


def ingredients(
    width: int, batch_size: int
) -> tuple[Any, torch.optim.Optimizer, torch.Tensor, torch.Tensor]:
    """The network, its optimizer and a batch, the same ones each time."""
    torch.manual_seed(0)
    model = fastadv.build_model("preact_resnet18", width=width)
    # A rate at which nothing is learnt, so that late steps cost as much as early ones.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, weight_decay=5e-4)
    labels = torch.randint(10, (batch_size,))
    return model, optimizer, torch.rand(batch_size, 3, 32, 32), labels


def measure(
    pythons: dict[str, str], method: str, rounds: int, steps: int, sizes: dict[str, int]
) -> tuple[dict[str, dict[str, list[float]]], str | None]:
    """CPU milliseconds per round of each Python's ``ours`` and ``bare``, and the commit of the old
    version."""
    command = [str(Path(__file__).resolve()), "--worker", method]
    for name, size in sizes.items():
        command += [f"--{name.replace('_', '-')}", str(size)]
    workers = {
        side: subprocess.Popen(
            [python, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for side, python in pythons.items()
    }
    found: dict[str, dict[str, list[float]]] = {side: {"ours": [], "bare": []} for side in workers}
    try:
        places = {side: answer(worker) for side, worker in workers.items()}
        print(f"{method}: {places}", file=sys.stderr)
        for turn in range(rounds):
            order = list(workers) if turn % 2 == 0 else list(workers)[::-1]
            for side in order:
                stdin: Any = workers[side].stdin
                stdin.write(f"{steps}\n")
                stdin.flush()
                times = map(float, answer(workers[side]).split())
                for name, milliseconds in zip(("ours", "bare"), times, strict=True):
                    found[side][name].append(milliseconds)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return found, commit_at(Path(places["old"])) if "old" in places else None


def commit_at(file: Path) -> str:
    """The commit of the checkout that holds ``file``."""
    command = ["git", "-C", str(file.parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def answer(worker: subprocess.Popen[str]) -> str:
    """The next line that a worker prints; ends the program if there is none."""
    stdout: Any = worker.stdout
    line: str = stdout.readline()
    if not line:
        sys.exit("error: a worker ended; its message is printed above.")
    return line.strip()


def row_of(method: str, found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Medians in milliseconds, and the ratios new/old of fastadv's own time and of whole steps."""
    every = range(len(found["new"]["ours"]))
    row: dict[str, Any] = {"kind": "own time", "method": method, "rounds": len(every)}
    for side, times in found.items():
        row[side] = {name: round(statistics.median(each), 3) for name, each in times.items()}
        row[side]["own"] = round(own(times, every), 3)
    if "old" in found:
        own_time = {side: [own(times, [turn]) for turn in every] for side, times in found.items()}
        steps = {side: times["ours"] for side, times in found.items()}
        row["new_over_old"], row["interval"] = ratio(own_time["new"], own_time["old"])
        row["step_new_over_old"], row["step_interval"] = ratio(steps["new"], steps["old"])
    return row


def ratio(new: Sequence[float], old: Sequence[float]) -> tuple[float, list[float]]:
    """The ratio of the medians, and its 95 % interval by a bootstrap over rounds."""

    def of(rounds: Sequence[int]) -> float:
        medians = (statistics.median(times[turn] for turn in rounds) for times in (new, old))
        return next(medians) / next(medians)

    every, draw = range(len(new)), random.Random(0)
    drawn = sorted(of(draw.choices(every, k=len(every))) for _ in range(RESAMPLINGS))
    ends = drawn[int(0.025 * RESAMPLINGS)], drawn[int(0.975 * RESAMPLINGS) - 1]
    return round(of(every), 3), [round(end, 3) for end in ends]


def own(times: dict[str, list[float]], rounds: Sequence[int]) -> float:
    """The median difference between a step and the bare loop."""
    return statistics.median(times["ours"][turn] - times["bare"][turn] for turn in rounds)


def write(folder: Path, row: dict[str, Any]) -> None:
    """Append the row, with its provenance, to the results of this machine."""
    # Imported here, because the script is also run as a worker of an older version of the package.
    from fastadv.benchmark.rows import append_rows, provenance, results_file

    device = torch.device("cpu")
    # The path of the interpreter means nothing on other machines; the row has its commit.
    told = {"command": "own_time.py --against PYTHON", "threads": 1}
    append_rows(results_file(folder, device), [row | provenance(device) | told])


if __name__ == "__main__":
    main()
