"""bench/inductor.py: variants that exist, refused when misspelt, timed beside none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_script import BENCH
from torch._inductor import config

from fastadv.benchmark.variants import PADDED, VARIANTS, variant
from fastadv.engine.model import padded_channels


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_sets_what_it_names_and_nothing_else(name):
    before = config.shallow_copy_dict()
    with variant(name):
        now = config.shallow_copy_dict()
        assert {key: now[key] for key in now if now[key] != before[key]} == VARIANTS[name]
        assert padded_channels.is_on() == (name == PADDED)
    assert config.shallow_copy_dict() == before
    assert not padded_channels.is_on()


def test_a_misspelt_setting_is_refused(tmp_path):
    command = [sys.executable, str(BENCH / "inductor.py"), "--settings", "reuze"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "did you mean 'reuse'" in done.stderr.lower()
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Folder of the GPU suite. Both tests below compile the same step, so they share its code."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def compiling(work) -> dict[str, str]:
    """Environment in which compiled code lies where the GPU suite puts it."""
    return os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}


@pytest.mark.slow
def test_rows_of_two_settings(tmp_path, compiling):
    command = [sys.executable, str(BENCH / "inductor.py"), "--width", "2", "--batch-size", "4"]
    command += ["--dtype", "fp32", "--methods", "fast", "--repeats", "2", "--out", str(tmp_path)]
    subprocess.run([*command, "--settings", "reuse"], check=True, env=compiling)
    (file,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["inductor"] for row in rows] == ["none", "reuse"]
    assert rows[0]["none_over_it"]["median"] == 1
    assert all(0.1 < row["none_over_it"]["median"] < 10 for row in rows)
    assert rows[0]["mode"] == "compiled"


@pytest.mark.slow
def test_the_stage_of_the_gpu_suite(tmp_path, work, compiling):
    command = [sys.executable, str(BENCH / "gpu_suite.py"), "inductor", "--device", "cpu"]
    command += [
        "--only",
        "inductor",
        "--tiny",
        "--work",
        str(work),
        "--pack",
        str(tmp_path / "packed"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=compiling)
    assert done.returncode == 0, done.stdout
    (summary,) = work.glob("inductor-*/summary.json")
    (stage,) = json.loads(summary.read_text())
    assert (stage["stage"], stage["note"]) == ("inductor", "none: 1.000 times as fast as none")
