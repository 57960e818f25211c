"""Verdicts of an evaluation, image by image: what they are, and that none depends on an
interruption, on the processes, or on memory for the whole set."""

from __future__ import annotations

import gc
import json
import socket
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from two_processes import in_two_processes

import fastadv
from fastadv.engine.process.distributed import leave
from fastadv.errors import NotFiniteError, UserError
from fastadv.evaluation.accuracy import verdicts_of
from fastadv.evaluation.found import Found
from fastadv.evaluation.ledger import OPEN, RIGHT
from fastadv.evaluation.tally import Halt, Tally

EPS = 0.1
CASCADE = "square-15+apgd-ce-2+apgd-t-3-3+fab-t-6-3"
OPTIONS: dict[str, Any] = {"eps": EPS, "norm": "linf", "alpha": None, "seed": 4}


class RowByRow(nn.Module):
    """(n,1,6,6) to (n,5), by products and sums that do not depend on the other rows of the batch,
    as those of a matrix product may in the last bits."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.inner = nn.Parameter(torch.randn(16, 36, generator=draw).double() / 6)
        self.outer = nn.Parameter(torch.randn(5, 16, generator=draw).double() / 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x.flatten(1)[:, None] * self.inner).sum(2).relu()
        return (hidden[:, None] * self.outer).sum(2)


def network() -> nn.Module:
    return RowByRow()


def images(count: int = 60) -> tuple[Tensor, Tensor]:
    """Images (count,1,6,6), of which the network gets 10 wrong."""
    x = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    y = network()(x).argmax(1)
    y[::6] = (y[::6] + 1) % 5
    return x, y


def batches(size: int = 13, count: int = 60) -> list[tuple[Tensor, Tensor]]:
    x, y = images(count)
    return list(zip(x.split(size), y.split(size), strict=True))


def rows(found: Found, attack: str = CASCADE) -> np.ndarray:
    return found.ledgers[attack].rows


@pytest.fixture(scope="module")
def whole() -> Found:
    return verdicts_of(network(), batches(), [CASCADE], **OPTIONS)


def test_a_cascade_names_the_search_that_fooled_each_image(whole: Found) -> None:
    model, (x, y) = network(), images()
    expected = np.full(60, -1)
    expected[model(x).argmax(1).numpy() != y.numpy()] = 0
    for number, name in enumerate(CASCADE.split("+"), 1):
        x_adv = fastadv.attack(model, x, y, name, eps=EPS, seed=4)
        fooled = (model(x_adv).argmax(1) != y).numpy()
        expected[(expected == -1) & fooled] = number
    assert len(set(expected)) >= 4  # right, wrong before, and two searches at least
    np.testing.assert_array_equal(rows(whole)["fooled_by"], expected)
    verdicts = fastadv.evaluate(model, batches(), [CASCADE], eps=EPS, seed=4).verdicts[CASCADE]
    assert verdicts.stages == ("clean", *CASCADE.split("+"))
    np.testing.assert_array_equal(verdicts.fooled_by, expected)
    np.testing.assert_array_equal(verdicts.label, y.numpy())
    assert verdicts.accuracy == (expected == -1).mean()
    fooled = verdicts.fooled_by >= 0
    assert (verdicts.margin[fooled] <= 0).all()
    assert (verdicts.margin[~fooled] > 0).all()


@pytest.mark.parametrize("name", ["clean", "fgsm", "pgd-3", "pgd-2-3", "noise-0.2"])
def test_verdicts_of_an_attack_on_batches(name: str) -> None:
    model, (x, y) = network(), images()
    scores = fastadv.evaluate(model, batches(), ["clean", name][name == "clean" :], eps=EPS, seed=4)
    verdicts = scores.verdicts[name]
    logits = model(fastadv.attack(model, x, y, name, eps=EPS, seed=4))
    right = (logits.argmax(1) == y).numpy()
    np.testing.assert_array_equal(verdicts.right, right)
    searches = name.startswith("pgd")
    assert verdicts.stages == (("clean", name) if searches else (name,))
    assert scores[name] == pytest.approx(right.mean())
    top = logits.sort(dim=1, descending=True).values
    margin = torch.where(
        logits.argmax(1) == y, top[:, 0] - top[:, 1], logits.gather(1, y[:, None])[:, 0] - top[:, 0]
    )
    # A search does not attack what is wrong without it, and of several runs it is the smallest.
    attacked = verdicts.fooled_by != 0 if searches else np.full(60, True)
    seen, last = verdicts.margin[attacked], margin.detach().numpy()[attacked]
    assert (seen <= last + 1e-6).all()
    several = name == "pgd-2-3"
    same = ~right[attacked] if several else np.full(len(seen), True)
    np.testing.assert_allclose(seen[same], last[same], rtol=1e-6)
    assert (verdicts.facts["attack"], verdicts.facts["eps"]) == (name, EPS)


def test_a_search_that_comes_again_has_a_number() -> None:
    name = "apgd-ce-2+apgd-ce-2"
    scores = fastadv.evaluate(network(), batches(), [name], eps=EPS)
    assert scores.verdicts[name].stages == ("clean", "apgd-ce-2", "apgd-ce-2 (2)")


def test_where_labels_are_no_classes_there_are_no_verdicts() -> None:
    x, _ = images()
    options: dict[str, Any] = {"criterion": lambda z, y: (z - y).square().sum(1)}
    options["metric"] = lambda z, y: (z - y).abs().sum(1)
    scores = fastadv.evaluate(network(), [(x, torch.rand(60, 5).double())], ["fgsm"], **options)
    assert scores.verdicts == {}


@pytest.mark.parametrize("steps", [17, 40, 90])
def test_stopped_again_and_again_it_ends_with_the_same_verdicts(whole: Found, steps: int) -> None:
    """Every part ends after so many steps, with images in the middle of every search."""
    done: Found | None = None
    parts = 0
    while done is None or done.halted:
        left, parts = steps, parts + 1

        def between(tally: Tally) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Halt

        found = verdicts_of(network(), batches(), [CASCADE], **OPTIONS, done=done, between=between)
        assert done is None or rows(found).tobytes() != rows(done).tobytes()
        done = found
    assert parts > 2
    assert rows(done).tobytes() == rows(whole).tobytes()


def test_what_has_ended_is_not_searched_again(whole: Found) -> None:
    """Images that have passed two searches and a run of the third begin there."""

    def between(tally: Tally) -> None:
        if (tally.ledgers[CASCADE].rows["runs"] > 0).sum() > 5:
            raise Halt

    done = verdicts_of(network(), batches(), [CASCADE], **OPTIONS, between=between)
    known = rows(done)
    assert (known["runs"] > 0).any()
    assert (known["fooled_by"] == OPEN).any()
    third = (known["fooled_by"] == OPEN) & (known["passed"] == 2)
    spent: dict[str, int] = {}

    def noting(tally: Tally) -> None:
        if tally.pipelines:
            spent["first"] = tally.pipelines[CASCADE].engines[0].seen

    found = verdicts_of(network(), batches(), [CASCADE], **OPTIONS, done=done, between=noting)
    assert rows(found).tobytes() == rows(whole).tobytes()
    others = len(known) < 60 or ((known["passed"] == 0) & (known["fooled_by"] == OPEN)).any()
    assert third.any()
    assert others == (spent["first"] > 0)


def test_a_verdict_does_not_depend_on_the_batch(whole: Found) -> None:
    for size in (60, 7):
        found = verdicts_of(network(), batches(size), [CASCADE], **OPTIONS)
        np.testing.assert_array_equal(rows(found)["fooled_by"], rows(whole)["fooled_by"])
        np.testing.assert_allclose(rows(found)["margin"], rows(whole)["margin"], atol=1e-6)


# -- several processes ----------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


NAMES = ["clean", "pgd-2", CASCADE]


def worker(rank: int, port: int, out: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = network()
    told: list[int] = []
    scores = fastadv.evaluate(
        model, batches(), NAMES, eps=EPS, seed=4, shared=True, progress=told.append
    )
    result: dict[str, Any] = {"scores": dict(scores), "told": told}
    result["all"] = [scores.verdicts[name].fooled_by.tolist() for name in NAMES]
    # Fewer images than processes: process 1 has none.
    one = verdicts_of(model, batches(1, 1), NAMES, **OPTIONS, shared=True)
    result["one"] = [rows(one, name)["fooled_by"].tolist() for name in NAMES]
    result["stages"] = one.stages[CASCADE]

    def between(tally: Tally) -> None:
        begun = rank == 1 and CASCADE in tally.pipelines
        if begun and tally.pipelines[CASCADE].engines[1].seen > 30:
            raise Halt

    part = verdicts_of(model, batches(), NAMES, **OPTIONS, shared=True, between=between)
    result["halted"] = part.halted
    result["known"] = int(part.ledgers[CASCADE].known.sum())
    rest = verdicts_of(model, batches(), NAMES, **OPTIONS, shared=True, done=part)
    result["rest"] = [rows(rest, name)["fooled_by"].tolist() for name in NAMES]
    Path(f"{out}.{rank}").write_text(json.dumps(result))
    leave()


def test_two_processes_find_what_one_does(tmp_path: Path, whole: Found) -> None:
    """Five batches, of which process 0 takes three; a single image; and process 1 interrupted."""
    alone = fastadv.evaluate(network(), batches(), NAMES, eps=EPS, seed=4)
    expected = [alone.verdicts[name].fooled_by.tolist() for name in NAMES]
    assert expected[2] == rows(whole)["fooled_by"].tolist()
    out = str(tmp_path / "found")
    in_two_processes(worker, free_port(), out)
    for rank in range(2):
        result = json.loads(Path(f"{out}.{rank}").read_text())
        assert result["scores"] == pytest.approx(dict(alone))
        assert result["told"] == [13, 26, 39, 52, 60]
        assert result["all"] == expected
        assert result["one"] == [values[:1] for values in expected]
        assert result["stages"] == ["clean", *CASCADE.split("+")]
        assert result["halted"]
        assert result["known"] < 60
        assert result["rest"] == expected


# -- memory, and what is no evaluation ------------------------------------------------------------


def stream(count: int, size: int = 20) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` images that exist only while their batch is read."""
    model = network()
    for start in range(0, count, size):
        x = torch.rand(size, 1, 6, 6, generator=torch.Generator().manual_seed(start)).double()
        yield x, model(x).argmax(1)


def held(count: int) -> tuple[int, int]:
    """The most bytes of tensors at one time while ``count`` images are evaluated, and the bytes
    that numpy and Python hold at the end."""
    most = calls = 0

    def between(tally: Tally) -> None:
        nonlocal most, calls
        calls += 1
        if calls % 40 == 0:  # of some hundreds
            # Other tests of this process may have left tensors of any kind.
            tensors = [
                each
                for each in gc.get_objects()
                if type(each) is Tensor and each.layout is torch.strided and not each.is_meta
            ]
            storages = {
                each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
                for each in tensors
            }
            most = max(most, sum(storages.values()))

    tracemalloc.start()
    found = verdicts_of(
        network(), stream(count), ["apgd-ce-3+apgd-t-3-2"], **OPTIONS, between=between
    )
    own, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.images == count
    return most, own


@pytest.mark.slow
def test_more_images_do_not_take_more_memory() -> None:
    held(60)  # what is imported and cached at the first call
    few, rows_of_few = held(200)  # more than there are under way at one time
    many, rows_of_many = held(500)
    pixels = 300 * 36 * 8
    assert few > 0
    assert many - few < 0.2 * pixels
    assert rows_of_many - rows_of_few < 100 * 300  # of which the pixels alone have 288


class BadImage(nn.Module):
    """NaN where the first pixel is exactly 0.123."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        bad = x.flatten(1)[:, :1] == 0.123
        return torch.where(bad, float("nan"), self.inner(x))


@pytest.mark.parametrize("attack", ["clean", "pgd-2", CASCADE])
def test_outputs_that_are_not_finite_name_the_image(attack: str) -> None:
    x, y = images()
    x[31, 0, 0, 0] = 0.123
    pairs = list(zip(x.split(13), y.split(13), strict=True))
    with pytest.raises(NotFiniteError, match="first those of image 31"):
        fastadv.evaluate(BadImage(), pairs, [attack], eps=EPS)


def test_what_is_named_twice_or_empty_is_refused() -> None:
    with pytest.raises(UserError, match="'pgd-2' is named twice"):
        fastadv.evaluate(network(), batches(), ["pgd-2", "clean", " pgd-2"], eps=EPS)
    with pytest.raises(UserError, match="no images"):
        fastadv.evaluate(network(), [], [CASCADE], eps=EPS)


def test_flat_gradients_are_counted_by_image() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(5).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.weight[(5 * x.detach().flatten(1).mean(1)).long()] + 0 * x.sum()

    x, _ = images()
    y = Flat()(x).argmax(1)
    found = verdicts_of(Flat(), [(x, y)], ["pgd-2"], **OPTIONS | {"eps": 1e-9})
    assert found.counts().zero_gradient == [60]
    assert rows(found, "pgd-2")["flat"].all()
    assert (rows(found, "pgd-2")["fooled_by"] == RIGHT).all()
