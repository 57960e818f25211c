"""Compile the kernels of a launcher for a GPU that is not present, and read the cubin.

The launchers run on CPU tensors with ``launch`` replaced by a recorder, and Triton's launcher
compiles what was recorded under a driver that only names its target, so that signatures, sizes and
alignments are the ones a GPU would get.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from fastadv.kernels import (
    triton_batch,
    triton_block_noise,
    triton_crop,
    triton_guard,
    triton_l2,
    triton_linf,
    triton_losses,
    triton_noise,
    triton_norm,
    triton_pad,
    triton_top_n,
    triton_weights,
)

MODULES: tuple[ModuleType, ...] = (
    *(triton_crop, triton_l2, triton_linf, triton_losses),
    *(triton_noise, triton_norm, triton_block_noise, triton_pad, triton_top_n, triton_weights),
    *(triton_guard, triton_batch),
)


@dataclass(frozen=True)
class Launch:
    """One recorded launch: kernel, grid and arguments."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


class AbsentGPU:
    """A driver for an absent GPU, with everything that a compilation needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device number; no machine has this many.
        return 1000 + self.capability

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside the block, kernel launches are appended to the list instead of executed."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        assert all(isinstance(n, int) and n > 0 for n in grid), grid
        del options["device"]
        options.setdefault("enable_fp_fusion", False)
        launches.append(Launch(kernel, grid, args, options))

    with ExitStack() as patches:
        for module in MODULES:
            patches.enter_context(mock.patch.object(module, "launch", record))
        yield launches


@dataclass(frozen=True)
class Machine:
    """Properties of the code that was generated for one launch."""

    sass: str
    ptx: str
    registers: int
    stack: int
    shared: int
    local: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))

    @property
    def instructions(self) -> int:
        """The number of all instructions; a thread of a kernel without loops executes at most so
        many."""
        return self.count(r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S")


def triton_compiled(launch: Launch, capability: int) -> Any:
    """What Triton's own launcher compiles for ``sm_<capability>``: its types, its alignments."""
    # Not set_active and reset_active: the latter looks for a GPU and fails without one.
    with mock.patch.object(triton.runtime.driver, "_active", AbsentGPU(capability)):
        return launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)


def compiled(launch: Launch, capability: int) -> Machine:
    """The properties of the cubin of one launch."""
    kernel = triton_compiled(launch, capability)
    found, sass = _usage(kernel), _cuobjdump("-sass", kernel)
    numbers = (found["REG"], found["STACK"], found["SHARED"], found["LOCAL"])
    return Machine(sass, kernel.asm["ptx"], *numbers)


def registers(launch: Launch, capability: int) -> int:
    """Those of a thread of one launch; its code is not disassembled, which takes longer."""
    return _usage(triton_compiled(launch, capability))["REG"]


def _usage(kernel: Any) -> dict[str, int]:
    told = _cuobjdump("-res-usage", kernel)
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", told)}


def _cuobjdump(option: str, kernel: Any) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        return subprocess.run(
            [tool, option, str(cubin)], capture_output=True, text=True, check=True
        ).stdout
