"""Several runs in one table, and two on the same images."""

from __future__ import annotations

import csv
import io
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edited import edit

from fastadv.errors import UserError
from fastadv.evaluation.attacks import attack
from fastadv.evaluation.tally import Tally
from fastadv.evaluation.verdicts import Verdicts
from fastadv.run import several
from fastadv.run.alike import methods_of, open_alike
from fastadv.run.console import Console
from fastadv.run.eval_pass import EvalScores, EvaluationStopped
from fastadv.run.finished import evaluate_run
from fastadv.run.loaded import load_run
from fastadv.run.pairs import compare_runs
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.run_folder import RunFolder
from fastadv.run.several import evaluate_runs
from fastadv.run.train import train
from fastadv.storage import trust

SETTINGS: dict[str, Any] = {
    "width": 2,
    "epochs": 2,
    "limit": 96,
    "batch_size": 32,
    "lr": 0.5,
    "mode": "eager",
    "select_attack": "fgsm",
    "test_attacks": "clean",
    "test_limit": 10,
}
RUNS = {
    "fast-0": {"method": "fast", "seed": 0},
    "fast-1": {"method": "fast", "seed": 1},
    "wide": {"method": "fast", "seed": 0, "width": 4},
    "standard": {"method": "standard", "seed": 0},
}
OPEN: dict[str, Any] = {"eps": None, "alpha": None}


def verdicts_of(path: str, attack: str, **options: Any) -> Verdicts:
    return evaluate_run(path, attack, **options).verdicts[attack]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of four runs."""
    place = tmp_path_factory.mktemp("several")
    for name, settings in RUNS.items():
        train(RunRequest(**SETTINGS | settings, out=str(place / name)), Console())
    return place


@pytest.fixture
def runs(trained: Path) -> Iterator[Path]:
    """The folder of the runs, none of which is evaluated yet."""
    yield trained
    for name in RUNS:
        (trained / name / "evaluations.jsonl").unlink(missing_ok=True)
        shutil.rmtree(trained / name / "verdicts", ignore_errors=True)


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """Copies of two runs, to be changed."""
    for name in ("fast-0", "fast-1"):
        shutil.copytree(trained / name, tmp_path / name)
    return tmp_path


def at(place: Path, *names: str) -> list[str]:
    return [str(place / name) for name in names]


def test_the_seeds_of_a_method_form_one_row(runs: Path) -> None:
    paths = at(runs, "fast-0", "standard", "fast-1")
    table = evaluate_runs(paths, "clean,fgsm", which="both", limit=100)
    assert [method.name for method in table.methods] == ["fast", "standard"]
    assert [len(method.runs) for method in table.methods] == [2, 1]
    assert (table.n, table.attacks, table.which) == (100, ["clean", "fgsm"], ("best", "last"))
    fast = table.methods[0]
    alone = {
        (path, which): evaluate_run(path, "clean,fgsm", which=which, limit=100)
        for path in fast.runs
        for which in ("best", "last")
    }
    for attack_name in table.attacks:
        means = []
        for which in ("best", "last"):
            values = [alone[path, which][attack_name] for path in fast.runs]
            score = fast.scores[which][attack_name]
            assert score.mean == pytest.approx(np.mean(values))
            assert score.deviation == pytest.approx(np.std(values, ddof=1))
            means.append(np.mean(values))
        assert fast.difference(attack_name) == pytest.approx(means[0] - means[1])


def test_results_from_before_are_not_computed_again(runs: Path) -> None:
    paths = at(runs, "fast-0", "fast-1")
    evaluate_runs(paths[:1], "clean,fgsm")
    assert evaluate_runs(paths, "clean,fgsm").stored == []
    assert evaluate_runs(paths, "clean,fgsm").stored == ["clean", "fgsm"]


def test_runs_with_other_settings_are_other_methods(runs: Path) -> None:
    paths = at(runs, "fast-0", "wide", "fast-1", "standard")
    configs = {path: RunFolder.open(path).read_config() for path in paths}
    assert methods_of(configs) == {
        "fast, width 2": [paths[0], paths[2]],
        "fast, width 4": [paths[1]],
        "standard": [paths[3]],
    }


def test_paths_are_told_apart_by_as_little_as_needs_be() -> None:
    def names(*places: str | None, name: str = "init") -> list[str]:
        asked = [RunRequest(method="fast", init=each) for each in places]
        if name == "teachers":
            asked = [RunRequest(method="kd-swa", options={name: each}) for each in places]
        return list(methods_of({str(n): resolve_run(each) for n, each in enumerate(asked)}))

    assert names("/data/a/x.pt", "/data/b/y.pt", None) == [
        "fast, init x.pt",
        "fast, init y.pt",
        "fast, init not set",
    ]
    assert names("/data/a/w.pt", "/data/b/w.pt") == ["fast, init a/w.pt", "fast, init b/w.pt"]
    assert names("/not set", None) == ["fast, init /not set", "fast, init not set"]
    assert names("/r/one,/r/two", "/r/one,/s/two", name="teachers") == [
        "kd-swa, teachers r/one,r/two",
        "kd-swa, teachers r/one,s/two",
    ]


def test_one_run_given_twice(runs: Path, tmp_path: Path) -> None:
    (first,) = at(runs, "fast-0")
    (tmp_path / "link").symlink_to(first)
    for other in (first, first + "/", os.path.relpath(first), str(tmp_path / "link")):
        with pytest.raises(UserError, match="given twice; give each run once"):
            evaluate_runs([first, other], "clean")


def test_a_copy_of_a_run_is_no_seed(runs: Path, tmp_path: Path) -> None:
    (first,) = at(runs, "fast-0")
    copy = str(tmp_path / "copy")
    shutil.copytree(first, copy)
    with pytest.raises(UserError, match="hold the same weights: one is a copy"):
        evaluate_runs([first, copy], "clean", limit=20)
    with pytest.raises(UserError, match="nothing to compare"):
        list(compare_runs(first, copy, "clean", limit=20))


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("eps = 0.2", "eps = 0.1", "different radii, eps 0.2 and 0.1; choose .* --eps"),
        ('norm = "linf"', 'norm = "l2"', "different norms, linf and l2"),
        ('data = "digits"', 'data = "cifar10"', "different data sets, digits and cifar10"),
    ],
)
def test_runs_that_cannot_be_in_one_table(
    before: str, after: str, sentence: str, copied: Path
) -> None:
    edit(copied / "fast-1" / "config.toml", before, after)
    paths = at(copied, "fast-0", "fast-1")
    with pytest.raises(UserError, match=sentence):
        open_alike(paths, ["best"], **OPEN)
    with pytest.raises(UserError, match=sentence):
        list(compare_runs(*paths, "clean"))


def test_the_way_out_of_other_radii_and_steps(copied: Path) -> None:
    config = copied / "fast-1" / "config.toml"
    edit(config, "eps = 0.2", "eps = 0.1")
    paths = at(copied, "fast-0", "fast-1")
    assert open_alike(paths, ["best"], eps="0.2", alpha=None).keys() == set(paths)
    with pytest.raises(UserError, match="radii"):
        open_alike(paths, ["best"], eps=None, alpha="0.05")
    edit(config, "eps = 0.1", "eps = 0.2")
    config.write_text("eval_alpha = 0.01\n" + config.read_text())
    with pytest.raises(UserError, match=r"alpha of each attack and 0.01; .* --alpha"):
        open_alike(paths, ["best"], **OPEN)
    assert open_alike(paths, ["best"], eps=None, alpha="0.05").keys() == set(paths)


@pytest.mark.parametrize(("file", "which"), [("best.pt", "both"), ("last.pt", "last")])
def test_a_run_without_a_checkpoint(file: str, which: str, copied: Path) -> None:
    (copied / "fast-1" / file).unlink()
    with pytest.raises(UserError, match=f"has no {file}, .* restore the file"):
        evaluate_runs(at(copied, "fast-0", "fast-1"), "clean", which=which)
    assert not (copied / "fast-0" / "evaluations.jsonl").exists()


def test_a_run_that_has_not_ended_is_told(copied: Path) -> None:
    (copied / "fast-1" / "summary.json").unlink()
    paths = at(copied, "fast-0", "fast-1")
    with pytest.warns(UserWarning, match="fast-1 has not ended"):
        open_alike(paths, ["best"], **OPEN)


def test_an_alpha_that_no_attack_follows_is_said_once(copied: Path) -> None:
    paths = at(copied, "fast-0", "fast-1")
    options: dict[str, Any] = {"alpha": "0.01", "limit": 10}
    for evaluated in (
        lambda: evaluate_runs(paths, "fgsm,clean", **options),
        lambda: list(compare_runs(*paths, "fgsm,clean", **options)),
    ):
        with pytest.warns(UserWarning, match="ignored by fgsm and clean: omit it") as said:
            evaluated()
        assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(compare_runs(*paths, "fgsm,pgd-1", **options))


def test_typos(runs: Path) -> None:
    first, second = at(runs, "fast-0", "fast-1")
    with pytest.raises(UserError, match=r"did you mean .*standard"):
        evaluate_runs([first, str(runs / "standrad")], "clean")
    with pytest.raises(UserError, match="did you mean 'pgd-20'"):
        evaluate_runs([first, second], "clean,pdg-20")
    with pytest.raises(UserError, match="did you mean 'both'"):
        evaluate_runs([first, second], "clean", which="bot")
    with pytest.raises(UserError, match="holds no run"):
        evaluate_runs([str(runs)], "clean")
    with pytest.raises(UserError, match="no such folder"):
        evaluate_runs([str(runs / "zzz")], "clean")
    with pytest.raises(UserError, match=r"name its folder, .*fast-0"):
        evaluate_runs([str(Path(first) / "best.pt")], "clean")
    weights = runs / "weights.safetensors"
    weights.touch()
    with pytest.raises(UserError, match="as --weights"):
        evaluate_runs([str(weights)], "clean")
    weights.unlink()


@pytest.mark.parametrize(
    ("facts", "n", "said", "sentence"),
    [
        ({"image_set": "others"}, 100, "linf", "different images"),
        ({}, 90, "linf", "different images"),
        ({}, 100, "bfloat16", "in different ways .linf; bfloat16."),
    ],
)
def test_what_only_the_evaluation_shows(
    facts: dict[str, Any], n: int, said: str, sentence: str, runs: Path, monkeypatch: Any
) -> None:
    def found(path: str, *_: Any, **__: Any) -> EvalScores:
        second = path.endswith("fast-1")
        scores = EvalScores(n if second else 100, said if second else "linf")
        scores["clean"] = 0.5
        scores.facts = {"image_set": "same", "weights": path} | (facts if second else {})
        return scores

    monkeypatch.setattr(several, "evaluate_run", found)
    with pytest.raises(UserError, match=sentence):
        evaluate_runs(at(runs, "fast-0", "fast-1"), "clean")


@pytest.mark.parametrize("name", ["clean", "fgsm", "pgd-3-2", "noise-0.3"])
def test_verdicts_are_those_of_the_evaluation(name: str, runs: Path) -> None:
    (path,) = at(runs, "fast-0")
    found = verdicts_of(path, name, limit=60, seed=3)
    evaluated = evaluate_run(path, name, limit=60, seed=3)[name]
    assert found.accuracy == pytest.approx(evaluated, abs=1e-6)
    config, data, model = load_run(path, "best").evaluated
    images = data.test.limited(60)
    x, y = (torch.cat(parts) for parts in zip(*images, strict=True))
    x_adv = attack(model, x, y, name, eps=config.eps, seed=3)
    logits = model.eval()(x_adv).detach()
    np.testing.assert_array_equal(found.index, images.rows.numpy())
    np.testing.assert_array_equal(found.label, y.numpy())
    own = logits[torch.arange(60), y]
    others = logits.index_put((torch.arange(60), y), torch.tensor(-torch.inf)).amax(1)
    np.testing.assert_allclose(found.margin, (own - others).numpy(), atol=1e-4)
    np.testing.assert_array_equal(found.right, (logits.argmax(1) == y).numpy())
    assert found.stages[-1] == name
    assert found.facts["eps"] == config.eps


def test_verdicts_are_kept(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = at(runs, "fast-0")
    first = verdicts_of(path, "fgsm", limit=60)
    (file,) = (runs / "fast-0" / "verdicts").iterdir()
    np.testing.assert_array_equal(Verdicts.read(file).right, first.right)
    attacked: list[str] = []
    real = Tally.add

    def noting(tally: Tally, x: torch.Tensor, y: torch.Tensor) -> None:
        attacked.extend(tally.specs)
        real(tally, x, y)

    monkeypatch.setattr(Tally, "add", noting)
    verdicts_of(path, "fgsm", limit=60)
    assert not attacked
    for other in ({"limit": 61}, {"seed": 1}, {"eps": "0.1"}, {"alpha": "0.01"}):
        attacked.clear()
        verdicts_of(path, "pgd-1" if "alpha" in other else "fgsm", **{"limit": 60} | other)
        assert attacked, other


def test_a_file_that_was_changed_or_is_another_users_is_not_believed(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = at(runs, "fast-0")
    truth = verdicts_of(path, "fgsm", limit=60)
    (file,) = (runs / "fast-0" / "verdicts").iterdir()
    everything = np.ones(60, bool)
    Verdicts(
        truth.index, truth.label, everything, truth.margin, np.full(60, -1, np.int16),
        truth.stages, Verdicts.read(file).facts,
    ).write(file)  # fmt: skip
    with pytest.warns(UserWarning, match="was changed, so fgsm is evaluated again"):
        assert verdicts_of(path, "fgsm", limit=60).accuracy == truth.accuracy < 1
    file.write_bytes(b"PK")
    with pytest.warns(UserWarning, match="was changed, so fgsm is evaluated again"):
        assert verdicts_of(path, "fgsm", limit=60).accuracy == truth.accuracy
    before = file.stat().st_mtime_ns
    monkeypatch.setattr(trust, "_key", lambda *, make: b"somebody else's" * 2)
    verdicts_of(path, "fgsm", limit=60)
    assert file.stat().st_mtime_ns != before


def test_verdicts_that_cannot_be_stored(runs: Path, tmp_path: Path) -> None:
    (runs / "fast-0" / "verdicts").symlink_to(tmp_path)
    try:
        with pytest.warns(UserWarning, match="cannot be stored in .*verdicts"):
            verdicts_of(str(runs / "fast-0"), "clean", limit=20)
    finally:
        (runs / "fast-0" / "verdicts").unlink()
    assert not list(tmp_path.iterdir())


def test_two_runs_on_the_same_images(runs: Path) -> None:
    first, second = at(runs, "fast-0", "standard")
    pairs = list(compare_runs(first, second, "clean,fgsm", which="both", limit=100))
    assert [(p.attack, p.which) for p in pairs] == [
        (a, w) for w in ("best", "last") for a in ("clean", "fgsm")
    ]
    for pair in pairs:
        right = [
            verdicts_of(path, pair.attack, which=pair.which, limit=100).right
            for path in (first, second)
        ]
        assert pair.paired.first == (right[0] & ~right[1]).sum()
        assert pair.paired.second == (right[1] & ~right[0]).sum()
        assert pair.paired.n == 100


def test_the_command_evaluate_writes_a_table_that_can_be_redirected(
    runs: Path, fastadv_command: Any
) -> None:
    paths = at(runs, "fast-0", "standard", "fast-1")
    words = ("--attacks", "clean,fgsm", "--limit", 50, "--which", "both")
    shown = fastadv_command("evaluate", *paths, *words)
    assert shown.code == 0
    assert "fast (2 seeds)" in shown.out
    assert "% of 50 images" in shown.out
    assert max(map(len, shown.out.splitlines()[:10])) <= 80
    written = fastadv_command("evaluate", *paths, *words, "--format", "csv")
    fast, standard = csv.DictReader(io.StringIO(written.out))
    assert (fast["method"], fast["seeds"], standard["images"]) == ("fast", "2", "50")
    for name, start in (("markdown", "| method | clean best |"), ("latex", "% Test accuracy")):
        written = fastadv_command("evaluate", *paths, *words, "--format", name)
        assert written.out.startswith(start)
    assert fastadv_command("evaluate", *paths, "--format", "html").code == 2


def test_the_command_compare_says_it_in_words(runs: Path, fastadv_command: Any) -> None:
    first, second = at(runs, "fast-0", "standard")
    outcome = fastadv_command("compare", first, second, "--attacks", "clean", "--limit", 50)
    assert outcome.code == 0
    said = " ".join(outcome.out.split())
    pair = next(compare_runs(first, second, "clean", limit=50))
    a, b = 100 * pair.first.accuracy, 100 * pair.second.accuracy
    assert f"{first} {a:.2f} %, {second} {b:.2f} %" in said
    assert f"only the first is right on {pair.paired.first} images" in said
    assert pair.paired.sentence(first, second) in said
    assert ("several seeds of each tell" in said) == pair.paired.is_told
    assert fastadv_command("compare", first, first).code == 2


def test_ctrl_c_in_compare_says_how_to_continue(
    runs: Path, fastadv_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(*_: Any, **__: Any) -> Any:
        raise EvaluationStopped(EvalScores(360, ""), "fgsm: 100 of 360 images are done")

    monkeypatch.setattr("fastadv.run.pairs.evaluate_run", stopping)
    outcome = fastadv_command("compare", *at(runs, "fast-0", "standard"), "--attacks", "fgsm")
    assert outcome.code == 130
    assert (
        "Stopped by SIGINT under fgsm: 100 of 360 images are done; the same command" in outcome.err
    )
