"""Which backend runs, and that the package works where Triton is not installed."""

import inspect
import subprocess
import sys

import pytest
import torch

from fastadv import kernels
from fastadv.kernels import reference
from fastadv.kernels.dispatch import OPERATORS

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from fastadv import kernels
z = torch.randn(4, 3, requires_grad=True)
kernels.trades_kl(z, torch.zeros(4, 3)).sum().backward()
assert z.grad.isfinite().all()
assert kernels.backends("cuda")["linf_step"] == ("reference", "Triton is not installed")
from fastadv.kernels.dispatch import OPERATORS
try:
    OPERATORS["trades_kl"].run(z, z, backend="triton")
except RuntimeError as error:
    assert "not installed" in str(error)
else:
    raise AssertionError("fell back in silence")
"""
TRITON_STAYS_OUT = """
import sys
import torch
from fastadv import kernels
kernels.linf_project(torch.rand(2, 3), torch.rand(2, 3), 0.1)
assert "triton" not in sys.modules
"""


@pytest.mark.parametrize("program", [WITHOUT_TRITON, TRITON_STAYS_OUT], ids=["absent", "unused"])
def test_in_a_fresh_process(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_cpu_runs_the_reference_and_reports_it() -> None:
    found = kernels.backends("cpu")
    assert set(found) == set(OPERATORS)
    assert {backend for backend, _ in found.values()} == {"reference"}
    assert all("cpu" in why or "not installed" in why for _, why in found.values())


def test_asking_for_triton_on_a_cpu_is_an_error() -> None:
    z = torch.randn(4, 3)
    run = OPERATORS["trades_kl"].run
    with pytest.raises(RuntimeError, match="cannot run trades_kl"):
        run(z, z, backend="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        run(z, z, backend="cuda")
    assert torch.equal(run(z, z), run(z, z, backend="reference"))


def test_public_functions_keep_the_references_signature_and_docstring() -> None:
    for name, operator in OPERATORS.items():
        public, plain = getattr(kernels, name), operator.reference
        assert inspect.signature(public) == inspect.signature(plain)
        assert public.__doc__ == plain.__doc__
        assert public.__name__ == name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_runs_triton_and_agrees() -> None:
    x, grad = torch.rand(8, 3, 32, 32, device="cuda"), torch.randn(8, 3, 32, 32, device="cuda")
    rows = torch.arange(8, device="cuda")
    assert kernels.backends("cuda")["linf_step"][0] == "triton"
    start = kernels.linf_start(x, 0.1, rows, 1, 2)
    assert torch.equal(start, reference.linf_start(x, 0.1, rows, 1, 2))
    assert torch.equal(
        kernels.linf_step(start, grad, x, 0.1, 0.1), reference.linf_step(start, grad, x, 0.1, 0.1)
    )
    torch.testing.assert_close(
        kernels.l2_step(start, grad, x, 0.1, 0.5), reference.l2_step(start, grad, x, 0.1, 0.5)
    )
