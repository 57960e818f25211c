"""Arguments of the Python API, right ones and many more wrong ones: networks, tensors, values.

The first of each table is what is usual. What is drawn by ``generated_calls.py`` depends on the
order of the tables.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastadv

CLASSES = 4


class Net(nn.Module):
    """(B,C,H,W) to (B,4)."""

    def __init__(self, norm: bool = True, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.conv(x)).relu().mean((2, 3)))


class Returning(nn.Module):
    """A network that gives what ``change`` makes of its logits."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.change = Net(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


class Raising(nn.Module):
    """A network whose own code fails."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("of the network's own")


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(CLASSES))


MODELS: dict[str, Callable[[], Any]] = {
    "a network": Net,
    "without BatchNorm": lambda: Net(norm=False),
    "of float64": lambda: Net().double(),
    "of bfloat16": lambda: Net().bfloat16(),
    "of float16": lambda: Net().half(),
    "in eval mode": lambda: Net().eval(),
    "frozen": lambda: Net().requires_grad_(False),
    "on meta": lambda: Net().to("meta"),
    "lazy": _lazy,
    "of one channel": lambda: Net(channels=1),
    "without parameters": nn.Identity,
    "of weights of NaN": lambda: _filled(Net(), math.nan),
    "of weights of inf": lambda: _filled(Net(), math.inf),
    "of weights of zero": lambda: _filled(Net(), 0.0),
    "with a tuple": lambda: Returning(lambda z: (z, z)),
    "with a list": lambda: Returning(lambda z: [z]),
    "with an empty tuple": lambda: Returning(lambda z: ()),
    "with a dict": lambda: Returning(lambda z: {"logits": z}),
    "with None": lambda: Returning(lambda z: None),
    "with a number": lambda: Returning(lambda z: 3.0),
    "with a text": lambda: Returning(lambda z: "logits"),
    "with detached logits": lambda: Returning(lambda z: z.detach()),
    "with half of the batch": lambda: Returning(lambda z: z[: len(z) // 2]),
    "with one logit": lambda: Returning(lambda z: z[:, :1]),
    "with a vector": lambda: Returning(lambda z: z[:, 0]),
    "with a scalar": lambda: Returning(lambda z: z.sum()),
    "with images": lambda: Returning(lambda z: z[:, :, None, None].expand(-1, -1, 2, 2)),
    "with integers": lambda: Returning(lambda z: z.long()),
    "with bools": lambda: Returning(lambda z: z > 0),
    "with complex logits": lambda: Returning(lambda z: z.to(torch.complex64)),
    "with NaN": lambda: Returning(lambda z: z * math.nan),
    "with inf": lambda: Returning(lambda z: z / 0),
    "with softmax": lambda: Returning(lambda z: z.softmax(1)),
    "with sparse logits": lambda: Returning(lambda z: z.to_sparse()),
    "with float64 logits": lambda: Returning(lambda z: z.double()),
    "raising": Raising,
    "a function": lambda: Net().forward,
    "a lambda": lambda: lambda x: x,
    "a text": lambda: "resnet18",
    "None": lambda: None,
    "a number": lambda: 3,
    "a class": lambda: Net,
    "a state_dict": lambda: Net().state_dict(),
    "a list of networks": lambda: [Net(), Net()],
}


def _filled(net: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def images(count: int = 4, *shape: int) -> Tensor:
    return torch.rand(count, *(shape or (3, 6, 6)))


X: dict[str, Callable[[], Any]] = {
    "images": images,
    "one image": lambda: images(1),
    "many images": lambda: images(9),
    "no image": lambda: images(0),
    "images of no pixel": lambda: images(4, 3, 0, 6),
    "larger images": lambda: images(4, 3, 9, 7),
    "images of one pixel": lambda: images(4, 3, 1, 1),
    "grey images": lambda: images(4, 1, 6, 6),
    "an image without batch": lambda: torch.rand(3, 6, 6),
    "vectors": lambda: torch.rand(4, 3),
    "videos": lambda: torch.rand(4, 3, 2, 6, 6),
    "a number": lambda: torch.rand(()),
    "float64": lambda: images().double(),
    "bfloat16": lambda: images().bfloat16(),
    "float16": lambda: images().half(),
    "uint8": lambda: (255 * images()).byte(),
    "int64": lambda: images().long(),
    "bool": lambda: images() > 0.5,
    "complex": lambda: images().to(torch.complex64),
    "of NaN": lambda: images().fill_(math.nan),
    "with one NaN": lambda: _with(images(), math.nan),
    "with one inf": lambda: _with(images(), math.inf),
    "with -inf": lambda: _with(images(), -math.inf),
    "in 255ths": lambda: 255 * images(),
    "normalised": lambda: (images() - 0.5) / 0.2,
    "below 0": lambda: -images(),
    "constant": lambda: torch.zeros(4, 3, 6, 6),
    "with gradient": lambda: images().requires_grad_(),
    "of a graph": lambda: images().requires_grad_() * 1.0,
    "strided": lambda: torch.rand(4, 3, 12, 12)[:, :, ::2, ::2],
    "expanded": lambda: torch.rand(1, 3, 6, 6).expand(4, 3, 6, 6),
    "channels last": lambda: images().to(memory_format=torch.channels_last),
    "sparse": lambda: images().to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(images(), 0.1, 0, torch.quint8),
    "on meta": lambda: images().to("meta"),
    "a parameter": lambda: nn.Parameter(images()),
    "made in inference mode": lambda: _inference(images),
    "an array": lambda: images().numpy(),
    "a list": lambda: [[0.5]],
    "None": lambda: None,
    "a text": lambda: "images",
    "float8": lambda: images().to(torch.float8_e4m3fn),
    "nested": lambda: _nested(),
    "conjugated": lambda: images().to(torch.complex64).conj(),
    "negated lazily": lambda: torch._neg_view(-images()),
    "subclass": lambda: images().as_subclass(Named),
}


class Named(Tensor):
    """A subclass that adds nothing."""


def _nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.rand(3, 6, 6), torch.rand(3, 5, 5)])


def _inference(make: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode():
        return make()


def _with(x: Tensor, value: float) -> Tensor:
    x.view(-1)[7] = value
    return x


def labels(count: int = 4) -> Tensor:
    return torch.arange(count) % CLASSES


Y: dict[str, Callable[[int], Any]] = {
    "labels": labels,
    "too few": lambda n: labels(max(n - 1, 0)),
    "too many": lambda n: labels(n + 1),
    "int32": lambda n: labels(n).int(),
    "uint8": lambda n: labels(n).byte(),
    "bool": lambda n: labels(n) > 1,
    "float": lambda n: labels(n).float(),
    "column": lambda n: labels(n)[:, None],
    "negative": lambda n: labels(n) - 1,
    "too large": lambda n: labels(n) + 2,
    "far too large": lambda n: labels(n) + 2**40,
    "ignored -100": lambda n: labels(n).fill_(-100),
    "one-hot": lambda n: nn.functional.one_hot(labels(n), CLASSES),
    "one-hot float": lambda n: nn.functional.one_hot(labels(n), CLASSES).float(),
    "soft": lambda n: torch.full((n, CLASSES), 1 / CLASSES),
    "soft of float64": lambda n: torch.full((n, CLASSES), 1 / CLASSES).double(),
    "soft of bfloat16": lambda n: torch.full((n, CLASSES), 1 / CLASSES).bfloat16(),
    "soft that do not sum to 1": lambda n: torch.ones(n, CLASSES),
    "soft with NaN": lambda n: torch.full((n, CLASSES), math.nan),
    "soft of more classes": lambda n: torch.full((n, CLASSES + 1), 1 / (CLASSES + 1)),
    "soft of one class": lambda n: torch.ones(n, 1),
    "soft with gradient": lambda n: torch.full((n, CLASSES), 1 / CLASSES).requires_grad_(),
    "masks": lambda n: torch.zeros(n, 6, 6).long(),
    "a number": lambda n: torch.tensor(1),
    "none": lambda n: None,
    "a list": lambda n: [0] * n,
    "on meta": lambda n: labels(n).to("meta"),
    "complex": lambda n: labels(n).to(torch.complex64),
    "made in inference mode": lambda n: _inference(lambda: labels(n)),
}

INDEX: dict[str, Callable[[int], Any]] = {
    "rows": torch.arange,
    "none": lambda n: None,
    "int32": lambda n: torch.arange(n).int(),
    "float": lambda n: torch.arange(n).float(),
    "negative": lambda n: torch.arange(n) - 1,
    "beyond": lambda n: torch.arange(n) + 100,
    "far beyond": lambda n: torch.arange(n) + 2**60,
    "twice": lambda n: torch.zeros(n).long(),
    "too few": lambda n: torch.arange(max(n - 1, 0)),
    "a list": lambda n: list(range(n)),
    "a column": lambda n: torch.arange(n)[:, None],
    "bool": lambda n: torch.arange(n) > 1,
    "on meta": lambda n: torch.arange(n).to("meta"),
}

COMPANION: dict[str, Callable[[Any], Any]] = {
    "like x": lambda x: 0.01 * torch.rand_like(x),
    "of NaN": lambda x: torch.full_like(x, math.nan),
    "huge": lambda x: torch.full_like(x, 1e30),
    "of half the images": lambda x: torch.zeros_like(x)[: len(x) // 2],
    "of one image": lambda x: torch.zeros_like(x)[:1],
    "float64": lambda x: torch.zeros_like(x).double(),
    "int": lambda x: torch.zeros_like(x).long(),
    "bool": lambda x: torch.ones_like(x).bool(),
    "a number": lambda x: 0.1,
    "a text": lambda x: "8/255",
    "radii": lambda x: torch.full((len(x),), 0.05),
    "negative radii": lambda x: torch.full((len(x),), -0.05),
    "NaN radii": lambda x: torch.full((len(x),), math.nan),
    "int radii": lambda x: torch.zeros(len(x)).long(),
    "labels": lambda x: torch.zeros(len(x)).long(),
    "a mask": lambda x: torch.ones(1, 1, *x.shape[2:]).bool(),
    "a mask of another size": lambda x: torch.ones(1, 1, 2, 2).bool(),
    "an empty mask": lambda x: torch.zeros(1, 1, *x.shape[2:]).bool(),
    "complex": lambda x: torch.zeros_like(x).to(torch.complex64),
    "a list": lambda x: [0.1],
    "on meta": lambda x: torch.zeros_like(x).to("meta"),
    "a view": lambda x: fastadv.View(torch.zeros(len(x)).long(), *[torch.zeros(len(x)).long()] * 2),
}

VALUES: dict[str, Any] = {
    "None": None,
    "True": True,
    "0": 0,
    "-1": -1,
    "3": 3,
    "2.5": 2.5,
    "0.0": 0.0,
    "-0.1": -0.1,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "1e300": 1e300,
    "10**400": 10**400,
    "10**9": 10**9,
    "10**12": 10**12,
    "1e-300": 1e-300,
    "a text": "abc",
    "an empty text": "",
    "a fraction": "8/255",
    "0/0": "0/0",
    "a long text": "9" * 5000,
    "a list": [1, 2],
    "an empty list": [],
    "a tuple": (0.1,),
    "a dict": {"a": 1},
    "a set": {1},
    "bytes": b"8/255",
    "complex": 1 + 2j,
    "an object": object(),
    "a class": int,
    "a function": len,
    "a tensor": torch.tensor(0.1),
    "a tensor of ints": torch.tensor(3),
    "a vector": torch.tensor([0.1, 0.2]),
    "a tensor of NaN": torch.tensor(math.nan),
    "a module": nn.Identity(),
    "a device": torch.device("meta"),
    "a dtype": torch.float16,
    "cuda": "cuda",
    "markup": "[red]\x1b[31m\n",
    "a ramp": fastadv.Ramp(0, 0.1, epochs=2),
    "phases": fastadv.Phases({0: 0.1, 3: 0.2}),
    "a threat": fastadv.Threat("l2", 0.5),
    "l2": "l2",
}
