"""``fastadv evaluate --sanity``: what it prints, how it ends, and what it keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fastadv.run.console import Console
from fastadv.run.request import RunRequest
from fastadv.run.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    settings: dict[str, Any] = {"method": "standard", "width": 2, "epochs": 3, "mode": "eager"}
    train(RunRequest(**settings, out=str(out), eval_every=100), Console())
    return out


def test_an_honest_run_passes(run: Path, fastadv_command: Callable[..., Any]) -> None:
    done = fastadv_command("evaluate", run, "--sanity", "--limit", 60, "--seed", 3)
    assert done.code == 0, done.out + done.err
    lines = done.out.splitlines()
    assert lines[0].endswith("best weights: 60 test images")
    assert [line.split()[0] for line in lines[1:12]] == ["passed"] * 11
    assert lines[12].startswith("passed all 11 checks on 60 images")
    assert "correctly classified of 60 images: at most" in done.err
    record = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert record["attack"] == "sanity"
    assert record["sanity"]["passed"] is True
    assert (record["n"], record["seed"], record["norm"], record["eps"]) == (60, 3, "linf", 0.2)
    assert [check["check"] for check in record["sanity"]["checks"]][:3] == [
        "same outputs", "logits", "gradient",
    ]  # fmt: skip


def test_a_record_of_it_is_not_taken_for_an_attack(
    run: Path, fastadv_command: Callable[..., Any]
) -> None:
    fastadv_command("evaluate", run, "--sanity", "--limit", 20)
    done = fastadv_command("evaluate", run, "--attacks", "clean", "--limit", 20)
    assert done.code == 0, done.err
    assert "evaluated before" not in done.out
    assert "unknown" in fastadv_command("evaluate", run, "--attacks", "sanity").err.lower()


def test_a_masked_network_from_elsewhere_ends_with_3(
    run: Path, tmp_path: Path, fastadv_command: Callable[..., Any]
) -> None:
    """The run's own weights, with logits 10,000 times as large."""
    file = tmp_path / "masked.safetensors"
    assert fastadv_command("export", run, "--out", file).code == 0
    tensors = load_file(file)
    last = [name for name, tensor in tensors.items() if tensor.shape[:1] == (10,)]
    assert len(last) == 2
    for name in last:
        tensors[name] = 1e4 * tensors[name]
    save_file(tensors, file)
    words = ("--model", "preact_resnet18", "--weights", file, "--data", "digits")
    done = fastadv_command("evaluate", *words, "--eps", 0.2, "--sanity", "--limit", 60)
    assert done.code == 3, done.out + done.err
    assert "FAILED  gradient: the gradient is exactly zero for" in done.out
    assert "means nothing" in done.out
    folder = Path(f"{file}.evaluations")
    record = json.loads((folder / "evaluations.jsonl").read_text())
    assert record["sanity"]["passed"] is False


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--sanity", "--attacks", "pgd-20"), "omit --attacks"),
        (("--sanity", "--alpha", "0.01", "--format", "csv"), "omit --alpha, --format"),
        (("--sanity", "--save-examples"), "omit --save-examples"),
        (("--sanity", "--mode", "eager"), "omit --mode"),
        (("--mode", "compile"), "Unknown mode 'compile'; did you mean 'compiled'?"),
        (("--sanity", "--reference", "--search-dtype", "bf16"), "omit --search-dtype, --reference"),
        (("--reference", "--format", "csv"), "omit --format csv"),
        (("--sanity", "--limit", "0"), "--limit must be at least 1"),
        (("--sanity", "--eps", "0"), "eps is 0"),
        (("--sanity", "--other", "nowhere"), "There is no"),
        (("--other", "runs/a"), "--other is for --sanity"),
    ],
)
def test_refusals_in_one_sentence(
    words: tuple[str, ...], sentence: str, run: Path, fastadv_command: Callable[..., Any]
) -> None:
    done = fastadv_command("evaluate", run, *words)
    assert done.code == 2
    assert done.out == ""
    assert sentence in done.err
    assert done.err.count("\n") == 1
