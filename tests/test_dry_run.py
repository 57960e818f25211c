"""``fastadv train --dry-run``: every setting with its origin, cost, time and memory; no file."""

from __future__ import annotations

import re
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from fastadv.cli import dry_run
from fastadv.run import fitting, rehearsal
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run

SMALL = ("--width", 2, "--limit", 128, "--test-limit", 40, "--epochs", 5, "--batch-size", 32)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(rehearsal, "MOST_STEPS", 3)
    monkeypatch.setattr(rehearsal, "NOT_COUNTED", 1)
    monkeypatch.setenv("COLUMNS", "80")


def test_it_shows_origins_cost_time_and_memory_and_writes_nothing(tmp_path, fastadv_command):
    (tmp_path / "run.toml").write_text("beta = 2\n")
    words = ("--method", "trades", "--steps", 1, *SMALL, "--test-attacks", "clean,autoattack")
    outcome = fastadv_command("train", "--config", "run.toml", "--dry-run", *words)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, value, origin in (
        ("epochs", "5", "user"),
        ("beta", "2", "file"),
        ("objective", "trades", "recipe"),
        ("momentum", "0.9", "default"),
        ("lr", "0.3", "data preset"),
        ("attack-bn", "eval", "recipe|part"),
        ("device", r"cpu \(auto\)", "default"),
        ("loader", r"device \(auto\)", "default"),
        ("fused-norm", r"off \(auto\)", "default"),
        ("mode", r"(eager|compiled) \(auto\)", "default"),
    ):
        assert re.search(rf"^  {name} +{value} +({origin})$", outcome.out, re.MULTILINE), name
    said = " ".join(outcome.out.split())
    assert "passes per batch:" in said
    assert "measured: 3 steps on cpu" in said
    assert re.search(r"training: [\d.]+ (s|min) for 5 epochs of 4 batches; [\d.]+ (s|min) to", said)
    assert re.search(r"evaluation: [\d.]+ s, from one batch of each set: 5 of pgd-10", said)
    assert "not included: autoattack" in said
    assert re.search(r"memory: [\d,]+ MiB of the process at most", said)


def test_every_setting_is_listed_once(fastadv_command):
    from fastadv.run.request import setting_types

    outcome = fastadv_command("train", "--dry-run", *SMALL)
    unset = re.search(r"Not set: ([^\n]*(?:\n  [^\n]*)*)", outcome.out)
    shown = re.findall(r"^  ([a-z0-9-]+)  ", outcome.out.partition("Not set")[0], re.MULTILINE)
    listed = [*shown, *re.split(r",\s+", unset[1])]
    for name in setting_types():
        assert listed.count(name.replace("_", "-")) == 1, name


def test_values_by_epoch_are_taken_from_the_command_line(monkeypatch, fastadv_command):
    words = ("--points", "0@0,0.1@1,0@2", "--steps", "1@0,2@3")
    monkeypatch.setattr(dry_run, "prepared", lambda config: nullcontext(_Session(config)))
    monkeypatch.setattr(dry_run, "chosen", lambda session: {})
    monkeypatch.setattr(dry_run, "rehearse", lambda session: rehearsal.Rehearsal(session, 1))
    monkeypatch.setattr(dry_run, "measured", lambda found: ())
    outcome = fastadv_command("train", "--dry-run", "--method", "pgd", *words, *SMALL)
    assert outcome.code == 0, outcome.err
    for name, value in (("points", "0.0@0,0.1@1,0.0@2"), ("lr", "0.1"), ("steps", "1@0,2@3")):
        assert re.search(rf"^  {name} +{re.escape(value)} +user$", outcome.out, re.MULTILINE), name


def test_a_batch_that_fits_is_measured_first(tmp_path, monkeypatch, fastadv_command):
    monkeypatch.setattr(fitting, "peak_of_step", lambda session, count: 1000 + 10 * count)
    monkeypatch.setattr(fitting, "peak_of_first_step", lambda session: 1000)
    monkeypatch.setattr(fitting, "taken_now", lambda device: 1000)
    monkeypatch.setattr(fitting, "_free", lambda device: 10 * 70 / (1 - fitting.RESERVE))
    words = ("--method", "fast", "--test-attacks", "clean", "--select-attack", "fgsm", *SMALL[:-1])
    outcome = fastadv_command("train", "--dry-run", *words, "auto")
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.out.split())
    assert "batch size 64: the largest that fits with a reserve of 40 %" in said
    assert re.search(r"^  batch-size +64 +user$", outcome.out, re.MULTILINE)
    assert "for 5 epochs of 2 batches" in said
    assert not list(tmp_path.iterdir())


def test_a_folder_of_images_gets_no_cache(tmp_path, fastadv_command, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for place in ("train", "test"):
        for label in ("a", "b"):
            folder = tmp_path / "images" / place / label
            folder.mkdir(parents=True)
            for number in range(20):
                pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    before = sorted(tmp_path.rglob("*"))
    words = ("--data", "folder:images", "--width", 2, "--epochs", 1, "--batch-size", 8)
    outcome = fastadv_command("train", "--dry-run", *words, "--model", "preact_resnet18")
    assert outcome.code == 0, outcome.err
    assert "dry run: nothing was written" in outcome.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mistake_of_the_run_is_one_of_its_rehearsal(fastadv_command):
    outcome = fastadv_command("train", "--dry-run", "--method", "rst", *SMALL)
    assert outcome.code == 2
    assert "fastadv pseudo-label" in " ".join(outcome.err.split())


def test_data_that_is_not_here_is_not_downloaded(tmp_path, fastadv_command):
    outcome = fastadv_command("train", "--dry-run", "--data", "cifar10", "--download")
    assert outcome.code == 2
    assert "a dry run does not --download" in " ".join(outcome.err.split())
    assert not list(tmp_path.iterdir())


def test_it_measures_one_process(monkeypatch, fastadv_command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = fastadv_command("train", "--dry-run", *SMALL)
    assert outcome.code == 2
    assert "start it without torchrun" in " ".join(outcome.err.split())


def test_each_size_of_image_is_timed():
    request = RunRequest(
        method="fast", width=2, limit=64, epochs=6, batch_size=32, image_sizes="6@0,8@4"
    )
    with rehearsal.prepared(resolve_run(request)) as session:
        found = rehearsal.rehearse(session)
    assert [stage.epochs for stage in found.stages] == [4, 2]
    assert all(len(stage.seconds) == 3 for stage in found.stages)


def test_time_is_that_of_all_steps_and_evaluations():
    found = rehearsal.Rehearsal(
        session=_Session(resolve_run(RunRequest(epochs=5, eval_every=2, eval_train=10))),
        batches=10,
        stages=[rehearsal.Stage(4, [1.0, 2.0, 3.0]), rehearsal.Stage(1, [10.0])],
        evaluated={"val": 2.0, "train": 1.0, "final": 5.0},
    )
    assert found.training(0.5) == 10 * (4 * 2 + 10)
    assert found.training(1.0) == 10 * (4 * 3 + 10)
    assert found.evaluation() == 3 * (2 + 1) + 2 * 5  # after epochs 2, 4 and 5


class _Session:
    def __init__(self, config):
        self.config = config
