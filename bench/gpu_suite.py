"""Everything a GPU is needed for, in at most nine minutes: ``python bench/gpu_suite.py --out DIR``.

(All of DIR in one file, where only few can be brought back: ``tar czf DIR.tgz DIR`` after it.)

Needs this repository, torch >= 2.11 with its Triton, and typer, rich, safetensors, scikit-learn,
pytest and hypothesis. fastadv need not be installed: without ``fastadv.kernels`` on the path a
temporary folder of links stands in for the installation (the lasting way is ``pip install
--no-deps --no-build-isolation -e .``).

While the tests run, processes in the background compile what the timed stages will need; those
begin when nothing else runs any more. Each stage is a process of its own under its own time
limit; a stage that fails or runs out of time is reported and the next one goes on. Logs and rows
land in DIR, a short table comes last.
``--device cpu --tiny`` is a dry run.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
# name -> seconds it may take; the most telling first, as the time may run out
STAGES = {
    "smoke": 50,
    "tests": 100,
    "kernels": 30,
    "bound": 30,
    "pgd-512": 75,
    "pgd-128": 50,
    "methods-512": 60,
    "pgd-32": 25,
    "wide-128": 40,
    "training": 35,
    "inductor": 300,
}
WHEN_ASKED = ("inductor",)  # a call of its own: --stages inductor
UNTIMED = ("smoke", "tests")
COMPILED = ("pgd-512", "methods-512", "wide-128", "pgd-128", "pgd-32")
WARM_SECONDS = 150.0
LEAST = 5.0  # seconds below which a stage is not begun


@dataclass
class Done:
    """How a stage went."""

    stage: str
    status: str
    seconds: float
    note: str


def main() -> None:
    """Run the stages asked for; the exit code says whether all went well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-suite"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a dry run")
    parser.add_argument("--minutes", type=float, default=9.0)
    usual = [name for name in STAGES if name not in WHEN_ASKED]
    parser.add_argument("--stages", default=",".join(usual), help="which, with commas")
    given = parser.parse_args()
    stages = given.stages.split(",")
    for name in stages:
        if name not in STAGES:
            parser.error(f"unknown stage {name!r}; there are {', '.join(STAGES)}")
    given.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as links:
        environment = environment_with_fastadv(Path(links))
        untimed = [name for name in stages if name in UNTIMED]
        done = []
        for name in untimed[:-1]:
            done.append(run_stage(name, given, environment, until))
        warming = Warming([name for name in stages if name in COMPILED], given, environment)
        for name in untimed[-1:]:
            done.append(run_stage(name, given, environment, until))
        done.append(warming.end(until))
        timed = [name for name in stages if name not in UNTIMED]
        done += [run_stage(name, given, environment, until) for name in timed]
    report(done, given.out)
    sys.exit(any(entry.status != "ok" for entry in done))


def environment_with_fastadv(links: Path) -> dict[str, str]:
    """Environment variables under which ``fastadv`` and ``fastadv.kernels`` are importable."""
    # A test run that calls this must not reach into the test runs inside: pytest-benchmark
    # measures nothing where it believes that xdist is at work.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    # Other folders than the default may not be writable, and all stages should share one cache.
    # Not named like the package: a folder "fastadv" beside a script would hide it.
    cache = Path(tempfile.gettempdir()) / "fastadv-inductor"
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    if _installed():
        return environment
    package = links / "fastadv"
    package.mkdir()
    for entry in (ROOT / "fastadv").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(links), *([before] if before else [])])
    return environment


def _installed() -> bool:
    try:
        return importlib.util.find_spec("fastadv.kernels") is not None
    except ImportError:
        return False


class Warming:
    """Processes that compile for the timed stages, one for each."""

    def __init__(
        self, stages: list[str], given: argparse.Namespace, environment: dict[str, str]
    ) -> None:
        self.began = time.monotonic()
        self.processes = {}
        for name in stages:
            log = (given.out / f"warm-{name}.log").open("w")
            # What is timed later waits for these, but the tests beside them should not.
            command = ["nice", *stage_command(name, given, WARM_SECONDS), "--warm"]
            few = {"TORCHINDUCTOR_COMPILE_THREADS": "3"}
            self.processes[name] = _start(command, environment | few, log)

    def end(self, until: float) -> Done:
        """Wait for them as long as they may take, end the rest."""
        late, bad = [], []
        for name, process in self.processes.items():
            left = min(until, self.began + WARM_SECONDS) - time.monotonic()
            try:
                if process.wait(max(0.0, left)):
                    bad.append(name)
            except subprocess.TimeoutExpired:
                late.append(name)
            _end_group(process)
        note = f"unfinished: {', '.join(late) or 'none'}; failed: {', '.join(bad) or 'none'}"
        status = "failed" if bad else "ok"
        return Done("warming", status, time.monotonic() - self.began, note)


def stage_command(name: str, given: argparse.Namespace, seconds: float) -> list[str]:
    """How a stage is started; ``-P``: the checkout's ``fastadv/`` alone has no kernels in it."""
    command = [sys.executable, "-P", str(ROOT / "bench" / "gpu_stages.py"), name]
    command += ["--out", str(given.out), "--device", given.device, "--seconds", str(seconds)]
    return command + (["--tiny"] if given.tiny else [])


def _start(
    command: list[str], environment: dict[str, str], log: IO[str]
) -> subprocess.Popen[bytes]:
    with log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def run_stage(
    name: str, given: argparse.Namespace, environment: dict[str, str], until: float
) -> Done:
    """One stage in its own process, its output in ``<out>/<name>.log``."""
    limit = min(STAGES[name] * (6 if given.tiny else 1), until - time.monotonic())
    if limit < LEAST:
        return Done(name, "not begun", 0.0, "the time was up")
    print(f"{name}: at most {limit:.0f} s", flush=True)
    log = given.out / f"{name}.log"
    began = time.monotonic()
    process = _start(stage_command(name, given, limit), environment, log.open("w"))
    try:
        status = "failed" if process.wait(limit) else "ok"
    except subprocess.TimeoutExpired:
        status = "out of time"
    _end_group(process)
    return Done(name, status, time.monotonic() - began, _note(log, status))


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what the stage left running: compile workers, peers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _note(log: Path, status: str) -> str:
    """What a stage says of itself: its last line that begins with "result: ", or just its last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line.removeprefix("result: ") for line in lines if line.startswith("result: ")]
    if told and status == "ok":
        return told[-1]
    return lines[-1][:150] if lines else ""


def report(done: list[Done], out: Path) -> None:
    """The short table, and the same as JSON in ``summary.json``."""
    summary = [vars(entry) for entry in done]
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    rows = list(_whole_rows(out))
    print()
    for row in rows:
        if row.get("kind") == "step":
            print(_step_line(row))
        elif row.get("kind") == "idle":
            batch = row["config"]["batch_size"]
            print(f"{row['name']} batch {batch}: idle {100 * row['idle_share']:.1f} %")
        elif row.get("kind") == "speedup" and row["our_bn"] == row["peer_bn"]:
            batch = row["config"]["batch_size"]
            print(f"{row['ours']} batch {batch}: {row['times']['median']:.2f}x {row['peer']}")
    print()
    for entry in done:
        print(f"{entry.stage:<12} {entry.status:<11} {entry.seconds:6.1f} s  {entry.note}")


def _whole_rows(out: Path) -> Iterator[dict]:
    """Every row but the one that a stage was writing when its time was up."""
    for file in sorted(out.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def _step_line(row: dict) -> str:
    name = f"{row['config']['model']} {row['name'].removeprefix('fastadv ')}"
    parts = [f"{name} batch {row['config']['batch_size']}:"]
    parts.append(f"{row['ms']['median']:.4g} ms, {row['images_per_s']:,.0f} images/s")
    if "over_bound" in row:
        parts.append(f"{100 / row['over_bound']:.0f} % of bound")
    if "of_matmul" in row:
        parts.append(f"{100 * row['of_matmul']:.0f} % of matmul")
    if "over_passes" in row:
        parts.append(f"{row['over_passes']['median']:.3f} x passes")
    if row.get("peak_mib"):
        parts.append(f"{row['peak_mib']:,.0f} MiB")
    return " ".join([parts[0], ", ".join(parts[1:])])


if __name__ == "__main__":
    main()
