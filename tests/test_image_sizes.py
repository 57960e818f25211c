"""Training images of another size by epoch: the scaling, what a step sees, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import same
from tiny import TinyNet, tiny_model
from tiny_capture import Replayer
from tiny_run import Counting
from torch import Tensor, nn

import fastadv
from fastadv.by_epoch import Phases
from fastadv.cli.main import application
from fastadv.data import DeviceLoader
from fastadv.data.image_sizes import SizedByEpoch, require_within, scaled
from fastadv.data.small_sets import make_synthetic
from fastadv.errors import Interrupted, UserError
from fastadv.run import own_scores
from fastadv.run import session as sessions
from fastadv.run.config_file import from_bytes, to_toml
from fastadv.run.console import Console
from fastadv.run.epoch_loop import EpochLoop
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run, resolve_stored
from fastadv.run.session import Session
from fastadv.run.sizes_taken import require_taken
from fastadv.run.train import resume
from fastadv.training.captured import CapturedUpdate
from fastadv.training.internals import Internals
from fastadv.training.training_step import Step

DATA = make_synthetic(train=64, test=10, size=16, num_classes=5)
PHASES = Phases([(0, 4), (6, 7), (12, 16)])
WORDS = [
    *("--method", "pgd", "--steps", "2", "--width", "4", "--epochs", "3", "--limit", "200"),
    *("--batch-size", "64", "--mode", "eager", "--image-sizes", "4@0,6@1,8@2"),
    *("--select-attack", "clean", "--test-attacks", "clean", "--test-limit", "20"),
    *("--eval-train", "20"),
]


def by_hand(row: list[float], side: int) -> list[float]:
    """``row`` scaled down to ``side`` values, each a mean weighted by a triangle over its place."""
    scale = len(row) / side
    found = []
    for place in range(side):
        center = (place + 0.5) * scale
        weights = [max(0.0, 1 - abs(j + 0.5 - center) / scale) for j in range(len(row))]
        weighted = sum(w * value for w, value in zip(weights, row, strict=True))
        found.append(weighted / sum(weights))
    return found


@pytest.mark.parametrize(("size", "side"), [(8, 4), (9, 4), (16, 7), (12, 11), (5, 1)])
def test_a_pixel_is_the_weighted_mean_of_those_it_covers(size: int, side: int) -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    found = images
    for _ in range(2):  # along the rows, then along the columns
        rows = [by_hand(row, side) for row in found.flatten(0, 2).tolist()]
        found = torch.tensor(rows, dtype=torch.float64).reshape(*found.shape[:3], side).mT
    torch.testing.assert_close(scaled(images, side), found, rtol=1e-12, atol=1e-12)


def test_white_stays_in_range_and_an_image_of_the_size_is_the_same() -> None:
    white = torch.ones(1, 1, 13, 13)
    for side in range(1, 13):
        assert scaled(white, side).max() <= 1
    assert scaled(white, 13) is white


def loader(rank: int = 0, world_size: int = 1, **options: Any) -> SizedByEpoch:
    options = {"batch_size": 16 // world_size, "views": 2, "seed": 3, "pad": 2, **options}
    plain = DeviceLoader(
        DATA.train_images, DATA.train_labels, rank=rank, world_size=world_size, **options
    )
    return SizedByEpoch(plain, PHASES)


@pytest.mark.parametrize(("epoch", "side"), [(0, 4), (5, 4), (6, 7), (11, 7), (12, 16), (30, 16)])
def test_both_views_are_scaled_after_the_augmentation(epoch: int, side: int) -> None:
    own = loader()
    assert len(own) == 4
    for found, plain in zip(own.epoch(epoch), own.loader.epoch(epoch), strict=True):
        assert found.image.shape == (16, 3, side, side)
        assert torch.equal(found.image, scaled(plain.image, side))
        assert torch.equal(found.second[0], scaled(plain.second[0], side))
        assert torch.equal(found.index, plain.index)
        assert torch.equal(found.label, plain.label)
        assert all(torch.equal(*pair) for pair in zip(found.view, plain.view, strict=True))


def test_two_processes_see_the_images_of_one() -> None:
    alone = {int(r): x for b in loader().epoch(6) for r, x in zip(b.index, b.image, strict=True)}
    count = 0
    for rank in range(2):
        for batch in loader(rank, 2).epoch(6):
            for row, image in zip(batch.index, batch.image, strict=True):
                assert torch.equal(image, alone[int(row)])
                count += 1
    assert count == len(alone) == 64


def test_type_and_layout_stay() -> None:
    batch = next(iter(loader(dtype=torch.bfloat16, channels_last=True).epoch(0)))
    assert batch.image.dtype is torch.bfloat16
    assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert next(iter(loader().epoch(0))).image.is_contiguous()


class Watched:
    """The sizes of the images of each step and of each evaluated set, and what was forgotten."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.evaluated: set[int] = set()
        self.forgotten: list[int] = []  # after so many steps
        call, evaluation, forget = Step.__call__, own_scores.run_evaluation, Internals.forget_shapes

        def calling(step: Step, x: Tensor, *others: Any, **more: Any) -> Any:
            assert x.shape[-1] == x.shape[-2]
            self.steps.append(x.shape[-1])
            return call(step, x, *others, **more)

        def evaluating(model: nn.Module, images: Any, *others: Any, **more: Any) -> Any:
            self.evaluated |= {x.shape[-1] for x, _ in images}
            return evaluation(model, images, *others, **more)

        def forgetting(internals: Internals) -> None:
            self.forgotten.append(len(self.steps))
            forget(internals)

        monkeypatch.setattr(Step, "__call__", calling)
        monkeypatch.setattr(own_scores, "run_evaluation", evaluating)
        monkeypatch.setattr(Internals, "forget_shapes", forgetting)


def trained(out: Path) -> Path:
    application("train")(["train", *WORDS, "--out", str(out)], standalone_mode=False)
    return out


def test_a_run_trains_on_the_sizes_of_its_epochs_and_is_evaluated_on_whole_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Watched(monkeypatch)
    trained(tmp_path / "run")
    assert seen.steps == [4, 4, 4, 6, 6, 6, 8, 8, 8]
    assert seen.evaluated == {8}
    assert seen.forgotten == [3, 6]  # once for each phase, before its first step


def test_a_run_stopped_in_a_small_phase_continues_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tmp_path / "whole")
    stop = EpochLoop._asked_to_stop

    def stopping(loop: EpochLoop) -> bool:
        if (loop.progress.epoch, loop.progress.batch) == (1, 2):
            loop.stops.by = "the test"
        return stop(loop)

    with monkeypatch.context() as patched:
        patched.setattr(EpochLoop, "_asked_to_stop", stopping)
        with pytest.raises(Interrupted):
            trained(tmp_path / "part")
    seen = Watched(monkeypatch)
    resume(str(tmp_path / "part"), Console())
    assert seen.steps == [6, 8, 8, 8]
    same(tmp_path / "part", whole)


def make(mode: str, backend: Any = "aot_eager") -> tuple[TinyNet, Step]:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    length: dict[str, Any] = {"total_steps": 100, "steps_per_epoch": 4}
    step = fastadv.step(
        model, optimizer, "pgd", eps=0.1, num_classes=4, steps=1, mode=mode, **length
    )
    step.internals.net.runner.backend = backend
    return model, step


def batches(side: int) -> list[tuple[Tensor, Tensor]]:
    """An epoch, the last batch of which is short."""
    generator = torch.Generator().manual_seed(side)
    return [
        (
            torch.rand(count, 3, side, side, dtype=torch.float64, generator=generator),
            torch.randint(0, 4, (count,), generator=generator),
        )
        for count in (8, 8, 6)
    ]


SIDES = (4, 5, 6, 7, 8)


def go(step: Step, between: Any) -> list[Tensor]:
    losses = []
    for side in SIDES:
        between()
        losses += [step(x, y)["loss"] for x, y in batches(side)]
    return losses


def test_every_phase_is_recorded_once() -> None:
    plain, eager = make("eager")
    expected = go(eager, lambda: None)
    model, step = make("eager")
    captured = step.internals.passes = CapturedUpdate(step.internals.update, Replayer())
    assert torch.equal(torch.stack(go(step, step.internals.forget_shapes)), torch.stack(expected))
    assert captured.recorded == 2 * len(SIDES)
    assert len(captured._entries) == 2  # those of the last phase
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.slow
def test_every_phase_is_compiled_once_however_many_there_are() -> None:
    """Dynamo compiles one region eight times at most; here ten shapes come."""
    _, eager = make("eager")
    expected = go(eager, lambda: None)
    torch._dynamo.reset()
    counting = Counting("aot_eager")
    _, step = make("compiled", counting)
    by_phase: list[int] = []

    def between() -> None:
        by_phase.append(counting.count)
        step.internals.forget_shapes()

    found = go(step, between)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-9, atol=1e-9)
    new = {after - before for before, after in pairwise(by_phase)}
    assert len(new) == 1
    assert counting.count == new.pop() * len(SIDES)


@pytest.mark.parametrize(
    ("method", "options", "part"),
    [
        ("free", {}, "adversary 'free'"),
        ("apart", {}, "adversary 'apart'"),
        ("fgsm-plus", {}, "adversary 'fgsm-plus'"),
        ("atta-1", {}, "start 'stored'"),
        ("pgd", {"start": "stored"}, "start 'stored'"),
        ("liet", {}, "adversary 'liet'"),
        ("fgsm-mep", {}, "adversary 'fgsm-mep'"),
        ("fgsm-bp", {}, "adversary 'fgsm-bp'"),
        ("fgsm-uap", {}, "adversary 'fgsm-uap'"),
    ],
)
def test_perturbations_of_one_size_are_refused(
    method: str, options: dict[str, Any], part: str
) -> None:
    resolve_run(RunRequest(method=method, options=options))
    with pytest.raises(UserError, match=f"{part} keeps perturbations of one size"):
        resolve_run(RunRequest(method=method, image_sizes="4@0,8@2", options=options))


def test_apart_without_a_start_of_its_own_keeps_none() -> None:
    config = resolve_run(RunRequest(method="apart-no-start", image_sizes="4@0,8@2"))
    assert config.plan.sized == []


def test_larger_images_and_others_than_squares_are_refused() -> None:
    require_within(8, (8, 8))
    with pytest.raises(UserError, match="these are 8x8, so choose at most 8 in place of 9"):
        Session.build(resolve_run(RunRequest(method="pgd", image_sizes="4@0,9@1")))
    with pytest.raises(UserError, match="square images, and these are 8x12"):
        require_within(Phases([(0, 4), (1, 8)]), (8, 12))


def test_a_network_of_one_size_is_refused_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of_one_size(*_: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    monkeypatch.setattr(sessions, "make_model", of_one_size)
    config = resolve_run(RunRequest(method="pgd", mode="eager", image_sizes="8@0,4@1"))
    with pytest.raises(UserError, match=r"cannot take images of 4x4 pixels \(mat1 and mat2"):
        Session.build(config)
    Session.build(resolve_run(RunRequest(method="pgd", mode="eager", image_sizes=8)))


def test_asking_a_network_leaves_no_trace() -> None:
    model = tiny_model().float().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    require_taken(model, Phases([(0, 4), (1, 8)]), 3)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), name


def test_the_setting_is_written_and_read_again() -> None:
    for given in ("4@0,6@1,8@2", 6, Phases([(0, 4), (2, 8)])):
        config = resolve_run(RunRequest(method="pgd", image_sizes=given))
        path = Path("config.toml")
        again = resolve_stored(from_bytes(to_toml(config).encode(), path))
        assert again.image_sizes == config.image_sizes
        assert again.image_sizes is not None
    with pytest.raises(UserError, match="Phases begin with epoch 0"):
        resolve_run(RunRequest(method="pgd", image_sizes="4@1"))


def test_the_published_phases_of_imagenet() -> None:
    request: dict[str, Any] = {"method": "fast-imagenet", "data": "imagenet:/anywhere"}
    config = resolve_run(RunRequest(**request, variant="phases"))
    assert config.image_sizes == Phases([(0, 128), (6, 224), (12, 288)])
    assert (config.image_size, config.epochs) == (288, 15)
    # Phases of 15 epochs say nothing about a run of another length.
    assert resolve_run(RunRequest(**request, variant="phases", epochs=30)).image_sizes is None
    own = resolve_run(RunRequest(**request, variant="phases", epochs=30, image_sizes="96@0,288@9"))
    assert str(own.image_sizes) == "96@0,288@9"
    assert resolve_run(RunRequest(**request)).image_sizes is None
