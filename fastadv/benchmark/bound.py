"""A lower bound on the time of a step with the convolutions of this torch.

Every product of the network (forward, input gradient, weight gradient) is timed alone in the
pass's data type and channels_last layout, and counted as often as the passes use it. The memory
traffic between the products is assumed to run at the device's measured copy rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastadv.algorithms.contract.passes import Pass
from fastadv.benchmark.clock import seconds_alone
from fastadv.benchmark.geometry import Geometry, Product, products_of
from fastadv.benchmark.limits import ELEMENT_BYTES, TORCH_DTYPES, Limits

# Number of different tensors used in turn: a previous pass's activation is rarely in the cache.
COPIES = {"cpu": 2, "cuda": 4}


@dataclass(frozen=True)
class Bound:
    """Lower bounds for batches of one size in one data type."""

    geometry: Geometry
    batch: int
    dtype: str
    limits: Limits
    alone: Mapping[Product, Mapping[str, float]]  # product -> forward, input, weight -> seconds

    def of_pass(self, kind: str, bn: str) -> float:
        """Seconds of one pass; ``bn`` is BatchNorm's mode in it."""
        products = sum(
            count * self.alone[product][which]
            for product, count in self.geometry.products.items()
            for which in products_of(kind, product)
        )
        between = self.geometry.other_bytes(kind, bn, ELEMENT_BYTES[self.dtype])
        return products + self.batch * between / self.limits.copy

    def of_step(self, passes: Mapping[Pass, int]) -> float:
        """Seconds of a step made of ``passes`` (and how many of each)."""
        return sum(count * self.of_pass(kind, bn) for (kind, bn), count in passes.items())

    def flops(self, passes: Mapping[Pass, int]) -> int:
        """Operations of a step."""
        return self.batch * sum(n * self.geometry.flops(kind) for (kind, _), n in passes.items())

    def bytes_moved(self, passes: Mapping[Pass, int]) -> int:
        """Bytes a step must move, in the products and between them."""
        element, total = ELEMENT_BYTES[self.dtype], 0
        for (kind, bn), count in passes.items():
            between = self.geometry.other_bytes(kind, bn, element)
            products = self.geometry.product_bytes(kind, self.batch, element)
            total += count * (self.batch * between + products)
        return total


def measure_bound(
    geometry: Geometry,
    batch: int,
    dtype: str,
    limits: Limits,
    device: torch.device,
    *,
    repeats: int = 5,
) -> Bound:
    """Time every product of the network alone, on batches of ``batch`` images."""
    alone = {
        product: _product_seconds(product, batch, dtype, device, repeats)
        for product in geometry.products
    }
    return Bound(geometry, batch, dtype, limits, alone)


def _product_seconds(
    product: Product, batch: int, dtype: str, device: torch.device, repeats: int
) -> dict[str, float]:
    prepare = _convolution if len(product.weight) > 2 else _linear
    sets = [prepare(product, batch, dtype, device) for _ in range(COPIES[device.type])]
    return {
        which: seconds_alone([calls[which] for calls in sets], device, repeats).median
        for which in ("forward", "input", "weight")
    }


Calls = dict[str, Callable[[], Any]]


def _random(shape: tuple[int, ...], dtype: str, device: torch.device) -> Tensor:
    tensor = torch.randn(shape, device=device).to(TORCH_DTYPES[dtype])
    return tensor.to(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def _convolution(product: Product, batch: int, dtype: str, device: torch.device) -> Calls:
    image = _random((batch, *product.inputs), dtype, device)
    weight = _random(product.weight, dtype, device)
    gradient = _random((batch, *product.output), dtype, device)
    shape = (product.stride, product.padding, product.dilation, False, (0, 0), product.groups)

    def backward(of_input: bool) -> Callable[[], Any]:
        mask = [of_input, not of_input, False]
        return lambda: torch.ops.aten.convolution_backward(
            gradient, image, weight, None, *shape, mask
        )

    def forward() -> Tensor:
        return torch.ops.aten.convolution(image, weight, None, *shape)

    return {"forward": forward, "input": backward(True), "weight": backward(False)}


def _linear(product: Product, batch: int, dtype: str, device: torch.device) -> Calls:
    inputs = _random((batch, *product.inputs), dtype, device)
    weight = _random(product.weight, dtype, device)
    gradient = _random((batch, *product.output), dtype, device)
    return {
        "forward": lambda: inputs @ weight,
        "input": lambda: gradient @ weight.T,
        "weight": lambda: inputs.T @ gradient,
    }
