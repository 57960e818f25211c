"""The stages of ``gpu_suite.py``, one a call; not meant to be started by hand."""

import argparse
import importlib.util
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import rich.console
import torch
from fastadv.kernels import reference

from fastadv import kernels
from fastadv.benchmark.bound import measure_bound
from fastadv.benchmark.command import run_comparisons
from fastadv.benchmark.compare import Comparison, warm_up
from fastadv.benchmark.geometry import PASSES, geometry
from fastadv.benchmark.limits import measure_limits
from fastadv.benchmark.ours import LONG_RUN, our_candidate
from fastadv.benchmark.rows import append_rows, provenance, read_rows, results_file
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import Spec, parse_specs
from fastadv.config import TrainConfig
from fastadv.errors import UserError
from fastadv.train import train

ROOT = Path(__file__).resolve().parents[1]
WANTED_MODES = ("captured", "compiled", "eager")
METHODS = "apart,fast,awp,rwp,advlc,trades"
# All that is marked "gpu", each file in a process of its own: a graph that breaks may take every
# later one of its process along.
GPU_TESTS = (
    "tests/test_gpu_capture.py",
    "tests/kernels/test_gpu_kernels.py",
    "tests/kernels/test_choice.py",
)


class Stage:
    """What the command line said."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out: Path = given.out
        self.device: str = given.device
        self.tiny: bool = given.tiny
        self.warm: bool = given.warm
        self.began = time.monotonic()
        self.seconds: float = given.seconds

    @property
    def dtype(self) -> str:
        return "fp32" if self.tiny else "bf16"

    def setting(self, batch_size: int, model: str = "preact_resnet18") -> Setting:
        if self.tiny:
            width = 1 if model.startswith("wide") else 4
            return Setting(model, width, 8, 8, device=self.device)
        return Setting(model, batch_size=batch_size, device=self.device)

    def modes(self, wanted: tuple[str, ...] = WANTED_MODES) -> list[str]:
        """The wanted modes that this device has; a dry run has eager only."""
        if self.tiny:
            return ["eager"]
        return [mode for mode in wanted if mode != "captured" or self.device != "cpu"]

    def deadline(self, share: float) -> float:
        """The moment when ``share`` of the stage's time has passed."""
        return self.began + share * self.seconds


def smoke(stage: Stage) -> str:
    """Import, one step in every mode, one kernel against its reference."""
    device = torch.device(stage.device)
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {stage.device}")
    for name, (face, why) in kernels.faces(device).items():
        print(f"kernel {name}: {face}, {why}")
    x, x_adv, gradient = (torch.randn(4, 3, 33, 31) for _ in range(3))
    arguments = (x_adv, gradient, x, 0.01, 0.03)
    expected = reference.linf_step(*arguments)
    moved = [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments]
    off = float((kernels.linf_step(*moved).cpu() - expected).abs().max())
    if not off < 1e-6:
        raise RuntimeError(f"linf_step on {device} is off by {off:.1e}")
    failed = []
    tiny = Setting(width=8, batch_size=8, image_size=16, device=stage.device)
    # A short run is captured without compiling; a long one, which the others are, with.
    for mode, total in [("eager", 1), *[("captured", 1)] * (stage.device != "cpu")] + [
        (mode, LONG_RUN) for mode in stage.modes(("compiled", "captured")) if mode != "eager"
    ]:
        try:
            candidate = our_candidate(tiny, Spec("fast"), stage.dtype, mode, total_steps=total)
            print(
                f"{mode}, {total} steps: {1e3 * candidate.turn():.2f} ms, "
                f"first calls {candidate.warm_seconds}",
                flush=True,
            )
            candidate.close()
        except Exception as error:
            # The next mode may still work, and the suite must say which does.
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0]
            failed.append(f"{mode}, {total} steps ({type(error).__name__}: {first[:80]})")
    if failed:
        raise RuntimeError("one step failed in " + "; ".join(failed))
    return f"kernel linf_step right to {off:.0e}, one step in every mode"


def tests(stage: Stage) -> str:
    """The tests that need a GPU."""
    # The project's own addopts name a plugin that may not be installed here.
    command = [sys.executable, "-P", "-m", "pytest", "-o", "addopts=", "--strict-markers", "-v"]
    command += ["-m", "gpu", "-p", "no:cacheprovider", "--durations=5"]
    results, failed = [], False
    for file in GPU_TESTS:
        said = []
        # Passed on line by line: where the time runs out, the log must say in which test.
        with subprocess.Popen(
            [*command, file], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as pytest:
            for line in pytest.stdout or ():
                print(line, end="", flush=True)
                said += [line.strip("= \n")] * bool(line.strip())
        results.append(f"{Path(file).stem}: {said[-1] if said else 'pytest did not start'}")
        failed = failed or pytest.returncode != 0
    if failed:
        raise RuntimeError("; ".join(results))
    return "; ".join(results)


def kernel_times(stage: Stage) -> str:
    """Every kernel beside its reference and its bytes at the copy rate."""
    command = [sys.executable, str(ROOT / "bench" / "kernels.py"), "--device", stage.device]
    command += ["--results", str(stage.out)]
    if importlib.util.find_spec("pytest_benchmark") is None:
        command += ["-p", "plain_benchmark"]
    else:  # calls are timed on the device beside it, which takes no rounds
        command += ["--benchmark-max-time=0.05", "--benchmark-min-rounds=3"]
    command += ["-k", "not compiled"]  # two dozen compilations would take all the time
    if stage.tiny:
        command[-1] = "linf_step and reference"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    if done.returncode:
        raise RuntimeError("kernels.py failed")
    return f"{done.stdout.count('GB/s; a copy')} cases"


def bound(stage: Stage) -> str:
    """The time no step can beat, per pass."""
    torch.backends.cudnn.benchmark = True  # as every step is timed
    device = torch.device(stage.device)
    limits = measure_limits(device, stage.dtype, tiny=stage.tiny)
    rows = []
    for batch in (128, 512):
        setting = stage.setting(batch)
        shape = geometry(setting.make_model(), setting.image_shape)
        best = measure_bound(shape, setting.batch_size, stage.dtype, limits, device)
        for kind in PASSES:
            ms = round(1e3 * best.of_pass(kind, "train"), 4)
            print(f"batch {setting.batch_size}, {kind}: {ms} ms")
            rows.append({"kind": "bound", "pass": kind, "ms": ms, "config": setting.as_row()})
    origin = provenance(device)
    append_rows(results_file(stage.out, device), [row | origin for row in rows])
    return f"copy {limits.copy / 1e9:.0f} GB/s, matmul {limits.matmul / 1e12:.3g} TFLOP/s"


def _compare(stage: Stage, comparison: Comparison) -> str:
    if stage.warm:
        compiling = [mode for mode in comparison.modes if mode != "eager"][:1]
        skipped = warm_up(replace(comparison, modes=compiling, peers=(), deadline=None), print)
        return "compiled; " + " ".join(skipped)

    def say(sentence: str) -> None:
        print(f"{time.monotonic() - stage.began:6.1f} s {sentence}", flush=True)

    rows = run_comparisons([comparison], stage.out, rich.console.Console(width=150), say=say)
    steps = [row for row in rows if row["kind"] == "step" and row["by"] == "fastadv"]
    if not steps:
        raise RuntimeError("no step of ours was timed")
    best = max(steps, key=lambda row: row["images_per_s"])
    return f"{len(steps)} steps timed, fastest {best['name']}: {best['images_per_s']:,.0f} images/s"


def pgd(batch_size: int, *, with_peers: bool = True) -> Callable[[Stage], str]:
    """PGD-10 AT in every mode, beside the loops that need no other package."""

    def run(stage: Stage) -> str:
        peers = ["published", "published-tf32-off", "helped"] if with_peers else []
        comparison = Comparison(
            stage.setting(batch_size), parse_specs("pgd"), stage.dtype, stage.modes(), 7,
            peers, with_passes=with_peers, deadline=stage.deadline(0.75), tiny=stage.tiny,
        )  # fmt: skip
        return _compare(stage, comparison)

    return run


def methods(stage: Stage) -> str:
    """Every other method of the papers in the fastest mode, with its passes."""
    comparison = Comparison(
        stage.setting(512), parse_specs(METHODS), stage.dtype, stage.modes()[:1], 7,
        deadline=stage.deadline(0.75), tiny=stage.tiny,
    )  # fmt: skip
    return _compare(stage, comparison)


def wide(stage: Stage) -> str:
    """WRN-34-10, PGD-10 AT."""
    comparison = Comparison(
        stage.setting(128, "wide_resnet34_10"), parse_specs("pgd"), stage.dtype,
        stage.modes()[:1], 5, with_passes=False, deadline=stage.deadline(0.7), tiny=stage.tiny,
    )  # fmt: skip
    return _compare(stage, comparison)


def training(stage: Stage) -> str:
    """A short real run."""
    small = {"epochs": 1, "limit": 256, "width": 4} if stage.tiny else {"epochs": 5}
    config = TrainConfig(
        method="apart", data="digits", amp=not stage.tiny, device=stage.device,
        out=str(stage.out / f"run-{int(time.time())}"), **small,
    )  # fmt: skip
    summary = train(config)
    for weights in Path(str(config.out)).glob("*.pt"):
        weights.unlink()  # only the numbers are wanted
    last = ", ".join(f"{name} {100 * score:.1f} %" for name, score in summary["last"].items())
    return f"{last} after {summary['train_seconds']:.1f} s"


def inductor(stage: Stage) -> str:
    """Whether another setting of the compiler makes a step faster."""
    command = [sys.executable, "-P", str(ROOT / "bench" / "inductor.py"), "--device", stage.device]
    command += ["--out", str(stage.out), "--seconds", str(0.6 * stage.seconds)]
    if stage.tiny:
        command += ["--width", "2", "--batch-size", "4", "--dtype", stage.dtype]
        command += ["--methods", "fast", "--repeats", "1", "--settings", "none"]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise RuntimeError("inductor.py failed")
    found = [row for row in read_rows(stage.out) if row.get("kind") == "inductor"]
    best = max(found, key=lambda row: row["none_over_it"]["median"])
    return f"{best['inductor']}: {best['none_over_it']['median']:.3f} times as fast as none"


STAGES: dict[str, Callable[[Stage], str]] = {
    "smoke": smoke,
    "tests": tests,
    "kernels": kernel_times,
    "bound": bound,
    "pgd-512": pgd(512),
    "pgd-128": pgd(128),
    "methods-512": methods,
    "pgd-32": pgd(32, with_peers=False),
    "wide-128": wide,
    "training": training,
    "inductor": inductor,
}


def main() -> None:
    """Run one stage; its last line says what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--warm", action="store_true", help="only fill the compilation cache")
    given = parser.parse_args()
    try:
        print("result: " + STAGES[given.stage](Stage(given)))
    except (UserError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
