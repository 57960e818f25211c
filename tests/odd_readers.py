"""Networks in which a module other than its BatchNorm reads a convolution's output or weights."""

from __future__ import annotations

import torch
import torch.nn.utils.prune as prune
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

WIDTH, CLASSES = 6, 4


class Net(nn.Module):
    """(B,3,H,W) to (B,4): two convolutions, each with its BatchNorm, and a classifier."""

    folds = 2  # how many may be folded

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.c2, self.b2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def first(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b1(self.c1(x)))

    def second(self, h: Tensor) -> Tensor:
        return torch.tanh(self.b2(self.c2(h)))

    def head(self, h: Tensor) -> Tensor:
        return self.fc(4 * h.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


class Gate(Net):
    folds = 1

    def gate(self, h: Tensor) -> Tensor:
        return torch.sigmoid(4 * h.detach().mean((2, 3), keepdim=True))

    def first(self, x: Tensor) -> Tensor:
        h = self.c1(x)
        return torch.tanh(self.b1(h)) * self.gate(h)


class GateAfter(Gate):
    def first(self, x: Tensor) -> Tensor:
        h = self.c1(x)
        return torch.tanh(self.b1(h)) * self.gate(h)


class NoGradStatistic(Gate):
    def gate(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            return 1 / (1 + h.abs().amax((2, 3), keepdim=True))


class Winners(Gate):
    def gate(self, h: Tensor) -> Tensor:
        return (h > h.mean(1, keepdim=True)).to(h.dtype)


class Numpy(Gate):
    def gate(self, h: Tensor) -> Tensor:
        return torch.from_numpy(1 + h.detach().float().numpy().mean((2, 3), keepdims=True)).to(h)


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, h: Tensor) -> Tensor:
        return h / 2

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 3 * gradient


class OwnFunction(Net):
    folds = 1

    def first(self, x: Tensor) -> Tensor:
        h = self.c1(x)
        return torch.tanh(self.b1(h)) + Halved.apply(h)


class InPlaceBetween(Net):
    folds = 1

    def first(self, x: Tensor) -> Tensor:
        h = self.c1(x)
        h.mul_(0.5)
        return torch.tanh(self.b1(h))


class OutputInPlace(Net):
    def first(self, x: Tensor) -> Tensor:
        return self.b1(self.c1(x)).sigmoid_()


class GradientHook(Net):
    folds = 1

    def first(self, x: Tensor) -> Tensor:
        h = self.c1(x)
        out = self.b1(h)
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient * (gradient > 0))
        return torch.tanh(out)


class KeepsOutput(Net):
    folds = 1

    def first(self, x: Tensor) -> Tensor:
        self.last = self.c1(x)
        return torch.tanh(self.b1(self.last))


class Gamma(Net):
    def second(self, h: Tensor) -> Tensor:
        return super().second(h) * self.b2.weight.abs().view(1, -1, 1, 1)


class Statistics(Net):
    def second(self, h: Tensor) -> Tensor:
        return super().second(h - self.b1.running_mean.view(1, -1, 1, 1))


class Attributes(Net):
    def first(self, x: Tensor) -> Tensor:
        assert isinstance(self.b1, nn.BatchNorm2d)
        assert self.b1.num_features == WIDTH
        return super().first(x)


class FilterNorm(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.c2.weight.norm()


class SharedFilter(Net):
    def second(self, h: Tensor) -> Tensor:
        h = super().second(h)
        return torch.tanh(functional.conv2d(h, self.c2.weight, padding=1))


class Twice(Net):
    folds = 1

    def second(self, h: Tensor) -> Tensor:
        return super().second(super().second(h))


class NormTwiceOfOne(Net):
    folds = 1

    def first(self, x: Tensor) -> Tensor:
        h = self.c1(x)
        return self.b1(h).tanh_() + self.b1(h)


class BufferFilter(Net):
    folds = 1

    def __init__(self) -> None:
        super().__init__()
        weight = self.c2.weight.detach().clone()
        del self.c2.weight
        self.c2.register_buffer("weight", weight)


class Rewritten(Net):
    """A filter that every forward makes from another, as binary networks do."""

    folds = 1

    def __init__(self) -> None:
        super().__init__()
        self.master = nn.Parameter(self.c2.weight.detach().clone())

    def second(self, h: Tensor) -> Tensor:
        self.c2.weight.data.copy_(self.master.tanh())
        return super().second(h)


class Exchanged(Rewritten):
    def second(self, h: Tensor) -> Tensor:
        self.c2.weight.data = self.master.detach().tanh()
        return Net.second(self, h)


class NormFrozenByHand(Net):
    """BatchNorm that stays in training mode, whatever ``eval()`` says."""

    folds = 1

    def first(self, x: Tensor) -> Tensor:
        self.b1.train()
        return super().first(x)


class Later(Net):
    """A branch that only ``step`` decides: a gate from the third batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.late = False

    def first(self, x: Tensor) -> Tensor:
        if not self.late:
            return super().first(x)
        h = self.c1(x)
        return torch.tanh(self.b1(h)) * (h > h.mean(1, keepdim=True))


class OnValues(Net):
    """A branch on the pixels."""

    def first(self, x: Tensor) -> Tensor:
        h = self.c1(x)
        if x[:, 0].mean() > 0.6:
            return torch.tanh(self.b1(h)) * torch.sigmoid(h.detach())
        return torch.tanh(self.b1(h))


class SkipsNorm(Later):
    def first(self, x: Tensor) -> Tensor:
        return torch.tanh(self.c1(x)) if self.late else Net.first(self, x)


class OtherNorm(Later):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(WIDTH)

    def first(self, x: Tensor) -> Tensor:
        h = self.c1(x)
        return torch.tanh((self.other if self.late else self.b1)(h))


class OwnAutocast(Net):
    def second(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().second(h.to(self.fc.weight.dtype))


class NormUnderNoGrad(Net):
    folds = 1

    def first(self, x: Tensor) -> Tensor:
        h = self.c1(x)
        with torch.no_grad():
            still = self.b1(h)
        return torch.tanh(h + still)


class Mapped(Net):
    """``torch.func`` inside of the forward."""

    def first(self, x: Tensor) -> Tensor:
        if self.training:
            return super().first(x)
        return torch.vmap(super().first)(x[None])[0]


class Functional(Net):
    folds = 0

    def forward(self, x: Tensor) -> Tensor:
        doubled = {name: 2 * value for name, value in self.named_parameters()}
        inner = torch.func.functional_call(
            _Body(self), {f"net.{k}": v for k, v in doubled.items()}, x
        )
        return inner + super().forward(x)


class _Body(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return Net.forward(self.net, x)


def reparametrized(kind: str) -> type[Net]:
    class Reparametrized(Net):
        folds = 0

        def __init__(self) -> None:
            super().__init__()
            for convolution in (self.c1, self.c2):
                _REPARAMETRIZE[kind](convolution)

    return Reparametrized


_REPARAMETRIZE = {
    "weight_norm by hooks": weight_norm,
    "spectral_norm by hooks": spectral_norm,
    "prune": lambda convolution: prune.l1_unstructured(convolution, "weight", 0.3),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}

SAME_EVERY_TIME: dict[str, type[Net]] = {
    kind.__name__: kind
    for kind in (
        *(Net, Gate, GateAfter, NoGradStatistic, Winners, Numpy, OwnFunction, InPlaceBetween),
        *(OutputInPlace, GradientHook, KeepsOutput, Gamma, Statistics),
        *(Attributes, FilterNorm, SharedFilter, Twice, NormTwiceOfOne, BufferFilter, Rewritten),
        *(Exchanged, NormFrozenByHand, OwnAutocast, NormUnderNoGrad, Mapped, Functional),
    )
} | {kind: reparametrized(kind) for kind in _REPARAMETRIZE}


def made(kind: type[Net], dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    """A network whose statistics and affine maps make a wrong fold visible."""
    torch.manual_seed(seed)
    model = kind().to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                if module.affine:
                    module.weight.uniform_(0.5, 2)
                    module.bias.uniform_(-1, 1)
                if module.track_running_stats:
                    module.running_var.uniform_(0.2, 3)
                    module.running_mean.uniform_(-0.5, 0.5)
    return model
