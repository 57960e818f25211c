"""Long evaluations of a run: killed, out of time, with their examples, and what they show."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
import torch
from torch import Tensor, nn

import fastadv
from fastadv.engine.model.network import Network
from fastadv.errors import NotFiniteError, UserError
from fastadv.evaluation.forecast import Forecast
from fastadv.evaluation.ledger import OPEN, RIGHT, Ledger
from fastadv.evaluation.verdicts import Verdicts
from fastadv.run import console as console_module
from fastadv.run import eval_watch
from fastadv.run.console import Console
from fastadv.run.eval_watch import Deadline
from fastadv.run.finished import evaluate_run
from fastadv.run.loaded import load_run
from fastadv.run.request import RunRequest
from fastadv.run.source import EvalBatches, from_memory
from fastadv.run.train import train

SETTINGS: dict[str, Any] = {
    "method": "fast",
    "width": 2,
    "epochs": 3,
    "limit": 400,
    "batch_size": 32,
    "mode": "eager",
    "select_attack": "clean",
    "test_attacks": "clean",
    "test_limit": 10,
}
CASCADE = "apgd-ce-5+apgd-t-5-3+square-30"
LIMIT = 60
EPS = "0.1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("long") / "run"
    train(RunRequest(**SETTINGS, out=str(out)), Console())
    return out


@pytest.fixture
def run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A finished run without evaluations, evaluated in batches of 25 images."""
    monkeypatch.setattr(from_memory, "eval_batch_size", lambda device, values: 25)
    yield trained
    (trained / "evaluations.jsonl").unlink(missing_ok=True)
    for name in ("evaluations.partial", "verdicts"):
        shutil.rmtree(trained / name, ignore_errors=True)


def evaluated(run: Path, attacks: str = CASCADE, **options: Any) -> Any:
    return evaluate_run(str(run), attacks, eps=EPS, limit=LIMIT, **options)


def record(run: Path) -> dict[str, Any]:
    (line,) = (run / "evaluations.jsonl").read_text().splitlines()
    return dict(json.loads(line))


def require_same(found: Verdicts, expected: Verdicts) -> None:
    """The margins of passes with another number of images may be rounded differently."""
    for name in ("index", "label", "right", "fooled_by"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.margin, expected.margin, atol=1e-4)
    assert found.stages == expected.stages


def test_every_result_has_a_file_of_verdicts(run: Path) -> None:
    scores = evaluated(run)
    line = record(run)
    held = Verdicts.read(run / line["verdicts"])
    require_same(held, scores.verdicts[CASCADE])
    config, data, model = load_run(str(run), "best").evaluated
    images = data.test.limited(LIMIT)
    own = fastadv.evaluate(model, images, [CASCADE], eps=EPS, norm=config.norm)
    np.testing.assert_array_equal(held.fooled_by, own.verdicts[CASCADE].fooled_by)
    np.testing.assert_array_equal(held.index, images.rows.numpy())
    assert held.stages == ("clean", *CASCADE.split("+"))
    assert (held.facts["attack"], held.facts["eps"], held.facts["norm"]) == (CASCADE, 0.1, "linf")
    assert held.facts["images"] == data.content["test data"]
    assert line["accuracy"][CASCADE] == pytest.approx(held.accuracy)
    stored = evaluated(run)
    assert stored.stored == [CASCADE]
    require_same(stored.verdicts[CASCADE], held)


def test_other_attacks_and_radii_have_their_own_files(run: Path) -> None:
    for attack, eps in (("clean", EPS), ("noise-8/255", EPS), ("fgsm", EPS), ("fgsm", "0.2")):
        evaluate_run(str(run), attack, eps=eps, limit=LIMIT)
    names = sorted(path.name.rpartition("-")[0] for path in (run / "verdicts").iterdir())
    assert names == ["best-clean", "best-fgsm", "best-fgsm", "best-noise-8_255"]


def test_a_file_of_verdicts_that_is_gone_is_made_again(run: Path) -> None:
    first = evaluated(run, "fgsm")
    (file,) = (run / "verdicts").iterdir()
    file.unlink()
    with pytest.warns(UserWarning, match=r"fgsm-.*npz is missing, so fgsm is evaluated again"):
        again = evaluated(run, "fgsm")
    assert again.stored == []
    require_same(again.verdicts["fgsm"], first.verdicts["fgsm"])
    assert file.exists()


def test_the_command_takes_names_in_capitals_for_the_same_attack(
    run: Path, fastadv_command: Any
) -> None:
    evaluated(run, "fgsm")
    words = ("--eps", EPS, "--limit", LIMIT)
    outcome = fastadv_command("evaluate", run, "--attacks", "FGSM", *words)
    assert (outcome.code, "evaluated before: fgsm" in outcome.out) == (0, True)


# Each line of its input begins an evaluation in a child, which has nothing to import. It writes the
# child's number, and with what it ended.
KILLED = """
import os
import sys
from fastadv.run import eval_watch
from fastadv.run.source import from_memory
from fastadv.run.finished import evaluate_run

from_memory.eval_batch_size = lambda device, values: 25
eval_watch.KEEP_EVERY = -1.0
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        evaluate_run(sys.argv[1], sys.argv[2], eps=sys.argv[3], limit=int(sys.argv[4]),
                     save_examples=True)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def kept(run: Path) -> list[Ledger]:
    found = []
    for path in (run / "evaluations.partial").glob("*.0"):
        _, header, payload = path.read_bytes().split(b"\n", 2)
        assert sum(json.loads(header)["bytes"].values()) == len(payload)
        found.append(Ledger.unpacked(payload))
    return found


def runs_still(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_killed_several_times_it_ends_with_the_same_verdicts(run: Path) -> None:
    expected = evaluated(run, save_examples=True).verdicts[CASCADE]
    examples = np.load(run / record(run)["examples"])
    (run / "evaluations.jsonl").unlink()
    shutil.rmtree(run / "verdicts")
    moments = (
        lambda rows: ((rows["fooled_by"] == OPEN) & (rows["runs"] > 0)).any(),
        lambda rows: ((rows["fooled_by"] == OPEN) & (rows["passed"] == 2)).any(),
        lambda rows: (rows["fooled_by"] == RIGHT).any(),
    )
    command = [sys.executable, "-c", KILLED, str(run), CASCADE, EPS, str(LIMIT)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for reached in moments:
            print(file=parent.stdin, flush=True)
            child = int(parent.stdout.readline())
            while runs_still(child) and not any(reached(each.rows) for each in kept(run)):
                time.sleep(0.002)
            assert runs_still(child), "it ended before it could be killed"
            os.kill(child, signal.SIGKILL)
            assert int(parent.stdout.readline()) == signal.SIGKILL
            assert not (run / "evaluations.jsonl").exists()
    found = evaluated(run, save_examples=True)
    require_same(found.verdicts[CASCADE], expected)
    again = np.load(run / record(run)["examples"])
    close = np.abs(again - examples).reshape(LIMIT, -1).max(1) < 1e-4
    assert close[~expected.right].mean() > 0.9
    assert not (run / "evaluations.partial").exists()
    assert not list((run / "verdicts").glob("*.partial"))


def test_examples_are_those_of_the_attack(run: Path) -> None:
    attacks = f"clean,pgd-3,{CASCADE}"
    scores = evaluated(run, attacks, save_examples=True)
    _, data, model = load_run(str(run), "best").evaluated
    parts = list(data.test.limited(LIMIT))
    x, y = (torch.cat(each) for each in zip(*parts, strict=True))
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert "examples" not in lines[0]
    for line, name in zip(lines[1:], attacks.split(",")[1:], strict=True):
        held = np.load(run / line["examples"], mmap_mode="r")
        assert held.dtype == np.float32
        x_adv = torch.from_numpy(held.copy())
        own = fastadv.attack(model, x, y, name, eps=EPS)
        verdicts = scores.verdicts[name]
        moved = torch.from_numpy(
            verdicts.fooled_by > 0 if name == CASCADE else verdicts.right | True
        )
        torch.testing.assert_close(x_adv[moved], own[moved], atol=1e-5, rtol=0)
        assert (x_adv - x).abs().max() <= 0.1 + 1e-6
        assert (x_adv >= 0).all()
        assert (x_adv <= 1).all()
        with torch.no_grad():
            right = model.eval()(x_adv).argmax(1) == y
        np.testing.assert_array_equal(right.numpy(), verdicts.right)
    assert evaluated(run, attacks, save_examples=True).stored == attacks.split(",")


def test_a_result_without_examples_is_not_one_with_them(run: Path) -> None:
    evaluated(run, "fgsm")
    assert evaluated(run, "fgsm", save_examples=True).stored == []
    assert evaluated(run, "fgsm", save_examples=True).stored == ["fgsm"]


# -- the time limit -------------------------------------------------------------------------------


class Steps(Deadline):
    """Comes after so many looks."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._left = steps

    def comes_within(self, seconds: float) -> bool:
        self._left -= 1
        self.is_over = self._left < 0
        return self.is_over


def test_out_of_time_it_tells_the_bounds_and_continues(run: Path) -> None:
    attack = "apgd-ce-5+apgd-t-5-3+square-8"
    truth = evaluated(run, attack)
    (run / "evaluations.jsonl").unlink()
    shutil.rmtree(run / "verdicts")
    spans = [(0.0, 1.0)]
    while len(spans) < 20:
        # More than a run of the search with the longest ones takes.
        scores = evaluated(run, f"{attack},clean", deadline=Steps(12))
        if attack in scores:
            break
        assert "clean" not in scores
        assert scores.bounds["clean"] == (0.0, 1.0)
        low, high = scores.bounds[attack]
        known = scores.known[attack]
        assert high - low == pytest.approx((LIMIT - known) / LIMIT)
        assert spans[-1][0] <= low <= truth[attack] + 1e-6
        assert truth[attack] - 1e-6 <= high <= spans[-1][1]
        (path,) = (run / "evaluations.partial").glob("*.0")
        header = json.loads(path.read_bytes().split(b"\n")[1])
        assert header["accuracy between"] == {attack: [low, high]}
        assert (header["known"], header["of"]) == ({attack: known}, LIMIT)
        spans.append((low, high))
    assert len(spans) > 3
    require_same(scores.verdicts[attack], truth.verdicts[attack])


def test_a_step_that_would_end_after_the_deadline_is_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    deadline = Deadline(0.5)
    assert not deadline.comes_within(29.9)
    assert not deadline.is_over
    assert deadline.comes_within(30.1)
    assert deadline.is_over
    assert not Deadline().comes_within(1e9)
    assert Deadline("0.5").comes_within(30.1)
    assert not Deadline("0.5").comes_within(29.9)
    for wrong in (0.0, -1.0, float("nan"), "1h", "nan", "-2", ""):
        with pytest.raises(UserError, match=f"--time-limit is in minutes .* not {wrong!r}: 60 is"):
            Deadline(wrong)


def test_a_limit_shorter_than_one_run_says_how_long_it_must_be(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only passes of the network move, by a second each."""
    now = 0.0
    logits = Network.logits

    def slow(*given: Any, **options: Any) -> Tensor:
        nonlocal now
        now += 1
        return logits(*given, **options)

    monkeypatch.setattr(Network, "logits", slow)
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def limited(seconds: float) -> Any:
        options = {"eps": "0.004", "limit": LIMIT, "deadline": Deadline(seconds / 60)}
        return evaluate_run(str(run), "apgd-ce-30", **options)

    first = limited(15)
    assert first.known["apgd-ce-30"] > 0  # those that are wrong without an attack
    assert first.stuck == {}
    again = limited(15)
    assert again.known == first.known
    seconds, least = again.stuck["apgd-ce-30"]
    assert seconds == pytest.approx(31)
    assert 1.1 * 31 < least < 1.1 * (31 + 15)
    known, stuck = again.unfinished("a run")
    assert known.endswith(" %.")
    assert "nothing new could be stored" in stuck
    minutes = math.ceil(least / 6) / 10
    assert f"31.0 s; the same command gets further with --time-limit {minutes:g} or more" in stuck
    enough = limited(least)
    assert enough.stuck == {}
    assert enough.known.get("apgd-ce-30", LIMIT) > first.known["apgd-ce-30"]


def test_the_command_says_that_the_time_is_over(
    run: Path, fastadv_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("evaluate", run, "--attacks", f"clean,{CASCADE}", "--eps", EPS, "--limit", LIMIT)
    monkeypatch.setattr(eval_watch, "Deadline", lambda minutes: Steps(45))
    outcome = fastadv_command(*words, "--time-limit", 1)
    assert outcome.code == 0
    assert "clean" in outcome.out
    said = " ".join(outcome.out.split())
    assert f"{CASCADE}: the time ended with " in said
    assert "of 60 verdicts; the accuracy is between" in said
    assert "the same command continues" in said
    monkeypatch.undo()
    monkeypatch.setattr(from_memory, "eval_batch_size", lambda device, values: 25)
    done = fastadv_command(*words)
    assert done.code == 0
    assert "the time ended" not in done.out
    wrong = fastadv_command(*words, "--time-limit", "1h")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err.startswith("error: --time-limit is in minutes and must be a number above 0")


@pytest.mark.parametrize("attack", ["fgsm", "pgd-7"])
def test_a_limit_that_ends_before_the_first_pass_does_not_promise_to_continue(
    attack: str, run: Path, fastadv_command: Any
) -> None:
    words = ("evaluate", run, "--attacks", attack, "--eps", EPS, "--limit", LIMIT)
    outcome = fastadv_command(*words, "--time-limit", "0.0000001")
    assert outcome.code == 0
    said = " ".join(outcome.out.split())
    assert "the time ended with 0 of 60 verdicts" in said
    assert "nothing new could be stored in this time: give a longer --time-limit." in said
    assert "continues" not in said


# -- progress -------------------------------------------------------------------------------------


class Noting(Console):
    """Keeps the notes beside the bar."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    @contextmanager
    def evaluating(self, *_: Any) -> Iterator[Any]:
        yield lambda images, note, left: self.notes.append(note)


def test_no_accuracy_without_an_attack_is_shown_under_pgd_which_does_not_look(run: Path) -> None:
    """PGD attacks all images: those that are wrong before it are not known."""
    pgd, apgd = Noting(), Noting()
    evaluated(run, "pgd-2", console=pgd)
    evaluated(run, "apgd-ce-2", console=apgd)
    assert pgd.notes
    assert not any(pgd.notes)
    assert apgd.notes[-1].startswith("clean ")


class Searching:
    """An engine that has evaluated ``seen`` points in ``seconds``."""

    def __init__(self, seen: int, seconds: float, *, gradient: bool = True) -> None:
        self.seen, self.seconds = seen, seconds
        self.search = type("S", (), {"steps": 9, "segments": 2, "uses_gradient": gradient})()


def test_the_accuracy_after_each_search_and_the_time_left() -> None:
    ledger = Ledger()
    engines = [Searching(0, 0.0), Searching(0, 0.0), Searching(0, 0.0, gradient=False)]
    forecast = Forecast(ledger, type("P", (), {"engines": engines})(), 100)  # type: ignore[arg-type]
    assert forecast.shares() == []
    assert np.isnan(forecast.seconds_left())
    ledger.expect(range(50))
    by = [0] * 10 + [1] * 8 + [2] * 4 + [OPEN] * 28
    passed = [0] * 10 + [1] * 8 + [2] * 4 + [2] * 12 + [1] * 16
    ledger.put(torch.arange(50), fooled_by=torch.tensor(by), passed=torch.tensor(passed))
    # 40 of 50; of those 32 of 40 stay; of these 32 the second has fooled 4 so far.
    assert forecast.shares() == pytest.approx([0.8, 0.8 * 0.8, 0.8 * 0.8 * 28 / 32])
    # The first search: at most 20 passes an image, 4 where it fools; all 40 have ended. Of 100
    # images 80 reach it: 40 to come, of which 8 in 40 are fooled. The second: 64 reach it, 16 have
    # ended, 4 in 32 are fooled. The third has not begun; a pass without gradient is a third of one.
    engines[0].seen, engines[0].seconds = 8 * 4 + 32 * 20, 67.2
    engines[1].seen, engines[1].seconds = 4 * 4 + 12 * 20, 25.6
    expected = 40 * (8 * 4 + 32 * 20) / 40 * 0.1 + 48 * (4 * 4 + 28 * 20) / 32 * 0.1
    expected += 56 * 20 * 0.1 / 3
    assert forecast.seconds_left() == pytest.approx(expected)


def test_a_cascade_shows_its_accuracies_in_80_columns(run: Path) -> None:
    text = io.StringIO()
    out = rich.console.Console(file=text, force_terminal=True, width=80, highlight=False)
    console = Console(out)
    attack = "apgd-ce-100-5+apgd-dlr-100-5+fab-100-5+square"
    note = " · ".join(f"{name} 61.2 %" for name in ("clean", *attack.split("+"), "apgd-t", "fab-t"))
    with console.evaluating("evaluating " + "x" * 100, attack, 0, 10_000) as tick:
        tick(1234, note, 4321.0)
    shown = rich.text.Text.from_ansi(text.getvalue()).plain
    lines = [line for part in shown.splitlines() for line in part.split("\r")]
    assert max(map(len, lines)) <= 80
    assert any("1,234/10,000" in line and "1:12:01 left" in line for line in lines)
    assert any(line.startswith("…") and line.endswith("fab-t 61.2 %") for line in lines)


def test_without_a_terminal_the_line_has_them_too(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = io.StringIO()
    console = Console(
        rich.console.Console(file=text, force_terminal=False, width=80, soft_wrap=True)
    )
    monkeypatch.setattr(console_module, "SAY_EVERY", 0.0)
    monkeypatch.setattr(eval_watch, "SHOW_EVERY", -1.0)
    evaluated(run, console=console)
    last = text.getvalue().splitlines()[-1]
    for name in ("clean", "apgd-ce-5", "apgd-t-5-3"):
        assert f"{name} " in last.partition("images/s")[2]


# -- what is no evaluation ------------------------------------------------------------------------


def test_outputs_that_are_not_finite_leave_no_result(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN for image 30, which is in the second of three batches."""
    real = load_run

    def broken(path: str, which: str, **told: Any) -> Any:
        found = real(path, which, **told)
        data, model = found.source, found.model
        x = torch.cat([batch for batch, _ in data.test.limited(LIMIT)])[30]

        def hook(module: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
            bad = (inputs[0] == x).flatten(1).all(1)
            return logits.masked_fill(bad[:, None], torch.nan)

        model.register_forward_hook(hook)
        return found

    monkeypatch.setattr("fastadv.run.finished.load_run", broken)
    monkeypatch.setattr(eval_watch, "KEEP_EVERY", -1.0)
    with pytest.raises(NotFiniteError, match="first those of image 30 "):
        evaluated(run, "pgd-2")
    assert not (run / "evaluations.jsonl").exists()
    assert not (run / "verdicts").exists()
    (ledger,) = kept(run)
    assert ledger.known.sum() == 25
    assert not np.isnan(ledger.rows["margin"][ledger.known]).any()


def test_an_empty_test_set_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = load_run

    def emptied(path: str, which: str, **told: Any) -> Any:
        found = real(path, which, **told)
        found.source.test = EvalBatches(
            lambda rows, size: [], torch.empty(0, dtype=torch.int64), 25
        )
        return found

    monkeypatch.setattr("fastadv.run.finished.load_run", emptied)
    with pytest.raises(UserError, match="no images to evaluate"):
        evaluate_run(str(run), "clean")


def test_a_link_in_place_of_the_folder_is_not_followed(run: Path, tmp_path: Path) -> None:
    for name in ("verdicts", "evaluations.partial"):
        (run / name).symlink_to(tmp_path)
    try:
        with pytest.warns(UserWarning, match="cannot be stored"):
            found = evaluated(run, "fgsm")
        assert 0 <= found["fgsm"] <= 1
        assert not list(tmp_path.iterdir())
    finally:
        for name in ("verdicts", "evaluations.partial"):
            (run / name).unlink()
