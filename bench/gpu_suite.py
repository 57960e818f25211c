"""Everything that needs a GPU, in two short calls.

    python bench/gpu_suite.py smoke --pack FOLDER     # at most 105 s
    python bench/gpu_suite.py rest --pack FOLDER      # at most 590 s
    python bench/gpu_suite.py train --pack FOLDER     # if 330 s are left

Needs this repository and torch >= 2.11 with its Triton, typer, rich, safetensors, scikit-learn,
pytest and hypothesis; no installation, no network, no git. ``bench/gpu_prepare.py`` collects in
``bench/gpu_kit`` what saves minutes there (compiled code, the peers' wheels, images); all of it may
be missing. ``gpu_plan.py`` lists what is measured, in which order, and for how long.

Each stage is a process with its own time limit; one that fails or exceeds it is reported, and the
next one starts. Rows and logs are written to the folder ``--work`` immediately, and every 15 s they
are packed into one file in the folder ``--pack``. A short table is printed last. ``python
bench/tables.py --take FILE`` adds the results to ``bench/results`` and writes the tables.
``--device cpu --tiny --patience 6`` is a dry run.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from gpu_kit import ENVIRONMENTS, KIT, environment, unpack_code, unpack_peers
from gpu_pack import DRY, Packing, rows_in
from gpu_plan import CALLS, LEAST, PACK_EVERY, PLAN, Stage, stages_of

ROOT = Path(__file__).resolve().parents[1]
ENDS_EARLY = 5.0  # seconds of a call reserved for the last packing and the table


@dataclass
class Done:
    """The result of one stage."""

    stage: str
    status: str
    seconds: float
    note: str


def main() -> None:
    """Run one call; the exit code is 0 if all its stages succeeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("call", choices=[*CALLS, "inductor"], help="the stages to run")
    parser.add_argument("--pack", type=Path, required=True, help="folder of the packed results")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fastadv-gpu")
    parser.add_argument("--kit", type=Path, default=KIT, help="folder that gpu_prepare.py wrote")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on the time limits")
    parser.add_argument("--only", help="some stages of the call, separated by commas")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a dry run")
    given = parser.parse_args()
    if given.patience <= 0:
        parser.error("--patience must be above 0; 1 keeps the limits of gpu_plan.py")
    # The stages run in the repository's root.
    for name in ("pack", "work", "kit"):
        setattr(given, name, getattr(given, name).resolve())
    began = time.monotonic()
    stages = stages_of(given.call)
    if given.only:
        stages = _chosen(stages, given.only.split(","), parser)
    usual = CALLS.get(given.call, sum(stage.seconds for stage in stages) + 10)
    until = began + usual * given.patience - ENDS_EARLY
    given.out = given.work / f"{given.call}-{time.strftime('%Y%m%dT%H%M%S')}"
    given.out.mkdir(parents=True)
    if given.tiny or "PRETEND_CUDA_NAME" in os.environ:
        (given.out / DRY).touch()
    with Packing(given.out, given.pack / f"{given.out.name}.tar.gz", PACK_EVERY):
        print(unpack_code(given.kit, given.work / "inductor"), flush=True)
        print(unpack_peers(given.kit, ENVIRONMENTS), flush=True)
        variables = environment(given.kit, given.work)
        done: list[Done] = []
        for stage in stages:
            done.append(run_stage(stage, given, variables, until))
            print(_stage_line(done[-1]), flush=True)
            write_summary(done, given.out)
    report(done, given.out)
    print(f"{time.monotonic() - began:.0f} s; results: {given.pack / given.out.name}.tar.gz")
    sys.exit(any(entry.status != "ok" for entry in done))


def _chosen(stages: list[Stage], names: list[str], parser: argparse.ArgumentParser) -> list[Stage]:
    known = [stage.name for stage in stages]
    for name in names:
        if name not in known:
            where = [stage.call for stage in PLAN if stage.name == name]
            hint = f"it belongs to the call {where[0]}" if where else f"one of {', '.join(known)}"
            parser.error(f"there is no stage {name!r} in this call; {hint}")
    return [stage for stage in stages if stage.name in names]


def stage_command(stage: Stage, given: argparse.Namespace, seconds: float) -> list[str]:
    """The command that starts a stage."""
    command = [sys.executable, str(ROOT / "bench" / "gpu_stages.py"), stage.name]
    command += ["--out", str(given.out), "--device", given.device, "--seconds", f"{seconds:.0f}"]
    command += ["--kit", str(given.kit), "--work", str(given.work)]
    return command + (["--tiny"] if given.tiny else [])


def run_stage(
    stage: Stage, given: argparse.Namespace, variables: dict[str, str], until: float
) -> Done:
    """Run one stage in its own process, with its output in ``<out>/<name>.log``."""
    limit = min(stage.seconds * given.patience, until - time.monotonic())
    if limit < LEAST:
        return Done(stage.name, "not begun", 0.0, "no time was left")
    print(f"{stage.name}: {stage.finds}; at most {limit:.0f} s", flush=True)
    log = given.out / f"{stage.name}.log"
    began = time.monotonic()
    with log.open("w") as opened:
        process = subprocess.Popen(
            stage_command(stage, given, limit), cwd=ROOT, env=variables, stdout=opened,
            stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip
    try:
        status = "failed" if process.wait(limit) else "ok"
    except subprocess.TimeoutExpired:
        status = "out of time"
    finally:
        _end_group(process)
    return Done(stage.name, status, time.monotonic() - began, _note(log, status))


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the processes that the stage left running: compile workers, peers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _note(log: Path, status: str) -> str:
    """The result that a stage printed ("result: ..."), or its last line if it did not succeed."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("result: ") for line in lines if line.startswith("result: ")]
    if said and status == "ok":
        return said[-1]
    return lines[-1][:150] if lines else ""


def _stage_line(entry: Done) -> str:
    return f"{entry.stage:<12} {entry.status:<11} {entry.seconds:6.1f} s  {entry.note}"


def write_summary(done: list[Done], out: Path) -> None:
    """Write ``summary.json``: the results of the stages so far."""
    (out / "summary.json").write_text(json.dumps([vars(entry) for entry in done], indent=2) + "\n")


def report(done: list[Done], out: Path) -> None:
    """Print the short table: every step, then the result of each stage."""
    print()
    for row in rows_in(out):
        line = _row_line(row)
        if line is not None:
            print(line)
    print()
    for entry in done:
        print(_stage_line(entry))


def _row_line(row: dict) -> str | None:
    kind = row.get("kind")
    if kind == "step":
        return _step_line(row)
    if kind == "idle":
        batch = row["config"]["batch_size"]
        return f"{row['name']} batch {batch}: idle {100 * row['idle_share']:.1f} %"
    if kind == "fused norm":
        batch = row["config"]["batch_size"]
        return f"{row['ours']} batch {batch}: {row['times']['median']:.3f}x PyTorch's BatchNorm"
    if kind == "speedup" and row["our_bn"] == row["peer_bn"]:
        batch = row["config"]["batch_size"]
        return f"{row['ours']} batch {batch}: {row['times']['median']:.2f}x {row['peer']}"
    return None


def _step_line(row: dict) -> str:
    name = f"{row['config']['model']} {row['name'].removeprefix('fastadv ')}"
    parts = [f"{name} batch {row['config']['batch_size']}:"]
    parts.append(f"{row['ms']['median']:.4g} ms, {row['images_per_s']:,.0f} images/s")
    if row.get("over_bound"):  # 0 on a pretended device, where work takes no time
        parts.append(f"{100 / row['over_bound']:.0f} % of bound")
    if "of_matmul" in row:
        parts.append(f"{100 * row['of_matmul']:.0f} % of matmul")
    if "over_passes" in row:
        parts.append(f"{row['over_passes']['median']:.3f} x passes")
    if row.get("peak_mib"):
        parts.append(f"{row['peak_mib']:,.0f} MiB")
    if row.get("preliminary"):
        parts.append("preliminary")
    return " ".join([parts[0], ", ".join(parts[1:])])


if __name__ == "__main__":
    main()
