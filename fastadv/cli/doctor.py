"""What this machine can do, and what fastadv will use of it."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterable, Mapping

import torch
from rich.console import Console
from rich.text import Text

from fastadv import __version__, kernels
from fastadv.benchmark.installation.finding import Finding, findings
from fastadv.engine.model.fused_norm_choice import choose
from fastadv.engine.model.precision import cpu_multiplies
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError
from fastadv.printing.layout import filled, page_columns
from fastadv.storage.printable import safe_sentence

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
    for (backend, why), names in _alike(kernels.backends(device)).items():
        lines += _wrapped(f"{backend}, {why}: {', '.join(names)}")
    lines += _wrapped(f"--fused-norm auto: {_own_norms(device)}")
    lines += ["", "extras:"]
    for module, (extra, what) in EXTRAS.items():
        state = "installed" if _present(module) else f"missing: pip install 'fastadv[{extra}]'"
        lines.append(f"  {what}: {state}")
    if torch.cuda.is_available():
        lines += ["", "`fastadv doctor --gpu` checks the results of this GPU, in a minute"]
    return Text("\n".join(lines))


def check_gpu(console: Console) -> bool:
    """Check the GPU, a line for each check; returns whether none failed. Raises ``UserError``
    without a GPU."""
    if not torch.cuda.is_available():
        raise UserError(
            f"Nothing to check: {_why_no_gpu()}; `fastadv doctor` says what this machine has."
        )
    from fastadv.benchmark.installation.all_checks import gpu_checks

    device = choose_device("cuda")
    torch.cuda.set_device(device)
    console.print(f"{device}: {torch.cuda.get_device_name(device)}", markup=False)
    return show(findings(gpu_checks(device)), console)


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = (str(error).splitlines() or [""])[0].partition(". ")[0].rstrip(".")
        return f"torch finds no GPU ({said})"
    return "there is no CUDA device here"


def show(found: Iterable[Finding], console: Console) -> bool:
    """Print each finding when it is there, and the result; returns whether none failed."""
    passed, failed, left = 0, 0, 0
    width = page_columns()
    for each in found:
        passed, failed = passed + (each.passed is True), failed + (each.passed is False)
        left += each.passed is None
        told = f"{each.word:<4} {each.name:<27} {each.seconds:4.1f} s  "
        lines = [told + each.said, *([f"do: {each.todo}"] if each.todo else [])]
        for first, line in enumerate(lines):
            style = {True: None, False: "red", None: "yellow"}[each.passed]
            indent = " " * (5 if first else len(told))
            begins = indent if first else ""
            text = filled(begins + line, width, hang=indent)
            console.print(Text(safe_sentence(text), style=style or ""))
    console.print(f"{passed} right, {failed} wrong, {left} not checked")
    return not failed


def _alike(
    found: Mapping[str, tuple[str, str]],
) -> dict[tuple[str, str], list[str]]:
    """The kernels with the same backend for the same reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, choice in found.items():
        groups.setdefault(choice, []).append(name)
    return groups


def _wrapped(text: str) -> list[str]:
    return filled(f"  {text}", page_columns(), hang="    ").split("\n")


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
