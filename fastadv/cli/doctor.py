"""What this machine can do, and what fastadv will use of it."""

from __future__ import annotations

import importlib.util
import platform

import torch
from rich.text import Text

from fastadv import __version__, kernels
from fastadv.engine.model.fused_norm_choice import choose
from fastadv.engine.model.precision import cpu_multiplies

EXTRAS = {
    "pyautoattack": ("eval", "the canonical AutoAttack"),
    "nvidia.dali": ("dali", "the DALI loader"),
    "matplotlib": ("report", "plots"),
    "tensorboard": ("tensorboard", "TensorBoard events"),
}


def report() -> Text:
    """Versions, devices, precisions, kernels and extras, one line each."""
    lines = [
        f"fastadv {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, bf16 "
        + ("in hardware" if cpu_multiplies(torch.bfloat16) else "not in hardware: omit --amp"),
    ]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            lines.append(f"cuda:{number}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    else:
        lines.append("CUDA: none")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines += ["", f"kernels on {device}:"]
    by_backend: dict[str, list[str]] = {}
    for name, (backend, why) in kernels.backends(device).items():
        by_backend.setdefault(f"{backend}, {why}", []).append(name)
    lines += [f"  {said}: {', '.join(names)}" for said, names in by_backend.items()]
    lines.append(f"  --fused-norm auto: {_own_norms(device)}")
    lines += ["", "extras:"]
    for module, (extra, what) in EXTRAS.items():
        state = "installed" if _present(module) else f"missing: pip install 'fastadv[{extra}]'"
        lines.append(f"  {what}: {state}")
    return Text("\n".join(lines))


def _own_norms(device: torch.device) -> str:
    """Whether BatchNorm runs in own kernels where the user does not say so, and why."""
    if choose("auto", device):
        return "on, measured to be faster on this device"
    if device.type == "cuda":
        return "off, no gain was measured on this device; `on` tries them"
    return "off, own BatchNorm kernels are for CUDA"


def _present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
