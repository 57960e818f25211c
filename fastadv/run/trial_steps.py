"""Steps that are tried and undone: which batches fit into memory."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from fastadv.algorithms.plugins import load_file, loaded_files
from fastadv.engine.process import memory
from fastadv.run.config import RunConfig
from fastadv.run.session import Session
from fastadv.storage.trust import trusting
from fastadv.training.memory import fits

_PATIENCE = 300.0  # seconds for a process that only tries steps
_CHILD = "from fastadv.run.trial_steps import in_a_child; in_a_child()"


def fits_in(session: Session, count: int, *, undone: bool = True) -> bool:
    """True if a step of ``session`` on ``count`` images fits into memory; unless it is not to be
    ``undone``, it has changed nothing afterwards."""
    step = session.step
    index = torch.arange(count, device=session.device)
    rows = index if step.plan.keeps_sample_state else None
    x, y = _batch(session, count)
    second = x if "second_view" in step.plan.needs else None
    around: AbstractContextManager[object]
    around = step.internals.transaction.around(rows) if undone else nullcontext()
    return fits(lambda: step(x, y, index, second=second), around)


def next_smaller(session: Session, count: int) -> int | None:
    """The largest batch below ``count`` images, by halves, with which a step of ``session`` fits
    into memory; None if none does, or if it could not be found out.

    Where addresses are limited (``ulimit -v``) another process tries it, since in this one the
    allocator keeps those of the step that did not fit; and the batch is half of what fits, since
    it never gives all of them back, and a run that takes one step may not take the sixth.
    """
    if session.device.type == "cpu" and memory.addresses_are_limited():
        return _in_another_process(session.config, count)
    count //= 2
    while count >= 2:
        if fits_in(session, count):
            return count
        count //= 2
    return None


def _in_another_process(config: RunConfig, count: int) -> int | None:
    # Weights of a file and of the seed take equally much, and the file may be gone.
    config = replace(config, init=None, mode="eager", download=False)
    asked = pickle.dumps((sys.path, [str(file) for file in loaded_files()]))
    asked += pickle.dumps((config, count, torch.get_num_threads()))
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=asked,
            capture_output=True,
            timeout=_PATIENCE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        fitting = [int(line) for line in done.stdout.split()]
        return fitting[-min(2, len(fitting))]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def in_a_child() -> None:
    """Print the batches that fit, of those for which standard input asks, the smaller ones first:
    what they leave to the allocator is of use to the larger ones."""
    sys.path[:], plugins = pickle.load(sys.stdin.buffer)
    for file in plugins:
        load_file(file)
    config, count, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    with trusting(True):  # what the asking process has called before
        session = Session.build(config)
    halves = [count >> shift for shift in range(1, count.bit_length() - 1)]
    for each in reversed(halves):
        if not fits_in(session, each):
            break
        print(each, flush=True)


def _batch(session: Session, count: int) -> tuple[Tensor, Tensor]:
    """Images and labels of the kind of the run's, drawn without a generator that it uses."""
    data, device = session.data, session.device
    drawn = torch.Generator().manual_seed(0)
    x = torch.rand(count, data.channels, *data.image_size, generator=drawn).to(device)
    y = torch.arange(count, device=device) % data.num_classes
    return x.contiguous(memory_format=torch.channels_last), y
