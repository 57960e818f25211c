"""The libraries below: driver, CUDA, Triton, cuDNN, TF32, NCCL, and the clocks of the GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch
from torch.nn import functional

from fastadv.benchmark.installation.finding import Check, Failed
from fastadv.engine.model.precision import tf32

# Bits of clocks_event_reasons.active. A power cap of the software (0x4) is usual under load.
SLOWED = {0x8: "slowed by hardware", 0x20: "too hot", 0x40: "too hot", 0x80: "power brake"}
ASKED = (
    *("driver_version", "clocks.sm", "clocks.max.sm", "temperature.gpu", "power.draw"),
    *("power.limit", "clocks_throttle_reasons.active"),
)
NCCL_SECONDS = 15.0


@dataclass(frozen=True)
class Facts:
    """What the machine says about itself: versions as (major, minor), None where unknown."""

    driver: tuple[int, int] | None
    runtime: tuple[int, int] | None
    capability: tuple[int, int]
    architectures: Sequence[str]
    triton: str | None
    triton_wanted: str | None


def facts(device: torch.device) -> Facts:
    """The facts about this machine and ``device`` (CUDA)."""
    try:
        told = int(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]
        driver: tuple[int, int] | None = (told // 1000, told % 1000 // 10)
    except (AttributeError, RuntimeError):
        driver = None
    built = re.match(r"(\d+)\.(\d+)", torch.version.cuda or "")
    try:
        own = version("triton")
    except PackageNotFoundError:
        own = None
    wanted = re.search(r"^triton\s*==\s*([\w.]+)", "\n".join(requires("torch") or []), re.MULTILINE)
    return Facts(
        driver,
        (int(built[1]), int(built[2])) if built else None,
        torch.cuda.get_device_capability(device),
        torch.cuda.get_arch_list(),
        own,
        wanted[1] if wanted else None,
    )


def version_checks(told: Callable[[], Facts]) -> Iterator[Check]:
    """Do driver, CUDA, torch, Triton and the GPU fit each other?"""
    yield Check("driver and CUDA", lambda: _driver(told()))
    yield Check("torch for this GPU", lambda: _architecture(told()))
    yield Check("Triton for this torch", lambda: _triton(told()))


def _driver(told: Facts) -> str:
    if told.driver is None or told.runtime is None:
        return f"torch for CUDA {torch.version.cuda}, the driver's version is not known"
    driver, runtime = (".".join(map(str, pair)) for pair in (told.driver, told.runtime))
    if told.driver[0] < told.runtime[0]:
        raise Failed(
            f"the driver is for CUDA {driver}, torch for {runtime}",
            f"install a driver for CUDA {told.runtime[0]}, or a torch for CUDA {told.driver[0]}",
        )
    return f"driver for CUDA {driver}, torch for {runtime}"


def _architecture(told: Facts) -> str:
    major, minor = told.capability
    known = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", each) for each in told.architectures]
    fits = any(
        found
        and (
            # Machine code runs on later minor versions, PTX on every later version.
            int(found[2]) == major and int(found[3]) <= minor
            if found[1] == "sm"
            else (int(found[2]), int(found[3])) <= (major, minor)
        )
        for found in known
    )
    if not fits:
        raise Failed(
            f"torch {torch.__version__} has no code for sm_{major}{minor}, but for "
            f"{', '.join(told.architectures)}",
            "install a build of torch for this GPU",
        )
    return f"sm_{major}{minor}, torch {torch.__version__}"


def _triton(told: Facts) -> str:
    if told.triton is None:
        raise Failed("Triton is not installed", f"pip install triton=={told.triton_wanted or ''}")
    if told.triton_wanted is not None and told.triton.split("+")[0] != told.triton_wanted:
        raise Failed(
            f"Triton {told.triton}, and torch asks for {told.triton_wanted}",
            f"pip install triton=={told.triton_wanted}",
        )
    return f"Triton {told.triton}"


def arithmetic_checks(device: torch.device) -> Iterator[Check]:
    """TF32, and cuDNN's convolutions."""
    yield Check("TF32", lambda: _tf32(device))
    yield Check("cuDNN", lambda: _cudnn(device))


def _tf32(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()

    def off() -> float:
        found = (left.to(device) @ right.to(device)).cpu().double()
        return float((found - exact).norm() / exact.norm())

    now = off()
    with tf32(False):
        without = off()
    if not without < 1e-5:  # float32 makes 1e-7, TF32 3e-4
        raise Failed(
            f"float32 products are off by {without:.0e} although TF32 is switched off",
            "unset NVIDIA_TF32_OVERRIDE",
        )
    return f"{'on' if now > 1e-5 else 'off'} in matrix products, and can be switched off"


def _cudnn(device: torch.device) -> str:
    if device.type == "cuda" and not torch.backends.cudnn.is_available():
        raise Failed("torch cannot use cuDNN", "install torch again: its CUDA build brings cuDNN")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 16, 16, 16, generator=generator).to(device)
    weight = torch.randn(32, 16, 3, 3, generator=generator).to(device).requires_grad_()

    def once() -> list[torch.Tensor]:
        x.requires_grad_()
        found = functional.conv2d(x, weight, padding=1)
        return [found.detach(), *torch.autograd.grad(found.square().sum(), [x, weight])]

    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        first, second = once(), once()
        with tf32(False):
            found = once()
    finally:
        torch.backends.cudnn.deterministic = before
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        raise Failed(
            "convolutions differ from run to run although they are set to be deterministic",
            "runs cannot be repeated bit for bit with this version; install torch again",
        )
    exact = functional.conv2d(x.detach().cpu().double(), weight.detach().cpu().double(), padding=1)
    off = float((found[0].cpu().double() - exact).norm() / exact.norm())
    if not off < 1e-5:
        raise Failed(f"a convolution is off by {off:.0e}", "install torch again")
    number = torch.backends.cudnn.version()
    name = f"cuDNN {number}" if number else "no cuDNN on this device"
    return f"{name}, right and the same bits in each run"


def nccl_check(count: int, reduce: Callable[[int], Sequence[float]] | None = None) -> Check:
    """A sum over all ``count`` GPUs; ``reduce`` makes it (None: NCCL's, in this process)."""

    def run() -> str | None:
        if count < 2:
            return None
        done: list[Any] = []

        def work() -> None:
            try:
                done.append(list((reduce or _all_reduce)(count)))
            except Exception as error:
                done.append(error)

        # In a thread: a sum that never ends must not keep the report.
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(NCCL_SECONDS)
        todo = "set NCCL_DEBUG=INFO and run this again; NCCL_P2P_DISABLE=1 may help"
        if not done:
            raise Failed(f"a sum over {count} GPUs did not end in {NCCL_SECONDS:.0f} s", todo)
        if isinstance(done[0], Exception):
            raise Failed(str(done[0]).strip().splitlines()[0], todo)
        if done[0] != [float(sum(range(1, count + 1)))] * count:
            raise Failed(f"a sum over {count} GPUs is wrong", todo)
        return f"a sum over {count} GPUs is right"

    return Check("NCCL", run, NCCL_SECONDS)


def _all_reduce(count: int) -> list[float]:
    tensors = [
        torch.full((1024,), number + 1.0, device=f"cuda:{number}") for number in range(count)
    ]
    torch.cuda.nccl.all_reduce(tensors)
    return [float(tensor.mean()) for tensor in tensors]


def clock_check(ask: Callable[[], str | None]) -> Check:
    """Is the GPU slowed down under load? ``ask`` returns nvidia-smi's line, None without one."""
    return Check("clocks", lambda: _clocks(ask()), seconds=3.0)


def nvidia_smi(device: torch.device) -> str | None:
    """What nvidia-smi says about ``device`` while it multiplies matrices."""
    if shutil.which("nvidia-smi") is None:
        return None
    matrix = torch.randn(4096, 4096, device=device)
    for _ in range(200):
        torch.mm(matrix, matrix)
    number = str(getattr(torch.cuda.get_device_properties(device), "uuid", device.index or 0))
    name = number if number.isdecimal() else f"GPU-{number.removeprefix('GPU-')}"
    command = ["nvidia-smi", f"--id={name}", f"--query-gpu={','.join(ASKED)}"]
    command += ["--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    finally:
        torch.cuda.synchronize(device)
    return done.stdout.strip() if done.returncode == 0 else None


def _clocks(line: str | None) -> str | None:
    values = [each.strip() for each in (line or "").split(",")]
    if len(values) != len(ASKED):
        return None
    driver, clock, most, heat, power, limit, reasons = values
    words = f"{clock} of {most} MHz, {heat} C, {power} of {limit} W, driver {driver}"
    try:
        bits = int(reasons, 16)
    except ValueError:
        return words
    slowed = dict.fromkeys(word for bit, word in SLOWED.items() if bits & bit)
    if slowed:
        raise Failed(f"{', '.join(slowed)}: {words}", "look after cooling and power; times are off")
    return words
