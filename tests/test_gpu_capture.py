"""Steps as CUDA graphs on a GPU: what ``on_pretend_gpu.py`` cannot check."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from every_recipe import COUNT, EPOCHS, step_of
from tiny import CLASSES, tiny_batch
from tiny_staged import SAMPLES, StagedNet, staged_model, view_of
from torch import Tensor, nn

import fastadv
from fastadv.engine.cuda_graph import NotReplayable
from fastadv.training.captured import CapturedUpdate
from fastadv.training.training_step import Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

METHODS = ("pgd", "apart", "free", "trades-awp", "rwp", "te", "trades-sat", "atta-1", "swa")
METHODS += ("advlc", "fgsm-n-advlc", "fgsm-n-gradalign", "gairat", "pgd-eval")
METHODS += ("gat", "fgsm-mep", "fgsm-bp", "elle-a", "random-eps")
METHODS += ("ssat", "rs-aaer", "fgsm-cuap", "fgsm-mep-cs", "fgsm-pco")
KERNELS = ("fast", "apart", "atta-1", "advlc", "trades", "rwp", "pgd-eval")


def make(method: str, mode: str, dtype: torch.dtype = torch.float64, **options: Any) -> Step:
    """A run of a few epochs; too short for ``captured`` to compile."""
    model = staged_model().to("cuda", dtype)
    return step_of(method, model, mode, **options)


def call(step: Step, update: int, count: int = COUNT) -> Tensor:
    x, y, _, _ = tiny_batch(count, seed=update)
    x = x.to("cuda", next(step.model.parameters()).dtype)
    index = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(update))[:count]
    view = type(view_of(count))(*(tensor.cuda() for tensor in view_of(count, update)))
    return step(x, y.cuda(), index.cuda(), view=view)["loss"]


def assert_same_model(first: nn.Module, second: nn.Module) -> None:
    for (name, own), other in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-8, msg=name)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN may add up gradients in another order at each call, and a gradient that is 0 in one and
    1e-20 in the other has another sign, with which an attack moves a pixel the other way."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("method", METHODS)
def test_replays_are_the_eager_updates(method: str) -> None:
    """In float64, where rounding decides no sign; with a short last batch."""
    eager, step = make(method, "eager"), make(method, "captured")
    for update, count in enumerate([6, 6, 4, 6][:EPOCHS]):
        expected = call(eager, update, count)
        torch.testing.assert_close(call(step, update, count), expected, rtol=1e-8, atol=1e-8)
    assert isinstance(step.internals.passes, CapturedUpdate)
    assert step.internals.passes.recorded >= 2
    assert_same_model(step.model, eager.model)
    for name, tensor in eager.state.items():
        torch.testing.assert_close(step.state[name], tensor, rtol=1e-8, atol=1e-8, msg=name)
    step.check()


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("method", KERNELS)
def test_replays_of_the_kernels_are_the_eager_updates(method: str) -> None:
    """In float32, where the Triton kernels run."""
    eager, step = (make(method, mode, torch.float32) for mode in ("eager", "captured"))
    for update in range(3):
        expected = call(eager, update)
        torch.testing.assert_close(call(step, update), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kind", ["fused sgd", "adam"])
def test_replays_of_an_optimizer_follow_its_rate(kind: str) -> None:
    steps, rates = [], []
    for mode in ("eager", "captured"):
        model = staged_model().float().cuda()
        if kind == "adam":
            optimizer = torch.optim.Adam(model.parameters(), capturable=True)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
        steps.append(fastadv.step(model, optimizer, "standard", mode=mode, total_steps=8))
        rates.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 0.8**update))
    for update in range(6):
        x, y, _, _ = tiny_batch(COUNT, seed=update)
        norms = [step(x.float().cuda(), y.cuda())["grad_norm"] for step in steps]
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=0)
        for rate in rates:
            rate.step()
    eager, captured = steps
    assert captured.internals.passes._current.update._recording is not None
    for own, other in zip(captured.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "captured"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("apart", {}),
        ("trades-awp", {"warmup_epochs": 0}),
        ("rwp", {"warmup_epochs": 0}),
        ("te", {"te_start": 0.0, "te_end": 0.0}),
        ("pgd", {"averaging": "ema"}),
    ],
)
def test_nothing_waits_for_the_device_after_the_first_updates(
    method: str, options: dict[str, Any], mode: str
) -> None:
    step = make(method, mode, torch.float32, **options)
    x, y, _, _ = tiny_batch(COUNT)
    x, y, index = x.float().cuda(), y.cuda(), torch.arange(COUNT, device="cuda")
    step(x, y, index)
    with waiting_is_an_error():
        for _ in range(3):
            step(x, y, index)
    step.check()


@pytest.mark.usefixtures("deterministic")
def test_dropout_draws_what_it_draws_in_eager() -> None:
    """Warming up must leave the generator as it was."""
    losses = []
    for mode in ("eager", "captured"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Dropout(0.5))
        model = model.append(nn.Linear(64, CLASSES)).double().cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        step = fastadv.step(model, optimizer, "fgsm", eps=0.1, mode=mode, total_steps=4)
        torch.cuda.manual_seed(3)
        x, y, _, _ = tiny_batch(COUNT)
        losses.append(torch.stack([step(x.cuda(), y.cuda())["loss"] for _ in range(3)]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("deterministic")
def test_a_graph_of_the_users_may_be_held() -> None:
    """It brings the default stream into autograd's nodes of the parameters."""
    model = staged_model().cuda()
    held = model(torch.rand(2, 3, 6, 6, device="cuda", dtype=torch.float64)).sum()
    eager = step_of("trades-awp", copy.deepcopy(model), "eager")
    step = step_of("trades-awp", model, "captured")
    for update in range(2):
        expected = call(eager, update)
        torch.testing.assert_close(call(step, update), expected, rtol=1e-8, atol=1e-8)
    assert_same_model(step.model, eager.model)
    assert held.requires_grad


@pytest.mark.usefixtures("deterministic")
def test_what_waits_is_refused_before_it_is_captured() -> None:
    """It also leaves the device usable, and weights and statistics as they were."""
    step = make("fgsm-n-advlc-nuclear", "captured")
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    with pytest.raises(NotReplayable, match="mode='eager'"):
        call(step, 0)
    for name, value in step.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    losses = [call(make("pgd", mode), 0) for mode in ("eager", "captured")]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("deterministic")
def test_other_threads_may_use_the_device_meanwhile() -> None:
    """DALI's threads and NCCL's watchdog do the same."""
    eager, sizes = make("pgd", "eager"), (6, 4, 6)
    expected = [call(eager, update, count) for update, count in enumerate(sizes)]
    done, failed = threading.Event(), []

    def work() -> None:
        try:
            stream, event = torch.cuda.Stream(), torch.cuda.Event()
            while not done.is_set():
                with torch.cuda.stream(stream):
                    torch.ones(1000, device="cuda").mul_(2)
                    event.record()
                event.query()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        step = make("pgd", "captured")
        for update, count in enumerate(sizes):
            loss = call(step, update, count)
            torch.testing.assert_close(loss, expected[update], rtol=1e-8, atol=1e-8)
    finally:
        done.set()
        thread.join()
    assert not failed
    assert_same_model(step.model, eager.model)


def fused(method: str, mode: str, **options: Any) -> Step:
    """In float32, with the fused optimizer."""
    model = staged_model().float().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    return fastadv.step(model, optimizer, method, eps=0.1, mode=mode, total_steps=8, **options)


@pytest.mark.usefixtures("deterministic")
def test_float16_and_a_scaler_in_graphs() -> None:
    eager, step = (fused("pgd", mode, amp=True, amp_dtype="fp16") for mode in ("eager", "captured"))
    for update in range(5):
        loss, expected = call(step, update), call(eager, update)
        assert loss.isfinite()
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    step.check()
    assert all(parameter.isfinite().all() for parameter in step.model.parameters())
    assert torch.equal(step.internals.update.scale, eager.internals.update.scale)


@pytest.mark.usefixtures("deterministic")
def test_a_fused_optimizer_takes_gradients_of_channels_last_images() -> None:
    """The weights are not in channels_last."""
    eager, step = fused("fgsm", "eager"), fused("fgsm", "captured")
    x, y, _, _ = tiny_batch(COUNT)
    x = x.float().cuda().contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        loss, expected = (each(x, y.cuda())["loss"] for each in (step, eager))
        assert loss.isfinite()
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


def test_replaying_takes_little_more_memory_than_eager() -> None:
    peaks = []
    for mode in ("eager", "captured"):
        torch.manual_seed(0)
        model = fastadv.build_model("preact_resnet18").cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
        step = fastadv.step(model, optimizer, "pgd", mode=mode, steps=2, total_steps=8)
        x = torch.rand(512, 3, 32, 32, device="cuda")
        y = torch.randint(10, (512,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            step(x, y)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model, optimizer, step
        torch.cuda.empty_cache()
    assert peaks[1] <= 1.1 * peaks[0], peaks


def test_a_loader_on_the_gpu_gives_what_one_on_the_cpu_gives() -> None:
    from fastadv.data.device_loader import DeviceLoader

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (23,), generator=generator)
    options: dict[str, Any] = {"batch_size": 5, "pad": 2, "flip": True, "views": 2}
    expected = list(DeviceLoader(images, labels, **options).epoch(1))
    loader = DeviceLoader(images, labels, device="cuda", **options)
    with waiting_is_an_error():
        found = list(loader.epoch(1))
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own.index.cpu(), other.index)
        assert torch.equal(own.label.cpu(), other.label)
        torch.testing.assert_close(own.image.cpu(), other.image)
        torch.testing.assert_close(own.second[0].cpu(), other.second[0])


@pytest.mark.usefixtures("deterministic")
def test_evaluation_on_the_gpu_is_the_one_on_the_cpu() -> None:
    model: StagedNet = staged_model().eval()
    x, y, _, _ = tiny_batch(12)
    names = ("clean", "fgsm", "pgd-3", "cw-3")
    expected = fastadv.evaluate(model, [(x, y)], attacks=names, eps=0.05)
    assert fastadv.evaluate(model.cuda(), [(x, y)], attacks=names, eps=0.05) == expected
