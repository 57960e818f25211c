"""Steps on a pretended GPU: none mixes devices, synchronises, or does what a graph cannot hold.

``pretend_gpu.py`` says how; ``test_cuda_fake.py`` runs this file in a process of its own.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import launch_plan
import pretend_gpu as gpu
import pytest
import torch
from every_recipe import COUNT, EPOCHS, step_of
from pretend_gpu import NotInAGraph, OnDevice, Recorder, WaitsForTheDevice
from pretend_steps import assert_same_run, call, captured, on_device, recordings
from tiny import EPS, sgd, tiny_batch, tiny_model, tiny_step, twin
from tiny_staged import SAMPLES, staged_model
from torch import Tensor, nn

import fastadv
from fastadv.algorithms.recipes.table import METHODS
from fastadv.algorithms.resolution import resolve
from fastadv.data.device_loader import DeviceLoader
from fastadv.engine.cuda_graph import NotReplayable
from fastadv.engine.model.precision import DTYPES
from fastadv.evaluation.attacks import inputs
from fastadv.training.captured import MAX_RECORDINGS

# cuSOLVER's results are read on the host.
NOT_REPLAYABLE = {"fgsm-n-advlc-nuclear", "nuat"}

# What recordings hold. Each was checked: it neither waits for the device nor copies from the host,
# and draws nothing. A new one must also be checked (is there a CUDA graph test that uses it? does
# its CUDA code call cudaMemcpy, .item(), .cpu() or thrust without a policy?), and then added.
JUDGED = {
    *("__rshift__", "_foreach_add", "_foreach_add_", "_foreach_copy_", "_foreach_lerp_"),
    *("_foreach_norm", "_foreach_zero_"),
    *("_log_softmax", "_log_softmax_backward_data", "_softmax", "_softmax_backward_data"),
    *("_to_copy", "abs", "add", "all"),
    *(
        "add_",
        "addmm",
        "alias",
        "amax",
        "any",
        "arange",
        "argmax",
        "bitwise_and",
        "bitwise_and_",
        "bitwise_not",
        "bitwise_or",
    ),
    *(
        "bitwise_xor",
        "bitwise_xor_",
        "cat",
        "clamp",
        "clamp_",
        "clone",
        "convolution",
        "convolution_backward",
        "copy_",
    ),
    *("cos", "detach", "div", "div_", "empty", "empty_like", "eq", "exp", "expand", "full"),
    *("gather", "ge", "gt", "index", "index_copy_", "index_put", "index_put_", "le"),
    *("linalg_vector_norm", "log", "logical_and_", "lt", "masked_fill_", "mean", "mm", "mul"),
    *("mul_", "nan_to_num_", "native_batch_norm", "native_batch_norm_backward", "ne", "neg"),
    *("new_zeros", "nll_loss_backward", "nll_loss_forward", "ones", "ones_like", "pow"),
    *("reciprocal", "rsqrt", "rsub", "scalar_tensor", "scatter_add", "select", "select_backward"),
    *("sgn", "sigmoid", "sigmoid_backward", "sign", "sin", "slice", "slice_backward", "softplus"),
    *("softplus_backward", "sort", "split", "split_with_sizes", "sqrt", "squeeze", "stack", "sub"),
    *("sub_", "sum", "t", "transpose", "unbind", "unsqueeze", "view", "where", "zeros"),
    *(
        "zeros_like",
        "erfinv",
        "fill_",
        "full_like",
        "lerp",
        "logical_or_",
        "masked_fill",
        "permute",
    ),
    *("relu", "threshold_backward", "topk", "xlogy"),
}


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with gpu.pretend_gpu():
        yield


def covering() -> set[str]:
    """A few recipes that contain every requirement, and every part of every slot but the four that
    have most; those are complete in the slow tier."""
    wanted: dict[str, set[Any]] = {}
    for name in METHODS:
        plan = resolve(name)
        wanted[name] = {*plan.needs, *plan.slots.items()}
        wanted[name] -= {
            (slot, plan.slots[slot]) for slot in ("adversary", "regularizer", "start", "objective")
        }
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
    launch_plan.assert_known(method, recordings(step))


# -- what a recording must survive ----------------------------------------------------------------


def test_an_update_that_synchronises_runs_uncaptured_unless_strict() -> None:
    method = "fgsm-n-advlc-nuclear"
    cpu, step = step_of(method, staged_model()), step_of(method, on_device(staged_model()))
    captured(step, strict=False)
    with pytest.warns(UserWarning, match="cannot be replayed"):
        call(step, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(step, 1)
    call(cpu, 0), call(cpu, 1)
    assert_same_run(step, cpu)


def test_batches_of_many_sizes_alternate() -> None:
    """More situations than are kept, so each is forgotten and recorded again."""
    cpu = step_of("trades-awp", staged_model(), epoch_length=20)
    step = captured(step_of("trades-awp", on_device(staged_model()), epoch_length=20))
    for update, count in enumerate([6, 4, 6, 3, 5, 2, 6, 4, 6]):
        call(cpu, update, count), call(step, update, count)
    assert_same_run(step, cpu)
    assert step.internals.passes.recorded > MAX_RECORDINGS


def test_a_state_that_grows_for_a_larger_batch() -> None:
    cpu, step = step_of("free", staged_model()), step_of("free", on_device(staged_model()))
    captured(step)
    for update, count in enumerate([3, 6, 3, 6]):
        call(cpu, update, count), call(step, update, count)
    assert_same_run(step, cpu)


def test_gradients_scaled_by_layers_are_new_in_every_replay() -> None:
    options = {"layers": "fixed-lr", "layer_groups": ("3", "4"), "rate_form": "gradient"}
    options |= {"fixed_lr": 0.2}
    cpu = step_of("fgsm", staged_model(), **options)
    step = captured(step_of("fgsm", on_device(staged_model()), **options))
    for update in range(3):
        call(cpu, update), call(step, update)
    assert_same_run(step, cpu)


def test_replaced_scratch_memory_is_kept_by_the_recordings_that_use_it() -> None:
    """A network in another precision, or other weights to perturb, need other scratch."""
    options = {"attack_bn": "eval", "warmup_epochs": 0}
    cpu = step_of("awp", staged_model(), **options)
    step = captured(step_of("awp", on_device(staged_model()), **options))
    for update in range(3):
        call(cpu, update), call(step, update)
        step.internals.net.copies._copies = {}
        step.plan.weights.originals, step.plan.weights.moved_by = [], []
    assert step.internals.passes.recorded == 1
    assert_same_run(step, cpu)


LOW = [("apart", "bf16"), ("fgsm-n-advlc", "fp16")]
LOW_TOO = [("trades-awp", "bf16"), ("pgd-eval", "fp16")]


def too(*cases: Any) -> list[Any]:
    """More cases of a kind, for the slow tier."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("method", "kind"), [*LOW, *too(*LOW_TOO)])
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
    assert kinds == {DTYPES[kind]}


def test_an_autograd_graph_that_the_user_holds_is_kept() -> None:
    """Autograd's nodes of the parameters would bring the stream of that graph into the capture."""
    model = on_device(staged_model())
    x = gpu.to_device(tiny_batch(COUNT)[0])
    held = model.eval()(x).sum()
    model.train()
    own = {id(parameter) for parameter in model.parameters()}
    recorded: list[bool] = []  # True if the model held a parameter of that graph

    def look(module: nn.Module, _: object) -> None:
        if gpu.Rules.log:
            recorded.append(any(id(p) in own for p in module.parameters() if p.requires_grad))

    model.register_forward_pre_hook(look)
    cpu, step = step_of("trades-awp", staged_model()), step_of("trades-awp", model)
    captured(step)
    for update in range(2):
        call(cpu, update), call(step, update)
    assert held.requires_grad
    assert len(recorded) > 0
    assert not any(recorded)
    assert_same_run(step, cpu)
    assert [*model.parameters()] == [*step.internals.update.parameters.learning()]


def test_a_parameter_in_a_list_and_in_a_held_graph_is_refused() -> None:
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


# -- around the step ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["clean", "fgsm-rwp", "pgd-3-2", *too(["cw-3"], ["noise-0.1"])])
def test_an_evaluation_on_the_device_is_the_one_on_the_cpu(name: str) -> None:
    x, y, _, _ = tiny_batch(12)
    batches = [*zip(x.split(5), y.split(5), strict=True)]
    model = staged_model().eval()
    expected = fastadv.evaluate(model, batches, attacks=(name,), eps=0.05)
    found = fastadv.evaluate(on_device(twin(model)), batches, attacks=(name,), eps=0.05)
    assert found == expected


SEARCHES = ("apgd-ce-6+apgd-t-5-2", "fab-t-4-2", "square-40")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "auto") for name in SEARCHES),
        *too(("apgd-dlr-6-2", "auto"), ("fab-t-4-2", "eager")),
    ],
)
def test_searches_are_replayed_and_find_what_they_find_on_the_cpu(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders: list[gpu.Recorder] = []

    def recorder(device: object, mode: str) -> gpu.Recorder | None:
        if mode == "eager":
            return None
        recorders.append(gpu.Recorder())
        return recorders[-1]

    monkeypatch.setattr(inputs, "recorder_for", recorder)
    eps = 0.2 if "square" in name else 0.05
    x = tiny_batch(12)[0]
    model = staged_model().eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    batches = [*zip(x.split(5), y.split(5), strict=True)]
    expected = fastadv.evaluate(model, batches, attacks=("clean", name), eps=eps)
    found = fastadv.evaluate(
        on_device(twin(model)), batches, attacks=("clean", name), eps=eps, mode=mode
    )
    assert found == expected
    assert 0 < found[name] < found["clean"] == 1
    made = sum(len(each.recordings) for each in recorders)
    assert made >= len(name.split("+")) if mode == "auto" else made == 0


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
def test_synchronisations_are_detected(name: str) -> None:
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
def test_operations_that_a_graph_cannot_hold_are_detected(name: str) -> None:
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


def test_use_of_freed_memory_is_detected() -> None:
    x = tensor()
    scratch = [x * 2]
    result, replay = Recorder()(lambda: x + scratch[0])
    replay()
    scratch.clear()
    with pytest.raises(NotInAGraph, match="nobody holds"):
        replay()
    assert result.shape == x.shape


def test_results_overwritten_by_an_earlier_graph_are_detected() -> None:
    x, recorder = tensor(), Recorder()
    _, first = recorder(lambda: x * 2)
    shared, second = recorder(lambda: x * 3)
    own, third = recorder(lambda: x * 4, alone=True)
    second(), third(), first()
    assert not torch.equal(gpu.to_host(shared), gpu.to_host(x) * 3)
    assert torch.equal(gpu.to_host(own), gpu.to_host(x) * 4)


def test_memory_shared_between_graphs_is_detected() -> None:
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
