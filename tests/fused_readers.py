"""Networks that read the output of a BatchNorm in other ways than by one ReLU."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import torch
from odd_readers import WIDTH, Halved, Net
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint


class Reader(Net):
    """``read`` gets the output ``h`` (B,6,H,W) of the first BatchNorm, and returns a tensor of the
    same shape. The second BatchNorm is followed by ReLU."""

    def first(self, x: Tensor) -> Tensor:
        return self.read(self.b1(self.c1(x)))

    def second(self, h: Tensor) -> Tensor:
        return functional.relu(self.b2(self.c2(h)))

    def read(self, h: Tensor) -> Tensor:
        return torch.relu(h)


def reads(function):  # type: ignore[no-untyped-def]
    """A network with ``read(self, h)`` of this name."""
    kind = type(function.__name__, (Reader,), {"read": function})
    READERS[function.__name__] = kind
    return kind


READERS: dict[str, type[Reader]] = {}


@reads
def relu(self, h):
    return functional.relu(h)


@reads
def relu_in_place(self, h):
    assert functional.relu(h, inplace=True) is not None
    return h


@reads
def relu_method_in_place(self, h):
    return h.relu_() + h


@reads
def relu_module_in_place(self, h):
    y = nn.ReLU(inplace=True)(h)
    return y + 2 * h.detach() * h


@reads
def relu_twice(self, h):
    return functional.relu(h) + 2 * h.relu()


@reads
def relu_of_minus(self, h):
    return functional.relu(h) - functional.relu(-h)


@reads
def gate(self, h):
    return functional.relu(h) * torch.sigmoid(h.mean((2, 3), keepdim=True))


@reads
def gate_before(self, h):
    gate = torch.sigmoid(h.mean((2, 3), keepdim=True))
    return functional.relu(h) * gate


@reads
def relu_in_place_after_reading(self, h):
    mean = h.mean()
    view = h[:, :2]
    h.relu_()
    return torch.cat([view, h[:, 2:]], 1) * mean


@reads
def residual(self, h):
    return functional.relu(h + torch.tanh(self.c1.weight.sum()) * torch.ones_like(h))


@reads
def residual_of_a_leaf(self, h):
    skip = torch.full_like(h, 0.3)
    return functional.relu(skip + h) + functional.relu(h)


@reads
def residual_in_place(self, h):
    skip = 0.5 * h.detach().sin()
    old = h
    h += skip
    return functional.relu(h) + torch.tanh(old)


def ones(h, *shape, dtype=torch.float64):
    """Ones in channels_last, made without ``h``."""
    made = torch.ones(shape or h.shape, dtype=dtype)
    return made.to(memory_format=torch.channels_last)


@reads
def unread_residual_in_place(self, h):
    old = h
    h += 0.3 * ones(h)
    return functional.relu(h) + torch.tanh(old) + Halved.apply(old)


@reads
def one_change_then_a_function(self, h):
    h.sigmoid_()
    return Halved.apply(h)


@reads
def another_shape(self, h):
    skip = ones(h, len(h), 1, *h.shape[2:]) * self.fc.weight.sum().sin()
    return functional.relu(h + skip)


@reads
def another_type(self, h):
    skip = ones(h, dtype=torch.float32) * self.fc.weight.sum().sin().float()
    return functional.relu(h + skip)


@reads
def residual_read(self, h):
    both = h + 0.5 * h.detach().sin()
    return both.tanh() + functional.relu(both) + functional.relu(h)


@reads
def added_thrice(self, h):
    skip = 0.3 * h.detach()
    return functional.relu(h + skip + skip.cos())


@reads
def added_to_another(self, h):
    skip = h.sin()
    skip += h
    return functional.relu(skip)


@reads
def alpha(self, h):
    return functional.relu(torch.add(h, h.detach().sin(), alpha=0.5))


@reads
def number(self, h):
    return functional.relu(h + 0.25) + functional.relu(0.5 + h)


@reads
def broadcast(self, h):
    return functional.relu(h + h.detach()[:, :1])


@reads
def wider(self, h):
    return functional.relu(h[:, :1].detach() + h)


@reads
def two_norms(self, h):
    return functional.relu(h + self.b1(1.5 * h.detach().sin()))


@reads
def two_norms_the_same(self, h):
    return functional.relu(h + h)


@reads
def silu_in_place(self, h):
    functional.silu(h, inplace=True)
    return functional.relu(h) + Halved.apply(h)


@reads
def relu6_in_place(self, h):
    return functional.relu6(h, inplace=True)


@reads
def other_changes_in_place(self, h):
    h.mul_(1.5)
    h[:, 0] = 0.3
    h -= 0.1
    torch.sigmoid(h, out=h) if not h.requires_grad else h.sigmoid_()
    return Halved.apply(h) + functional.relu(h)


@reads
def changed_by_a_view(self, h):
    h.permute(0, 2, 3, 1).mul_(1.5)
    h[:, 1].add_(0.1)
    return functional.relu(h) + Halved.apply(h)


@reads
def own_function(self, h):
    return Halved.apply(h) + functional.relu(h)


@reads
def own_function_of_a_sum(self, h):
    both = h + h.detach().sin()
    return Halved.apply(both) + functional.relu(both)


@reads
def own_function_after_change(self, h):
    h += 0.5 * h.detach()
    mean = h.mean()
    h.relu_()
    return Halved.apply(h) * mean


@reads
def gradient_hook(self, h):
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * (gradient > 0))
    return functional.relu(h) + functional.relu(h + 1.0)


@reads
def gradient_hook_on_a_sum(self, h):
    both = h + h.detach().sin()
    if both.requires_grad:
        both.register_hook(lambda gradient: gradient * (gradient > 0))
    return functional.relu(both)


@reads
def gradient_hook_after_change(self, h):
    h.relu_()
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * (gradient > 0))
    return h.tanh()


@reads
def own_gradient(self, h):
    if not h.requires_grad:
        return functional.relu6(h) * h.cos()
    (found,) = torch.autograd.grad(h.sin().sum(), [h], retain_graph=True)
    return functional.relu6(h) * found


@reads
def checkpointed(self, h):
    return checkpoint(lambda h: torch.tanh(functional.relu(h)) * h, h, use_reentrant=False) + h


@reads
def checkpointed_norm(self, h):
    def inner(h):
        return functional.relu(self.b2(self.c2(torch.relu(h)))) + functional.relu(h + h.sin())

    return checkpoint(inner, h, use_reentrant=False)


@reads
def under_no_grad(self, h):
    with torch.no_grad():
        still = functional.relu(h) + h
        change = h + still
    return functional.relu(h) * torch.sigmoid(still) + functional.relu(change)


@reads
def in_inference_mode(self, h):
    with torch.inference_mode():
        mean = h.mean().item()
    return functional.relu(h) * mean + h.tanh()


@reads
def changed_under_no_grad(self, h):
    with torch.no_grad():
        h.relu_()
        h += 0.25
    return h.sin()


@reads
def detached(self, h):
    return functional.relu(h) + h.detach() + h.data


@reads
def values_in_python(self, h):
    found = h.detach().numpy().sum() + h.sum().item() + float(h.detach().flatten()[0])
    assert "tensor" in repr(h)
    assert "tensor" in f"{h}"
    return functional.relu(h) * torch.sigmoid(torch.tensor(found)).item()


@reads
def copied(self, h):
    twin = copy.deepcopy(h.detach()) + pickle.loads(pickle.dumps(h.detach()))
    file = io.BytesIO()
    torch.save(h.detach(), file)
    file.seek(0)
    return functional.relu(h) + twin + torch.load(file)


@reads
def collected(self, h):
    first, second = torch.stack([h, functional.relu(h)]).unbind()
    return torch.cat((first[:, :2], second[:, 2:]), dim=1) + torch.where(h > 0, h, 0.1 * h)


@reads
def mapped(self, h):
    return torch.vmap(lambda one: functional.relu(one) * one.mean())(h)


@reads
def mapped_over_another(self, h):
    return torch.vmap(lambda one: functional.relu(one + h).mean(0))(h.detach()) * h


@reads
def tangents(self, h):
    at, moves = torch.func.jvp(functional.relu, (h,), (h.detach().cos(),))
    return at + moves


@reads
def scripted(self, h):
    return SCRIPTED(h) + functional.relu(h)


def script_of_h(h: Tensor) -> Tensor:
    return h.relu() * h


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    SCRIPTED = torch.jit.script(script_of_h)


class Nothing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class NothingBelow(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@reads
def under_modes(self, h):
    with Nothing():
        first = functional.relu(h)
    with NothingBelow():
        return first + functional.relu(h) * h.mean()


@reads
def convolved(self, h):
    return self.c2(h) + functional.relu(self.b2(self.c2(h)))


@reads
def normalized_again(self, h):
    return functional.relu(self.b2(h))


@reads
def types(self, h):
    halves = h.to(torch.float32).to(h.dtype)
    return functional.relu(h) + halves.detach() + h.type_as(halves).detach()


def _kept(module, inputs, output):
    module.last = output


class KeepsOutputs(Reader):
    def __init__(self) -> None:
        super().__init__()
        self.b1.register_forward_hook(_kept)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + functional.relu(self.b1.last).mean((1, 2, 3))[:, None]


class DoublesOutputs(Reader):
    def __init__(self) -> None:
        super().__init__()
        self.b1.register_forward_hook(lambda module, inputs, output: 2 * output)
        self.b2.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))


class BackwardHooks(Reader):
    def __init__(self) -> None:
        super().__init__()
        self.b1.register_full_backward_hook(lambda module, found, given: (2 * found[0],))
        self.b2.register_full_backward_pre_hook(lambda module, given: (given[0] * 0.5,))
        self.c2.register_full_backward_hook(lambda module, found, given: (found[0].sin(),))


class TwiceCalled(Reader):
    def read(self, h: Tensor) -> Tensor:
        return torch.relu(self.b1(self.c2(torch.relu(h))))


class Unusual(Reader):
    """BatchNorms without weights, without statistics, with a cumulative average."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList(
            [
                nn.BatchNorm2d(WIDTH, affine=False),
                nn.BatchNorm2d(WIDTH, track_running_stats=False),
                nn.BatchNorm2d(WIDTH, momentum=None),
                nn.BatchNorm2d(WIDTH, eps=0.1, momentum=0.7),
            ]
        )
        self.flat = nn.BatchNorm1d(WIDTH)

    def read(self, h: Tensor) -> Tensor:
        for norm in self.others:
            h = torch.relu(norm(h)) + 0.1 * h
        return torch.relu(h) * self.flat(h.mean((2, 3)))[..., None, None]


class Contiguous(Reader):
    """The second BatchNorm gets another memory format."""

    def second(self, h: Tensor) -> Tensor:
        return torch.relu(self.b2(self.c2(h).contiguous()))


class InEvaluation(Reader):
    """BatchNorms that stay in evaluation mode, whatever ``train()`` says."""

    def forward(self, x: Tensor) -> Tensor:
        self.b1.eval()
        return super().forward(x)

    def read(self, h: Tensor) -> Tensor:
        return torch.relu(h) + h


class CheckpointedWhole(Reader):
    def first(self, x: Tensor) -> Tensor:
        return checkpoint(super().first, x, use_reentrant=False)


class Sums(Reader):
    """Residual sums, which the BatchNorm behind them takes apart."""

    def forward(self, x: Tensor) -> Tensor:
        from fastadv.engine.model.fused_norm import residual

        h = self.first(x)
        both = residual(self.c2(h), h)
        return self.head(self.use(both))

    def use(self, both: Tensor) -> Tensor:
        return torch.relu(self.b2(both)) + both


def uses(function):  # type: ignore[no-untyped-def]
    """A network with ``use(self, both)`` of this name; ``both`` (B,6,H,W) is a residual sum."""
    kind = type(function.__name__, (Sums,), {"use": function})
    SUMS[function.__name__] = kind
    return kind


SUMS: dict[str, type[Sums]] = {"Sums": Sums}


@uses
def normalized_alone(self, both):
    return torch.relu(self.b2(both))


@uses
def read_before(self, both):
    return both.sin() + torch.relu(self.b2(both))


@uses
def read_between(self, both):
    h = self.b2(both)
    return both.sin() * torch.relu(h)


@uses
def not_normalized(self, both):
    return torch.relu(both) + both.sigmoid()


@uses
def normalized_twice(self, both):
    first, second = self.b2(both), self.b1(both)
    return torch.relu(second) + torch.relu(first) * both


@uses
def normalized_and_read(self, both):
    return self.b2(both).tanh() + both


@uses
def sum_for_a_function(self, both):
    return torch.relu(self.b2(both)) + Halved.apply(both)


@uses
def sum_hooked(self, both):
    if both.requires_grad:
        both.register_hook(lambda gradient: gradient * (gradient > 0))
    return torch.relu(self.b2(both)) + both


@uses
def sum_hooked_between(self, both):
    h = self.b2(both)
    if both.requires_grad:
        both.register_hook(lambda gradient: gradient * (gradient > 0))
    return torch.relu(h) + both


@uses
def sum_without_grad(self, both):
    with torch.no_grad():
        still = torch.relu(self.b2(both))
    return torch.relu(self.b1(both)) * still + both


@uses
def relu_without_grad(self, both):
    h = self.b2(both)
    with torch.no_grad():
        still = torch.relu(h)
    return torch.relu(self.b1(both)) * still + both


@uses
def sum_with_two_relus(self, both):
    h = self.b2(both)
    first = torch.relu(h)
    between = both.sin()
    return first * torch.relu(h) + between * both


@uses
def sum_and_more(self, both):
    return torch.relu(self.b2(both) + both)


@uses
def sum_in_place(self, both):
    both *= 1.5
    both += 0.1
    return torch.relu(self.b2(both)) + both


@uses
def sum_checkpointed(self, both):
    def inner(both):
        return torch.relu(self.b2(both)) + both

    return checkpoint(inner, both, use_reentrant=False) + both


@uses
def sum_of_sums(self, both):
    from fastadv.engine.model.fused_norm import residual

    again = residual(self.c2(torch.relu(self.b2(both))), both)
    return torch.relu(self.b1(again)) + again


@uses
def sum_of_an_unread_sum(self, both):
    from fastadv.engine.model.fused_norm import residual

    again = residual(self.c2(both), both)
    return torch.relu(self.b1(again) + torch.ones_like(both))


@uses
def sum_of_a_norm(self, both):
    from fastadv.engine.model.fused_norm import residual

    again = residual(self.b2(both), both)
    return torch.relu(again) + self.b1(residual(both, self.b2(both)))


@uses
def sum_of_other_shapes(self, both):
    from fastadv.engine.model.fused_norm import residual

    again = residual(both, both.detach()[:, :1])
    return torch.relu(self.b1(again))


MODULES: dict[str, type[Reader]] = {
    kind.__name__: kind
    for kind in (
        *(KeepsOutputs, DoublesOutputs, BackwardHooks, TwiceCalled, Unusual, Contiguous),
        *(InEvaluation, CheckpointedWhole),
    )
}
EVERY: dict[str, type[Reader]] = READERS | SUMS | MODULES


# -- refused -------------------------------------------------------------------------------------


def changes_the_input(self: Reader, x: Tensor) -> Tensor:
    given = self.c1(x)
    h = self.b1(given)
    given.mul_(2)
    return functional.relu(h)


def changes_a_summand(self: Reader, x: Tensor) -> Tensor:
    h = self.b1(self.c1(x))
    skip = torch.zeros_like(h)
    both = h + skip
    skip += 1
    return functional.relu(both)


def changes_a_summand_of_a_sum(self: Reader, x: Tensor) -> Tensor:
    from fastadv.engine.model.fused_norm import residual

    h = self.c1(x)
    skip = 0.5 * h.detach()
    both = residual(h, skip)
    skip += 1
    return functional.relu(self.b1(both))


def changes_a_weight(self: Reader, x: Tensor) -> Tensor:
    h = self.b1(self.c1(x))
    with torch.no_grad():
        self.b1.weight.mul_(1.0)
    return functional.relu(h)


def gradient_of_a_used_one(self: Reader, x: Tensor) -> Tensor:
    h = self.b1(self.c1(x))
    y = functional.relu(h)
    return y + (torch.autograd.grad(y.sum(), h, retain_graph=True)[0] if y.requires_grad else 0)


def gradient_of_a_used_sum(self: Reader, x: Tensor) -> Tensor:
    from fastadv.engine.model.fused_norm import residual

    h = self.c1(x)
    both = residual(h, h.detach().sin())
    y = functional.relu(self.b1(both)) + both
    return y + (torch.autograd.grad(y.sum(), both, retain_graph=True)[0] if y.requires_grad else 0)


def hook_on_a_used_one(self: Reader, x: Tensor) -> Tensor:
    h = self.b1(self.c1(x))
    y = functional.relu(h)
    if h.requires_grad:
        h.register_hook(lambda gradient: 2 * gradient)
    return y


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.mark_dirty(h)
        h.mul_(2)
        return h

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def dirty_function(self: Reader, x: Tensor) -> Tensor:
    return torch.tanh(Dirty.apply(self.b1(self.c1(x))))


REFUSED = {
    function.__name__: type(function.__name__, (Reader,), {"first": function})
    for function in (
        *(changes_the_input, changes_a_summand, changes_a_weight, gradient_of_a_used_one),
        changes_a_summand_of_a_sum,
        *(gradient_of_a_used_sum, hook_on_a_used_one, dirty_function),
    )
}
