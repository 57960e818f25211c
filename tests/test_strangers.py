"""Untrusted run folders execute nothing and write nowhere else; damage is detected."""

from __future__ import annotations

import multiprocessing
import random
import resource
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_runs import CANARY, FILES, harm
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as some

from fastadv.errors import TrainingError, UserError
from fastadv.run.console import Console
from fastadv.run.export import export_run
from fastadv.run.finished import evaluate_run
from fastadv.run.pseudo_labels import write_pseudo_labels
from fastadv.run.request import RunRequest
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint, sealed
from fastadv.storage.digests import digest
from fastadv.storage.trust import trusting

SMALL = {"method": "fast", "width": 2, "epochs": 1, "limit": 48, "test_limit": 16}
SMALL |= {"test_attacks": "clean", "select_attack": "fgsm"}
SECONDS = 30
GROWTH = 300 << 20  # bytes of resident memory: the run's own network and data, and torch's rooms


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests copy it."""
    out = tmp_path_factory.mktemp("good") / "run"
    train(RunRequest(**SMALL, out=str(out)), Console())
    return out


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "copy", symlinks=True))


READERS: dict[str, Callable[[str, Path], Any]] = {
    "evaluate": lambda path, _: evaluate_run(path, "clean", limit=8),
    "last": lambda path, _: evaluate_run(path, "clean", which="last", limit=8),
    "resume": lambda path, _: resume(path, Console()),
    "export": lambda path, out: export_run(path, out / "weights.safetensors"),
    "pseudo-label": lambda path, out: labelled(path, out),
}


def labelled(path: str, out: Path) -> None:
    """``fastadv pseudo-label`` of three images."""
    np.savez(out / "images.npz", images=np.zeros((3, 8, 8, 1), np.uint8))
    write_pseudo_labels(path, str(out / "images.npz"), str(out / "more.npz"))


# -- code -----------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module whose import leaves a file; returns the path of that file."""
    trace = tmp_path / "imported"
    (tmp_path / f"{CANARY}.py").write_text(
        f"open({str(trace)!r}, 'a').write('x')\nimport fastadv\n"
        "def net(num_classes, in_channels):\n"
        "    return fastadv.build_model('preact_resnet18', width=2, num_classes=num_classes,\n"
        "                               in_channels=in_channels)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return trace


def forget_module() -> None:
    import sys

    sys.modules.pop(CANARY, None)


def test_code_that_a_folder_names_is_not_run(module: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    settings = SMALL | {"width": None, "normalize": False, "model": f"{CANARY}:net"}
    train(RunRequest(**settings, out=str(own)), Console())
    module.unlink()
    forget_module()
    assert evaluate_run(str(own), "clean", limit=8).n == 8  # it was begun here, by this user
    module.unlink()
    foreign = copied(own, tmp_path)
    for name, read in READERS.items():
        forget_module()
        with pytest.raises(UserError, match="--trust-code"):
            read(str(foreign), tmp_path)
        assert not module.exists(), name
    with trusting(True):
        assert evaluate_run(str(foreign), "clean", limit=8).n == 8
    assert module.exists()


def test_code_that_an_edited_folder_names_is_not_run(
    run: Path, module: Path, tmp_path: Path
) -> None:
    folder = copied(run, tmp_path)
    config = folder / "config.toml"
    lines = [x for x in config.read_text().splitlines() if not x.startswith(("model", "# check"))]
    for model in (f"{CANARY}:net", "http.server:test"):
        config.write_text("\n".join([f'model = "{model}"', *lines]) + "\n")
        for read in READERS.values():
            with pytest.raises(UserError, match="--trust-code"):
                read(str(folder), tmp_path)
    assert not module.exists()


def test_a_teacher_of_another_user_runs_no_code(run: Path, module: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    config = folder / "config.toml"
    lines = [x for x in config.read_text().splitlines() if not x.startswith(("model", "# check"))]
    config.write_text("\n".join([f'model = "{CANARY}:net"', *lines]) + "\n")
    options = {"target": "distillation", "teachers": f"{folder},{folder}"}
    with pytest.raises(UserError, match="--trust-code"):
        train(RunRequest(**SMALL, out=str(tmp_path / "kd"), options=options), Console())
    assert not module.exists()


# -- links ----------------------------------------------------------------------------------------


def test_nothing_is_written_through_a_link(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    for name in FILES:
        for suffix in ("", ".partial"):
            folder = copied(run, tmp_path)
            (folder / (name + suffix)).unlink(missing_ok=True)
            (folder / (name + suffix)).symlink_to(outside)
            for read in READERS.values():
                try:
                    read(str(folder), tmp_path)
                except UserError:
                    continue
            assert outside.read_text() == "mine", name + suffix
            shutil.rmtree(folder)


# -- damage ---------------------------------------------------------------------------------------

VALUES = some.recursive(
    some.none() | some.booleans() | some.integers(-(2**70), 2**70) | some.floats(allow_nan=False)
    | some.text(max_size=4),
    lambda inner: some.lists(inner, max_size=3) | some.tuples(inner, inner)
    | some.dictionaries(some.text(max_size=3) | some.integers(0, 9), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def same(first: Any, second: Any) -> bool:
    """Equal, also in types and in the order of dictionaries."""
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return same(list(first.items()), list(second.items()))
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return repr(first) == repr(second)


@given(VALUES, VALUES)
@limits(max_examples=150, deadline=None)
def test_two_values_have_one_digest_only_if_they_are_equal(first: Any, second: Any) -> None:
    assert (digest(first) == digest(second)) == same(first, second)


def test_values_that_once_had_the_same_digest() -> None:
    pairs = [
        ({"a": {"b": 1}}, {"a": {}, "b": 1}), (1, True), (1, 1.0), (1, "1"), ([1], (1,)),
        (0.0, -0.0),
        ([[1], 2], [[1, 2]]), ({"a": None}, {}), ("ab", "a"), ({1: 2}, {"1": 2}),
        (torch.zeros(2), torch.zeros(2, 1)), (torch.zeros(2), torch.zeros(2).double()),
        (torch.zeros(4, dtype=torch.uint8), torch.zeros(1)),
    ]  # fmt: skip
    for first, second in pairs:
        assert digest({"x": first}) != digest({"x": second}), (first, second)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    wide = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
    payload = {
        "tensors": [torch.ones(3).to(kind) for kind in kinds]
        + [wide, torch.zeros(()), torch.empty(0)],
        "numbers": [1, 2.5, True, None, -(2**40), float("inf")],
        "texts": {"a": "ä", "b": ("x", [])},
    }
    checkpoint.save(tmp_path / "x.pt", payload)
    found = checkpoint.load(tmp_path / "x.pt")
    assert found["numbers"] == payload["numbers"]
    assert found["texts"] == payload["texts"]
    for own, expected in zip(found["tensors"], payload["tensors"], strict=True):
        assert torch.equal(own, expected)
        assert (own.dtype, own.stride()) == (expected.dtype, expected.stride())


def flipped(path: Path, draw: random.Random) -> bytes:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("config.toml", 60),
        ("metrics.jsonl", 60),
        ("summary.json", 60),
        ("best.pt", 20),
        ("last.pt", 20),
    ],
)
def test_every_flipped_bit_is_detected(run: Path, tmp_path: Path, name: str, count: int) -> None:
    """Either one sentence is raised, or what is read equals what was written."""
    from fastadv.run.run_folder import RunFolder

    readers: dict[str, Callable[[RunFolder], Any]] = {
        "config.toml": lambda folder: folder.read_config(),
        "metrics.jsonl": lambda folder: folder.read_metrics(),
        "summary.json": lambda folder: folder.read_summary(),
        "best.pt": lambda folder: digest(checkpoint.load(folder.best)),
        "last.pt": lambda folder: digest(checkpoint.load(folder.last)),
    }
    folder = RunFolder.open(str(copied(run, tmp_path)))
    path, draw = folder.path / name, random.Random(0)
    whole, expected = path.read_bytes(), readers[name](folder)
    noticed = 0
    for _ in range(count):
        path.write_bytes(flipped(folder.path / name, draw))
        try:
            found = readers[name](folder)
        except UserError:
            noticed += 1
        else:
            assert found == expected or (name == "summary.json" and found is None)
            noticed += found is None
        path.write_bytes(whole)
    # Measured: 14 % of the bits of so small a file of weights pad its entries and mean nothing.
    assert noticed > count * 0.6


def test_a_line_end_that_became_another_character_is_no_truncation() -> None:
    text = sealed.seal_line({"epoch": 1, "loss": 0.5}, "")
    with pytest.raises(sealed.Broken):
        sealed.open_lines(text[:-1] + "\x0b")
    assert sealed.open_lines(text) == [{"epoch": 1, "loss": 0.5}]
    assert all(sealed.open_lines(text[:end]) == [] for end in range(len(text)))


# -- what a run depends on ------------------------------------------------------------------------


def write_images(path: Path, change: Callable[[dict[str, np.ndarray]], None] | None = None) -> None:
    random_numbers = np.random.default_rng(0)
    arrays = {
        "x_train": random_numbers.integers(0, 256, (60, 1, 8, 8), dtype=np.uint8),
        "y_train": np.arange(60) % 3,
        "x_test": random_numbers.integers(0, 256, (12, 1, 8, 8), dtype=np.uint8),
        "y_test": np.arange(12) % 3,
    }
    if change is not None:
        change(arrays)
    np.savez(path, **arrays)


def swap(arrays: dict[str, np.ndarray]) -> None:
    arrays["x_train"][[3, 6]] = arrays["x_train"][[6, 3]]  # of one class


def one_pixel(arrays: dict[str, np.ndarray]) -> None:
    arrays["x_train"][5, 0, 2, 2] ^= 1


def one_label(arrays: dict[str, np.ndarray]) -> None:
    arrays["y_train"][[1, 2]] = arrays["y_train"][[2, 1]]


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run after the first of two epochs."""
    from fastadv.errors import Interrupted
    from fastadv.run.epoch_loop import EpochLoop

    write_images(tmp_path / "images.npz")
    out = tmp_path / "run"
    config = RunRequest(
        method="atta-1", data=f"npz:{tmp_path / 'images.npz'}", width=2, epochs=2, batch_size=16,
        test_attacks="clean", select_attack="fgsm", flip=False, out=str(out),
    )  # fmt: skip
    original = EpochLoop._train_epoch

    def once(self: Any) -> None:
        if self.progress.epoch == 1:
            raise Interrupted("stop")
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpochLoop, "_train_epoch", once)
        with pytest.raises(Interrupted):
            train(config, Console())
    return out


def test_a_resume_on_other_data_is_refused(stopped: Path, tmp_path: Path) -> None:
    for change in (one_pixel, one_label, swap):
        write_images(tmp_path / "images.npz", change)
        with pytest.raises(UserError, match="begun"):
            resume(str(stopped), Console())
    write_images(tmp_path / "images.npz")
    assert resume(str(stopped), Console())["n"] == 12


def test_another_number_of_threads_is_reported(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    resume(str(stopped), Console())
    said = capsys.readouterr().out
    assert "warning:" in said
    assert "threads" in said


# -- many -----------------------------------------------------------------------------------------


def _child(folder: str, out: str, sender: Any) -> None:
    """Run all readers on one folder; returns the errors that were not one sentence."""
    torch.set_num_threads(1)
    signal.alarm(SECONDS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = []
    for name, read in READERS.items():
        try:
            read(folder, Path(out))
        except (UserError, TrainingError):
            continue
        except BaseException:
            found.append(f"{name}: {traceback.format_exc()[-1500:]}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    sender.send((found, grown))


@pytest.mark.parametrize(
    "seeds",
    [
        range(8),
        *(pytest.param(range(a, a + 31), marks=pytest.mark.slow) for a in range(8, 256, 31)),
    ],
    ids=lambda seeds: f"{seeds.start}-{seeds.stop}",
)  # fmt: skip
def test_malicious_run_folders_do_no_harm(
    run: Path, module: Path, tmp_path: Path, seeds: range
) -> None:
    witness, outside = tmp_path / "witness", tmp_path / "outside.txt"
    outside.write_text("mine")
    forking = multiprocessing.get_context("fork")
    for seed in seeds:
        folder = copied(run, tmp_path)
        told = harm(folder, seed, witness)
        receiver, sender = forking.Pipe(duplex=False)
        child = forking.Process(target=_child, args=(str(folder), str(tmp_path), sender))
        child.start()
        assert receiver.poll(SECONDS + 5), f"{told}: no answer"
        found, grown = receiver.recv()
        child.join(5)
        assert not found, f"{told}\n{found[0]}"
        assert grown < GROWTH, f"{told}: {grown >> 20} MiB"
        assert not witness.exists(), told
        assert not module.exists(), told
        assert outside.read_text() == "mine", told
        shutil.rmtree(folder, ignore_errors=True)


def test_printed_names_have_no_control_characters(fastadv_command: Any, tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[2Jb"
    outcome = fastadv_command("evaluate", str(folder))
    assert outcome.code == 2
    assert "\x1b[2J" not in outcome.err + outcome.out
