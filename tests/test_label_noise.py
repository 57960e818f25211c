"""``--label-noise``: the published transition, and which labels it is in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edited import edit
from PIL import Image
from test_begun_with import SMALL, stopped
from test_distributed import free_port
from torch import Tensor, distributed
from two_processes import in_two_processes

from fastadv.data import MixedLoader, draws, load
from fastadv.data.label_noise import noisy_labels
from fastadv.engine.process.distributed import leave
from fastadv.errors import UserError
from fastadv.run.console import Console
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.source import Source, open_source
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"method": "fast", "epochs": 2, "batch_size": 40, "limit": 400}


def opened(rate: float, **settings: Any) -> Source:
    return open_source(resolve_run(RunRequest(**SIZES | settings, label_noise=rate)), CPU)


def trained_on(source: Source) -> dict[int, int]:
    """Row -> label of every image of an epoch."""
    found: dict[int, int] = {}
    for batch in source.loader.epoch(0):
        found |= dict(zip(batch.index.tolist(), batch.label.tolist(), strict=True))
    return found


def labels_of(images: Any) -> Tensor:
    return torch.cat([label for _, label in images])


def by_hand(labels: list[int], rate: float, classes: int, seed: int) -> list[int]:
    """SplitMix64 in Python's own numbers, label by label."""
    mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15

    def mixed(state: int) -> int:
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        return state ^ state >> 31

    def bits(row: int, stream: int) -> int:
        key = mixed((mixed((0 ^ stream) + gamma & mask) ^ seed) + gamma & mask)
        return mixed(row * gamma + key & mask) >> 1

    found = []
    for row, label in enumerate(labels):
        replaced = (bits(row, draws.NOISY_ROWS) >> 10) / 2**53 < rate
        found.append(bits(row, draws.NOISY_LABELS) % classes if replaced else label)
    return found


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_labels_are_those_of_a_loop(rate: float) -> None:
    true = torch.arange(500) % 7
    found = noisy_labels(true, rate, 7, seed=3)
    assert found.tolist() == by_hand(true.tolist(), rate, 7, 3)
    assert found.dtype == torch.int64


@pytest.mark.parametrize("rate", [0.2, 0.8, 1.0])
def test_the_transition_is_uniform_over_all_classes(rate: float) -> None:
    """Row c of the matrix is (1 - rate) at c, and rate/C added everywhere."""
    classes, each = 5, 40_000
    true = torch.arange(classes).repeat(each)
    found = noisy_labels(true, rate, classes, seed=1)
    for label in range(classes):
        counts = torch.bincount(found[true == label], minlength=classes).double()
        share = torch.full((classes,), rate / classes, dtype=torch.float64)
        share[label] += 1 - rate
        error = (each * share * (1 - share)).sqrt()
        assert ((counts - each * share).abs() < 5 * error).all()


def test_a_higher_rate_adds_to_a_lower_one_and_seeds_differ() -> None:
    true = torch.arange(2000) % 10
    low, high = (noisy_labels(true, rate, 10, seed=0) for rate in (0.2, 0.6))
    assert torch.equal(high[low != true], low[low != true])
    assert (high != true).sum() > (low != true).sum()
    assert not torch.equal(noisy_labels(true, 0.6, 10, seed=1), high)


def test_only_the_labels_of_the_loader_are_noisy() -> None:
    true = load("digits", limit=400).train_labels
    plain, noisy = opened(0.0), opened(0.5)
    expected = noisy_labels(true, 0.5, 10, 0)
    assert trained_on(plain) == {row: int(true[row]) for row in trained_on(plain)}
    assert trained_on(noisy) == {row: int(expected[row]) for row in trained_on(plain)}
    assert torch.equal(labels_of(noisy.validation), labels_of(plain.validation))
    assert torch.equal(labels_of(noisy.test), labels_of(plain.test))
    rows = torch.tensor(sorted(trained_on(noisy)))
    assert torch.equal(labels_of(noisy.training), expected[rows])
    assert noisy.training.wrong_labels == int((expected != true)[rows].sum())
    assert plain.training.wrong_labels == 0
    assert noisy.content == plain.content
    assert noisy.validation.content == plain.validation.content
    assert noisy.training.content != plain.training.content


def test_pseudo_labels_stay(tmp_path: Path) -> None:
    more = np.arange(30) % 10
    path = tmp_path / "more.npz"
    np.savez(path, images=np.zeros((30, 8, 8, 1), np.uint8), labels=more)
    source = opened(1.0, unlabelled=str(path), method="rst", val_fraction=0.1)
    assert isinstance(source.loader, MixedLoader)
    found = trained_on(source)
    pseudo = {row: label for row, label in found.items() if row >= 400}
    assert len(pseudo) > 10
    assert pseudo == {row: int(more[row - 400]) for row in pseudo}
    noisy = noisy_labels(load("digits", limit=400).train_labels, 1.0, 10, 0)
    labelled = {row: label for row, label in found.items() if row < 400}
    assert labelled == {row: int(noisy[row]) for row in labelled}


@pytest.mark.parametrize("loader", ["device", "dali"])
def test_files_of_a_folder_get_the_same_labels(loader: str, tmp_path: Path) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")

    for part, count in (("train", 40), ("test", 4)):
        for number in range(count):
            place = tmp_path / "tree" / part / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.full((8, 8, 3), 5 * number, np.uint8)
            Image.fromarray(pixels).save(place / f"{number:02}.png")
    where = {"data": f"folder:{tmp_path / 'tree'}", "data_root": str(tmp_path / "cache")}
    settings = {**where, "limit": None, "batch_size": 8, "val_fraction": 0.2}
    settings |= {"loader": loader, "pad": 0}
    true = load(where["data"], root=where["data_root"]).train_labels
    source = opened(0.7, **settings)
    found = trained_on(source)
    expected = noisy_labels(true, 0.7, 2, 0)
    assert found == {row: int(expected[row]) for row in found}
    assert any(found[row] != int(true[row]) for row in found)
    rows = torch.tensor(sorted(found))
    assert torch.equal(labels_of(source.training), expected[rows])
    plain = opened(0, **settings)
    assert torch.equal(labels_of(source.validation), labels_of(plain.validation))
    assert source.validation.content == plain.validation.content


def worker(rank: int, port: int, out: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(trained_on(opened(0.5)), f"{out}.{rank}")
    leave()


def test_two_processes_train_on_the_labels_of_one(tmp_path: Path) -> None:
    out = str(tmp_path / "labels")
    in_two_processes(worker, free_port(), out)
    first, second = (torch.load(f"{out}.{rank}") for rank in range(2))
    whole = trained_on(opened(0.5))
    assert first.keys().isdisjoint(second)
    assert len(first) + len(second) == len(whole)
    assert first | second == whole


def test_the_first_lines_say_how_many_are_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SMALL | {"epochs": 1, "limit": 100, "label_noise": 1.0}
    train(RunRequest(**settings, out=str(tmp_path / "run")), Console())
    source = open_source(resolve_run(RunRequest(**settings)), CPU)
    count = len(source.training)
    said = " ".join(capsys.readouterr().out.split())
    share = 100 * source.training.wrong_labels / count
    assert f"label noise: {share:.1f} % of {count} labels are wrong" in said


def test_a_resumed_run_keeps_its_labels(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    train(RunRequest(**SMALL, label_noise=0.4, out=str(whole)), Console())
    resume(str(stopped(out, label_noise=0.4)), Console())
    first, second = (checkpoint.load(path / "last.pt")["model"] for path in (whole, out))
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = [
        json.loads((path / "metrics.jsonl").read_text().splitlines()[1]) for path in (whole, out)
    ]
    assert lines[0]["loss"] == lines[1]["loss"]


def test_another_rate_is_another_run(tmp_path: Path) -> None:
    out = stopped(tmp_path / "run", label_noise=0.4)
    edit(out / "config.toml", "label_noise = 0.4", "label_noise = 0.5")
    with pytest.raises(UserError, match=r"begun with label_noise 0\.4"):
        resume(str(out), Console())
