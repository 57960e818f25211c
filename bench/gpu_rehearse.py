"""A rehearsal of the GPU session without a GPU: ``python bench/gpu_rehearse.py``.

The files of the repository and ``bench/gpu_kit`` are copied into an empty folder, without .git and
without network, and the calls that ``gpu_prepare.py`` prints are run there, on a simulated CUDA
runtime (``tools/pretend_cuda``). Then one call is killed. It is checked that every stage succeeds
and writes its rows, that all compiled code is found in the kit, and that the results before the
kill are in the packed file. Times and numbers mean nothing.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from gpu_kit import CODE, KIT, ROOT
from gpu_pack import unpack, whole_rows
from gpu_plan import CALLS, stages_of
from gpu_prepare import tracked
from gpu_pretend import GPUS, Pretended, add_arguments

# The kinds of rows that each stage must write.
WRITES = {
    "smoke": {"smoke"},
    "tests": {"gpu tests"},
    "parity": {"parity"},
    "pgd-512": {"limits", "step", "pass", "speedup"},
    "fused-512": {"step", "fused norm", "kernels"},
    "replay-512": {"kernels"},  # the total; the pretended runtime does not report single kernels
    "single-512": {"step", "pass"},
    "pgd-128": {"step", "speedup", "fused norm"},
    "variants-128": {"inductor"},
    "pgd-eval-512": {"step"},
    "methods-512": {"step"},
    "peers-128": {"step", "speedup"},
    "kernels": {"kernels"},
    "wide-128": {"step"},
    "train-fast": {"training run"},
    "evaluation": {"evaluation"},
    "train-apart": {"training run"},
}
# The peers that the stage must have timed: it skips a peer that cannot run.
PEERS = {
    "published fp32", "published fp32, TF32 off", "torchattacks fp32 bn=eval",
    "torchattacks fp32 bn=train", "ART fp32 bn=eval",
}  # fmt: skip
KILLED = "pgd-512"
PATIENCE = 4  # times the usual limits, for a machine with fewer cores


def main() -> None:
    """Rehearse and print the result; the exit code is 1 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--gpu", choices=GPUS, default=GPUS[0], help="the GPU's name")
    parser.add_argument("--calls", default="smoke,rest,train", help="separated by commas")
    parser.add_argument("--patience", type=float, default=PATIENCE)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    given = parser.parse_args()
    asked = given.calls.split(",")
    for call in asked:
        if call not in CALLS:
            parser.error(f"there is no call {call!r}: {', '.join(CALLS)}")
    pretended = Pretended(given.pretend, given.python)
    with tempfile.TemporaryDirectory() as folder:
        stage = Rehearsal(Path(folder), pretended, given.gpu, given.patience)
        stage.arrive()
        calls = {call: stage.call(call) for call in asked}
        killed = stage.killed()
    kit = "with compiled code" if (KIT / CODE).exists() else "without compiled code"
    said = {
        "gpu": given.gpu,
        "kit": kit,
        "network": stage.network,
        "calls": calls,
        "killed": killed,
    }
    if given.json is not None:
        given.json.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(said, indent=2))
    sys.exit(not all(entry["ok"] for entry in (*calls.values(), killed)))


class Rehearsal:
    """A folder with the files of the machine with the GPU, and the calls made there."""

    def __init__(self, folder: Path, pretended: Pretended, gpu: str, patience: float) -> None:
        self.root, self.work, self.out = folder / "tree", folder / "work", folder / "out"
        self.interpreter, self.patience = pretended.python, patience
        self.variables = pretended.environment(gpu, self.root)
        cut_off = subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0
        self.network = "cut off" if cut_off else "not cut off (unshare --net is not allowed here)"
        self.prefix = ["unshare", "--net"] if cut_off else []

    def arrive(self) -> None:
        """Copy the files that travel, through one archive."""
        archive = self.root.parent / "travels.tar"
        with tarfile.open(archive, "w") as opened:
            for name in tracked():
                opened.add(ROOT / name, name)
            if KIT.exists():
                opened.add(KIT, KIT.relative_to(ROOT))
        with tarfile.open(archive) as opened:
            unpack(opened, self.root)
        archive.unlink()

    def command(self, call: str, *more: str) -> list[str]:
        command = [*self.prefix, str(self.interpreter), "bench/gpu_suite.py", call]
        command += ["--pack", str(self.out), "--work", str(self.work)]
        return [*command, "--patience", str(self.patience), *more]

    def call(self, call: str) -> dict:
        """Run one whole call; returns the results of each stage."""
        began = time.monotonic()
        subprocess.run(self.command(call), cwd=self.root, env=self.variables)
        rows, summary = self.packed(call)
        stages = {}
        for stage in stages_of(call):
            done = next((entry for entry in summary if entry["stage"] == stage.name), {})
            kinds = Counter(
                row.get("kind", row.get("bench")) for row in rows if _of(row, stage.name)
            )
            missing = sorted(WRITES[stage.name] - set(kinds))
            if stage.name == "peers-128":
                missing += sorted(PEERS - {row.get("peer") for row in rows})
            graphs = _compiled(done.get("note", ""))
            late = (KIT / CODE).exists() and graphs["compiled"] > 0
            stages[stage.name] = {
                "ok": done.get("status") == "ok" and not missing and not late,
                "status": done.get("status"),
                "seconds": round(done.get("seconds", 0.0), 1),
                "rows": dict(kinds),
                "missing": missing,
                **graphs,
                "note": done.get("note", ""),
            }
        return {
            "ok": all(entry["ok"] for entry in stages.values()),
            "seconds": round(time.monotonic() - began, 1),
            "stages": stages,
        }

    def killed(self) -> dict:
        """Run a call and kill it as soon as its first rows are packed."""
        shutil.rmtree(self.out, ignore_errors=True)
        process = subprocess.Popen(
            self.command("rest", "--only", KILLED), cwd=self.root, env=self.variables,
            start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and not self.packed("rest")[0]:
                time.sleep(1)
            ended = process.poll() is not None
        finally:
            _kill_tree(process)
        rows, _ = self.packed("rest")
        kinds = Counter(row.get("kind") for row in rows)
        return {"ok": not ended and bool(rows), "rows": dict(kinds), "ended before": ended}

    def packed(self, call: str) -> tuple[list[dict], list[dict]]:
        """Rows and summary of the newest packed file of ``call``, which is complete at any time."""
        files = sorted(self.out.glob(f"{call}-*.tar.gz"))
        rows, summary = [], []
        if files:
            with tarfile.open(files[-1]) as archive:
                for member in archive:
                    data = archive.extractfile(member).read().decode(errors="replace")
                    if member.name.endswith(".jsonl") and "/" not in member.name:
                        rows += whole_rows(data.splitlines())
                    if member.name == "summary.json":
                        summary = json.loads(data)
        return rows, summary


def _compiled(note: str) -> dict:
    """The number of graphs that a stage found in the cache, and that it compiled."""
    said = re.search(r"compiled code: (\d+) found, (\d+) compiled", note)
    found, compiled = map(int, said.groups()) if said else (0, 0)
    return {"found": found, "compiled": compiled}


def _of(row: dict, stage: str) -> bool:
    """True if ``stage`` wrote the row; rows of bench/kernels.py name the benchmark only."""
    return row.get("command", "").endswith(f"--only {stage}") or row.get("bench") == stage


def _kill_tree(process: subprocess.Popen) -> None:
    """Kill the call and all its descendants: a stage has its own process group."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    children: dict[int, list[int]] = {}
    for line in listed.splitlines()[1:]:
        pid, parent = map(int, line.split())
        children.setdefault(parent, []).append(pid)
    waiting, doomed = [process.pid], []
    while waiting:
        pid = waiting.pop()
        doomed.append(pid)
        waiting += children.get(pid, [])
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


if __name__ == "__main__":
    main()
