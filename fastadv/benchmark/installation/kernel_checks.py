"""Every Triton kernel against its reference."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastadv.benchmark.installation.finding import REPORT, Check, Failed
from fastadv.benchmark.kernel_calls import LARGE, SMALL, Sizes, kernel_calls, moved
from fastadv.kernels.dispatch import OPERATORS, TRITON_INSTALLED

# Sums of many float32 are taken in another order: of the largest value of the result.
ROUNDING = 2e-5


def kernel_checks(device: torch.device, sizes: Sizes = SMALL) -> Iterator[Check]:
    """One check for each kernel; the first launch compiles it."""
    for name in OPERATORS:
        yield Check(f"kernel {name}", partial(_one, name, device, sizes), seconds=1.0)


def large_check(device: torch.device, seconds: float = 10.0) -> Check:
    """All kernels at the size of a training step, as many as ``seconds`` allow."""

    def run() -> str:
        until, done, wrong = time.monotonic() + seconds, 0, []
        for name in OPERATORS:
            if time.monotonic() > until:
                break
            try:
                _one(name, device, LARGE)
            except Failed as fault:
                wrong.append(f"{name} {fault.said}")
            done += 1
        if wrong:
            raise Failed("; ".join(wrong), _avoid())
        return f"{done} of {len(OPERATORS)} right on images of {LARGE}"

    return Check("kernels, full size", run, seconds)


def _one(name: str, device: torch.device, sizes: Sizes) -> str:
    if not TRITON_INSTALLED:
        raise Failed("Triton is not installed", "pip install triton, in the version torch asks for")
    make = kernel_calls(sizes)[name]
    arguments, given = make(), moved(make(), device)
    operator = OPERATORS[name]
    with torch.no_grad():
        expected = operator.reference(*arguments)
        found = operator.triton(*given)
    # What is changed in place counts as a result.
    pairs = zip(_tensors([found, given]), _tensors([expected, arguments]), strict=True)
    worst = max((_excess(own, other) for own, other in pairs), default=0.0)
    if not worst <= 1:
        off = "further than any rounding" if math.isinf(worst) else f"{worst:.3g} roundings"
        raise Failed(f"{off} away from its reference", _avoid())
    return "right"


def _avoid() -> str:
    return f"train with --mode eager on a CPU until it is mended; {REPORT}"


def _excess(own: Tensor, other: Tensor) -> float:
    """The largest difference in units of what rounding may make."""
    own = own.detach().cpu()
    if own.shape != other.shape or own.dtype != other.dtype:
        return float("inf")
    if not other.numel():
        return 0.0
    if not other.is_floating_point():
        return 0.0 if torch.equal(own, other) else float("inf")
    unit = max(ROUNDING, torch.finfo(other.dtype).eps if other.dtype.itemsize < 4 else 0.0)
    exact = other.double()
    off = float((own.double() - exact).abs().max()) / (unit * max(1.0, float(exact.abs().max())))
    return float("inf") if math.isnan(off) else off  # a NaN is larger than no number


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for each in value for t in _tensors(each)] if isinstance(value, list | tuple) else []
