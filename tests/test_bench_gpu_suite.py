"""What the GPU suite rests on: order of building, what is kept alive, and a dry run of it all."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_script import script

from fastadv.benchmark import rows
from fastadv.benchmark.compare import Comparison, _wanted, warm_up
from fastadv.benchmark.interleave import Candidate
from fastadv.benchmark.results import idle_rows
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import parse_specs

ROOT = Path(__file__).parents[1]
TINY = Setting(width=4, batch_size=4, image_size=16)


def test_how_long_a_gpu_waits_is_asked_of_our_steps_alone(monkeypatch):
    monkeypatch.setattr("fastadv.benchmark.results.idle_share", lambda turn, device: turn())
    made = [
        Candidate("ours", lambda: 0.123456, facts={"by": "fastadv"}),
        Candidate("peer", lambda: 1.0, facts={"by": "published"}),
        Candidate("a pass", lambda: 1.0, facts={"by": "fastadv", "pass": "forward"}),
    ]
    (row,) = idle_rows(TINY, made, torch.device("cuda"))
    assert (row["name"], row["idle_share"], row["config"]) == ("ours", 0.1235, TINY.as_row())
    assert not list(idle_rows(TINY, made, torch.device("cpu")))


def test_what_is_wanted_most_is_built_first():
    comparison = Comparison(
        TINY, parse_specs("pgd"), "fp32", ("captured", "compiled", "eager"), 3,
        ("art", "published-tf32-off", "published", "helped"),
    )  # fmt: skip
    names = [name for name, _ in _wanted(comparison)]
    assert names == [
        "pgd fp32 captured",
        "training pass fp32 captured, train mode",
        "input gradient pass fp32 captured, train mode",
        "pgd fp32 eager",
        "pgd fp32 compiled",
        "helped",
        "published",
        *(
            f"{kind} pass fp32 {mode}, train mode"
            for mode in ("compiled", "eager")
            for kind in ("training", "input gradient")
        ),
        "published-tf32-off",
        "art",
    ]


def test_a_warm_up_keeps_one_candidate_at_a_time(monkeypatch):
    alive, most = [], []

    def candidate(setting, spec, dtype, mode):
        alive.append(str(spec))
        most.append(len(alive))
        return Candidate(str(spec), float, facts={"by": "fastadv"}, close=alive.clear)

    monkeypatch.setattr("fastadv.benchmark.compare.our_candidate", candidate)
    asked = Comparison(TINY, parse_specs("pgd,fast,apart"), "fp32", ("compiled",), 1)
    assert warm_up(replace(asked, with_passes=False), print) == []
    assert most == [1, 1, 1]


def test_the_gpu_suite_runs_every_test_that_needs_a_gpu():
    stages = (ROOT / "bench" / "gpu_stages.py").read_text()
    mark = "pytest.mark." + "gpu"
    marked = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "tests").rglob("test_*.py")
        if mark in file.read_text()
    }
    named = re.search(r"GPU_TESTS = \((.*?)\)", stages, re.DOTALL)
    assert marked == set(re.findall(r'"(.*?)"', named[1]))


@pytest.mark.slow
def test_gpu_suite_dry_run(tmp_path):
    suite = ROOT / "bench" / "gpu_suite.py"
    command = [sys.executable, str(suite), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {entry["status"] for entry in summary} == {"ok"}
    assert len(summary) == 11
    kinds = {row.get("kind") for row in rows.read_rows(tmp_path)}
    assert {"limits", "step", "pass", "speedup", "bound"} <= kinds


def test_the_suite_reports_what_a_killed_stage_left(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"kind": "bound"}\n{"kind": "st')
    gpu_suite = script("gpu_suite")
    gpu_suite.report([gpu_suite.Done("bound", "out of time", 1.0, "")], tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())[0]["stage"] == "bound"
