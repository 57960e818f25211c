"""Starts two processes of a group that have nothing left to import.

A server that has imported torch and the package forks them: one import for all tests of a pytest
worker, in place of two for each test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import multiprocessing

IMPORTED = ["torch.distributed", "torch._dynamo", "fastadv.training.training_step", "fastadv"]


def in_two_processes(worker: Callable[..., None], *arguments: Any) -> None:
    """Call ``worker(rank, *arguments)`` in two processes, and wait for their end. Raises what one
    raises. Their environment is that of the first call."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    multiprocessing.start_processes(worker, arguments, nprocs=2, start_method="forkserver")
