"""bfloat16, and the choice of a backend, in Triton's interpreter.

The interpreter itself rounds bfloat16 wrongly on some stores, so results are held to one step of
bfloat16; that kernels compute in float32 is what these tests show.
"""

import pytest
import torch
from oracle import call, gradients, images
from oracle import triton_and_reference as both
from torch import Tensor

from fastadv.kernels.dispatch import why_not_triton

BF16 = torch.bfloat16
X, G = images((2, 3, 5, 4), 0, BF16), gradients((2, 3, 5, 4), 1, BF16)
Z, Z_ADV = gradients((6, 5), 2, BF16), gradients((6, 5), 3, BF16)
Y = torch.arange(6) % 5
CASES: dict[str, tuple[object, ...]] = {
    "linf_step": (X, G, X, 2 / 255, 8 / 255),
    "linf_start": (X, 8 / 255, torch.arange(2), 3, 4),
    "l2_step": (X, G, X, 0.1, 0.5),
    "top_n_sum": (Z, Z_ADV, 7),
    "trades_kl": (Z, Z_ADV),
    "masked_ce": (Z, Y, 1.7),
    "block_signs": ([X, G],),
    "block_noise": ([G], torch.tensor([0.3])),
    "block_step_gradients": ([X], [G]),
}


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name: str) -> None:
    triton, plain = both(name, *CASES[name])
    torch.testing.assert_close(triton, plain, rtol=8e-3, atol=1e-3)


def test_float64_is_refused_when_triton_is_asked_for() -> None:
    wide = torch.rand(2, 3, dtype=torch.float64)
    assert "float64" in str(why_not_triton(wide.device, (wide,)))
    with pytest.raises(RuntimeError, match="float64"):
        call("trades_kl", wide, wide, backend="triton")
    with pytest.raises(RuntimeError, match="float64"):
        call("noise_uniform", torch.arange(2), (3,), 1, 1, 0, torch.float64, backend="triton")


def test_by_default_a_cpu_runs_the_reference() -> None:
    def refused(*_args: object) -> Tensor:
        raise AssertionError("Triton was chosen on a CPU")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastadv.kernels.dispatch.triton_function", refused)
        call("trades_kl", Z, Z_ADV)
