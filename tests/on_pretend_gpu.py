"""Steps on a pretended GPU: nothing mixes devices, waits, or does what a CUDA graph cannot hold.

``pretend_gpu.py`` says how; ``test_cuda_fake.py`` runs this file in a process of its own.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from math import inf
from typing import Any

import pretend_gpu as gpu
import pytest
import torch
from every_recipe import COUNT, EPOCHS, step_of
from pretend_gpu import NotInAGraph, OnDevice, Recorder, WaitsForTheDevice
from tiny import EPS, LEARNING, sgd, tiny_batch, tiny_model, tiny_step, twin
from tiny_staged import SAMPLES, staged_model, view_of
from torch import Tensor, nn

import fastadv
from fastadv.data.device_loader import DeviceLoader
from fastadv.engine.capture import KEPT, Captured
from fastadv.engine.precision import NAMES
from fastadv.engine.recorder import NotReplayable
from fastadv.engine.update import Updater
from fastadv.plan import resolve
from fastadv.recipes import METHODS
from fastadv.training_step import Step

# cuSOLVER's results are looked at on the host.
NOT_REPLAYABLE = {"fgsm-n-advlc-nuclear"}

# What recordings hold. Each was judged: it neither waits for the device nor copies from the host,
# and draws nothing. A new one must be judged, too (is there a CUDA graph test that uses it? does
# its CUDA code call cudaMemcpy, .item(), .cpu() or thrust without a policy?), and then added.
JUDGED = {
    *("__rshift__", "_foreach_add", "_foreach_add_", "_foreach_copy_", "_foreach_lerp_"),
    *("_log_softmax", "_log_softmax_backward_data", "_softmax", "_softmax_backward_data"),
    *("_to_copy", "abs", "add"),
    *("add_", "addmm", "alias", "amax", "any", "arange", "argmax", "bitwise_and", "bitwise_or"),
    *("bitwise_xor", "cat", "clamp", "clone", "convolution", "convolution_backward", "copy_"),
    *("cos", "detach", "div", "div_", "empty", "empty_like", "eq", "exp", "expand", "full"),
    *("gather", "ge", "gt", "index", "index_copy_", "index_put", "index_put_", "le"),
    *("linalg_vector_norm", "log", "logical_and_", "lt", "masked_fill_", "mean", "mm", "mul"),
    *("mul_", "nan_to_num_", "native_batch_norm", "native_batch_norm_backward", "ne", "neg"),
    *("new_zeros", "nll_loss_backward", "nll_loss_forward", "ones", "ones_like", "pow"),
    *("reciprocal", "rsqrt", "rsub", "scalar_tensor", "scatter_add", "select", "select_backward"),
    *("sgn", "sigmoid", "sigmoid_backward", "sign", "sin", "slice", "slice_backward", "softplus"),
    *("softplus_backward", "sort", "split", "split_with_sizes", "sqrt", "squeeze", "stack", "sub"),
    *("sub_", "sum", "t", "transpose", "unbind", "unsqueeze", "view", "where", "zeros"),
    *("zeros_like",),
}


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with gpu.pretend_gpu():
        yield


def on_device(model: nn.Module) -> nn.Module:
    return model.to(gpu.DEVICE)


def captured(step: Step, **options: Any) -> Step:
    step.passes = Captured(step.walk, Recorder(), **options)
    return step


def call(step: Step, update: int, count: int = COUNT, *, spoilt: bool = False) -> dict[str, Tensor]:
    """Update number ``update`` of ``step``, on a batch of its own, where the model is."""
    x, y, _, _ = tiny_batch(count, seed=update)
    x = x.to(next(step.model.parameters()).dtype) * (float("nan") if spoilt else 1.0)
    index = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(update))[:count]
    more: dict[str, Any] = {"view": view_of(count, update)}
    if "second_view" in step.plan.needs:
        more["second"] = tiny_batch(count, seed=100 + update)[0]
    if step.device.type == gpu.NAME:
        x, y, index, more = gpu.to_device((x, y, index, more))
    return step(x, y, index, **more)


def assert_same_run(first: Step, second: Step) -> None:
    """Weights, buffers and states of a step on the device and of one on the CPU agree."""
    pairs = [
        *zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True)
    ]
    pairs += zip(first.state.items(), second.state.values(), strict=True)
    for (name, own), other in pairs:
        own, other = gpu.to_host((own, other))
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10, msg=name)


def covering() -> set[str]:
    """Few recipes in which every part of every slot occurs, and every need."""
    wanted = {name: set(resolve(name).slots.items()) | resolve(name).needs for name in METHODS}
    missing: set[Any] = set().union(*wanted.values())
    chosen = set()
    while missing:
        best = max(wanted, key=lambda name: len(wanted[name] & missing))
        chosen.add(best)
        missing -= wanted[best]
    return chosen


QUICK = covering() | {"pgd-eval", "pgd-flipped", "trades-te", "apart-no-start"} | NOT_REPLAYABLE


def tiered(name: str) -> object:
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("method", [tiered(name) for name in METHODS])
def test_a_replayed_recipe_is_the_one_on_the_cpu(method: str) -> None:
    cpu = step_of(method, staged_model())
    step = captured(step_of(method, on_device(staged_model())))
    if method in NOT_REPLAYABLE:
        with pytest.raises(NotReplayable, match="mode='eager'"):
            call(step, 0)
        return
    call(cpu, 0), call(step, 0)
    with gpu.no_waits():
        for update in range(1, EPOCHS):
            call(cpu, update), call(step, update)
    assert_same_run(step, cpu)
    step.check()
    held = {str(entry[0]).split(".")[1] for log in recordings(step) for entry in log.calls}
    assert held <= JUDGED, "not judged yet"


def recordings(step: Step) -> list[gpu.Recording]:
    found: list[gpu.Recording] = step.passes.recorder.recordings
    return found


# -- what a recording must survive ----------------------------------------------------------------


def test_a_walk_that_waits_runs_as_written_unless_capture_is_insisted_on() -> None:
    method = "fgsm-n-advlc-nuclear"
    cpu, step = step_of(method, staged_model()), step_of(method, on_device(staged_model()))
    captured(step, insist=False)
    with pytest.warns(UserWarning, match="cannot be replayed"):
        call(step, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(step, 1)
    call(cpu, 0), call(cpu, 1)
    assert_same_run(step, cpu)


def test_batches_of_many_sizes_take_turns() -> None:
    """More situations than are kept, each forgotten and recorded again."""
    cpu = step_of("trades-awp", staged_model(), epoch_length=20)
    step = captured(step_of("trades-awp", on_device(staged_model()), epoch_length=20))
    for update, count in enumerate([6, 4, 6, 3, 5, 2, 6, 4, 6]):
        call(cpu, update, count), call(step, update, count)
    assert_same_run(step, cpu)
    assert step.passes.recorded > KEPT


def test_a_state_that_grows_for_a_larger_batch() -> None:
    cpu, step = step_of("free", staged_model()), step_of("free", on_device(staged_model()))
    captured(step)
    for update, count in enumerate([3, 6, 3, 6]):
        call(cpu, update, count), call(step, update, count)
    assert_same_run(step, cpu)


def test_gradients_that_layers_scale_are_fresh_every_time() -> None:
    options = {"layers": "fixed-lr", "layer_groups": ("3", "4"), "rate_form": "gradient"}
    options |= {"fixed_lr": 0.2}
    cpu = step_of("fgsm", staged_model(), **options)
    step = captured(step_of("fgsm", on_device(staged_model()), **options))
    for update in range(3):
        call(cpu, update), call(step, update)
    assert_same_run(step, cpu)


def test_scratch_that_is_replaced_stays_with_the_recordings_that_use_it() -> None:
    """A network in another precision, or other weights to perturb, need other scratch."""
    options = {"attack_bn": "eval", "warmup_epochs": 0}
    cpu = step_of("awp", staged_model(), **options)
    step = captured(step_of("awp", on_device(staged_model()), **options))
    for update in range(3):
        call(cpu, update), call(step, update)
        step.net.copies._copies = {}
        step.plan.weights.originals, step.plan.weights.moved_by = [], []
    assert step.passes.recorded == 1
    assert_same_run(step, cpu)


LOW = [("apart", "bf16"), ("trades-awp", "bf16"), ("pgd-eval", "fp16"), ("fgsm-n-advlc", "fp16")]


@pytest.mark.parametrize(("method", "kind"), LOW)
def test_low_precision_is_replayed(method: str, kind: str) -> None:
    """Autocast's casts, the attack's copies of the weights, and the scaler."""
    options: dict[str, Any] = {"warmup_epochs": 0} if "awp" in method else {}
    if "steps" in resolve(method).options:
        options["steps"] = 2
    steps = []
    for _ in range(2):
        model = on_device(staged_model().float())
        steps.append(
            fastadv.step(
                model,
                sgd(model),
                method,
                eps=EPS,
                amp=True,
                amp_dtype=kind,
                mode="eager",
                num_samples=SAMPLES,
                total_steps=8,
                **options,
            )
        )
    eager, step = steps
    captured(step)
    for update in range(4):
        losses = [call(each, update)["loss"] for each in steps]
        assert torch.equal(*gpu.to_host(losses))
    assert_same_run(step, eager)
    entries = [entry for log in recordings(step) for entry in log.calls]
    kinds = {args[0].dtype for call, args, _, _ in entries if "convolution" in str(call)}
    assert kinds == {NAMES[kind]}


def test_a_graph_somebody_holds_is_not_touched() -> None:
    """Autograd's nodes of the parameters would bring the stream of that graph into the capture."""
    model = on_device(staged_model())
    x = gpu.to_device(tiny_batch(COUNT)[0])
    held = model.eval()(x).sum()
    model.train()
    seen: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: seen.append(name) if gpu.Rules.log else None)
    cpu, step = step_of("trades-awp", staged_model()), step_of("trades-awp", model)
    captured(step)
    for update in range(2):
        call(cpu, update), call(step, update)
    assert held.requires_grad
    assert seen == []
    assert_same_run(step, cpu)
    assert [*model.parameters()] == [*step.walk.learning()]


def test_a_parameter_kept_aside_and_held_in_a_graph_is_refused() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = staged_model()
            self.gain = nn.Parameter(torch.ones(4).double())
            self.keep: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.keep[0]

    model = on_device(Aside())
    model.keep = [model.gain]
    held = model(gpu.to_device(tiny_batch(COUNT)[0])).sum()
    step = captured(tiny_step(model, "fgsm", optimizer=sgd(model)))
    with pytest.raises(NotReplayable, match="parameters"):
        call(step, 0)
    assert held.requires_grad


# -- between the graphs ---------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("kind", ["sgd", "fused sgd", "adam", "fused adam"])
def test_an_optimizer_stops_at_the_first_bad_update(kind: str, max_grad_norm: float | None) -> None:
    fused, algorithm = "fused" in kind, torch.optim.SGD if "sgd" in kind else torch.optim.Adam
    steps, weights = [], []
    for model in (tiny_model(), on_device(tiny_model())):
        settings = {"momentum": 0.9} if "sgd" in kind else {}
        optimizer = algorithm(model.parameters(), lr=0.05, fused=fused or None, **settings)
        steps.append(tiny_step(model, "fgsm", optimizer=optimizer, max_grad_norm=max_grad_norm))
        call(steps[-1], 0)
        with gpu.no_waits():
            call(steps[-1], 1)
            weights.append({n: gpu.to_host(v.clone()) for n, v in model.state_dict().items()})
            call(steps[-1], 2, spoilt=True)
            call(steps[-1], 3)
    assert_same_run(steps[1], steps[0])
    for name, value in steps[1].model.state_dict().items():
        assert torch.equal(gpu.to_host(value), weights[1][name]), name
    with pytest.raises(fastadv.TrainingError, match="step 2"):
        steps[1].check()


@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_reach_a_fused_optimizer_in_the_layout_of_their_weights(accumulate: bool) -> None:
    """Images in channels_last give convolutions such gradients, whatever their weights are."""
    steps = []
    for model in (tiny_model(), on_device(tiny_model())):
        optimizer = torch.optim.SGD(model.parameters(), **LEARNING, fused=True)
        steps.append(tiny_step(model, "fgsm", optimizer=optimizer))
        x, y, index = tiny_batch(COUNT)[:3]
        x = x.to(memory_format=torch.channels_last)
        if len(steps) == 2:
            x, y, index = gpu.to_device((x, y, index))
        for update in (not accumulate, True):
            steps[-1](x, y, index, update=update)
        strides = [(p.stride(), p.grad.stride()) for p in model.parameters()]
        assert all(weight == gradient for weight, gradient in strides)
    assert_same_run(steps[1], steps[0])


@pytest.mark.parametrize("kind", ["sgd", "fused sgd", "adam"])
def test_overflows_are_left_out_as_a_scaler_does(kind: str) -> None:
    """The first, which finds an optimizer without state, and a later one."""
    ours, theirs = on_device(tiny_model()), tiny_model()
    if kind == "adam":
        own, other = (torch.optim.Adam(m.parameters(), lr=0.01) for m in (ours, theirs))
    else:
        # PyTorch's fused SGD goes on from unwritten memory where a scaler masks its first step.
        other = sgd(theirs)
        own = torch.optim.SGD(ours.parameters(), **LEARNING, fused="fused" in kind)
    scaler, plain = (torch.amp.GradScaler(name, init_scale=8.0) for name in (gpu.NAME, "cpu"))
    updater = Updater(own, gpu.DEVICE, scaler, None)
    loss, number = gpu.to_device((torch.ones(()), torch.tensor(0)))
    for place, size in enumerate([inf, 1.0, 1.0, inf, 1.0]):
        scale = plain.scale(torch.ones(()))
        gradients = [torch.full_like(p, size) * scale for p in theirs.parameters()]
        waits = place < 2 or kind == "adam"  # until the first one that counts
        with nullcontext() if waits else gpu.no_waits():
            updater.begin()
            given = gpu.to_device([gradient.clone() for gradient in gradients])
            updater([*ours.parameters()], given, loss, number, update=True)
        for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
            parameter.grad = gradient
        plain.step(other)
        plain.update()
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(gpu.to_host(found), expected, rtol=1e-12, atol=1e-12)
    assert scaler.get_scale() == plain.get_scale() == 2.0
    updater.faults.check()


def test_averages_are_evaluated_with_statistics_of_batches_on_the_host() -> None:
    scores = []
    for averaging, model in itertools.product(("swa", "ema"), (tiny_model(), tiny_model())):
        on_gpu = len(scores) % 2 == 1
        model = on_device(model) if on_gpu else model
        step = tiny_step(
            model, "fgsm", averaging=averaging, total_steps=3, steps_per_epoch=1,
            **({"average_start": 0} if averaging == "swa" else {}),
        )  # fmt: skip
        for update in range(3):
            call(step, update)
        x = tiny_batch(COUNT, seed=9)[0]
        with step.evaluation_weights([x, (x, None)]):
            scores.append(gpu.to_host(model(gpu.to_device(x) if on_gpu else x)))
    assert torch.allclose(scores[0], scores[1], rtol=1e-12, atol=1e-12)
    assert torch.allclose(scores[2], scores[3], rtol=1e-12, atol=1e-12)


# -- around the step ------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["constant", "reflect"])
def test_a_loader_on_the_device_gives_what_one_on_the_cpu_gives(padding: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 4, (23,), generator=generator)
    options: dict[str, Any] = {"batch_size": 5, "pad": 2, "flip": True, "padding": padding}
    options |= {"views": 2, "channels_last": True, "indices": torch.arange(1, 23)}
    expected = DeviceLoader(images, labels, **options)
    loader = DeviceLoader(images, labels, device=gpu.DEVICE, **options)
    with gpu.no_waits():
        pairs = [*zip(loader.epoch(1, 1), expected.epoch(1, 1), strict=True)]
    for own, other in pairs:
        assert isinstance(own.image, OnDevice)
        assert own.image.stride() == other.image.stride()
        for name in ("index", "image", "label", "view", "second"):
            found = gpu.to_host(getattr(own, name))
            for a, b in zip(flat(found), flat(getattr(other, name)), strict=True):
                assert torch.equal(a, b), name


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for each in value for t in flat(each)]


@pytest.mark.parametrize("name", ["clean", "fgsm-rwp", "pgd-3-2", "cw-3", "noise-0.1"])
def test_an_evaluation_on_the_device_is_the_one_on_the_cpu(name: str) -> None:
    x, y, _, _ = tiny_batch(12)
    batches = [*zip(x.split(5), y.split(5), strict=True)]
    model = staged_model().eval()
    expected = fastadv.evaluate(model, batches, attacks=(name,), eps=0.05)
    found = fastadv.evaluate(on_device(twin(model)), batches, attacks=(name,), eps=0.05)
    assert found == expected


# -- the device itself ----------------------------------------------------------------------------


def tensor() -> Tensor:
    return gpu.to_device(torch.arange(6.0).view(2, 3))


def test_two_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="on the device and on the CPU"):
        tensor() + torch.ones(2, 3)
    assert gpu.to_host(tensor() + torch.tensor(1.0)).sum() == 21


WAITS = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.sum() > 0),
    "float": lambda t: float(t[0, 0]),
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 1],
    "masked assignment": lambda t: t.__setitem__(t > 1, torch.zeros(4).to(gpu.DEVICE)),
    "cpu": lambda t: t.cpu(),
    "tolist": lambda t: t.tolist(),
    "copy": lambda t: torch.empty(2, 3).copy_(t),
    "unique": lambda t: t.unique(),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_seen(name: str) -> None:
    WAITS[name](tensor())
    with gpu.no_waits(), pytest.raises(WaitsForTheDevice):
        WAITS[name](tensor())


UNRECORDABLE = {
    "an upload": lambda t: t + torch.ones(2, 3).to(t.device),
    "an uploaded number": lambda t: t.fill_(0) + torch.tensor(1.0),
    "indices from the host": lambda t: t[torch.tensor([0])],
    "unseeded noise": lambda t: torch.rand_like(t),
}


@pytest.mark.parametrize("name", UNRECORDABLE)
def test_what_a_graph_cannot_hold_is_seen(name: str) -> None:
    here = tensor()
    UNRECORDABLE[name](here)
    with pytest.raises(NotInAGraph):
        Recorder()(lambda: UNRECORDABLE[name](here))


def test_a_recording_computes_nothing_until_it_is_replayed() -> None:
    x, total = tensor(), gpu.to_device(torch.zeros(()))
    factor = 2.0
    result, replay = Recorder()(lambda: (total.add_(x.sum()), x * factor)[1])
    assert float(total) == 0
    assert not torch.equal(gpu.to_host(result), gpu.to_host(x * 2))
    x.fill_(1)
    factor = 3.0
    replay()
    replay()
    assert float(total) == 12
    assert torch.equal(gpu.to_host(result), torch.full((2, 3), 2.0))


def test_memory_that_was_freed_is_seen() -> None:
    x = tensor()
    scratch = [x * 2]
    result, replay = Recorder()(lambda: x + scratch[0])
    replay()
    scratch.clear()
    with pytest.raises(NotInAGraph, match="nobody holds"):
        replay()
    assert result.shape == x.shape


def test_memory_of_a_graph_that_another_may_use_is_seen() -> None:
    x, kept = tensor(), []

    def first_fills() -> Tensor:
        if not kept:
            kept.append(x * 2)
        return x + kept[0]

    result, replay = Recorder()(first_fills)
    _, again = Recorder()(first_fills)
    replay()
    expected = gpu.to_host(x) * 3
    assert torch.equal(gpu.to_host(result), expected)
    kept.clear()
    with pytest.raises(NotInAGraph, match="nobody holds"):
        again()
