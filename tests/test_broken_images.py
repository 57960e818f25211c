"""Images that cannot be decoded, and images that go missing: found, named, left out."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edited import edit
from hostile_data import chunk
from PIL import Image
from safetensors.torch import save_file
from test_begun_with import stopped

from fastadv.data import DaliLoader, load
from fastadv.data import broken as finding
from fastadv.data.decode import ends_early
from fastadv.errors import UserError
from fastadv.models import build_model
from fastadv.run.config import RunConfig
from fastadv.run.finished import evaluate_run
from fastadv.run.origin import Origin
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.source import open_source
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint
from fastadv.storage.trust import trusting

CPU = torch.device("cpu")
SIZE = 16
KINDS = ("empty", "cut off", "no image", "16 bit", "huge")
SETTINGS = {
    "method": "fast",
    "model": "small_net:SmallNet",
    "epochs": 2,
    "batch_size": 6,
    "lr": 0.01,
    "eps": 0.03,
    "pad": 0,
    "flip": False,
    "val_fraction": 0.2,
    "select_attack": "pgd-1",
    "test_attacks": "clean",
    "mode": "eager",
    "image_size": SIZE,
}


def write(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """30 training and 8 test JPEGs of two classes."""
    folder = tmp_path / "tree"
    for part, count in (("train", 15), ("test", 4)):
        for label, name in enumerate("ab"):
            for n in range(count):
                write(folder / part / name / f"{n:02}.jpg", seed=100 * label + n)
    return folder


def spoil(file: Path, kind: str) -> None:
    """Put what the ``kind`` says in the place of ``file``."""
    content = file.read_bytes()
    if kind == "empty":
        file.write_bytes(b"")
    elif kind == "cut off":
        file.write_bytes(content[:-10])
    elif kind == "no image":
        file.write_bytes(b"<html>429 Too Many Requests</html>")
    elif kind == "16 bit":
        deep = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 200
        Image.fromarray(deep).save(file, "PNG")
    elif kind == "huge":
        Image.new("1", (8000, 6000)).save(file, "PNG")


def middle(file: Path) -> None:
    """A PNG whose header and end are fine, and whose pixels are not."""
    raw = zlib.compress(bytes((1 + 3 * SIZE) * SIZE))
    head = chunk(b"IHDR", SIZE.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0")
    damaged = chunk(b"IDAT", raw[:6] + bytes(len(raw) - 6))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + head + damaged + chunk(b"IEND", b""))


def config(root: Path, **changes: object) -> RunConfig:
    settings = SETTINGS | {"data": f"folder:{root}"} | changes
    return resolve_run(RunRequest(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("loader", ["device", "dali"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_image_is_named_before_training(root: Path, loader: str, kind: str) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    spoil(root / "train" / "b" / "07.jpg", kind)
    with pytest.raises(UserError, match=r"^1 of 38 images .*b/07\.jpg .*--skip-broken\.$"):
        open_source(config(root, loader=loader), CPU)


@pytest.mark.parametrize("loader", ["device", "dali"])
def test_broken_images_are_left_out(
    root: Path, loader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    for n, kind in enumerate(KINDS):
        spoil(root / "train" / "a" / f"{n:02}.jpg", kind)
    spoil(root / "test" / "b" / "00.jpg", "cut off")
    asked = config(root, loader=loader, skip_broken=True)
    source = open_source(asked, CPU)
    assert source.num_samples == 25
    assert len(source.test) == 7
    said = capsys.readouterr().err
    assert "6 of 38 images" in said
    assert "(empty)" in said
    assert "and 3 more; they are left out." in said
    # What is left is what a folder without these files holds.
    for part, name, numbers in (("train", "a", range(5)), ("test", "b", range(1))):
        for n in numbers:
            (root / part / name / f"{n:02}.jpg").unlink()
    clean = open_source(config(root, loader=loader), CPU)
    for own, other in zip(source.loader.epoch(1), clean.loader.epoch(1), strict=True):
        assert torch.equal(own.image, other.image)
        assert torch.equal(own.index, other.index)


def test_lines_about_what_is_left_out_fit_the_terminal(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(root)
    for n in range(3):
        spoil(root / "train" / "a" / f"{n:02}.jpg", "empty")
    (root / "train" / "a" / "notes.txt").touch()
    load("folder:.", skip_broken=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if "Decoding" not in line]
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    assert all(line.startswith(("folder:", "3 of 38", "  ")) for line in lines)


def test_a_network_from_elsewhere_is_evaluated_without_broken_images(
    root: Path, tmp_path: Path, fastadv_command: Callable[..., Any]
) -> None:
    model = build_model("preact_resnet18", num_classes=2, width=2)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    spoil(root / "test" / "b" / "00.jpg", "cut off")
    words = ("evaluate", "--weights", tmp_path / "w.safetensors", "--model", "preact_resnet18")
    words = (*words, "--data", f"folder:{root}", "--attacks", "clean")
    refused = fastadv_command(*words)
    assert refused.code == 2
    assert "leave them out with --skip-broken." in " ".join(refused.err.split())
    done = fastadv_command(*words, "--skip-broken")
    assert done.code == 0
    assert "b/00.jpg (cut off); they are left out." in " ".join(done.err.split())
    kept = tmp_path / "w.safetensors.evaluations" / "evaluations.jsonl"
    assert json.loads(kept.read_text())["n"] == 7


def test_sound_images_of_odd_kinds_are_read(root: Path) -> None:
    """CMYK, grey, a palette, an animation, another format than the name says, bytes at the end."""
    folder = root / "train" / "a"
    photo = Image.open(folder / "00.jpg").convert("RGB")
    photo.convert("CMYK").save(folder / "01.jpg")
    photo.convert("L").save(folder / "02.jpg")
    photo.convert("P").save(folder / "03.png")
    photo.save(folder / "04.webp", save_all=True, append_images=[photo.rotate(90)])
    photo.save(folder / "05.jpg", "PNG")
    with open(folder / "06.jpg", "ab") as file:
        file.write(b"a camera's own bytes")
    assert ends_early(str(folder / "06.jpg"))  # so it is decoded, and found to be sound
    assert len(load(f"folder:{root}").train_images) == 32


def test_only_ends_are_read_and_only_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(finding, "undecodable", lambda file: asked.append(file) or True)
    spoil(root / "train" / "a" / "03.jpg", "cut off")
    with pytest.raises(UserError, match="1 of 38"):
        open_source(config(root, loader="device"), CPU)
    assert set(asked) == {str(root / "train" / "a" / "03.jpg")}
    looked: list[str] = []
    monkeypatch.setattr(finding, "_shows_it_is_broken", lambda file: looked.append(file) or False)
    with pytest.raises(UserError, match="1 of 38"):
        open_source(config(root, loader="device"), CPU)
    assert not looked


def test_an_image_that_was_repaired_is_read(root: Path) -> None:
    file = root / "train" / "a" / "03.jpg"
    spoil(file, "cut off")
    with pytest.raises(UserError, match="1 of 38"):
        load(f"folder:{root}")
    write(file, seed=3)
    assert len(load(f"folder:{root}").train_images) == 30


def test_a_class_without_a_sound_image_is_named(root: Path) -> None:
    for file in (root / "train" / "a").iterdir():
        spoil(file, "empty")
    with pytest.raises(UserError, match="no image of the class 'a' is left"):
        load(f"folder:{root}", skip_broken=True)


def test_damage_in_the_middle_is_found_by_the_loader_in_memory(root: Path) -> None:
    middle(root / "train" / "a" / "03.jpg")
    middle(root / "train" / "b" / "03.jpg")
    with pytest.raises(UserError, match=r"2 of 38 .*a/03\.jpg \(damaged\).*--skip-broken"):
        load(f"folder:{root}")
    assert len(load(f"folder:{root}", skip_broken=True).train_images) == 28


def test_the_batch_is_redone_without_an_image_that_breaks(root: Path) -> None:
    pytest.importorskip("nvidia.dali")
    asked = config(root, loader="dali", skip_broken=True, method="atta-1")
    whole = list(open_source(asked, CPU).loader.epoch(0))
    rows = [row for batch in whole for row in batch.index.tolist()]
    source = open_source(asked, CPU)
    middle(root / "train" / "a" / "03.jpg")
    left = list(source.loader.epoch(0))
    assert [row for batch in left for row in batch.index.tolist()] == [r for r in rows if r != 3]
    for own, other in zip(left, whole, strict=True):
        kept = torch.tensor([row != 3 for row in other.index.tolist()])
        assert torch.equal(own.image, other.image[kept])
        assert torch.equal(own.view.top, other.view.top[kept])
    # The next start knows it.
    assert open_source(asked, CPU).num_samples == 29


def test_what_is_left_out_is_said_once(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that has begun does not say it again, and cannot leave out more."""
    out = str(tmp_path / "run")
    spoil(root / "train" / "a" / "03.jpg", "cut off")
    settings = SETTINGS | {"data": f"folder:{root}", "loader": "device", "epochs": 1}
    train(RunRequest(**settings, skip_broken=True, out=out))
    assert capsys.readouterr().err.count("1 of 38 images") == 1
    with trusting(True):
        evaluate_run(out, "clean", on="val")
        resume(out)
    assert "38 images" not in capsys.readouterr().err


def test_a_run_that_goes_on_is_not_told_to_leave_out(root: Path) -> None:
    asked = config(root, loader="device")
    begun = replace(asked, origins=dict.fromkeys(asked.origins, Origin.STORED))
    for spoiling in (lambda file: spoil(file, "cut off"), middle):
        spoiling(root / "train" / "a" / "03.jpg")
        with pytest.raises(UserError, match=r"; repair or remove them\.$"):
            open_source(begun, CPU)
        with pytest.raises(UserError, match=r"leave them out with --skip-broken\.$"):
            open_source(asked, CPU)


@pytest.mark.slow
def test_a_run_is_saved_when_an_image_breaks_and_goes_on_without_it(
    root: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali")
    out = str(tmp_path / "run")
    reads = DaliLoader._take

    def breaking(self: DaliLoader, epoch: int, number: int) -> list[torch.Tensor]:
        if epoch == 1 and number == 0:
            middle(root / "train" / "a" / "03.jpg")
            self._stream = None  # what was decoded ahead
        return reads(self, epoch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DaliLoader, "_take", breaking)
        with pytest.raises(UserError, match=r"a/03\.jpg \(damaged\).*--resume"):
            train(RunRequest(**SETTINGS, data=f"folder:{root}", loader="dali", out=out))
    saved = checkpoint.load(Path(out) / "last.pt")
    assert saved["progress"]["epoch"] == 1
    with pytest.raises(UserError, match=r"a/03\.jpg \(damaged\); repair or remove them\.$"):
        resume(out)
    (root / "train" / "a" / "03.jpg").unlink()
    assert resume(out)["n"] == 8


@pytest.mark.parametrize("method", ["fast", "atta-1"])
@pytest.mark.parametrize("loader", ["device", "dali"])
@pytest.mark.slow
def test_a_run_goes_on_without_files_that_were_removed(
    root: Path, tmp_path: Path, method: str, loader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with state per sample: rows keep their numbers."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    out = tmp_path / "run"
    settings = SETTINGS | {"method": method, "data": f"folder:{root}", "loader": loader}
    asked = resolve_run(RunRequest(**settings))
    before = open_source(asked, CPU)
    train(RunRequest(**settings, out=str(out)))
    files = before.files
    assert files is not None
    rows = [row for batch in before.loader.epoch(1) for row in batch.index.tolist()]
    gone = rows[0]
    names = sorted((root / "train").rglob("*.jpg"))
    names[gone].unlink()
    (root / "test" / "a" / "00.jpg").unlink()
    after = open_source(asked, CPU, begun=files.listing)
    left = [row for batch in after.loader.epoch(1) for row in batch.index.tolist()]
    assert left == rows[1:]
    assert len(after.validation) == len(before.validation)
    assert len(after.test) == len(before.test) - 1
    edit(out / "config.toml", "epochs = 2", "epochs = 3")
    capsys.readouterr()
    with trusting(True):
        assert resume(str(out))["n"] == 7
        again = evaluate_run(str(out), "clean", on="val")
    assert again.n == len(before.validation)
    assert "2 images that the run was begun with" in " ".join(capsys.readouterr().out.split())


def test_a_run_goes_on_without_what_broke_since_it_began(
    root: Path, tmp_path: Path, fastadv_command: Callable[..., Any]
) -> None:
    settings = {"model": "preact_resnet18", "width": 2, "data": f"folder:{root}", "limit": None}
    out = stopped(tmp_path / "run", **SETTINGS | settings, loader="device")
    spoil(root / "test" / "a" / "00.jpg", "cut off")
    assert "repair or remove them." in fastadv_command("train", "--resume", out).err
    words = ("train", "--resume", out, "--skip-broken")
    refused = fastadv_command(*words, "--lr", "0.1")
    assert "continues a run as it was begun; omit --lr." in refused.err
    assert "in --keep 'worst'; known" in fastadv_command(*words, "--keep", "worst").err
    done = fastadv_command(*words, "--keep", "last", "--checkpoint-minutes", "1/2")
    assert done.code == 0, done.err
    assert "on 7 images" in " ".join(done.out.replace("test accuracy, % of", "on").split())


def test_another_folder_is_no_run_with_files_removed(root: Path, tmp_path: Path) -> None:
    files = open_source(config(root, loader="device"), CPU).files
    assert files is not None
    write(root / "train" / "a" / "99.jpg", seed=99)
    (root / "train" / "a" / "00.jpg").unlink()
    other = open_source(config(root, loader="device"), CPU, begun=files.listing)
    assert other.files is not None
    assert other.files.missing == 0
    assert other.content != files.listing.content
