"""The arithmetic and memory traffic of a network, from one forward pass on the meta device.

Counted are convolutions and matrix products (a multiply-add is two operations), and the numbers
moved between them (``traffic.py``).
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv.algorithms.contract.passes import (
    DOUBLE_BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    SHARED,
    TRAINING,
)
from fastadv.benchmark.traffic import MOVED, Traffic

# How many times a pass causes the traffic of a forward and of a backward. A double backward
# repeats both at least once.
GOES = {
    FORWARD: (1, 0),
    INPUT_GRADIENT: (1, 1),
    TRAINING: (1, 1),
    SHARED: (1, 2),
    DOUBLE_BACKWARD: (2, 2),
}
PASSES = tuple(GOES)


@dataclass(frozen=True)
class Product:
    """A convolution, or a linear layer (``weight`` of two dimensions), on a batch of one."""

    inputs: tuple[int, ...]
    weight: tuple[int, ...]
    output: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    first: bool = False  # its input is the image

    @property
    def flops(self) -> int:
        """Operations of the forward product; either gradient costs the same."""
        per_output = self.weight[1:] if len(self.weight) > 2 else self.weight[:1]
        return 2 * _count(self.output) * _count(per_output)

    def numbers_moved(self, batch: int) -> int:
        """Elements read and written once each, for any one of its three products."""
        return batch * (_count(self.inputs) + _count(self.output)) + _count(self.weight)


def products_of(kind: str, product: Product) -> tuple[str, ...]:
    """Which of the three products a pass computes for one layer."""
    # The training pass needs no gradient of the image.
    learning = ("weight",) if product.first else ("weight", "input")
    return {
        FORWARD: ("forward",),
        INPUT_GRADIENT: ("forward", "input"),
        TRAINING: ("forward", *learning),
        SHARED: ("forward", "input", *learning),
        # dx = W^T dz has a derivative in dz, another product with W, and one in W.
        DOUBLE_BACKWARD: ("forward", "input", "forward", "weight", *learning),
    }[kind]


@dataclass(frozen=True)
class Geometry:
    """A network on images of one shape."""

    products: Counter[Product]
    moved: dict[str, int]  # kind of work of ``traffic.MOVED`` -> elements of activations, per image

    def flops(self, kind: str) -> int:
        """Operations of one pass over one image."""
        return sum(
            count * product.flops * len(products_of(kind, product))
            for product, count in self.products.items()
        )

    def other_bytes(self, kind: str, bn: str, element: int) -> int:
        """Bytes moved outside the products by one pass over one image.

        ``bn`` is BatchNorm's mode ("train" or "eval"), ``element`` the bytes of a number.
        """
        return sum(self.bytes_by_work(kind, bn, element).values())

    def bytes_by_work(self, kind: str, bn: str, element: int) -> dict[str, int]:
        """The same for each kind of work of ``traffic.MOVED``."""
        forwards, backwards = GOES[kind]
        found = {}
        for work, elements in self.moved.items():
            forward, backward = MOVED[work][bn]
            found[work] = elements * (forwards * forward + backwards * backward) * element
        return found

    def product_bytes(self, kind: str, batch: int, element: int) -> int:
        """Bytes the products of one pass over a batch must move."""
        return element * sum(
            count * len(products_of(kind, product)) * product.numbers_moved(batch)
            for product, count in self.products.items()
        )


@torch.no_grad()
def geometry(model: nn.Module, image_shape: tuple[int, int, int]) -> Geometry:
    """Read ``model`` for images of ``image_shape`` (C,H,W); the model is not touched."""
    twin = _without_hooks(copy.deepcopy(model).to("meta").train())
    # BatchNorm in training needs two values per channel.
    images = torch.empty(2, *image_shape, device="meta")
    reader = _Reader()
    with reader:
        twin(images)
    return Geometry(reader.products, dict(reader.traffic.elements()))


class _Reader(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()
        self.traffic = Traffic()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == "convolution":
            self._convolution(args, result)
        elif name in {"addmm", "mm"}:
            left, right = args[-2:]
            self.products[Product(_one(left), tuple(right.shape), _one(result))] += 1
        self.traffic.note(name, args, result)
        return result

    def _convolution(self, args: Any, result: Tensor) -> None:
        image, weight, _, stride, padding, dilation, transposed, _, groups = args
        if transposed:
            raise NotImplementedError("networks with transposed convolutions are not measured")
        product = Product(
            _one(image), tuple(weight.shape), _one(result), tuple(stride), tuple(padding),
            tuple(dilation), groups, first=not self.products,
        )  # fmt: skip
        self.products[product] += 1


def _without_hooks(model: nn.Module) -> nn.Module:
    """Removes the hooks of a copied model, which belong to the step of the original."""
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return model


def _one(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape[1:])


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
