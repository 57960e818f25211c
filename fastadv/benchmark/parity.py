"""No speed-up is reported for a mode whose numbers are wrong."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fastadv.benchmark.ours import engine_mode
from fastadv.benchmark.rows import repository
from fastadv.benchmark.specs import Spec
from fastadv.engine.model.fused_norm_choice import choose
from fastadv.engine.model.precision import tf32
from fastadv.errors import UserError
from fastadv.models import build_model
from fastadv.training.entry import step

PARITY_TESTS = Path("tests") / "test_modes.py"
TOLERANCE = 1e-9
# Own BatchNorm kernels compute in float32, where steps that round differently are 5e-6 apart; an
# error of 3e-4 in every second value makes 3e-2, since it turns signs and activations.
NORM_TOLERANCE = 1e-2
TINY = {"width": 4, "depths": (1, 1, 1, 1)}


def require_parity(specs: Iterable[Spec], modes: Iterable[str], device: torch.device) -> str:
    """Raise ``UserError`` unless the modes agree with eager; returns the name of the check.

    In a checkout its own parity tests are run; an installed package, or one without pytest, trains
    a tiny network in float64 for one step in each mode instead.
    """
    root = repository()
    able = importlib.util.find_spec("pytest") is not None
    if able and root is not None and (root / PARITY_TESTS).exists():
        run_parity_tests(root)
        return str(PARITY_TESTS)
    checked = [mode for mode in dict.fromkeys(modes) if mode not in {"eager", "auto"}]
    for spec in specs:
        for mode in checked:
            require_same_step(spec, mode, device)
    if not checked:
        return "eager is the definition"
    return f"one float64 step of a tiny network, eager against {', '.join(checked)}"


def run_parity_tests(root: Path) -> None:
    """Run the parity tests of a checkout; raises ``UserError`` if they fail."""
    # The project's own addopts name a plugin that may not be installed; -P keeps a checkout's
    # fastadv/ from shadowing the installed package.
    command = [sys.executable, "-P", "-m", "pytest", "-o", "addopts=", "-m", "not slow"]
    command += ["-q", "-x", str(PARITY_TESTS)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        said = f"{done.stderr}\n{done.stdout}".splitlines()
        last = next((line for line in reversed(said) if line.strip()), "pytest printed nothing")
        raise UserError(
            f"The parity tests fail, so no speed-up is reported: run `pytest {PARITY_TESTS}` "
            f"and fix what it reports first ({last.strip('= ')})."
        )


def require_fused_parity(
    specs: Iterable[Spec], modes: Iterable[str], device: torch.device
) -> str | None:
    """Raise ``UserError`` unless the steps with own BatchNorm kernels agree with PyTorch's; returns
    the name of the check, None if no step among ``specs`` has such kernels on ``device``."""
    fused = [spec for spec in dict.fromkeys(specs) if choose(spec.fused_norm, device)]
    chosen = list(dict.fromkeys(modes))
    for spec in fused:
        for mode in chosen:
            require_same_step(spec, mode, device)
    return fused_parity_words(chosen) if fused else None


def fused_parity_words(modes: Iterable[str]) -> str:
    """The name of the check of steps with own BatchNorm kernels in ``modes``."""
    return (
        "one float32 step of a tiny network, own BatchNorm kernels in "
        f"{', '.join(modes)} against PyTorch's in eager"
    )


def require_same_step(spec: Spec, mode: str, device: torch.device) -> None:
    """Raise ``UserError`` unless one step in ``mode`` equals the eager one with PyTorch's
    BatchNorm: in float64, or in float32 if ``spec`` has own BatchNorm kernels on ``device``."""
    fused = choose(spec.fused_norm, device)
    dtype, tolerance = (torch.float32, NORM_TOLERANCE) if fused else (torch.float64, TOLERANCE)
    with tf32(False if fused else None):
        eager = _weights_after_a_step(spec.with_norm("off"), "eager", device, dtype)
        other = _weights_after_a_step(spec, mode, device, dtype)
    for name, expected in eager.items():
        error = (other[name] - expected).norm() / expected.norm().clamp_min(1e-30)
        if not error <= tolerance:
            typed = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{spec} in mode {mode} differs from eager by {float(error):.1e} in {name} after "
                f"one {typed} step, so no speed-up is reported; please report this as a bug."
            )


def _weights_after_a_step(
    spec: Spec, mode: str, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = build_model("preact_resnet18", **TINY).to(device, dtype)  # type: ignore[arg-type]
    layout = torch.channels_last  # as the steps that are timed
    model = cast(Any, model).to(memory_format=layout)  # torch's stubs leave it out
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    own_mode, total_steps = engine_mode(mode)
    training = step(
        model, optimizer, spec.method, mode=own_mode, fused_norm=spec.fused_norm, num_samples=8,
        num_classes=10, total_steps=total_steps, steps_per_epoch=10, **spec.chosen,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(8, 3, 16, 16, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (8,), generator=generator).to(device)
    start = (torch.rand(8, 3, 16, 16, generator=generator, dtype=torch.float64) - 0.5) / 32
    x, start = (each.to(device, dtype, memory_format=layout) for each in (x, start))
    training(x, y, torch.arange(8, device=device), start=start)
    return {name: value.detach().clone() for name, value in model.named_parameters()}
