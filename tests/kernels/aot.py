"""Compile what a launcher would launch, for a GPU that is not there, and read the cubin.

The launchers run on CPU tensors with ``launch`` replaced by a recorder, so the signatures, sizes
and alignments compiled here are the ones a GPU would get.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from fastadv.kernels import (
    triton_crop,
    triton_l2,
    triton_linf,
    triton_losses,
    triton_noise,
    triton_taps,
    triton_top_n,
    triton_weights,
)
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES: tuple[ModuleType, ...] = (
    *(triton_crop, triton_l2, triton_linf, triton_losses),
    *(triton_noise, triton_taps, triton_top_n, triton_weights),
)
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
OPTIONS = ("num_warps", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel and what it was called with."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within, launches of the kernels are appended to the list instead of run."""
    launches: list[Launch] = []

    def record(
        kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **given: Any
    ) -> None:
        assert all(isinstance(n, int) and n > 0 for n in grid), grid
        options = {"num_warps": 4, "enable_fp_fusion": False}
        options |= {key: given.pop(key) for key in OPTIONS if key in given}
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | given
        assert set(arguments) == set(kernel.arg_names), (set(kernel.arg_names), set(arguments))
        launches.append(Launch(kernel, arguments, options))

    with mock.patch.multiple(MODULES[0], launch=record):
        patches = [mock.patch.object(module, "launch", record) for module in MODULES[1:]]
        for patch in patches:
            patch.start()
        try:
            yield launches
        finally:
            for patch in patches:
                patch.stop()


def _type_of(value: Any, annotation: str) -> tuple[str, bool]:
    """(Triton's type, whether 16 divides it), as Triton's launcher would specialise."""
    if isinstance(value, Tensor):
        return POINTERS[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if annotation == "i64":
        return "i64", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0


def _source(launch: Launch) -> ASTSource:
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        fixed = parameter.annotation_type
        is_one = isinstance(value, int) and value == 1 and not fixed
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, tuple):
            kinds = [_type_of(v, "") for v in value]
            signature[parameter.name] = tuple(kind for kind, _ in kinds)
            aligned = {(position, i) for i, (_, even) in enumerate(kinds) if even}
        else:
            signature[parameter.name], even = _type_of(value, fixed)
            aligned = {(position,)} if even else set()
        attributes |= {place: [["tt.divisibility", 16]] for place in aligned}
    return ASTSource(launch.kernel, signature, constants, attributes)


@dataclass(frozen=True)
class Machine:
    """What the code generator made of one launch."""

    sass: str
    ptx: str
    registers: int
    stack: int
    shared: int
    local: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))


def triton_compiled(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel for one launch on ``sm_<capability>``."""
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(_source(launch), target=target, options=launch.options)


def compiled(launch: Launch, capability: int) -> Machine:
    """What is in the cubin of one launch."""
    kernel = triton_compiled(launch, capability)
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        told = _cuobjdump("-res-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
    found = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", told)}
    numbers = (found["REG"], found["STACK"], found["SHARED"], found["LOCAL"])
    return Machine(sass, kernel.asm["ptx"], *numbers)


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run(
        [tool, option, str(cubin)], capture_output=True, text=True, check=True
    ).stdout
