"""The pass that puts one operator in the place of BatchNorms: where it is exact, and where not.

The operator runs in plain PyTorch here, on float64 tensors of a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_nets import EVERY_PATTERN, EveryPattern, Fused, conv, drawn
from tiny import tiny_batch, tiny_step
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastadv.algorithms.resolution import resolve
from fastadv.engine import fused_graph
from fastadv.engine.compiled import Runner

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(fused_graph, "DTYPES", (torch.float64,))


class Parts(nn.Module):
    """Layers for a function of a test."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = conv(), conv(), conv()
        self.n1, self.n2, self.n3 = (nn.BatchNorm2d(3) for _ in range(3))


Body = Callable[[Parts, Tensor], Tensor]


def images() -> Tensor:
    x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(3)).double()
    return x.to(memory_format=torch.channels_last)


def results(body: Body, runner: Runner, model: nn.Module, x: Tensor) -> list[Tensor]:
    """The values, the gradients for x and the weights, and the buffers, after two passes."""
    weights = list(model.parameters())

    def region(x: Tensor) -> list[Any]:
        x = x.detach() + 0 * weights[0].sum()  # it requires grad
        out = body(model, x)  # type: ignore[arg-type]
        loss = (out * torch.arange(out.numel()).reshape(out.shape).sin()).sum()
        return [out.detach(), *torch.autograd.grad(loss, [x, *weights], allow_unused=True)]

    found = [*runner(region, x), *runner(region, x)]
    return [t for t in (*found, *model.buffers()) if t is not None]


def fused(body: Body, model: nn.Module | None = None, backend: str = "eager") -> list[str]:
    """What was fused in ``body``, whose results are compared with those of the same code as it is
    written."""
    x = images()
    model = drawn(Parts() if model is None else model)
    other = copy.deepcopy(model)
    seen = Fused(backend)
    found = results(body, Runner(True, seen, fused_norm=True), model, x)  # type: ignore[arg-type]
    expected = results(body, Runner(), other, x)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert len(seen.graphs) == 1
    return seen.graphs[0]


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "functional": functional.relu,
    "torch": torch.relu,
    "torch in place": torch.relu_,
    "method": lambda z: z.relu(),
    "method in place": lambda z: z.relu_(),
    "functional in place": lambda z: functional.relu(z, inplace=True),
    "module": nn.ReLU(),
}


@pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS)
def test_with_its_relu(relu: Callable[[Tensor], Tensor]) -> None:
    assert fused(lambda net, x: net.c2(relu(net.n1(net.c1(x))))) == ["r"]


def added_in_place(one: Tensor, other: Tensor) -> Tensor:
    one += other
    return one


ADDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "operator": lambda one, other: one + other,
    "in place": added_in_place,
    "torch": torch.add,
    "method": lambda one, other: one.add(other),
    "method in place": lambda one, other: one.add_(other),
}


@pytest.mark.parametrize("add", ADDS.values(), ids=ADDS)
def test_with_a_residual_after_it(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    def body(net: Parts, x: Tensor) -> Tensor:
        x = net.c1(x)
        return functional.relu(add(net.n1(net.c2(x)), x))

    assert fused(body) == ["ar"]


@pytest.mark.parametrize("add", ADDS.values(), ids=ADDS)
def test_with_a_residual_before_it(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    def body(net: Parts, x: Tensor) -> Tensor:
        x = net.c1(x)
        total = add(net.c2(x), x)
        return net.c3(functional.relu(net.n1(total))) + total.sin()

    assert fused(body) == ["br"]


def scaled(x: Tensor, **changes: Any) -> Tensor:
    return functional.batch_norm(
        x, None, None, training=True, **{"momentum": 0.2, "eps": 1e-3} | changes
    )


FOUND: dict[str, tuple[Body, list[str]]] = {
    "a product reads it": (lambda net, x: net.c2(net.n1(net.c1(x))), [""]),
    "the residual comes first": (
        lambda net, x: functional.relu(net.c1(x) + net.n1(net.c2(net.c1(x)))), ["ar"],
    ),
    "two of them are added": (
        lambda net, x: functional.relu(net.n1(net.c1(x)) + net.n2(net.c2(x))), ["", "ar"],
    ),
    "a residual before and one after": (
        lambda net, x: functional.relu(net.n1(net.c1(x) + net.c2(x)) + net.c3(x)), ["bar"],
    ),
    "without parameters and buffers": (
        lambda net, x: functional.relu(scaled(net.c1(x))), ["r"],
    ),
    "a tensor added to itself": (
        lambda net, x: functional.relu(net.n1((y := net.c1(x)) + y)), ["br"],
    ),
    "twice the same buffers": (
        lambda net, x: functional.relu(net.n1(net.c2(functional.relu(net.n1(net.c1(x)))))),
        ["r", "r"],
    ),
    "its result has three readers": (
        lambda net, x: net.c1(y := functional.relu(net.n1(net.c1(x)))) + net.c2(y) * y.sin(), ["r"],
    ),
    "a later reader of its input": (
        lambda net, x: functional.relu(net.n1(y := net.c1(x))) * y.sin() + net.c2(y), ["r"],
    ),
    "an earlier reader of its input": (
        lambda net, x: (y := net.c1(x)).sin() + functional.relu(net.n1(y)), ["r"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), FOUND.values(), ids=FOUND)
def test_it_is_found(body: Body, expected: list[str]) -> None:
    assert fused(body) == expected


def without_gradients(net: Parts, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = functional.relu(net.n1(net.c1(x)))
    return net.c2(y) + x


def relu_without_gradients(net: Parts, x: Tensor) -> Tensor:
    z = net.n1(net.c1(x))
    with torch.no_grad():
        y = functional.relu(z)
    return net.c2(y) + x


def sum_without_gradients(net: Parts, x: Tensor) -> Tensor:
    with torch.no_grad():
        total = net.c1(x) + net.c2(x)
    return functional.relu(net.n1(total)) + x


def residual_changed(net: Parts, x: Tensor) -> Tensor:
    with torch.no_grad():
        skip, z = net.c1(x), net.n1(net.c2(x))
        skip.mul_(2)
        y = functional.relu(z + skip)
    return x + y


def summand_changed(net: Parts, x: Tensor) -> Tensor:
    with torch.no_grad():
        skip, other = net.c1(x), net.c2(x)
        total = skip + other
        skip[0].zero_()
        y = functional.relu(net.n1(total))
    return x + y + skip


def input_changed(net: Parts, x: Tensor) -> Tensor:
    with torch.no_grad():
        read, skip = net.c1(x), net.c2(x)
        z = net.n1(read)
        read.mul_(2)
        y = functional.relu(z + skip)
    return x + y + read


def input_changed_in_a_checkpoint(net: Parts, x: Tensor) -> Tensor:
    with torch.no_grad():
        read, skip = net.c1(x), net.c2(x)
        z = net.n1(read)
        changed = checkpoint(lambda t: t.mul_(2), read, use_reentrant=False)
        y = functional.relu(z + skip)
    return x + y + changed


def buffer_read(net: Parts, x: Tensor) -> Tensor:
    skip, z = net.c1(x), net.n1(net.c2(x))
    skip = net.c3(skip) + net.n1.running_mean.sum()
    return functional.relu(z + net.c1(skip))


def buffers_moved_twice(net: Parts, x: Tensor) -> Tensor:
    z = net.n1(net.c1(x))
    other = net.c3(net.n1(net.c2(x)))
    return functional.relu(z + other)


def sum_read_before(net: Parts, x: Tensor) -> Tensor:
    total = net.c1(x) + net.c2(x)
    scale = total.mean()
    return functional.relu(net.n1(total)) * scale


def gradient_of_the_sum(net: Parts, x: Tensor) -> Tensor:
    total = net.c1(x) + net.c2(x)
    y = net.c3(functional.relu(net.n1(total))) + total
    return torch.autograd.grad(y.sin().sum(), total, retain_graph=True)[0] + y


def gradient_of_the_result(net: Parts, x: Tensor) -> Tensor:
    y = functional.relu(net.n1(net.c1(x)))
    out = net.c2(y) + net.c3(y)
    return torch.autograd.grad(out.sin().sum(), y, retain_graph=True)[0] + out


def gradient_of_the_input(net: Parts, x: Tensor) -> Tensor:
    read = net.c1(x)
    out = net.c2(functional.relu(net.n1(read))) + read
    return torch.autograd.grad(out.sin().sum(), read, retain_graph=True)[0] + out


def sum_added_after(net: Parts, x: Tensor) -> Tensor:
    total = net.c1(x) + net.c2(x)
    return functional.relu(net.n1(total) + total) + net.c3(total)


def hook_of_the_input(net: Parts, x: Tensor) -> Tensor:
    read = net.c1(x)
    y = functional.relu(net.n1(read))
    read.register_hook(lambda gradient: 2 * gradient)
    return net.c2(y) + net.c3(read)


def hook_of_the_sum(net: Parts, x: Tensor) -> Tensor:
    total = net.c1(x) + net.c2(x)
    y = functional.relu(net.n1(total))
    total.register_hook(lambda gradient: 2 * gradient)
    return net.c3(y) + total


def result_changed(net: Parts, x: Tensor) -> Tensor:
    y = functional.relu(net.n1(net.c1(x)))
    out = net.c2(y.sin()) + y.cos()
    with torch.no_grad():
        kept = functional.relu(net.n2(net.c1(x)))
        twice = net.c2(kept)
        kept.mul_(3)
    return out + kept + twice


def hooked(net: Parts, x: Tensor) -> Tensor:
    z = net.n1(net.c1(x))
    return net.c2(functional.relu(z)) + z.sin()


PARTS: dict[str, tuple[Body, list[str]]] = {
    "the residual is changed before it is added": (residual_changed, ["ar"]),
    "without gradients": (without_gradients, ["r"]),
    "the sum is computed without gradients": (sum_without_gradients, ["r"]),
    "a summand is changed after the sum": (summand_changed, ["r"]),
    "the sum is read before it": (sum_read_before, ["r"]),
    "the gradient for the sum is asked for": (gradient_of_the_sum, ["r"]),
    "the gradient for the result is asked for": (gradient_of_the_result, ["r"]),
    "the gradient for the input is asked for": (gradient_of_the_input, ["r"]),
    "the sum is added after it too": (sum_added_after, ["ar"]),
    "the input has a hook": (hook_of_the_input, ["r"]),
    "the sum has a hook": (hook_of_the_sum, ["r"]),
    "the result is changed in place": (result_changed, ["r", "r"]),
    "a product of tensors is added before": (
        lambda net, x: functional.relu(net.n1(net.c1(x) + x * net.c2(x))), ["r"],
    ),
    "the residual of one of two is a product of tensors": (
        lambda net, x: functional.relu(net.n1(net.c1(x)) + x * net.c2(x))
        + functional.relu(net.n2(net.c3(x))), ["r"],
    ),
    "the sum has a factor": (
        lambda net, x: net.c3(functional.relu(net.n1(torch.add(net.c1(x), net.c2(x), alpha=2))))
        + functional.relu(net.n2(net.c1(x))), ["r"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), PARTS.values(), ids=PARTS)
def test_a_part_of_it_is_left_alone(body: Body, expected: list[str]) -> None:
    assert fused(body) == expected


def eval_mode(net: Parts, x: Tensor) -> Tensor:
    return functional.relu(
        functional.batch_norm(net.c1(x), net.n1.running_mean, net.n1.running_var)
    )


def differentiated_twice(net: Parts, x: Tensor) -> Tensor:
    y = functional.relu(net.n1(net.c1(x)))
    return torch.autograd.grad(y.sin().sum(), x, create_graph=True)[0] + y


def differentiated_by_func(net: Parts, x: Tensor) -> Tensor:
    y = functional.relu(net.n1(net.c1(x)))
    return torch.func.grad(lambda t: functional.relu(scaled(net.c2(t))).sin().sum())(x) + y


LEFT: dict[str, Body] = {
    "in evaluation mode": eval_mode,
    "followed by another function": lambda net, x: functional.silu(net.n1(net.c1(x))),
    "with another reader": hooked,
    "a number is added": lambda net, x: functional.relu(net.n1(net.c1(x)) + 0.5),
    "a row is added": lambda net, x: functional.relu(net.n1(net.c1(x)) + x[:1]),
    "the residual is added with a factor": lambda net, x: functional.relu(
        torch.add(net.n1(net.c1(x)), net.c2(x), alpha=2)
    ),
    "it is added to itself": lambda net, x: functional.relu((z := net.n1(net.c1(x))) + z),
    "a bias is added before": lambda net, x: functional.relu(
        net.n1(functional.conv2d(x, net.c1.weight, net.n2.bias, padding=1))
    ),
    "its input need not be stored": lambda net, x: functional.relu(net.n1(net.c1(x).sigmoid())),
    "the input is changed between": input_changed,
    "the input is changed between, in a checkpoint": input_changed_in_a_checkpoint,
    "a buffer is read between": buffer_read,
    "the ReLU is without gradients": relu_without_gradients,
    "in another layout": lambda net, x: functional.relu(net.n1(net.c1(x).contiguous())),
    "images without a place": lambda net, x: functional.relu(
        functional.batch_norm(net.c1(x).mean((2, 3)), None, None, training=True)
    ),
    "in another precision": lambda net, x: functional.relu(scaled(net.c1(x).float())).double(),
    "a gradient is differentiated": differentiated_twice,
    "a gradient of torch.func": differentiated_by_func,
}


@pytest.mark.parametrize("body", LEFT.values(), ids=LEFT)
def test_it_is_left_alone(body: Body) -> None:
    assert fused(body) == []


def test_buffers_that_move_twice_move_in_order() -> None:
    # Autograd itself refuses what is traced here; the compilers' functional form does not.
    assert fused(buffers_moved_twice, backend="aot_eager") == [""]


def test_on_a_cpu_nothing_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(fused_graph, "DTYPES", (torch.float64,))  # the device alone decides
    assert fused(lambda net, x: functional.relu(net.n1(net.c1(x)))) == []


def test_every_pattern_in_one_network() -> None:
    assert fused(lambda net, x: net(x), model=EveryPattern()) == EVERY_PATTERN


METHODS: dict[str, dict[str, Any]] = {
    "pgd": {},
    "pgd:eval": {"attack_bn": "eval"},
    "apart": {"block_step_init": 0.02},
    "apart:input": {"block_step_init": 0.02, "block_noise_at": "input"},
    "trades": {},
    "awp": {"warmup_epochs": 0},
    "rwp": {"weight_steps": 2},
    "fgsm-n-advlc": {},
    "pgd-igr": {"reg_weight": 1.0},
    "atta-1": {},
    "free": {"replays": 2},
    "kd-swa": {},
    "te": {"te_start": 0},
}


def trained(
    name: str, model: nn.Module, backend: Any = None, updates: int = 2, **options: Any
) -> tuple[list[Tensor], dict[str, Any]]:
    """The losses of the method called ``name``, and the state of the model after them. With a
    ``backend`` it is compiled with fused BatchNorms."""
    method = name.split(":")[0]
    known = resolve(method).options
    settings = METHODS.get(name, {}) | options
    settings |= {"steps": 2} if "steps" in known and "steps" not in settings else {}
    if "teachers" in known:
        settings["teachers"] = [drawn(EveryPattern(), seed).eval() for seed in (7, 8)]
    if "helper" in known:
        settings["helper"] = drawn(EveryPattern(), 7).eval()
    if "apart" in name:
        settings["blocks"] = ["layer1.0", "layer2.0"]
    mode = {"mode": "compiled", "backend": backend} if backend else {}
    step = tiny_step(model, method, total_steps=4, steps_per_epoch=2, **mode, **settings)
    step.internals.net.runner.fused_norm = backend is not None
    losses = []
    for update in range(updates):
        x, y, index, _ = tiny_batch(6, seed=update)
        x = x.to(memory_format=torch.channels_last)
        losses.append(step(x, y, index)["loss"])
    return losses, model.state_dict()


def assert_trains_as_written(name: str, model: nn.Module, backend: Fused, **options: Any) -> None:
    other = copy.deepcopy(model)
    found = trained(name, model, backend, **options)
    expected = trained(name, other, **options)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


# The others repeat kinds of passes that these have.
QUICK = ("apart",)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_a_whole_step(name: str) -> None:
    backend = Fused()
    assert_trains_as_written(name, drawn(EveryPattern()), backend)
    assert any(backend.graphs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apart", "trades"])
def test_a_whole_step_in_generated_code(name: str) -> None:
    backend = Fused("inductor")
    assert_trains_as_written(name, drawn(EveryPattern()), backend)
    assert any(backend.graphs)
