"""The scripts of examples/ reach their accuracy, and the libraries they use change no update."""

from __future__ import annotations

import re
import runpy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastadv
from fastadv.data import load
from fastadv.engine.optimizer.replayed import _is_capturable
from fastadv.engine.torchvision_shim import import_torchvision

EXAMPLES = Path(__file__).parents[1] / "examples"
EPS = 0.2

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Examples write into the current folder. timm and torchmetrics import torchvision, whose
    wheel may have been built for another torch. Warnings are dropped here: their classes are the
    libraries' own, and the process that collects the workers' warnings would import Lightning,
    and so torchvision, to show one."""
    import_torchvision()
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield tmp_path


def printed(out: str) -> dict[str, float]:
    """The accuracies that a script has printed, in percent."""
    found = re.findall(r"^(clean|pgd-20) +([\d.]+)% of 360 images$", out, re.MULTILINE)
    return {name: float(value) for name, value in found}


@pytest.mark.parametrize(
    ("script", "clean", "robust"),
    [
        ("own_loop", 90, 45),
        ("accumulation", 88, 42),
        ("timm_model", 85, 60),
        ("lightning_module", 90, 40),
        ("with_accelerate", 88, 38),
    ],
)
def test_a_script_reaches_a_robust_network(
    script: str, clean: float, robust: float, capfd: pytest.CaptureFixture[str]
) -> None:
    """Standard training ends below 5 % under PGD-20 (test_digits.py)."""
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    accuracy = printed(capfd.readouterr().out)
    assert accuracy["clean"] >= clean
    assert accuracy["pgd-20"] >= robust


@pytest.fixture
def in_float64() -> Iterator[None]:
    """A model that is built within has float64 weights, and uint8 images become float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_calls_of_an_update_train_as_one_call(in_float64: None) -> None:
    """The loop of accumulation.py with calls of 16, 5 and all 64 images of an update."""
    text = (EXAMPLES / "accumulation.py").read_text()
    text = text.replace('amp=True, amp_dtype="fp16", ', "")
    assert 'fp16"' not in text
    found = []
    for size in (16, 5, 64):
        short = re.sub(r"(?m)^(EPOCHS, .* =) \d+, (.*), \d+$", rf"\1 1, \2, {size}", text)
        assert short != text
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(short, "accumulation.py", "exec"), space)
        assert space["step"].calls == len(space["loader"])
        assert space["scaler"]._growth_tracker == len(space["loader"])
        found.append(space["model"].state_dict())
    assert found[0]["0.weight"].dtype is torch.float64
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-10)


def test_the_own_loop_resumes_bit_for_bit(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    text = (EXAMPLES / "own_loop.py").read_text()
    short = re.sub(r"(?m)^EPOCHS, EPS, CHECKPOINT = \d+,", "EPOCHS, EPS, CHECKPOINT = 2,", text)
    assert short != text
    code = compile(short, "own_loop.py", "exec")

    def run() -> dict[str, Tensor]:
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(code, space)
        return space["model"].state_dict()

    whole = run()
    (folder / "own_loop.pt").unlink()
    save = torch.save

    def save_and_stop(*given: Any) -> None:
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    equal(run(), whole)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return fastadv.build_model("preact_resnet18", width=2, in_channels=1)


def few_rows() -> TensorDataset:
    digits = load("digits")
    return TensorDataset(digits.train_images[:96] / 255, digits.train_labels[:96], torch.arange(96))


def by_hand(model: nn.Module, epochs: int, method: str, **options: Any) -> dict[str, Tensor]:
    """The training of lightning_module.py without Lightning."""
    loader = DataLoader(few_rows(), batch_size=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    total = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    step = fastadv.step(
        model, optimizer, method, eps=EPS, num_samples=96, total_steps=total,
        steps_per_epoch=len(loader), **options,
    )  # fmt: skip
    for _ in range(epochs):
        for x, y, index in loader:
            step(x, y, index=index)
            schedule.step()
    return model.state_dict()


@pytest.fixture
def module_class() -> Callable[..., Any]:
    return runpy.run_path(str(EXAMPLES / "lightning_module.py"))["AdversarialTraining"]


def trainer(**options: Any) -> Any:
    from lightning import Trainer

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", max_epochs=2, **quiet, **options)


def test_lightning_trains_and_resumes_as_a_loop_by_hand(
    module_class: Callable[..., Any], folder: Path
) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    expected = by_hand(small_network(), 2, "apart")
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    first, second = small_network(), small_network()
    training = trainer(callbacks=[keep])
    training.fit(module_class(first, "apart"), DataLoader(few_rows(), batch_size=32))
    assert training.global_step == 6  # what Lightning's checkpoints and max_steps go by
    equal(first.state_dict(), expected)
    trainer(enable_checkpointing=False).fit(
        module_class(second, "apart"), DataLoader(few_rows(), batch_size=32),
        ckpt_path=folder / "epoch=0.ckpt",
    )  # fmt: skip
    equal(second.state_dict(), expected)


def test_lightning_counts_updates_and_not_calls(module_class: Callable[..., Any]) -> None:
    def halves(step: Any, batch: Any) -> None:
        for number in range(2):
            x, y, index = (part.chunk(2)[number] for part in batch)
            step(x, y, index=index, update=number == 1)

    class InHalves(module_class):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            halves(self.step, batch)
            self.lr_schedulers().step()

    model, plain = small_network(), small_network()
    training = trainer(enable_checkpointing=False)
    training.fit(InHalves(model, "atta-1"), DataLoader(few_rows(), batch_size=32))
    assert training.global_step == 6
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    lengths = {"num_samples": 96, "total_steps": 6, "steps_per_epoch": 3}
    step = fastadv.step(plain, optimizer, "atta-1", eps=EPS, **lengths)
    for _ in range(2):
        for batch in DataLoader(few_rows(), batch_size=32):
            halves(step, batch)
            schedule.step()
    equal(model.state_dict(), plain.state_dict())


def test_a_gradient_scaler_inside_lightnings_optimizer_is_refused(
    module_class: Callable[..., Any],
) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    scaling = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    half = trainer(enable_checkpointing=False, plugins=[scaling])
    with pytest.raises(fastadv.UserError, match="no precision to accelerate or Lightning"):
        half.fit(module_class(small_network(), "fgsm"), DataLoader(few_rows(), batch_size=32))


@pytest.fixture
def accelerator() -> Callable[..., Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    def make(**options: Any) -> Any:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return Accelerator(cpu=True, **options)

    return make


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_what_accelerate_prepared_trains_as_a_loop_by_hand(
    kind: Any, accelerator: Callable[..., Any]
) -> None:
    def train(prepare: Callable[..., Any]) -> dict[str, Tensor]:
        model = small_network()
        optimizer = kind(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        loader = DataLoader(few_rows(), batch_size=32)
        model, optimizer, loader, schedule = prepare(model, optimizer, loader, schedule)
        step = fastadv.step(model, optimizer, "pgd", steps=2, eps=EPS)
        for _ in range(2):
            for x, y, _index in loader:
                step(x, y)
                schedule.step()
        assert not _is_capturable(optimizer)  # a GPU launches it
        return model.state_dict()

    equal(train(accelerator().prepare), train(lambda *given: given))


def test_accelerate_accumulates_as_update_says(accelerator: Callable[..., Any]) -> None:
    rows = few_rows().tensors
    halves = accelerator(gradient_accumulation_steps=2)
    model, plain = small_network(), small_network()
    prepared = halves.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    step = fastadv.step(model, prepared, "fgsm", eps=EPS)
    other = fastadv.step(plain, torch.optim.SGD(plain.parameters(), lr=0.1), "fgsm", eps=EPS)
    for part in range(2):
        x, y = rows[0][part::2], rows[1][part::2]
        with halves.accumulate(model):
            if not halves.sync_gradients:
                with pytest.raises(fastadv.UserError, match=r"update=accelerator.sync_gradients"):
                    step(x, y)
            step(x, y, update=halves.sync_gradients)
        other(x, y, update=part == 1)
    equal(model.state_dict(), plain.state_dict())
    assert not torch.equal(model.state_dict()["conv1.weight"], small_network().conv1.weight)


def test_a_gradient_scaler_inside_accelerates_optimizer_is_refused(
    accelerator: Callable[..., Any],
) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    accelerator()
    model = small_network()
    scaling = AcceleratedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), scaler=torch.amp.GradScaler("cpu")
    )
    with pytest.raises(fastadv.UserError, match="no precision to accelerate or Lightning"):
        fastadv.step(model, scaling, "fgsm")


@pytest.mark.parametrize("attack_bn", ["train", "eval"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_timms_layers_train_as_a_loop_by_hand(name: str, attack_bn: str) -> None:
    """Among them BatchNorms that apply an activation themselves (BatchNormAct2d)."""
    import timm

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(timm.create_model(name, num_classes=4, drop_path_rate=0.0).double().train())
    plain, model = models
    size = 160 if name == "test_vit" else 32
    x = torch.rand(4, 3, size, size, dtype=torch.float64)
    y = torch.arange(4)
    start = (2 * torch.rand_like(x) - 1) * 0.03
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in models]
    step = fastadv.step(
        model, optimizers[1], "pgd", eps=0.03, alpha=0.01, steps=2, attack_bn=attack_bn
    )
    for _ in range(2):
        step(x, y, start=start)
        plain.train(attack_bn == "train")
        x_adv = (x + start).clamp(0, 1)
        for _ in range(2):
            x_adv.requires_grad_()
            loss = nn.functional.cross_entropy(plain(x_adv), y)
            (gradient,) = torch.autograd.grad(loss, x_adv)
            moved = x_adv.detach() + 0.01 * gradient.sign()
            x_adv = (x + (moved - x).clamp(-0.03, 0.03)).clamp(0, 1)
        plain.train()
        optimizers[0].zero_grad()
        nn.functional.cross_entropy(plain(x_adv), y).backward()
        optimizers[0].step()
    for found, expected in zip(
        model.state_dict().values(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
