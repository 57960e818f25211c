"""All checks of a GPU, in the order in which a fault explains the later ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastadv.benchmark.installation.finding import Check
from fastadv.benchmark.installation.kernel_checks import kernel_checks, large_check
from fastadv.benchmark.installation.library_checks import (
    arithmetic_checks,
    clock_check,
    facts,
    nccl_check,
    nvidia_smi,
    version_checks,
)
from fastadv.benchmark.installation.step_checks import captured_checks, cuda_meter, memory_checks


def gpu_checks(device: torch.device) -> Iterator[Check]:
    """The checks of a CUDA device; together at most a minute."""
    yield from version_checks(lambda: facts(device))
    yield clock_check(lambda: nvidia_smi(device))
    yield from arithmetic_checks(device)
    yield from kernel_checks(device)
    yield from captured_checks(device)
    yield from memory_checks(device, cuda_meter(device))
    yield nccl_check(torch.cuda.device_count())
    yield large_check(device)
