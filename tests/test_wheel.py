"""The built wheel contains the whole package and works outside of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import fastadv, fastadv.kernels, torch
assert "site" in fastadv.__file__ and "site" in fastadv.kernels.__file__, fastadv.__file__
model = fastadv.build_model("preact_resnet18", width=2, in_channels=1)
step = fastadv.step(model, torch.optim.SGD(model.parameters(), lr=0.1), "fast", eps=0.1)
loss = step(torch.rand(4, 1, 8, 8), torch.randint(0, 10, (4,)))["loss"]
assert loss.isfinite()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    # A copy: building must not leave its folders in the checkout.
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_every_module_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for file in (ROOT / "fastadv").rglob("*.py"):
        assert str(file.relative_to(ROOT)) in inside
    assert "fastadv/benchmark/bench.schema.json" in inside


def test_the_wheel_works_outside_of_the_repository(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
