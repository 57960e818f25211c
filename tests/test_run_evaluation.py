"""An evaluation reports its progress and precision, and loses nothing when interrupted."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch
from tiny import EPS, tiny_batch, tiny_model
from tiny_run import Counting

from fastadv.engine.model import precision
from fastadv.engine.model.compiled_forward import CompiledForward
from fastadv.errors import Interrupted, NotFiniteError, TrainingError, UserError
from fastadv.evaluation import accuracy as evaluation
from fastadv.evaluation.accuracy import verdicts_of
from fastadv.evaluation.counts import Counts
from fastadv.evaluation.found import Found
from fastadv.evaluation.search.engine import NOT_FINITE
from fastadv.evaluation.tally import Tally
from fastadv.run import console as console_module
from fastadv.run import eval_pass, eval_watch
from fastadv.run.console import Console
from fastadv.run.eval_pass import EvaluationStopped
from fastadv.run.finished import evaluate_run
from fastadv.run.loaded import load_run
from fastadv.run.request import RunRequest
from fastadv.run.source import from_memory
from fastadv.run.stop_request import StopRequest
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint, trust

SETTINGS: dict[str, Any] = {
    "method": "fast",
    "width": 2,
    "epochs": 2,
    "limit": 96,
    "batch_size": 32,
    "mode": "eager",
    "select_attack": "fgsm",
    "test_attacks": "clean,fgsm,pgd-2",
}
ATTACKS = "clean,fgsm,pgd-2"


@pytest.fixture(autouse=True, scope="module")
def hundreds() -> Iterator[None]:
    """Batches of 100 images, as for CIFAR; the digits would otherwise be one batch."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(from_memory, "eval_batch_size", lambda device, values: 100)
        yield


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(RunRequest(**SETTINGS, out=str(out)), Console())
    return out


@pytest.fixture
def run(begun: Path) -> Iterator[Path]:
    """A finished run of 360 test images, four batches of 100 at most, with no evaluation since."""
    yield begun
    (begun / "evaluations.jsonl").unlink(missing_ok=True)
    for name in ("evaluations.partial", "verdicts"):
        shutil.rmtree(begun / name, ignore_errors=True)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The attack and the number of images of every batch that is attacked."""
    seen: list[tuple[str, int]] = []
    add = Tally.add

    def noting(tally: Tally, x: torch.Tensor, y: torch.Tensor) -> None:
        seen.append((",".join(tally.specs), len(x)))
        add(tally, x, y)

    monkeypatch.setattr(Tally, "add", noting)
    return seen


class Stopping(Console):
    """Ctrl-C after so many images of an attack."""

    def __init__(self, attack: str, images: int) -> None:
        super().__init__(rich.console.Console(quiet=True))
        self._attack, self._images = attack, images

    @contextmanager
    def evaluating(
        self, title: str, attack: str, done: int, total: int
    ) -> Iterator[Callable[..., None]]:
        def tick(images: int, *_: Any) -> None:
            if attack == self._attack and images >= self._images:
                signal.raise_signal(signal.SIGINT)

        yield tick


def expected(run: Path, attacks: str = ATTACKS, which: str = "best", **options: Any) -> dict:
    """The result of an uninterrupted call."""
    config, data, model = load_run(str(run), which).evaluated
    options = {"eps": config.eps, "alpha": config.eval_alpha, **options}
    return evaluation.evaluate(model, data.test, attacks.split(","), norm=config.norm, **options)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_an_interrupted_evaluation_continues_with_the_same_result(run, passes) -> None:
    with pytest.raises(EvaluationStopped, match="pgd-2: 200 of 360 images") as stopped:
        evaluate_run(str(run), ATTACKS, console=Stopping("pgd-2", 200))
    assert list(stopped.value.scores) == ["clean", "fgsm"]
    passes.clear()
    found = evaluate_run(str(run), ATTACKS)
    assert passes == [("pgd-2", 100), ("pgd-2", 60)]
    assert found.stored == ["clean", "fgsm"]
    assert found == expected(run)
    assert found.n == 360
    assert not (run / "evaluations.partial").exists()


def test_every_result_is_a_line_with_all_its_settings(run) -> None:
    found = evaluate_run(str(run), ATTACKS, which="last", limit=50, seed=3)
    lines = records(run)
    assert [line["attack"] for line in lines] == ["clean", "fgsm", "pgd-2"]
    for line in lines:
        name = line["attack"]
        assert line["accuracy"] == {name: found[name]}
        assert line["right"] == [round(50 * found[name])]
        assert line["interval"] == {name: list(found.interval(name))}
        facts = {"n": 50, "seed": 3, "norm": "linf", "eps": 0.2, "precision": "float32"}
        facts |= {"which": "last weights", "torch": str(torch.__version__), "device": "cpu"}
        assert line | facts == line
        assert {"weights", "data", "fastadv", "date", "seconds", "alpha"} <= line.keys()


def test_stored_results_are_not_evaluated_again(run, passes) -> None:
    found = evaluate_run(str(run), ATTACKS)
    passes.clear()
    again = evaluate_run(str(run), "pgd-2,clean")
    assert passes == []
    assert again == {"pgd-2": found["pgd-2"], "clean": found["clean"]}
    assert len(records(run)) == 3


@pytest.mark.parametrize(
    "options", [{"eps": "0.1"}, {"seed": 1}, {"limit": 359}, {"alpha": "0.01"}]
)
def test_other_settings_are_another_evaluation(run, passes, options) -> None:
    evaluate_run(str(run), "pgd-2")
    passes.clear()
    found = evaluate_run(str(run), "pgd-2", **options)
    assert sum(images for _, images in passes) == options.get("limit", 360)
    assert found["pgd-2"] == evaluate_run(str(run), "pgd-2", **options)["pgd-2"]


def test_an_alpha_that_an_attack_ignores_is_no_other_evaluation(run, passes) -> None:
    attacks = "fgsm,apgd-ce-2,pgd-2"
    evaluate_run(str(run), attacks, limit=40)
    passes.clear()
    again = evaluate_run(str(run), attacks, limit=40, alpha="0.01")
    assert again.stored == ["fgsm", "apgd-ce-2"]
    assert {name for name, _ in passes} == {"pgd-2"}
    alphas = [(line["attack"], line["alpha"]) for line in records(run)]
    own = load_run(str(run)).config.eval_alpha
    assert alphas == [("fgsm", None), ("apgd-ce-2", None), ("pgd-2", own), ("pgd-2", 0.01)]


def test_other_weights_are_evaluated_again(run, passes, monkeypatch) -> None:
    evaluate_run(str(run), "fgsm")
    real = load_run

    def changed(path: str, which: str, **told: Any) -> Any:
        found = real(path, which, **told)
        model = found.model
        with torch.no_grad():
            next(model.parameters()).view(-1)[0].add_(1e-6)
        return found

    monkeypatch.setattr("fastadv.run.finished.load_run", changed)
    passes.clear()
    assert evaluate_run(str(run), "fgsm").stored == []
    assert len(passes) == 4


def test_a_line_that_was_changed_or_is_another_users_is_ignored(run, passes, monkeypatch) -> None:
    truth = evaluate_run(str(run), "clean,fgsm")
    file = run / "evaluations.jsonl"
    first, second = file.read_text().splitlines(keepends=True)
    right = json.loads(second)["right"][0]
    file.write_text(first + second.replace(f'"right": [{right}]', f'"right": [{right + 300}]'))
    passes.clear()
    assert evaluate_run(str(run), "clean,fgsm") == truth
    assert passes == [("fgsm", 100)] * 3 + [("fgsm", 60)]
    file.write_text((first + second)[:-40])  # cut short by a crash
    assert evaluate_run(str(run), "clean,fgsm").stored == ["clean"]
    assert evaluate_run(str(run), "clean,fgsm").stored == ["clean", "fgsm"]
    monkeypatch.setattr(trust, "_key", lambda *, make: b"somebody else's" * 2)
    assert evaluate_run(str(run), "clean,fgsm").stored == []


def test_a_killed_evaluation_loses_a_few_seconds(run, monkeypatch) -> None:
    """Finished work is also saved before any interruption."""
    monkeypatch.setattr(eval_watch, "KEEP_EVERY", -1.0)
    kept: list[int] = []

    class Looking(Stopping):
        @contextmanager
        def evaluating(self, *inputs: Any) -> Iterator[Callable[..., None]]:
            def tick(images: int, *_: Any) -> None:
                for file in (run / "evaluations.partial").glob("*"):
                    known = json.loads(file.read_bytes().split(b"\n")[1])["known"]
                    kept.append(known["fgsm"])

            yield tick

    evaluate_run(str(run), "fgsm", console=Looking("", 0))
    assert sorted(set(kept)) == [0, 100, 200, 300]


def test_a_run_folder_that_cannot_be_written_is_still_evaluated(run) -> None:
    (run / "evaluations.jsonl").symlink_to(run / "elsewhere")
    with pytest.warns(UserWarning, match="cannot be stored"):
        found = evaluate_run(str(run), "fgsm")
    assert found == expected(run, "fgsm")
    assert not (run / "elsewhere").exists()


def test_warnings_about_a_stored_result_are_repeated(run, monkeypatch) -> None:
    monkeypatch.setattr(Counts, "remarks", lambda counts: iter([f"masked {counts.right}"]))
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            evaluate_run(str(run), "fgsm")
        assert [str(w.message).split()[0] for w in said] == ["masked"]


def test_an_unknown_attack_is_refused_before_the_first_pass(run, passes) -> None:
    with pytest.raises(ValueError, match="'pgd-20'"):
        evaluate_run(str(run), "clean,pdg-20")
    assert passes == []


def test_ctrl_c_shows_the_results_so_far_and_how_to_continue(
    run, fastadv_command, monkeypatch
) -> None:
    stopping = Stopping("fgsm", 100)
    with monkeypatch.context() as patched:
        patched.setattr(Console, "evaluating", lambda _, *inputs: stopping.evaluating(*inputs))
        outcome = fastadv_command("evaluate", run, "--attacks", "clean,fgsm")
    assert outcome.code == 130
    assert "clean" in outcome.out
    assert "fgsm" not in outcome.out
    assert "fgsm: 100 of 360 images" in outcome.err
    assert "the same command continues" in outcome.err
    done = fastadv_command("evaluate", run, "--attacks", "clean,fgsm")
    assert done.code == 0
    assert "evaluated in float32" in done.out
    assert "evaluated before: clean" in done.out


@pytest.mark.parametrize(
    ("options", "attack"),
    [
        ({"averaging": "ema"}, "pgd-2"),
        pytest.param({}, "fgsm", marks=pytest.mark.slow),
        pytest.param({}, "pgd-2", marks=pytest.mark.slow),
        pytest.param({"averaging": "ema"}, "fgsm", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_final_evaluation_continues(
    options, attack, tmp_path, passes, monkeypatch
) -> None:
    """A run whose best weights are not the last ones, so that two networks are evaluated."""
    usual = SETTINGS | {"options": options, "lr": 1.0, "epochs": 3}
    whole = train(RunRequest(**usual, out=str(tmp_path / "whole")), Console())
    out = tmp_path / "stopped"
    assert whole["best_epoch"] < 3
    all_passes = [entry for entry in passes if entry[0] in ATTACKS.split(",")]
    passes.clear()

    def stopping(stops: StopRequest) -> bool:
        if passes[-2:] == [(attack, 100)] * 2:
            stops.by = "SIGINT"
        return real(stops)

    real = StopRequest.told
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "told", stopping)
        with pytest.raises(Interrupted, match="--resume"):
            train(RunRequest(**usual, out=str(out)), Console())
    assert (out / "evaluations.partial").exists()
    found = resume(str(out), Console())
    times = {"eval_seconds": 0, "train_seconds": 0}
    assert found | times == whole | times
    made = Counter(entry for entry in passes if entry[0] in ATTACKS.split(","))
    # Images that a search was at work on when it was stopped are read again, of one batch at most.
    again = made - Counter(all_passes)
    assert not Counter(all_passes) - made
    assert again.total() == (1 if attack.startswith("pgd") else 0)
    assert not (out / "evaluations.partial").exists()
    assert not (out / "evaluations.jsonl").exists()


def test_an_interrupted_evaluation_between_epochs_also_continues(
    tmp_path, passes, monkeypatch
) -> None:
    usual = SETTINGS | {"limit": 1200, "val_fraction": 0.2, "epochs": 1, "batch_size": 128}
    whole = train(RunRequest(**usual, out=str(tmp_path / "whole")), Console())
    evaluated = [images for names, images in passes if names == "clean,fgsm"]
    passes.clear()
    out = tmp_path / "stopped"

    def stopping(stops: StopRequest) -> bool:
        if passes[-1:] == [("clean,fgsm", 100)]:
            stops.by = "SIGINT"
        return real(stops)

    real = StopRequest.told
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "told", stopping)
        with pytest.raises(Interrupted):
            train(RunRequest(**usual, out=str(out)), Console())
    times = {"eval_seconds": 0, "train_seconds": 0}
    assert resume(str(out), Console()) | times == whole | times
    assert [images for names, images in passes if names == "clean,fgsm"] == evaluated
    assert len(evaluated) > 1
    lines = [json.loads((at / "metrics.jsonl").read_text()) for at in (tmp_path / "whole", out)]
    assert lines[0]["val_fgsm_percent"] == lines[1]["val_fgsm_percent"]


def test_verdicts_of_other_images_are_refused() -> None:
    x, y, _, _ = tiny_batch(12)
    options: dict[str, Any] = {"eps": EPS, "norm": "linf", "alpha": None, "seed": 0}
    done = verdicts_of(tiny_model(), [(x[:5], y[:5])], ["clean"], **options)
    y[:6] = (y[:6] + 1) % 2
    with pytest.raises(ValueError, match="other images"):
        verdicts_of(tiny_model(), [(x[:6], y[:6])], ["clean"], **options, done=done)


def drawn(terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    out = rich.console.Console(
        file=text, force_terminal=terminal, width=80, soft_wrap=True, highlight=False
    )
    return Console(out), text


def test_a_terminal_shows_a_bar_with_rate_time_left_and_precision(run) -> None:
    console, text = drawn(terminal=True)
    evaluate_run(str(run), "fgsm,pgd-2", console=console)
    shown = rich.text.Text.from_ansi(text.getvalue()).plain.replace("\n", "")
    sentence = "evaluating best weights on 360 test images under fgsm, pgd-2: linf eps 0.2, float32"
    assert sentence in shown
    assert "360/360" in shown
    assert "images/s" in shown
    assert "left" in shown


def test_without_a_terminal_only_long_evaluations_report_progress(run, monkeypatch) -> None:
    console, text = drawn(terminal=False)
    evaluate_run(str(run), "fgsm", console=console)
    assert text.getvalue() == ""
    monkeypatch.setattr(console_module, "SAY_EVERY", 0.0)
    evaluate_run(str(run), "fgsm", seed=1, console=console)
    first, *others = text.getvalue().splitlines()
    shown = [line.split("; fgsm: ")[1].split("/")[0] for line in (first, *others)]
    assert list(dict.fromkeys(shown)) == ["100", "200", "300", "360"]
    assert first.startswith(
        "evaluating best weights on 360 test images under fgsm: linf eps 0.2, float32; "
        "fgsm: 100/360 "
    )
    assert first.endswith("left")


@pytest.mark.slow
def test_one_mode_continues_another_and_is_told(run, passes, monkeypatch, fastadv_command) -> None:
    backend = Counting("aot_eager")
    monkeypatch.setattr(eval_pass, "CompiledForward", lambda: CompiledForward(backend))
    titles: list[str] = []

    class Reading(Stopping):
        def evaluating(self, title: str, *others: Any) -> Any:
            titles.append(title)
            return super().evaluating(title, *others)

    attacks = "clean,fgsm,pgd-2"
    with pytest.raises(EvaluationStopped, match="pgd-2: 200 of 360 images"):
        evaluate_run(str(run), attacks, console=Reading("pgd-2", 200), mode="compiled")
    assert backend.count == 2  # for all attacks
    assert {title.rpartition(": ")[2] for title in titles} == {"linf eps 0.2, float32, compiled"}
    passes.clear()
    with monkeypatch.context() as patched:
        reading = Reading("none", 0)
        patched.setattr(Console, "evaluating", lambda _, *inputs: reading.evaluating(*inputs))
        done = fastadv_command("evaluate", run, "--attacks", attacks, "--mode", "eager")
    assert done.code == 0
    assert titles[-1].endswith("float32, eager")
    assert "evaluated before: clean, fgsm" in done.out
    assert passes == [("pgd-2", 100), ("pgd-2", 60)]
    found = evaluate_run(str(run), attacks, mode="auto")
    assert found.stored == attacks.split(",")
    assert found == expected(run)
    assert not any("mode" in line for line in records(run))
    with pytest.raises(UserError, match="needs a CUDA device"):
        evaluate_run(str(run), attacks, mode="captured")
    assert backend.count == 2


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"amp": True}, "trains in bfloat16, evaluates in float32"),
        ({"attack_dtype": "bf16"}, "trains in float32 (attack bfloat16), evaluates in float32"),
        ({}, None),
    ],
)
def test_a_run_says_when_it_evaluates_in_another_precision(
    settings, line, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies", lambda dtype: True)
    console, text = drawn(terminal=False)
    short = SETTINGS | {"epochs": 1, "limit": 64, "test_limit": 20, "test_attacks": "clean"}
    train(RunRequest(**short, **settings, out=str(tmp_path / "run")), console)
    said = [found for found in text.getvalue().splitlines() if "evaluates in" in found]
    assert said == ([line] if line else [])


@pytest.mark.parametrize("sentence", ["The model's outputs are not finite.", NOT_FINITE])
def test_reasons_why_an_evaluation_fails_are_reported_unchanged(
    sentence, begun, tmp_path, monkeypatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NotFiniteError(sentence)

    monkeypatch.setattr("fastadv.run.own_scores.run_evaluation", fail)
    out = tmp_path / "run"
    with pytest.raises(TrainingError) as first:
        train(RunRequest(**SETTINGS | {"epochs": 1}, out=str(out)), Console())
    assert sentence in str(first.value)
    assert "no longer finite" in str(first.value)
    assert "still holds" not in str(first.value)
    with pytest.raises(TrainingError, match=r"last\.pt still holds what was saved before"):
        train(
            RunRequest(**SETTINGS | {"epochs": 1}, checkpoint_minutes=0.0, out=str(out) + "2"),
            Console(),
        )


def test_a_pass_that_ends_in_an_interruption_is_written_by_the_next(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last batch, reading the result waits for the device."""
    real = Tally.found

    def stopped(tally: Tally, *, shared: bool = False) -> Found:
        if shared:
            raise KeyboardInterrupt
        return real(tally)

    with monkeypatch.context() as patched:
        patched.setattr(Tally, "found", stopped)
        with pytest.raises(EvaluationStopped):
            evaluate_run(str(run), "fgsm")
    for _ in range(2):
        evaluate_run(str(run), "fgsm")
    assert len((run / "evaluations.jsonl").read_text().splitlines()) == 1
    assert not (run / "evaluations.partial").exists()


def test_outputs_that_are_not_finite_are_told_in_words_of_the_command(
    run: Path, monkeypatch: pytest.MonkeyPatch, fastadv_command: Any
) -> None:
    load = checkpoint.load

    def overflowing(path: Path) -> dict[str, Any]:
        saved = load(path)
        saved["model"] = {
            name: torch.full_like(value, torch.inf) if "bias" in name else value
            for name, value in saved["model"].items()
        }
        return saved

    monkeypatch.setattr(checkpoint, "load", overflowing)
    outcome = fastadv_command("evaluate", run, "--attacks", "clean", "--which", "last")
    assert outcome.code == 2
    said = " ".join(outcome.err.split())
    assert re.search(r"last weights: The model's outputs are not finite, first .* image 0 ", said)
    assert said.endswith("whole: --which best, last or a kept epoch.")
    assert "amp" not in said
