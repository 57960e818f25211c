"""No speed-up is reported for a mode whose numbers are wrong."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastadv.benchmark.ours import engine_mode
from fastadv.benchmark.rows import repository
from fastadv.benchmark.specs import Spec
from fastadv.errors import UserError
from fastadv.models import build_model
from fastadv.training.entry import step

PARITY_TESTS = Path("tests") / "test_modes.py"
TOLERANCE = 1e-9
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


def require_same_step(spec: Spec, mode: str, device: torch.device) -> None:
    """Raise ``UserError`` unless one step in ``mode`` equals the eager one in float64."""
    eager = _weights_after_a_step(spec, "eager", device)
    other = _weights_after_a_step(spec, mode, device)
    for name, expected in eager.items():
        error = (other[name] - expected).norm() / expected.norm().clamp_min(1e-30)
        if not error <= TOLERANCE:
            raise UserError(
                f"{spec} in mode {mode} differs from eager by {float(error):.1e} in {name} after "
                "one float64 step, so no speed-up is reported; please report this as a bug."
            )


def _weights_after_a_step(spec: Spec, mode: str, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = build_model("preact_resnet18", **TINY).double().to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    own_mode, total_steps = engine_mode(mode)
    training = step(
        model, optimizer, spec.method, mode=own_mode, num_samples=8, num_classes=10,
        total_steps=total_steps, steps_per_epoch=10, **spec.chosen,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(8, 3, 16, 16, generator=generator, dtype=torch.float64).to(device)
    y = torch.randint(10, (8,), generator=generator).to(device)
    start = (torch.rand(8, 3, 16, 16, generator=generator, dtype=torch.float64) - 0.5) / 32
    training(x, y, torch.arange(8, device=device), start=start.to(device))
    return {name: value.detach().clone() for name, value in model.named_parameters()}
