"""Memory that is full: what was trained stays, and the batch that fits is found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from every_recipe import call, step_of
from tiny import tiny_batch, tiny_model, tiny_step
from tiny_staged import staged_model
from torch import Tensor, nn

import fastadv
from fastadv.algorithms.recipes.table import METHODS
from fastadv.errors import TrainingError, UserError
from fastadv.run import fitting
from fastadv.run.request import RunRequest
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint
from fastadv.storage.trust import trusting
from fastadv.training.memory import OutOfMemory, is_out_of_memory

SETTINGS: dict[str, Any] = {
    "method": "fast",
    "epochs": 2,
    "model": "small_net:SmallNet",
    "limit": 200,
    "mode": "eager",
    "select_attack": "pgd-1",
    "test_attacks": "clean",
    "test_limit": 20,
}


class Small(nn.Module):
    """Stands for a device on which ``images`` images fit at once."""

    images, pass_number, passes = 10**9, 0, 0

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        Small.passes += 1
        if len(x) > Small.images and Small.passes > Small.pass_number:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        found: Tensor = self.inner(x)
        return found


@pytest.fixture(autouse=True)
def roomy() -> None:
    Small.images, Small.pass_number, Small.passes = 10**9, 0, 0


def everything(step: Any) -> dict[str, Tensor]:
    """Copies of all that a call may change."""
    found = {**step.model.state_dict(), **step.state}
    for place, state in enumerate(step.optimizer.state.values()):
        found |= {f"{name} {place}": v for name, v in state.items() if isinstance(v, Tensor)}
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize(
    "number", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 6))]
)
def test_a_full_device_in_any_pass_is_one_sentence_and_no_change(number: int) -> None:
    x, y, index, _ = tiny_batch()
    step = tiny_step(Small(tiny_model()), "trades-awp", steps=2, warmup_epochs=0)
    step(x, y, index)
    before = everything(step)
    Small.images, Small.pass_number, Small.passes = 0, number - 1, 0
    said = f"^Out of memory on cpu in a step on {len(x)} images of .*update=False"
    with pytest.raises(OutOfMemory, match=said) as caught:
        step(x, y, index)
    assert Small.passes == number
    assert isinstance(caught.value, torch.OutOfMemoryError)
    after = everything(step)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    Small.images = 10**9
    step(x, y, index)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_survives_a_full_device(method: str) -> None:
    model = staged_model()
    step = step_of(method, model)
    call(step, 0)
    before = everything(step)
    passes = 0

    def full(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.register_forward_pre_hook(full)
    try:
        call(step, 1)
    except OutOfMemory:
        after = everything(step)
        assert all(torch.equal(before[name], after[name]) for name in before)
    else:
        assert passes < 2
    hook.remove()
    call(step, 1)


def test_what_was_allocated_is_freed() -> None:
    """The error holds no frame with activations."""
    x, y, index, _ = tiny_batch()
    held: list[Any] = []

    class Holding(Small):
        def forward(self, x: Tensor) -> Tensor:
            import weakref

            large = torch.zeros(1000)
            held.append(weakref.ref(large))
            return super().forward(x) + large.sum()

    step = tiny_step(Holding(tiny_model()), "fgsm")
    Small.images = 0
    with pytest.raises(OutOfMemory) as caught:
        step(x, y, index)
    assert caught.value is not None
    assert held
    assert all(reference() is None for reference in held)


def test_a_cpu_says_it_alike() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def full_from(monkeypatch: pytest.MonkeyPatch, update: int, images: int) -> None:
    """From ``update`` on more than ``images`` images do not fit into a step."""
    import small_net

    forward = small_net.SmallNet.forward

    def limited(self: small_net.SmallNet, x: Tensor) -> Tensor:
        if self.training and len(x) > images and Small.passes >= update:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        Small.passes += self.training
        return forward(self, x)

    monkeypatch.setattr(small_net.SmallNet, "forward", limited)


@pytest.mark.slow
def test_a_run_says_which_batch_fits_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    train(RunRequest(**SETTINGS, batch_size=64, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        full_from(patch, 8, 20)
        said = r"Out of memory on cpu in step \d+ with a batch of 64 images: take --batch-size 16, "
        with pytest.raises(TrainingError, match=said + ".*The run is saved; continue with:"):
            train(RunRequest(**SETTINGS, batch_size=64, out=str(out)))
    with trusting(True):
        resume(str(out))
    own, other = (checkpoint.load(path / "last.pt")["model"] for path in (out, tmp_path / "whole"))
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.slow
def test_a_run_that_never_fits_leaves_its_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_from(monkeypatch, 0, 20)
    with pytest.raises(
        UserError, match="in step 0 with a batch of 64 images: take --batch-size 16"
    ):
        train(RunRequest(**SETTINGS, batch_size=64, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_full_device_in_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
        patch.setattr("fastadv.run.own_scores.run_evaluation", full)
        with pytest.raises(TrainingError, match=r"not in a step but beside it.*The run is saved"):
            train(RunRequest(**SETTINGS, batch_size=64, out=str(out)))
    with trusting(True):
        assert resume(str(out))["n"] == 20


def random_images(folder: Path) -> str:
    """The ``data`` of 1,200 training images of CIFAR's size."""
    file = folder / "images.npz"
    rng = np.random.default_rng(0)
    found = {"x_train": (1200, 32, 32, 3), "x_test": (16, 32, 32, 3)}
    arrays = {name: rng.integers(0, 256, shape, dtype=np.uint8) for name, shape in found.items()}
    labels = {"y_train": np.arange(1200) % 4, "y_test": np.arange(16) % 4}
    np.savez(file, **arrays, **labels)
    return f"npz:{file}"


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    takes: Callable[[int], int | None],
    room: int,
    first: int = 0,
) -> list[int]:
    """Let a step on n images take ``takes(n)`` bytes (None: they do not fit) of ``room`` beside the
    reserve, and the first one of the run ``first``. Returns the batches that are tried, as they
    are."""
    tried: list[int] = []

    def peak(_: object, count: int) -> int | None:
        tried.append(count)
        taken = takes(count)
        return None if taken is None else 1000 + taken

    monkeypatch.setattr(fitting, "peak_of_step", peak)
    monkeypatch.setattr(fitting, "peak_of_first_step", lambda session: 1000 + first)
    monkeypatch.setattr(fitting, "taken_now", lambda device: 1000)
    monkeypatch.setattr(fitting, "_free", lambda device: room / (1 - fitting.RESERVE))
    return tried


@pytest.mark.parametrize(
    ("takes", "found", "steps"),
    [
        (lambda n: 10 * n, 64, [2, 8, 32, 64, 96]),
        # Constants hide what an image takes, until its share is most of the peak or to the end.
        (lambda n: max(300 + n, 10 * n), 64, [2, 4, 8, 16, 32, 64, 96]),
        (lambda n: 690 + n // 8, 96, [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]),
        # More than in proportion to the images: a jump that was too far is taken back.
        (lambda n: n * n // 4, 48, [2, 8, 32, 64, 48]),
        (lambda n: 10 * n if n <= 20 else None, 16, [2, 8, 32, 24, 16]),
        (lambda n: n, 128, [2, 8, 32, 128]),
    ],
)
def test_the_batch_that_is_named_was_tried(
    takes: Callable[[int], int | None],
    found: int,
    steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = pretend(monkeypatch, takes, room=705)
    request = RunRequest(**SETTINGS, batch_size="auto")  # type: ignore[arg-type]
    assert fitting.fitting_batch(request)[0] == found
    assert tried == steps


@pytest.mark.parametrize(("each", "first"), [(400, 0), (1, 800)])
def test_no_batch_that_is_named_exceeds_the_room(
    each: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, lambda count: each * count, room=705, first=first)
    request = RunRequest(**SETTINGS, batch_size="auto")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^Not even two images .* with a reserve of 40 % of what"):
        fitting.fitting_batch(request)


@pytest.mark.parametrize(
    "method", ["apart", *(pytest.param(m, marks=pytest.mark.slow) for m in ("fast", "trades"))]
)
def test_a_real_step_on_the_batch_fits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a pretended limit; on few images the peak of apart is that of its first values."""
    request = RunRequest(
        method=method,
        data=random_images(tmp_path),
        limit=150,
        eps=0.03,
        model="preact_resnet18",
        width=16,
        batch_size="auto",  # type: ignore[arg-type]
        options={"steps": 1} if method == "trades" else {},
    )
    room = 150 * 2**20
    monkeypatch.setattr(fitting, "_free", lambda device: room / (1 - fitting.RESERVE))
    found, _ = fitting.fitting_batch(request)
    session = fitting.trial_session(request)
    fitting.free_what_is_kept()
    taken = fitting.taken_now(session.device)
    fitting.peak_of_first_step(session)
    peak = fitting.peak_of_step(session, found)
    del session
    assert peak is not None
    assert 0.5 * room < peak - taken < 1.15 * room, found


def test_a_trial_is_of_the_last_epoch() -> None:
    request = RunRequest(**SETTINGS | {"method": "awp"}, batch_size="auto")  # type: ignore[arg-type]
    session = fitting.trial_session(request)
    assert session.step.epoch == 0
    assert fitting.peak_of_first_step(session) is not None
    assert session.step.epoch == SETTINGS["epochs"] - 1
    assert fitting.peak_of_step(session, 4) is not None
    assert session.step.epoch == SETTINGS["epochs"] - 1


def test_auto_takes_what_fits_and_says_what_the_rate_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, lambda count: 10 * count, room=10 * 70)
    out = tmp_path / "run"
    train(RunRequest(**SETTINGS, batch_size="auto", out=str(out)))  # type: ignore[arg-type]
    said = " ".join(capsys.readouterr().out.split())
    # Room for 70 images.
    assert "batch size 64: the largest that fits" in said
    assert "the learning rate stays 0.3" in said
    assert "batch_size = 64" in (out / "config.toml").read_text()


@pytest.mark.parametrize(("images", "count", "found"), [(200, 180, 128), (24, 21, 16)])
def test_too_few_images_for_a_larger_batch_are_told(
    images: int, count: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, lambda count: 10 * count, room=10**12)
    said: list[str] = []
    request = RunRequest(**SETTINGS | {"limit": images}, batch_size="auto")  # type: ignore[arg-type]
    config = fitting.fitted(request, Mock(say=said.append))
    assert config.batch_size == found
    larger = found * 3 // 2
    expected = f"it fits, and the next size, {larger}, is above the {count} training images;"
    assert said[0].startswith(f"batch size {found}: {expected}")


@pytest.mark.parametrize(
    ("count", "found"), [(1, 1), (2, 2), (3, 3), (5, 4), (6, 6), (11, 8), (47, 32), (48, 48)]
)
def test_round_batches(count: int, found: int) -> None:
    assert fitting._round_down(count) == found


LIMITED = """
import resource, sys, torch
torch.set_num_threads(1)
from fastadv.run.request import RunRequest
from fastadv.run.train import train
import fastadv.run.session, fastadv.training.training_step
torch.nn.functional.conv2d(torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3))
size = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize"))
limit = 1024 * size + int(sys.argv[3]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
batch = sys.argv[1] if sys.argv[1] == "auto" else int(sys.argv[1])
try:
    train(RunRequest(
        method="fast", data=sys.argv[4], model="preact_resnet18", width=32, epochs=1, eps=0.03,
        limit=int(sys.argv[5]), batch_size=batch, mode="eager",
        pad=0, flip=False, select_attack="pgd-1",
        test_attacks="clean", test_limit=8, val_fraction=0.05, out=sys.argv[2],
    ))
except Exception as error:
    print(type(error).__name__, error)
"""


def limited(tmp_path: Path, batch: str, room: int, images: int = 1200) -> str:
    """What a run of this batch size says in a process that may take ``room`` MiB more."""
    data = random_images(tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LIMITED,
            batch,
            str(tmp_path / "run"),
            str(room),
            data,
            str(images),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "500"},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_process_with_a_real_limit(tmp_path: Path) -> None:
    """The batch that is named is one with which a run comes to its end."""
    said = limited(tmp_path, "1024", 700)
    found = re.search(r"UserError Out of memory on cpu .*: take --batch-size (\d+), which f", said)
    assert found is not None, said
    assert int(found[1]) >= 8
    said = limited(tmp_path, found[1], 700, images=300)
    assert "test accuracy" in said, said
    assert "Out of memory" not in said, said


@pytest.mark.slow
def test_auto_with_a_real_limit(tmp_path: Path) -> None:
    said = limited(tmp_path, "auto", 700, images=300)
    assert "the largest that fits with a reserve of 70 % of the free memory" in said, said
    assert "test accuracy" in said, said


def test_the_public_step_raises_what_loops_catch() -> None:
    model = Small(fastadv.build_model("preact_resnet18", width=2, num_classes=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = fastadv.step(model, optimizer, "fgsm", eps=8 / 255)
    Small.images = 2
    with pytest.raises(torch.OutOfMemoryError):
        step(torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
    step(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
