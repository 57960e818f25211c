"""The device's limits: the rate of a large copy and of a large matrix product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fastadv.benchmark.arithmetic import Spread
from fastadv.benchmark.clock import seconds_alone

COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
REPEATS = 9
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Limits:
    """Bytes read plus written per second by a copy, operations per second of a matrix product;
    ``spreads`` are those of both, by their names (empty: not measured)."""

    copy: float
    matmul: float
    spreads: Mapping[str, Spread] = field(default_factory=dict)


def measure_limits(device: torch.device, dtype: str, *, tiny: bool = False) -> Limits:
    """Both limits in ``dtype`` (fp32, bf16, fp16); ``tiny`` is for tests, not for numbers."""
    copied = 2**20 if tiny else COPY_BYTES[device.type]
    side = 128 if tiny else MATRIX_SIDE[device.type]
    copy, matmul = _copy_rate(device, copied), _matmul_rate(device, dtype, side)
    return Limits(copy.median, matmul.median, {"copy": copy, "matmul": matmul})


def _copy_rate(device: torch.device, size: int) -> Spread:
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return seconds_alone([lambda: target.copy_(source)], device, REPEATS).into(2 * size)


def _matmul_rate(device: torch.device, dtype: str, side: int) -> Spread:
    # Random numbers: a product of zeros draws less power and runs faster than any real one.
    left, right = (torch.randn(side, side, device=device).to(TORCH_DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(left)
    product = seconds_alone([lambda: torch.mm(left, right, out=out)], device, REPEATS)
    return product.into(2 * side**3)
