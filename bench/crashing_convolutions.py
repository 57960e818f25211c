"""Search a torch for convolutions that crash on a CPU: ``python bench/crashing_convolutions.py``.

Every convolution shape of every network at narrow widths runs its three gradients at many batch
sizes, each shape in its own process. glibc's heap checker is used if it is installed: it also kills
processes that write outside of their memory without crashing. One row lists the shapes that failed,
and those of them that training still calls.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastadv
from fastadv.benchmark.rows import append_rows, provenance, results_file
from fastadv.engine.model.strided_pointwise import pointwise, strides_taken_first
from fastadv.models import MODELS

RESULTS = Path(__file__).parent / "results"
CHECKER = "libc_malloc_debug.so.0"  # part of glibc since 2.34
CHECKED = "MALLOC_CHECK_"
SIZES = {1: (8,), 3: (32,)}  # channels of images: their heights


class Shape(NamedTuple):
    """A convolution without its batch size; ``height`` is that of its square input."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    groups: int
    height: int


class _Seen(TorchDispatchMode):
    """Records the shape of every convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[Shape] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, padding = args[:5]
            inputs = weight.shape[1] * args[8]
            found = (inputs, weight.shape[0], weight.shape[2], stride[0], padding[0], args[8])
            self.shapes.add(Shape(*found, x.shape[2]))
        return func(*args, **(kwargs or {}))


def shapes_of(networks: Sequence[str], widths: Sequence[int]) -> list[Shape]:
    """The convolutions of ``networks`` at ``widths``, each once."""
    with torch.device("meta"), _Seen() as seen, torch.no_grad():
        for name in networks:
            for width in widths:
                for channels, heights in SIZES.items():
                    model = fastadv.build_model(name, width=width, in_channels=channels)
                    for height in heights:
                        model(torch.rand(2, channels, height, height))
    return sorted(seen.shapes)


def breaks(shape: Shape, batches: Sequence[int], threads: int, *, mended: bool) -> bool:
    """True if a process that computes the gradients of ``shape`` at every batch size fails.

    ``mended``: with fastadv's replacement of strided 1x1 convolutions.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(threads)
        for batch in batches:
            _gradients(shape, batch, mended=mended)
    except BaseException:
        os._exit(1)
    os._exit(0)


def _gradients(shape: Shape, batch: int, *, mended: bool) -> None:
    made = nn.Conv2d(
        shape.inputs, shape.outputs, shape.kernel, shape.stride, shape.padding, groups=shape.groups
    ).to(memory_format=torch.channels_last)
    x = torch.rand(batch, shape.inputs, shape.height, shape.height)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    for _ in range(4):
        with strides_taken_first(pointwise(made.modules(), x.device) if mended else ()):
            made(x).sum().backward()
        _ = [torch.rand(500) for _ in range(5)]  # a damaged heap shows when it is used


def _under_the_checker() -> None:
    """Restart this script with glibc's heap checker, unless it already runs with it."""
    if CHECKED in os.environ:
        return
    os.environ |= {CHECKED: "3", "LD_PRELOAD": CHECKER}
    os.execv(sys.executable, [sys.executable, *sys.argv])


def _numbers(text: str) -> list[int]:
    """ "4-24:4" as 4, 8, ..., 24."""
    ends, _, step = text.partition(":")
    first, _, last = ends.partition("-")
    return list(range(int(first), int(last or first) + 1, int(step or 1)))


def main() -> None:
    """Parse the command line, try every shape, write a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(MODELS))
    parser.add_argument("--widths", type=_numbers, default="4-24:4", help="first-last:step")
    parser.add_argument("--batches", type=_numbers, default="1-33", help="first-last:step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    _under_the_checker()
    shapes = shapes_of(given.networks.split(","), given.widths)
    tried: dict[str, Any] = {"batches": given.batches, "threads": given.threads}
    shown = track(shapes, "shapes", console=Console(stderr=True))
    broken = [s for s in shown if breaks(s, **tried, mended=False)]
    met = [s for s in broken if breaks(s, **tried, mended=True)]
    row = {
        "kind": "crashing convolutions",
        "shapes": len(shapes),
        "widths": given.widths,
        "batches": given.batches,
        "broken": [s._asdict() for s in broken],
        "met_in_training": [s._asdict() for s in met],
    }
    device = torch.device("cpu")
    append_rows(results_file(given.out, device), [row | provenance(device)])
    for shape in broken:
        print(shape, "met in training" if shape in met else "never called in training")
    print(f"{len(shapes)} shapes, {len(broken)} break, {len(met)} of those are met in training")


if __name__ == "__main__":
    main()
