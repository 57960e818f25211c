"""The GPU suite: order of building, lifetime of candidates, and a dry run of all stages."""

import argparse
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from bench_script import BENCH
from PIL import Image

from fastadv.benchmark.compare import Comparison, _wanted
from fastadv.benchmark.interleave import Candidate
from fastadv.benchmark.ours import CAPTURED_EAGER, engine_mode, our_candidate
from fastadv.benchmark.results import idle_rows
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import parse_specs
from fastadv.data.npz import read_npz
from fastadv.errors import UserError
from fastadv.kernels.dispatch import OPERATORS
from fastadv.training.mode import compiles

ROOT = Path(__file__).parents[1]
TINY = Setting(width=4, batch_size=4, image_size=16)


@pytest.fixture
def beside(monkeypatch):
    """Imports a script of bench/ that imports others beside it."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_idle_time_of_a_gpu_is_measured_for_our_steps_only(monkeypatch):
    profiled = []
    monkeypatch.setattr("fastadv.benchmark.results.idle_share", lambda turn, device: turn())
    monkeypatch.setattr("fastadv.benchmark.results.profiled", lambda *given: profiled.append(1))
    made = [
        Candidate("ours", lambda: 0.123456, facts={"by": "fastadv"}),
        Candidate("peer", lambda: 1.0, facts={"by": "published"}),
        Candidate("a pass", lambda: 1.0, facts={"by": "fastadv", "pass": "forward"}),
    ]
    (row,) = idle_rows(TINY, made, torch.device("cuda"))
    assert (row["name"], row["idle_share"], row["config"]) == ("ours", 0.1235, TINY.as_row())
    assert profiled == [1]  # the first profile of a process starts the profiler
    assert not list(idle_rows(TINY, made, torch.device("cpu")))


def test_the_most_important_candidates_are_built_first():
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


def test_every_stage_of_the_plan_exists_and_fits_into_its_call(beside):
    plan, stages, rehearse = beside("gpu_plan"), beside("gpu_stages"), beside("gpu_rehearse")
    names = [stage.name for stage in plan.PLAN]
    assert sorted(stages.STAGES) == sorted(names) == sorted(set(names))
    for call, seconds in plan.CALLS.items():
        # The call's own start, packing and table take some seconds more.
        assert max(stage.seconds for stage in plan.stages_of(call)) <= seconds - 5, call
        assert {stage.name for stage in plan.stages_of(call)} <= set(rehearse.WRITES)
    assert sum(stage.seconds for stage in plan.stages_of("rest")) <= 1.2 * plan.CALLS["rest"]
    assert plan.CALLS["smoke"] <= 110
    assert plan.CALLS["rest"] <= 590  # a command on the machine may run for 600 s


@pytest.mark.slow
@pytest.mark.parametrize("call", ["smoke", "rest", "train"])
def test_gpu_suite_dry_run(call, tmp_path, beside):
    suite = ROOT / "bench" / "gpu_suite.py"
    command = [sys.executable, str(suite), call, "--device", "cpu", "--tiny", "--patience", "6"]
    command += ["--work", str(tmp_path / "work"), "--pack", str(tmp_path / "packed")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (packed,) = (tmp_path / "packed").iterdir()
    plan = beside("gpu_plan")
    with tarfile.open(packed) as archive:
        summary = json.load(archive.extractfile("summary.json"))
        written = [name for name in archive.getnames() if name.endswith(".jsonl")]
        assert not [name for name in archive.getnames() if name.endswith(".pt")]
    assert [entry["stage"] for entry in summary] == [s.name for s in plan.stages_of(call)]
    assert {entry["status"] for entry in summary} == {"ok"}
    assert written


def test_the_suite_reports_what_a_killed_stage_left(tmp_path, beside):
    (tmp_path / "rows.jsonl").write_text('{"kind": "bound"}\n{"kind": "st')
    gpu_suite = beside("gpu_suite")
    done = [gpu_suite.Done("bound", "out of time", 1.0, "")]
    gpu_suite.write_summary(done, tmp_path)
    gpu_suite.report(done, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())[0]["stage"] == "bound"


def test_a_stage_that_takes_too_long_is_killed_and_the_next_one_runs(tmp_path, beside, monkeypatch):
    gpu_suite = beside("gpu_suite")
    stage = gpu_suite.Stage("slow", "rest", 1, "")
    code = "import subprocess, sys, time; subprocess.Popen(['sleep', '97.25']); print('at work', "
    code += "flush=True); time.sleep(60)"
    monkeypatch.setattr(gpu_suite, "LEAST", 0.1)
    monkeypatch.setattr(gpu_suite, "stage_command", lambda *given: [sys.executable, "-c", code])
    given = argparse.Namespace(out=tmp_path, patience=1.0)
    done = gpu_suite.run_stage(stage, given, dict(os.environ), time.monotonic() + 30)
    assert (done.status, done.note) == ("out of time", "at work")
    assert done.seconds < 10
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "sleep 97.25" not in listed  # what the stage left running
    late = gpu_suite.run_stage(stage, given, dict(os.environ), time.monotonic() + 0.05)
    assert late.status == "not begun"


def test_the_packed_file_is_whole_at_any_moment(tmp_path, beside):
    packing = beside("gpu_pack")
    folder, target = tmp_path / "results", tmp_path / "out" / "results.tar.gz"
    folder.mkdir()
    (folder / "best.pt").write_bytes(b"weights")
    (folder / "long.log").write_bytes(b"a" * packing.LARGEST + b"the end")
    with packing.Packing(folder, target, 0.01):
        for count in range(50):
            with (folder / "rows.jsonl").open("a") as file:
                file.write(json.dumps({"row": count}) + "\n")
            time.sleep(0.002)
            with tarfile.open(target) as archive:  # raises if it is incomplete
                there = "rows.jsonl" in archive.getnames()
                lines = archive.extractfile("rows.jsonl").read().splitlines() if there else []
            assert [json.loads(line)["row"] for line in lines] == list(range(len(lines)))
    with tarfile.open(target) as archive:
        assert sorted(archive.getnames()) == ["long.log", "rows.jsonl"]
        assert len(archive.extractfile("rows.jsonl").read().splitlines()) == 50
        assert archive.extractfile("long.log").read().endswith(b"the end")


def test_files_that_appear_and_disappear_do_not_stop_the_packing(tmp_path, beside, monkeypatch):
    packing = beside("gpu_pack")
    add, gone = packing._add, []

    def adding(archive, file, name):
        if file.name == "going.jsonl" and not gone:
            gone.append(file.unlink())
        add(archive, file, name)

    monkeypatch.setattr(packing, "_add", adding)
    (tmp_path / "results").mkdir()
    for name in ("going.jsonl", "rows.jsonl", "rows.unfinished.new", "best.pt.partial"):
        (tmp_path / "results" / name).write_text("{}\n")
    packing.pack(tmp_path / "results", tmp_path / "packed.tar.gz")
    with tarfile.open(tmp_path / "packed.tar.gz") as archive:
        assert archive.getnames() == ["rows.jsonl"]
    assert gone


def test_a_dry_run_is_not_taken(tmp_path, beside):
    tables, packing = beside("gpu_tables"), beside("gpu_pack")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "gpu.jsonl").write_text('{"kind": "step", "run": "a"}\n')
    (tmp_path / "work" / packing.DRY).touch()
    packing.pack(tmp_path / "work", tmp_path / "packed.tar.gz")
    with pytest.raises(UserError, match="of a dry run"):
        tables.take(tmp_path / "packed.tar.gz", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_packed_results_are_added_once(tmp_path, beside):
    tables, packing = beside("gpu_tables"), beside("gpu_pack")
    work, results = tmp_path / "work", tmp_path / "results"
    (work / "run-fast").mkdir(parents=True)
    (work / "run-fast" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (work / "gpu.jsonl").write_text('{"kind": "step", "run": "a"}\n{"kind": "ste')
    packing.pack(work, tmp_path / "packed.tar.gz")
    assert tables.take(tmp_path / "packed.tar.gz", results) == [{"kind": "step", "run": "a"}]
    assert tables.take(tmp_path / "packed.tar.gz", results) == []
    assert (results / "gpu.jsonl").read_text() == '{"kind": "step", "run": "a"}\n'
    assert len(list(results.iterdir())) == 1
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "packed.tar.gz").read_bytes()[:60])
    with pytest.raises(UserError, match="Cannot read the packed results"):
        tables.take(tmp_path / "cut.tar.gz", results)


def test_the_kit_is_unpacked_where_its_readers_look(tmp_path, beside, monkeypatch):
    kit, prepare = beside("gpu_kit"), beside("gpu_prepare")
    brought, cache = tmp_path / "kit", tmp_path / "made"
    (brought / kit.WHEELS).mkdir(parents=True)
    (cache / "fxgraph").mkdir(parents=True)
    (cache / "fxgraph" / "code").write_text("compiled")
    (cache / "ab").mkdir()
    (cache / "ab" / "code.best_config").write_text("timed where nothing has a time")
    prepare.pack_code(cache, brought / kit.CODE)
    prepare.write_facts(brought, "digits")
    prepare.write_facts(brought)
    assert kit.facts(brought)["images"] == "digits"
    assert "not used with" in kit.unpack_code(brought, tmp_path / "there")  # other versions' code
    monkeypatch.setattr(prepare, "VERSIONS", {"torch": version("torch"), "python": "3."})
    prepare.write_facts(brought)
    facts = kit.facts(brought) | {"triton": ""}
    (brought / kit.FACTS).write_text(json.dumps(facts))
    assert kit.unpack_code(brought, tmp_path / "there").startswith("compiled code: 1 files")
    assert [path.name for path in (tmp_path / "there").rglob("code*")] == ["code"]
    assert "already unpacked" in kit.unpack_code(brought, tmp_path / "there")
    assert "not in the kit" in kit.unpack_code(tmp_path, tmp_path / "elsewhere")
    with zipfile.ZipFile(brought / kit.WHEELS / "torchattacks-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torchattacks/__init__.py", "VALUE = 7")
    said = kit.unpack_peers(brought, tmp_path / "venvs")
    assert said == "peers from wheels: torchattacks"  # and no other: its wheel is not there
    python = tmp_path / "venvs" / "torchattacks" / "bin" / "python"
    asked = [str(python), "-c", "import torchattacks, torch; print(torchattacks.VALUE)"]
    assert subprocess.run(asked, capture_output=True, text=True).stdout == "7\n"
    assert (tmp_path / "venvs" / "torchattacks" / "installed").exists()
    variables = kit.environment(brought, tmp_path)
    assert variables["FASTADV_COMMIT"] == prepare.commit()
    where = "import fastadv, fastadv.kernels; print(fastadv.kernels.__file__)"
    asked = [sys.executable, "-P", "-c", where]
    found = subprocess.run(asked, env=variables, cwd="/", capture_output=True, text=True)
    assert Path(found.stdout.strip()).resolve() == ROOT / "fastadv" / "kernels" / "__init__.py", (
        found.stderr
    )


def test_a_kit_that_is_too_large_is_refused_with_the_way_out(tmp_path, beside, monkeypatch):
    prepare = beside("gpu_prepare")
    monkeypatch.setattr(prepare, "MOST_MIB", 0.001)
    with pytest.raises(SystemExit, match="use a smaller archive of images"):
        prepare.check_size(tmp_path)


def test_images_of_an_archive_become_one_file(tmp_path, beside):
    images = beside("gpu_images")
    archive = tmp_path / "images.tar.xz"
    shades = {("train", "cat", "1.png"): 10, ("train", "dog", "0.png"): 20}
    shades |= {("test", "dog", "5.png"): 30, ("train", "cat", "0.png"): 40}
    with tarfile.open(archive, "w:xz") as opened:
        for name, shade in shades.items():
            data = io.BytesIO()
            Image.new("RGB", (5, 4), (shade, 0, 255)).save(data, "png")
            entry = tarfile.TarInfo("/".join(name))
            entry.size = len(data.getvalue())
            opened.addfile(entry, io.BytesIO(data.getvalue()))
    said = images.decode(archive, tmp_path / "images.npz")
    assert said == "3 train, 1 test images of 2 classes"
    data = read_npz(tmp_path / "images.npz")
    assert data.train_images.shape == (3, 3, 4, 5)
    assert data.train_images[:, 0, 0, 0].tolist() == [40, 10, 20]
    assert data.train_images[:, 2].min() == 255
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([0, 0, 1], [1])


def test_a_captured_eager_step_is_in_a_run_too_short_to_compile():
    for mode, compiled in [("captured", True), (CAPTURED_EAGER, False)]:
        name, steps = engine_mode(mode)
        assert (name, compiles(name, steps)) == ("captured", compiled)
    assert engine_mode("eager")[0] == "eager"
    with pytest.raises(UserError, match="captured-eager is a mode of CUDA devices"):
        our_candidate(TINY, parse_specs("pgd")[0], "fp32", CAPTURED_EAGER)
    with pytest.raises(UserError, match="did you mean 'captured-eager'"):
        our_candidate(TINY, parse_specs("pgd")[0], "fp32", "captured-eger")


def test_own_norms_that_are_not_right_are_timed_in_their_own_stage_only(
    beside, tmp_path, monkeypatch
):
    stages = beside("gpu_stages")
    asked = []

    def comparing(plan, *given, **options):
        asked.extend(plan)
        return [{"kind": "step", "by": "fastadv", "name": "a step", "images_per_s": 1.0}]

    monkeypatch.setattr(stages, "run_comparisons", comparing)
    given = {"out": tmp_path, "kit": tmp_path, "work": tmp_path, "device": "cpu", "tiny": True}
    stage = stages.Running(argparse.Namespace(**given, seconds=9.0))
    plain = {"kind": "parity", "mode": "captured", "ok": True, "fused_norm": False}
    names = ("pgd-128", "fused-512")
    for right in (True, False):
        fused = plain | {"mode": "captured-eager", "ok": right, "fused_norm": True}
        lines = "".join(json.dumps(row) + "\n" for row in (plain, fused))
        (tmp_path / "rows.jsonl").write_text(lines)
        for name in names:
            stages.STAGES[name](stage)
    mixed, own, without, unchecked = asked
    assert all(" eager against captured, in this run" in each.parity for each in asked)
    assert [spec.fused_norm for spec in mixed.specs] == ["off", "on"]
    assert "in captured-eager against PyTorch's in eager, in this run" in mixed.fused_parity
    assert own.fused_parity == mixed.fused_parity
    assert (without.fused_parity, unchecked.fused_parity) == ("", "")
    assert [spec.fused_norm for spec in without.specs] == ["off"]
    assert own.specs == unchecked.specs == parse_specs(
        "pgd:fused_norm=on,pgd:fused_norm=off,apart:fused_norm=on,apart:fused_norm=off"
    )  # fmt: skip
    assert own.kernels


def _gpu_rows():
    common = {
        "run": "a", "date": "2026-01-01", "device": "a GPU", "threads": 2, "torch": "2.11",
        "python": "3.12", "fastadv": "1", "commit": "abc", "cuda": "13.0", "command": "suite",
        "config": Setting(batch_size=512).as_row(), "dtype": "bf16", "method": "pgd",
        "attack_bn": "train",
    }  # fmt: skip
    spread = {"median": 80.0, "p10": 79.0, "p90": 82.0, "count": 7}
    step = {"kind": "step", "by": "fastadv", "name": "ours captured", "images_per_s": 6400.0}
    step |= {"ms": spread, "over_bound": 1.25, "of_matmul": 0.3, "peak_mib": 2500.0}
    peer = {"kind": "step", "by": "published", "name": "published", "images_per_s": 640.0}
    peer |= {"ms": {key: 10 * value for key, value in spread.items()}}
    late = step | {"name": "ours eager", "preliminary": True, "alone": True}
    ratio = {"kind": "speedup", "peer": "published", "ours": "ours captured", "times": spread}
    ratio |= {"times": {"median": 10.0}, "our_bn": "train", "peer_bn": "train"}
    idle = {"kind": "idle", "name": "ours captured", "idle_share": 0.015}
    whole = {"kind": "kernels", "candidate": "ours captured", "count": 2000, "wall_us": 80500.0}
    whole |= {"kernel_us": 79000.0, "idle_share": 0.01}
    kernel = {"kind": "kernel", "candidate": "ours captured", "name": "triton_red_0", "count": 17}
    kernel |= {"us": 7900.0, "bytes": 10**9, "of_copy": 0.42}
    fused = {"kind": "fused norm", "ours": "fastadv pgd:fused_norm=on bf16 captured"}
    fused |= {"ms": {"own": spread | {"median": 64.0}, "pytorch": spread}}
    fused |= {"times": {"median": 1.25, "p10": 1.2, "p90": 1.3}}
    unknown = kernel | {"name": "sm90_xmma_fprop", "us": 50000.0, "bytes": None, "of_copy": None}
    return [r | common for r in (step, peer, late, ratio, idle, whole, kernel, unknown, fused)]


def test_the_tables_of_a_gpu(beside):
    tables = beside("tables")
    written = tables.written_into("<!-- bench:gpu --><!-- /bench:gpu -->", _gpu_rows())
    (ours,) = [line for line in written.splitlines() if "ours captured" in line]
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells[1:6] == ["ours captured", "512", "80", "79-82", "6,400"]
    assert cells[6:12] == ["80.0 %", "", "30.0 %", "2,500", "1.5 %", ""]
    (peer,) = [line for line in written.splitlines() if "published |" in line]
    assert peer.endswith("| 10.00x |")
    assert "ours eager *" in written
    assert "the time limit was reached" in written
    replay = tables.written_into("<!-- bench:gpu-replay --><!-- /bench:gpu-replay -->", _gpu_rows())
    assert "2,000 kernels, 79 ms in 80.5 ms" in replay
    fprop, reduction = [line for line in replay.splitlines() if line.startswith("| `")]
    assert fprop == "| `sm90_xmma_fprop` | 17 | 50,000 | 63.3 % |  |  |"
    assert reduction == "| `triton_red_0` | 17 | 7,900 | 10.0 % | 1,000 | 42.0 % |"
    norms = tables.written_into("<!-- bench:gpu-fused --><!-- /bench:gpu-fused -->", _gpu_rows())
    said = (
        "preact_resnet18 | pgd:fused_norm=on bf16 captured | 512 | 80 | 64 | 1.250x | 1.200-1.300"
    )
    assert f"| {said} |" in norms
    line = beside("gpu_suite")._row_line(_gpu_rows()[-1])
    assert line == ("fastadv pgd:fused_norm=on bf16 captured batch 512: 1.250x PyTorch's BatchNorm")
    nothing = tables.written_into("<!-- bench:gpu --><!-- /bench:gpu -->", [])
    assert "No GPU has run this version yet" in nothing
    # A CPU's tables have no row of a GPU.
    assert "ours" not in tables.written_into(
        "<!-- bench:speed --><!-- /bench:speed -->", _gpu_rows()
    )


def test_our_kernels_on_a_gpu(beside):
    row = {"kind": "kernel speed", "device": "a GPU", "torch": "2.11", "time": "2026-01-01T00"}
    row |= {"kernel": "linf_step", "size": "512", "backward": False, "device_seconds": 8e-6}
    row |= {"gigabytes_per_second": 2700.0, "copy_gigabytes_per_second": 3000.0}
    row |= {"bytes": 2**30, "fastadv": "1", "commit": "abc", "launches": 1}
    small = row | {"backend": "triton", "kernel": "masked_ce", "bytes": 2**20}
    rows = [
        row | {"backend": "triton"},
        row | {"backend": "reference", "device_seconds": 40e-6},
        small,
    ]
    on_cpu = row | {"backend": "triton", "device": "a CPU", "device_seconds": None}
    written = beside("gpu_tables").kernels_table([*rows, on_cpu])
    assert "| linf_step | 512 | 1 | 8 | 2,700 | 90.0 % | 40 |  |" in written
    assert "| masked_ce | 512 | 1 | 8 | 2,700 |  |  |  |" in written
    assert "a CPU" not in written
    shares = beside("gpu_tables").shares_table([*rows, on_cpu]).splitlines()
    assert "| `linf_step` | 90.0 % | 512 | a GPU |" in shares
    # Too small for its rate to be the memory's; and one without a row.
    assert {"| `masked_ce` | unknown | | |", "| `norm_apply` | unknown | | |"} <= set(shares)
    assert len(shares) == 2 + len(OPERATORS)
