"""The files for a machine without a network, and their layout there.

``gpu_prepare.py`` writes the folder; ``gpu_suite.py`` unpacks it. In it: ``kit.json`` (what it was
made with), ``inductor.tar.xz`` (compiled code for the GPUs named in ``kit.json``), ``wheels/``
(the peers' packages) and ``images.tar.xz`` (JPEG images, ``train/CLASS/NAME.jpg`` and
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
FACTS, CODE, WHEELS, IMAGES = "kit.json", "inductor.tar.xz", "wheels", "images.tar.xz"
# A peer is found by its interpreter and a file that says the environment is complete.
PEERS = {
    "torchattacks": ("torchattacks",),
    "art": ("adversarial_robustness_toolbox",),
}
PACKAGES = ("torch", "triton")  # whose versions compiled code is for, beside Python's
# Settings of the compiler that would make other keys of its cache than those of the kit's code.
OTHER_KEYS = ("CXX", "TORCHINDUCTOR_", "TORCHDYNAMO_")


def facts(kit: Path) -> dict:
    """The contents of ``kit.json``; empty if there is no kit."""
    try:
        return json.loads((kit / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def unpack_code(kit: Path, cache: Path) -> str:
    """Put the compiled code where Inductor looks for it; returns a message."""
    cache.mkdir(parents=True, exist_ok=True)
    said = facts(kit)
    done = cache / "unpacked"
    if done.exists() and done.read_text() == str(said.get("date")):
        return "compiled code: unpacked before"
    if not (kit / CODE).exists():
        return "compiled code: none was brought, all is compiled here"
    here = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    for name, found in here.items():
        if not found.startswith(said.get(name, "").split("+")[0]):
            return f"compiled code: made for {name} {said.get(name)}, here is {found}; not used"
    with tarfile.open(kit / CODE) as archive:
        unpack(archive, cache)
        count = len(archive.getnames())
    done.write_text(str(said.get("date")))
    return f"compiled code: {count} files of {', '.join(said.get('gpus', []))}"


def unpack_peers(kit: Path, environments: Path) -> str:
    """An interpreter per peer whose wheels are in the kit: this one, with them on its path."""
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
    """Variables under which the stages find fastadv and the compiled code."""
    # A test run that calls this must not reach into the test runs inside: pytest-benchmark
    # measures nothing where it believes that xdist is at work.
    unwanted = ("PYTEST_", *OTHER_KEYS)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
    variables["TEARDOWN_CUPTI"] = "0"  # CUDA graphs did not survive the profiler's end everywhere
    variables["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
    variables["PYTHONUNBUFFERED"] = "1"
    commit = facts(kit).get("commit")
    if commit:
        variables.setdefault("FASTADV_COMMIT", commit)
    before = variables.get("PYTHONPATH")
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    return variables
