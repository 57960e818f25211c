"""The processes of one evaluation: those that torchrun has started, or this one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fastadv.engine.process import distributed
from fastadv.engine.process.device import choose_device
from fastadv.run.request import RunRequest
from fastadv.run.run_folder import RunFolder


@contextmanager
def evaluating_together(runs: Sequence[str], request: RunRequest | None) -> Iterator[bool]:
    """Within this context the processes share evaluations on the device of the first of ``runs``,
    or of the ``request`` for a network from elsewhere. Yields whether this one is to show what
    was found. Raises ``UserError`` for a folder without a run."""
    if request is None:
        name = RunFolder.open(runs[0]).read_config().device
    else:
        name = request.device or "auto"
    with distributed.joined(choose_device(name)):
        yield distributed.rank() == 0


def by_the_first(act: Callable[[], bool]) -> bool:
    """What ``act`` returns in the first process, for all of them; it is called there alone, and
    the others wait. If it raises, torchrun ends them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return act()
    said = int(os.environ["RANK"]) > 0 or act()
    with distributed.joined(torch.device("cpu")):
        first, *_ = distributed.every_part(bytes([said]))
        return bool(first[0])
