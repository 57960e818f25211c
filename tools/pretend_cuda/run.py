"""Run all sections, or those given: ``python tools/pretend_cuda/run.py [SECTION ...]``.

The script makes an environment with the CUDA build of PyTorch, builds the pretended runtime, runs
each section on it, compares with the golden numbers and writes ``record.json``. If numbers differ
it lists them, and ``--accept "why"`` makes them the golden ones. An interrupted run continues. The
first run downloads 4.6 GB; all sections together take about two hours on one core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import build
import digest
import records

FOLDER = digest.ROOT / ".pretend-cuda"
# Recipes that must be refused: cuSOLVER's results are read on the host.
REFUSED = {"fgsm-n-advlc-nuclear"}
# Limit per process: a number that the device has not computed may request any amount of memory.
ADDRESS_SPACE = 48 << 30


@dataclass
class Outcome:
    """The result of a section: counts of its jobs, faults, and numbers for the golden file."""

    counts: dict[str, int]
    faults: list[str]
    numbers: dict[str, Any] | None = None


class Interrupted(Exception):
    """A section's script was stopped by a signal."""


class Runner:
    """Starts the sections' scripts in the environment."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder = folder
        self.python = python
        self.results = folder / "results"
        self.results.mkdir(parents=True, exist_ok=True)

    def __call__(
        self, section: str, command: Sequence[str | Path], result: Path, **more: str
    ) -> int:
        """The exit code of ``command``, a script and its arguments, which writes ``result``."""
        result.unlink(missing_ok=True)
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "TRITON_CACHE_DIR": str(self.folder / "triton"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        environment = {
            **{name: value for name, value in os.environ.items() if "PYTEST" not in name},
            **build.environment(self.folder / "runtime"),
            **caches,
            "OMP_NUM_THREADS": "1",
            "PRETEND_CUDA_LOG": str(self.folder / f"{section}.log"),
            "PYTHONPATH": str(digest.HERE),
            **more,
        }
        code = subprocess.run(
            [self.python, "-P", "-W", "ignore", *command],
            env=environment,
            cwd=digest.ROOT,
            check=False,
            preexec_fn=_limit_memory,
        ).returncode
        if -code in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            raise Interrupted
        return code

    def json(self, section: str) -> Path:
        """The file of results of the section's script."""
        return self.results / f"{section}.json"


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))


# -- sections --------------------------------------------------------------------------------------


def controls(section: str, run: Runner) -> Outcome:
    """What must break a capture, and what must not; each row has a field "right"."""
    file = run.json(section)
    code = run(section, [digest.HERE / "controls.py", "--json", file], file)
    if not file.exists():
        return Outcome({"failed": 1}, [f"controls.py ended with {code}"])
    rows = json.loads(file.read_text())
    faults = [
        f"{row['name']} must {row['must']} and said {row['said']}"
        for row in rows
        if not row["right"]
    ]
    return Outcome({"passed": len(rows) - len(faults), "failed": len(faults)}, faults)


def ranks(section: str, run: Runner) -> Outcome:
    """Training with two processes: the nodes of their graphs, NCCL's included."""
    file = run.json(section)
    code = run(section, [digest.HERE / "ranks.py", "--json", file], file)
    if not file.exists():
        return Outcome({"failed": 1}, [f"ranks.py ended with {code}"])
    found: dict[str, Any] = json.loads(file.read_text())
    faults = [f"{name}: {each['failed']}" for name, each in found.items() if "failed" in each]
    counts = {"passed": len(found) - len(faults), "failed": len(faults)}
    return Outcome(counts, faults, found)


def gpu_tests(section: str, run: Runner) -> Outcome:
    """Every test marked "gpu", one process per file, without comparing numbers."""
    counts: Counter[str] = Counter()
    faults = []
    files = sorted(digest.ROOT.glob("tests/**/test_*.py"))
    for file in (file for file in files if "mark.gpu" in file.read_text()):
        report = run.results / f"{file.stem}.xml"
        options = ["-o", "addopts=--strict-markers", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        run(
            section,
            ["-m", "pytest", *options, "-p", "numbers_off", f"--junitxml={report}", file],
            report,
            PYTHONPATH=f"{digest.HERE}:{digest.ROOT / 'tests'}",
        )
        if not report.exists():
            faults.append(f"{file.name}: pytest has ended without a report")
            continue
        for case in xml.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            # A skipped test has not used the device.
            bad = kinds & {"failure", "error", "skipped"}
            counts["failed" if bad else "passed"] += 1
            counts["up to a comparison"] += "properties" in kinds
            if bad:
                faults.append(f"{file.name}: {case.get('name')} {bad.pop()}")
    counts["failed"] = len(faults)
    return Outcome(dict(counts), faults)


def pieces(section: str, run: Runner) -> Outcome:
    """A script that runs recipes, passes or steps with ``forked.each``."""
    file, now = run.json(section), digest.digest(section)
    kept = run.results / f"{section}.jsonl"
    code = run(
        section,
        [digest.HERE / f"{section}.py", "--out", file, "--kept", kept, "--digest", now],
        file,
    )
    if code:
        return Outcome({"failed": 1}, [f"{section}.py ended with {code}"])
    found: dict[str, Any] = json.loads(file.read_text())
    refused = {name for name, each in found.items() if "refused" in each}
    faults = [f"{name}: {each['failed']}" for name, each in found.items() if "failed" in each]
    faults += [f"{name}: refused, {found[name]['refused']}" for name in sorted(refused - REFUSED)]
    if section in ("recipes", "shapes"):
        faults += [f"{name}: not refused" for name in sorted(REFUSED - refused) if name in found]
    counts = {"passed": len(found) - len(refused) - len(faults), "refused": len(refused)}
    counts["failed"] = len(faults)
    shapes = {shape for each in found.values() for shape in each.pop("shapes", ())}
    if shapes:
        counts["graph shapes"] = len(shapes)
    numbers = {
        name: {key: value for key, value in each.items() if key not in {"seconds", "refused"}}
        for name, each in found.items()
    }
    return Outcome(counts, faults, numbers)


def rehearsal(section: str, run: Runner) -> Outcome:
    """The calls of ``bench/gpu_suite.py``, with only the files that travel to the GPU."""
    file = run.json(section)
    file.unlink(missing_ok=True)
    script = digest.ROOT / "bench" / "gpu_rehearse.py"
    command = [sys.executable, script, "--pretend", run.folder, "--python", run.python]
    command += ["--calls", "smoke,rest"]  # the third is two training runs
    subprocess.run([*command, "--json", file], check=False)
    if not file.exists():
        return Outcome({"failed": 1}, [f"{script.name} has ended without results"])
    found = json.loads(file.read_text())
    stages = {
        name: entry for call in found["calls"].values() for name, entry in call["stages"].items()
    }
    faults = [
        f"{name}: {entry['status']}, without rows of kind {entry['missing']}, {entry['note']}"
        for name, entry in stages.items()
        if not entry["ok"]
    ]
    if not found["killed"]["ok"]:
        faults.append(f"a killed call left {found['killed']['rows']}")
    counts = {"passed": len(stages) + 1 - len(faults), "failed": len(faults)}
    for word in ("found", "compiled"):
        counts[f"graphs {word}"] = sum(entry[word] for entry in stages.values())
    return Outcome(counts, faults)


SECTIONS: dict[str, Callable[[str, Runner], Outcome]] = {
    "controls": controls,
    "tests": gpu_tests,
    "recipes": pieces,
    "generated": pieces,
    "steps": pieces,
    "ranks": ranks,
    "shapes": pieces,
    "suite": rehearsal,
}

# -- the command -----------------------------------------------------------------------------------


def main() -> int:
    """Run, compare, record; the exit code is 1 if a section failed or numbers differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none is given"
    )
    parser.add_argument("--accept", metavar="WHY", help="make differing numbers the golden ones")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="folder of the environment and the results"
    )
    parser.add_argument(
        "--python",
        type=Path,
        help="the Python of an environment with the packages of requirements.txt",
    )
    given = parser.parse_args()
    unknown = set(given.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"There is no section {sorted(unknown)[0]!r}: {', '.join(SECTIONS)}.")
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if given.python is not None and not given.python.exists():
        parser.error(f"there is no {given.python}; omit --python to make an environment")
    python = given.python.absolute() if given.python else environment(folder)
    build.build(str(python), folder / "runtime")
    run = Runner(folder, python)
    fine = True
    for section in given.sections or SECTIONS:
        fine = record(section, run, given.accept) and fine
    return 0 if fine else 1


def environment(folder: Path) -> Path:
    """The Python of an environment with the versions of ``requirements.txt``, made if missing."""
    python = folder / "venv" / "bin" / "python"
    wanted = (digest.HERE / "requirements.txt").read_text()
    made = folder / "venv" / "made-of.txt"
    if made.exists() and made.read_text() == wanted:
        return python
    base = _python_3_12()
    print("making the environment, 4.6 GB", flush=True)
    install = [python, "-m", "pip", "install", "--quiet"]
    for command in (
        [base, "-m", "venv", "--clear", folder / "venv"],
        [*install, "-r", digest.HERE / "requirements.txt"],
        [*install, "--no-deps", "--no-build-isolation", "-e", digest.ROOT],
    ):
        subprocess.run(command, check=True)
    made.write_text(wanted)
    return python


def _python_3_12() -> str:
    """A Python of the version that the machine with the GPU has."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = map(str, sorted(pyenv.glob("versions/3.12.*/bin/python")))
    for python in (sys.executable, shutil.which("python3.12"), *found):
        asked = [str(python), "-c", "import sys; sys.exit(sys.version_info[:2] != (3, 12))"]
        # The command may be a shim without a Python behind it.
        if python and not subprocess.run(asked, check=False, capture_output=True).returncode:
            return python
    raise SystemExit("The environment needs Python 3.12: install it, or pass --python.")


def record(section: str, run: Runner, accepted: str | None) -> bool:
    """Run one section and write its record; True if it succeeded."""
    print(f"== {section}", flush=True)
    now, began = digest.digest(section), time.monotonic()
    try:
        outcome = SECTIONS[section](section, run)
    except Interrupted:
        print(f"{section}: interrupted, nothing was recorded; run it again to continue.")
        return False
    minutes = (time.monotonic() - began) / 60
    print(f"{section}: {outcome.counts}, {minutes:.0f} min")
    for fault in outcome.faults:
        print(f"  {fault}")
    entry: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": versions(run.python),
        "counts": outcome.counts,
        "digest": now,
    }
    if outcome.faults:
        entry["faults"] = outcome.faults
    reasons = records.read().get(section, {}).get("accepted", [])
    if outcome.numbers is not None and not outcome.faults:
        old = records.read_golden(section)
        changed = records.differences(old, outcome.numbers)
        if changed and old and accepted is None:
            print("\n".join(f"  {line}" for line in changed))
            print(
                f"{section}: {len(changed)} numbers differ from the golden ones and nothing was "
                'recorded; if the change is intended, pass --accept "why".'
            )
            return False
        if changed:
            records.write_golden(section, outcome.numbers)
            why = accepted or "first recorded"
            reasons = [*reasons, {"date": entry["date"], "changed": len(changed), "why": why}]
    if reasons:
        entry["accepted"] = reasons
    if digest.digest(section) != now:
        print(f"{section}: files changed during the run, nothing was recorded; run it again.")
        return False
    records.write(section, entry)
    return not outcome.faults


def versions(python: Path) -> dict[str, str]:
    """Versions of Python and of the packages that the results depend on."""
    told = "import json, platform; from importlib.metadata import version as v; "
    told += "print(json.dumps({'python': platform.python_version(), "
    told += "**{name: v(name) for name in ('torch', 'triton', 'torchvision')}}))"
    found: dict[str, str] = json.loads(
        subprocess.run(
            [python, "-P", "-c", told], check=True, capture_output=True, text=True
        ).stdout
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
