"""A user's mistakes: one sentence, exit code 2, nothing lost. Also the output of commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from edited import edit

from fastadv.storage import checkpoint

SMALL = ("--width", 2, "--epochs", 1, "--limit", 128, "--test-limit", 40)

MISTAKES = {
    "method": (("--method", "aprat"), "did you mean 'apart'"),
    "option name": (("--methd", "pgd"), "--method"),
    "part": (("--weights", "awq"), "did you mean 'awp'"),
    "part option": (("--method", "pgd", "--beta", 3), "--beta belongs to --objective trades"),
    "model": (("--model", "preact_resnet"), "did you mean 'preact_resnet18'"),
    "data set": (("--data", "cifar"), "cifar10"),
    "missing folder": (("--data", "folder:/no/such/place"), "/no/such/place"),
    "negative eps": (("--eps", "-8/255"), "eps"),
    "eps no number": (("--eps", "eight"), "eight"),
    "no epochs": (("--epochs", 0), "--epochs"),
    "no batch": (("--batch-size", 0), "--batch-size"),
    "batch of one": (("--batch-size", 1), "BatchNorm"),
    "norm": (("--norm", "l1"), "norm"),
    "no run": (("--resume", "nowhere"), "nowhere"),
    "resume with options": (("--resume", "nowhere", "--epochs", 3), "--epochs"),
    "choice": (("--schedule", "triangle"), "triangular"),
    "no blocks": (("--model", "vgg16"), "blocks"),
    "attack": (("--select-attack", "pdg-10"), "pgd"),
    "number": (("--lr", "fast"), "lr"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(name, fastadv_command):
    words, hint = MISTAKES[name]
    given = {word for word in words if isinstance(word, str)}
    small = [
        entry
        for flag, value in zip(SMALL[::2], SMALL[1::2], strict=True)
        if flag not in given and "--resume" not in given
        for entry in (flag, value)
    ]
    outcome = fastadv_command("train", *words, *small)
    assert outcome.code == 2
    assert hint in outcome.err
    assert "Traceback" not in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def npz(path: Path, **changes: np.ndarray) -> Path:
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (64, 8, 8, 1), dtype=np.uint8),
        "y_train": generator.integers(0, 3, 64),
        "x_test": generator.integers(0, 256, (16, 8, 8, 1), dtype=np.uint8),
        "y_test": generator.integers(0, 3, 16),
    }
    np.savez(path, **(arrays | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"x_train": np.full((64, 8, 8, 1), 3.0, np.float32)}, "[0,1]"),
        ({"y_train": np.full(64, -1)}, "abel"),
    ],
)
def test_bad_data_is_one_sentence(changes, hint, tmp_path, fastadv_command):
    path = npz(tmp_path / "data.npz", **changes)
    outcome = fastadv_command("train", "--data", f"npz:{path}", "--method", "fast", "--epochs", 1)
    assert outcome.code == 2
    assert hint.replace(" ", "") in outcome.err.replace(" ", "")


def test_a_run_writes_its_folder_and_is_not_overwritten(tmp_path, fastadv_command):
    words = ("train", "--method", "fast", *SMALL, "--out", "run")
    first = fastadv_command(*words)
    assert first.code == 0
    folder = tmp_path / "run"
    names = {"config.toml", "metrics.jsonl", "last.pt", "best.pt", "summary.json"}
    assert {file.name for file in folder.iterdir()} == names
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["best"]) == {"clean", "pgd-20"}
    assert all(0 <= score <= 1 for score in summary["last"].values())
    before = (folder / "last.pt").read_bytes()
    again = fastadv_command(*words)
    assert again.code == 2
    assert "--resume" in again.err
    assert (folder / "last.pt").read_bytes() == before


def test_evaluate_repeats_the_summary(tmp_path, fastadv_command):
    fastadv_command("train", "--method", "fast", *SMALL, "--out", "run")
    outcome = fastadv_command(
        "evaluate", "run", "--attacks", "clean,pgd-20", "--which", "last", "--limit", 40
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert outcome.code == 0
    for score in summary["last"].values():
        assert f"{100 * score:.2f}" in outcome.out


def test_a_damaged_checkpoint_is_refused(tmp_path, fastadv_command):
    fastadv_command("train", "--method", "fast", *SMALL, "--out", "run")
    file = tmp_path / "run" / "best.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    outcome = fastadv_command("evaluate", "run")
    assert outcome.code == 2
    assert "damaged" in outcome.err


def test_weights_of_another_model_are_refused(tmp_path, fastadv_command):
    fastadv_command("train", "--method", "fast", *SMALL, "--out", "run")
    config = tmp_path / "run" / "config.toml"
    edit(config, "width = 2", "width = 4")
    outcome = fastadv_command("evaluate", "run")
    assert outcome.code == 2
    assert "is of a run with width 2" in outcome.err


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_weights(tmp_path, fastadv_command):
    words = ("train", "--method", "fast", *SMALL, "--limit", 640, "--lr", 1e30, "--out", "run")
    outcome = fastadv_command(*words)
    assert outcome.code == 2
    assert re.search(r"at step \d+;", outcome.err)
    saved = checkpoint.load(tmp_path / "run" / "last_good.pt")["model"]
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_outputs_that_are_not_finite_give_no_accuracy(fastadv_command):
    outcome = fastadv_command("train", "--method", "fast", *SMALL, "--lr", 1e30, "--out", "run")
    assert outcome.code == 2
    assert "no longer finite" in outcome.err


def test_selecting_on_the_test_set_says_what_that_means(fastadv_command):
    outcome = fastadv_command("train", "--method", "standard", *SMALL, "--select", "test")
    assert outcome.code == 0
    assert "chosen on the test set" in outcome.out


def test_a_config_with_a_typo_is_refused(tmp_path, fastadv_command):
    fastadv_command("train", "--method", "fast", *SMALL, "--out", "run")
    config = tmp_path / "run" / "config.toml"
    edit(config, "epochs =", "epoch =")
    outcome = fastadv_command("train", "--resume", "run")
    assert outcome.code == 2
    assert "'epochs'" in outcome.err


def test_export_writes_the_weights(tmp_path, fastadv_command):
    from safetensors.torch import load_file

    fastadv_command("train", "--method", "fast", *SMALL, "--out", "run")
    assert fastadv_command("export", "run", "--out", "model.safetensors").code == 0
    exported = load_file(tmp_path / "model.safetensors")
    saved = checkpoint.load(tmp_path / "run" / "best.pt")["model"]
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)


def test_robust_self_training_from_labelling_to_training(tmp_path, fastadv_command):
    generator = np.random.default_rng(0)
    unlabelled = generator.integers(0, 256, (50, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "unlabelled.npz", images=unlabelled)
    small = (*SMALL, "--steps", 1, "--batch-size", 32)
    refused = fastadv_command("train", "--method", "rst", *small)
    assert refused.code == 2
    assert "fastadv pseudo-label" in refused.err
    fastadv_command("train", "--method", "standard", *SMALL, "--out", "teacher")
    words = ("--images", "unlabelled.npz", "--out", "labelled.npz")
    assert fastadv_command("pseudo-label", "teacher", *words).code == 0
    trained = fastadv_command("train", "--method", "rst", *small, "--unlabelled", "labelled.npz")
    assert trained.code == 0
    assert "165 training images" in trained.out  # 115 of 128 labelled ones and 50 more


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("methods",), r"^ apart +49\.30 PGD-20 +FGSM\+, a learned step in each block$"),
        (("methods", "apart"), r"^source: APART, Alg\. 1 and Tables 2 to 4$"),
        (("doctor",), r"^CPU: \d+ threads, .*bf16 (in|not in) hardware"),
    ],
)
def test_commands_that_only_print(words, says, fastadv_command):
    outcome = fastadv_command(*words)
    assert outcome.code == 0
    assert re.search(says, outcome.out, re.MULTILINE), outcome.out


def test_a_method_is_explained_by_the_name_that_others_use(fastadv_command):
    outcome = fastadv_command("methods", "FGSM-RS")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[:2] == [
        "FGSM-RS is called fast here",
        "fast: F+FGSM: 1.25 eps from a random start",
    ]


def test_what_is_a_setting_and_an_option_is_explained_once(fastadv_command):
    said = fastadv_command("methods", "apart").out
    assert len(re.findall(r"^  pad = 0", said, re.MULTILINE)) == 1


def test_every_command_exists(fastadv_command):
    commands = ("train", "evaluate", "bench", "methods", "doctor", "export", "pseudo-label")
    for command in commands:
        assert fastadv_command(command, "--help").code == 0
    assert fastadv_command("bench", "--methods", "pdg").code == 2


def test_an_unknown_method_to_explain(fastadv_command):
    outcome = fastadv_command("methods", "aprat")
    assert outcome.code == 2
    assert "did you mean 'apart'" in outcome.err
