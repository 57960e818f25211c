"""The kit: files for a GPU machine without a network, and how they are unpacked there.

``gpu_prepare.py`` writes the folder; ``gpu_suite.py`` unpacks it. It contains ``kit.json``
(versions, commit and date), ``inductor.tar.xz`` (compiled code for the GPUs named in ``kit.json``),
``wheels/`` (the peers' packages) and ``images.tar.xz`` (JPEG images, ``train/CLASS/NAME.jpg`` and
``test/CLASS/NAME.jpg``).
"""

import json
import os
import platform
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

from gpu_pack import unpack

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / "bench" / "gpu_kit"
ENVIRONMENTS = ROOT / "bench" / "peers" / "venvs"
FACTS, CODE, WHEELS, IMAGES = "kit.json", "inductor.tar.xz", "wheels", "images.tar.xz"
# Wheels of each peer. `fastadv bench` finds a peer by its interpreter and the file "installed".
PEERS = {
    "torchattacks": ("torchattacks",),
    "art": ("adversarial_robustness_toolbox",),
    "evaluation": ("pyautoattack", "torchattacks"),  # those of bench/evaluation.py
}
PACKAGES = ("torch", "triton")  # compiled code fits only these versions, and Python's
# Settings of the compiler that change the keys of its cache, so that the kit's code is not found.
OTHER_KEYS = ("CXX", "TORCHINDUCTOR_", "TORCHDYNAMO_")


def facts(kit: Path) -> dict:
    """The contents of ``kit.json``; empty if there is no kit."""
    try:
        return json.loads((kit / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def site_of(peer: str) -> Path:
    """The folder with the unpacked packages of ``peer``."""
    return ENVIRONMENTS / peer / "site"


def unpack_code(kit: Path, cache: Path) -> str:
    """Put the compiled code where Inductor looks for it; returns a message."""
    cache.mkdir(parents=True, exist_ok=True)
    said = facts(kit)
    done = cache / "unpacked"
    if done.exists() and done.read_text() == str(said.get("date")):
        return "compiled code: already unpacked"
    if not (kit / CODE).exists():
        return "compiled code: not in the kit, everything is compiled here"
    here = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    for name, found in here.items():
        if not found.startswith(said.get(name, "").split("+")[0]):
            return f"compiled code: made for {name} {said.get(name)}, not used with {found}"
    with tarfile.open(kit / CODE) as archive:
        unpack(archive, cache)
        count = len(archive.getnames())
    done.write_text(str(said.get("date")))
    return f"compiled code: {count} files of {', '.join(said.get('gpus', []))}"


def unpack_peers(kit: Path, environments: Path) -> str:
    """In ``environments`` make an interpreter for each peer whose wheels are in the kit: this
    Python with the wheels on its path. Returns a message."""
    ready = []
    for peer, packages in PEERS.items():
        wheels = [
            wheel for name in packages for wheel in sorted(kit.glob(f"{WHEELS}/{name}-*.whl"))
        ]
        home = environments / peer
        if len(wheels) < len(packages) or (home / "installed").exists():
            continue
        site = home / "site"
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        python = home / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(
            f'#!/bin/sh\nPYTHONPATH="{site}:$PYTHONPATH" exec "{sys.executable}" "$@"\n'
        )
        python.chmod(0o755)
        (home / "installed").touch()
        ready.append(peer)
    return f"peers from wheels: {', '.join(ready) or 'none'}"


def environment(kit: Path, work: Path) -> dict[str, str]:
    """Environment variables with which the stages find fastadv and the compiled code."""
    # pytest's variables must not reach the test runs of the stages: pytest-benchmark measures
    # nothing if it believes that xdist runs it.
    unwanted = ("PYTEST_", *OTHER_KEYS)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
    variables["TEARDOWN_CUPTI"] = "0"  # without it, replays failed on some machines after profiling
    variables["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
    variables["PYTHONUNBUFFERED"] = "1"
    commit = facts(kit).get("commit")
    if commit:
        variables.setdefault("FASTADV_COMMIT", commit)
    before = variables.get("PYTHONPATH")
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    return variables
