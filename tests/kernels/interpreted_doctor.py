"""``doctor --gpu`` in the interpreter: every kernel is right, and a fault in one is named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv.benchmark.installation.finding import findings
from fastadv.benchmark.installation.kernel_checks import kernel_checks
from fastadv.kernels import dispatch
from fastadv.kernels.dispatch import OPERATORS

CPU = torch.device("cpu")


def wrong() -> list[str]:
    found = list(findings(kernel_checks(CPU), limit=math.inf))
    assert len(found) == len(OPERATORS)
    return [each.name for each in found if not each.passed]


def test_every_kernel_is_right() -> None:
    assert wrong() == []


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for each in value for t in tensors(each)] if isinstance(value, list | tuple) else []


def spoil(tensor: Tensor, fault: str) -> None:
    """One value is wrong: by a thousandth of the largest one, or it is not a number."""
    flat = tensor.detach().as_strided((1,), (1,), tensor.storage_offset())
    if not tensor.is_floating_point():
        flat.copy_(~flat if tensor.dtype == torch.bool else flat + 1)
    elif fault == "nan":
        flat.fill_(math.nan)
    else:
        flat.add_(
            max(1.0, float(tensor.detach().abs().max())) * (1e-3 if tensor.itemsize == 4 else 0.1)
        )


@pytest.mark.parametrize("fault", ["off", "nan"])
def test_a_fault_in_any_kernel_is_found_and_named(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dispatch.triton_function
    checks = {check.name.removeprefix("kernel "): check for check in kernel_checks(CPU)}
    for name in OPERATORS:

        def faulty(module: str, wanted: str, name: str = name) -> Any:
            def run(*given: Any, **options: Any) -> Any:
                result = real(module, wanted)(*given, **options)
                spoil((tensors(result) or tensors(given))[0], fault)
                return result

            return run if wanted == name else real(module, wanted)

        monkeypatch.setattr(dispatch, "triton_function", faulty)
        (found,) = findings([checks[name]], limit=math.inf)
        assert (found.name, found.passed) == (f"kernel {name}", False)
        assert "away from its reference" in found.said
        assert "--mode eager" in found.todo


def test_a_kernel_that_does_not_compile_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    real = dispatch.triton_function

    def broken(module: str, wanted: str) -> Any:
        if wanted == "l2_step":
            raise RuntimeError("PTX of a newer version\nand more")
        return real(module, wanted)

    monkeypatch.setattr(dispatch, "triton_function", broken)
    found = {each.name: each for each in findings(kernel_checks(CPU), limit=math.inf)}
    assert [name for name, each in found.items() if not each.passed] == ["kernel l2_step"]
    assert found["kernel l2_step"].said == "RuntimeError: PTX of a newer version"
