"""A benchmark that is killed keeps its results; a speed-up is reported only after parity."""

import io
import subprocess
from dataclasses import replace

import pytest
import rich.console
import torch

from fastadv.benchmark import clock, compare, limits, rows, running
from fastadv.benchmark.bound import Bound
from fastadv.benchmark.compare import Comparison, compared
from fastadv.benchmark.interleave import Candidate, interleave
from fastadv.benchmark.results import Timed, speedup_rows
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import parse_specs
from fastadv.errors import UserError

TINY = Setting(width=4, batch_size=4, image_size=8)
PGD = Comparison(TINY, parse_specs("pgd"), "fp32", ["eager"], 5, tiny=True)
SILENT = rich.console.Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Candidates that take no time; of the convolutions only their existence is known."""
    monkeypatch.setattr(limits, "MATRIX_SIDE", {"cpu": 32})
    monkeypatch.setattr(compare, "our_candidate", ours)
    monkeypatch.setattr(compare, "pass_candidate", a_pass)
    monkeypatch.setattr(compare.peer_list, "BESIDE_OURS", {"published": published})
    monkeypatch.setattr(compare.peer_list, "APART", {"art": dying})
    monkeypatch.setattr(compare, "measure_bound", bound)


def bound(shape, batch, dtype, measured, device):
    alone = dict.fromkeys(("forward", "input", "weight"), 1e-3)
    return Bound(shape, batch, dtype, measured, dict.fromkeys(shape.products, alone))


def ours(setting, spec, dtype, mode):
    facts = {"by": "fastadv", "method": str(spec), "dtype": dtype, "mode": mode}
    return Candidate(f"fastadv {spec}", lambda: 11.0, facts={**facts, "attack_bn": "train"})


def a_pass(setting, kind, dtype, mode, bn):
    facts = {"by": "fastadv", "pass": kind, "dtype": dtype, "mode": mode, "attack_bn": bn}
    return Candidate(f"pass: {kind} {dtype} {mode} bn={bn}", lambda: 0.5, facts=facts)


def published(setting):
    facts = {"by": "published", "method": "pgd", "dtype": "fp32", "mode": "eager"}
    return Candidate("published fp32", lambda: 33.0, facts={**facts, "attack_bn": "train"})


def dying(setting):
    def turn():
        raise UserError("The peer art ended.")

    return replace(published(setting), name="ART", turn=turn, close=lambda: closed.append("ART"))


closed = []


def test_every_candidate_is_on_disk_before_the_next_is_built(tmp_path, monkeypatch):
    seen = []

    def looking(setting, kind, dtype, mode, bn):
        seen.append([row for row in rows.read_rows(tmp_path) if row["kind"] != "limits"])
        return a_pass(setting, kind, dtype, mode, bn)

    monkeypatch.setattr(compare, "pass_candidate", looking)
    running.run_comparisons([PGD], tmp_path, SILENT)
    assert [len(found) for found in seen] == [1, 2]
    (step,) = seen[0]
    assert (step["preliminary"], step["ms"]["median"], step["ms"]["count"]) == (True, 11e3, 1)
    assert {"run", "commit", "device"} <= step.keys()
    assert not {"over_passes", "over_bound"} & step.keys()
    assert all(row["over_bound"] for row in seen[1])


def test_a_bound_that_cannot_be_measured_keeps_the_other_rows(monkeypatch):
    def broken(*given):
        raise RuntimeError("no such convolution\nand more")

    monkeypatch.setattr(compare, "measure_bound", broken)
    with compared(PGD, lambda sentence: None) as outcome:
        assert outcome.skipped == ["the bound: no such convolution"]
    found = [row for row in outcome.rows if row["kind"] != "limits"]
    assert [(row["kind"], row.get("over_bound")) for row in found] == [
        ("pass", None),
        ("pass", None),
        ("step", None),
    ]
    assert found[-1]["over_passes"]["median"] == 2


def test_preliminary_rows_are_replaced_every_turn_and_deleted_at_the_end():
    told = []
    asked = replace(PGD, peers=["published"], parity="said so")
    with compared(asked, lambda sentence: None, told.append) as outcome:
        final = outcome.rows
    steps = [next((r for r in found if r["kind"] == "step"), None) for found in told]
    # Nothing but limits, four candidates alone, and the third, fourth and fifth turn together.
    assert [step and step["ms"]["count"] for step in steps] == [None, 1, 1, 1, 1, 3, 4, 5]
    assert all(row["preliminary"] for found in told for row in found)
    kinds = [{row["kind"] for row in found} for found in told]
    assert ["speedup" in found for found in kinds] == [False] * 5 + [True] * 3
    # Those of turns alone were taken at different times: no ratio of two of them is one.
    assert ["over_passes" in step for step in steps[1:]] == [False] * 4 + [True] * 3
    assert ["alone" in step for step in steps[1:]] == [True] * 4 + [False] * 3
    assert not any("preliminary" in row for row in final)


def test_a_failing_run_keeps_its_rows_and_a_finished_run_only_final_ones(tmp_path, monkeypatch):
    def breaking(candidates, repeats, progress, until, after, found):
        interleave(candidates, 4, progress, until, after, found)
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(compare, "interleave", breaking)
        with pytest.raises(RuntimeError, match="killed"):
            running.run_comparisons([PGD], tmp_path, SILENT)
    (file,) = tmp_path.iterdir()
    found = rows.read_rows(file)
    assert all(row["preliminary"] for row in found)
    assert [row["ms"]["count"] for row in found if row["kind"] in ("step", "pass")] == [4, 4, 4]
    running.run_comparisons([PGD], tmp_path, SILENT)
    assert len(list(tmp_path.iterdir())) == 2
    file.unlink()
    assert not any("preliminary" in row for row in rows.read_rows(tmp_path))


def test_a_candidate_that_fails_alone_is_skipped_and_closed():
    closed.clear()
    asked = replace(PGD, peers=["art"], parity="said so")
    with compared(asked, lambda sentence: None) as outcome:
        assert outcome.skipped == ["art: The peer art ended."]
        assert closed == ["ART"]
        assert "ART" not in {row.get("name") for row in outcome.rows}


def test_a_final_row_replaces_the_preliminary_one_of_its_run(tmp_path):
    row = {"kind": "step", "name": "a", "config": {"batch_size": 4}, "run": "1"}
    early = row | {"preliminary": True}
    others = [early | {"run": "2"}, early | {"config": {"batch_size": 8}}, early | {"name": "b"}]
    file = tmp_path / "x.jsonl"
    rows.append_rows(file, [early, *others, row])
    assert rows.read_rows(file) == [*others, row]
    unfinished = rows.SoFar(file, "1")
    unfinished.write([early])
    unfinished.write([early, *others[1:]])
    assert rows.read_rows(unfinished.path) == [early, *others[1:]]
    assert rows.read_rows(tmp_path) == [*others[1:], *others, row]
    unfinished.remove()
    assert list(tmp_path.iterdir()) == [file]


def test_a_run_without_final_rows_is_used_only_if_there_is_no_other():
    def row(run, where, **more):
        return {"run": run, "date": run, "where": where, **more}

    def where(entry):
        return entry["where"]

    old, late = row("1", "here"), row("2", "here", preliminary=True)
    alone = row("2", "there", preliminary=True)
    assert rows.newest([old, late, alone], where) == [old, alone]
    newer = row("3", "there", preliminary=True)
    assert rows.newest_of_each([alone, newer, old], where) == [newer, old]


def test_peers_are_timed_after_parity_only(tmp_path, monkeypatch):
    asked = []

    def require(specs, modes, device):
        asked.append(([str(spec) for spec in specs], list(modes)))
        return "tests/test_modes.py"

    monkeypatch.setattr(running, "require_parity", require)
    beside = replace(PGD, peers=["published"])
    with pytest.raises(ValueError, match="parity"), compared(beside, print):
        pass
    running.run_comparisons([PGD], tmp_path, SILENT)
    assert asked == []
    found = running.run_comparisons([beside, PGD], tmp_path, SILENT)
    assert asked == [(["pgd"], ["eager"])]
    (ratio,) = [row for row in found if row["kind"] == "speedup"]
    assert (ratio["times"]["median"], ratio["parity"]) == (3.0, "tests/test_modes.py")
    found = running.run_comparisons([replace(beside, parity="beside it")], tmp_path, SILENT)
    assert [row["parity"] for row in found if row["kind"] == "speedup"] == ["beside it"]
    assert len(asked) == 1
    with pytest.raises(ValueError, match="check that the modes agree"):
        list(speedup_rows(Timed(TINY, "fp32", [], {}, None), " "))


def test_a_turn_on_a_gpu_is_four_steps_between_two_waits(monkeypatch):
    happened, now = [], iter([10.0, 12.0])
    monkeypatch.setattr(clock, "synchronize", lambda device: happened.append("wait"))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    taken = clock.seconds_per_step(lambda: happened.append("step"), torch.device("cuda"))
    assert happened == ["wait", *["step"] * 4, "wait"]
    assert taken == 0.5


def test_a_turn_on_a_cpu_is_one_step():
    happened = []
    clock.seconds_per_step(lambda: happened.append("step"), torch.device("cpu"))
    assert happened == ["step"]


def git(folder, *words):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(
        ["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_commit_is_that_of_git_or_of_the_environment(tmp_path, monkeypatch):
    def commit():
        return rows.commit.__wrapped__()

    checkout, inside = tmp_path / "checkout", tmp_path / "checkout" / "archive"
    inside.mkdir(parents=True)
    monkeypatch.setenv("FASTADV_COMMIT", "abc1234")
    monkeypatch.setattr(rows, "repository", lambda: checkout)
    assert commit() == "abc1234"
    (checkout / "a").write_text("1")
    git(checkout, "init", "-q")
    git(checkout, "add", "a")
    git(checkout, "commit", "-qm", "a")
    head = git(checkout, "rev-parse", "--short", "HEAD")
    assert commit() == head
    (checkout / "a").write_text("2")
    assert commit() == f"{head}+changes"
    monkeypatch.setattr(rows, "repository", lambda: inside)  # unpacked in another repository
    assert commit() == "abc1234"
    monkeypatch.setattr(rows, "repository", lambda: None)
    assert commit() == "abc1234"
    monkeypatch.setenv("FASTADV_COMMIT", " ")
    assert commit() is None
