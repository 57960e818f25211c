"""Sets torch's switches for a reproducible or a fast run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """If ``wanted``, the same operations give the same bits every time within this context, and an
    operation that cannot raises torch's ``RuntimeError``. Otherwise they are as fast as possible.

    Fast means that cuDNN times its algorithms for a convolution once per shape and keeps the best,
    which may be another one in another run. cuBLAS reads its variable when it is first used.
    """
    cudnn = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.benchmark,
    )
    sets_workspace = wanted and CUBLAS not in os.environ
    if sets_workspace:
        os.environ[CUBLAS] = ":4096:8"
    if wanted:
        torch.use_deterministic_algorithms(True)
    cudnn.benchmark = not wanted
    try:
        yield
    finally:
        if wanted:  # the call imports the compiler, in seconds that an interruption may fall into
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark = before[2]
        if sets_workspace:
            os.environ.pop(CUBLAS, None)
