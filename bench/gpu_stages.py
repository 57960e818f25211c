"""The stages of ``gpu_suite.py``, which starts one per process."""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import rich.console
import torch
from gpu_kit import IMAGES, facts, site_of
from gpu_pack import rows_in
from gpu_plan import PLAN

from fastadv import kernels
from fastadv.benchmark.compare import Comparison
from fastadv.benchmark.ours import our_candidate
from fastadv.benchmark.parity import fused_parity_words, require_same_step
from fastadv.benchmark.rows import Row, append_rows, provenance, read_rows, results_file
from fastadv.benchmark.running import run_comparisons
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import Spec, parse_specs
from fastadv.errors import UserError
from fastadv.kernels import reference
from fastadv.run.request import RunRequest
from fastadv.run.train import train

ROOT = Path(__file__).resolve().parents[1]
# All tests marked "gpu", each file in its own process: a capture that fails may break all later
# ones of its process.
GPU_TESTS = (
    "tests/kernels/test_dispatch.py",
    "tests/kernels/test_gpu_kernels.py",
    "tests/kernels/test_tickets.py",
    "tests/test_gpu_capture.py",
)
# Compared with eager before anything is timed, instead of the parity tests, which take minutes. The
# own BatchNorm kernels come last: they are the newest, and an error of theirs may end the process.
PARITY_SPECS = (
    "pgd", "pgd:attack_bn=eval", "apart", "pgd:fused_norm=on", "apart:fused_norm=on",
)  # fmt: skip
FAST_EPOCHS, APART_EPOCHS = 15, 30
BATCH = 128  # of the training runs


class Running:
    """A running stage: its command line options and its remaining time."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out: Path = given.out
        self.kit: Path = given.kit
        self.work: Path = given.work
        self.device: str = given.device
        self.tiny: bool = given.tiny
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

    def modes(self, *wanted: str) -> list[str]:
        """The modes in ``wanted`` that this device has; a dry run on a CPU has only eager."""
        return list(wanted) if self.device != "cpu" else ["eager"]

    def deadline(self, share: float = 0.8) -> float:
        """The value of ``time.monotonic`` when ``share`` of the stage's time has passed."""
        return self.began + share * self.seconds

    def left(self) -> float:
        """Seconds until the stage's time limit."""
        return self.began + self.seconds - time.monotonic()

    def write(self, rows: Sequence[Row]) -> None:
        """Add ``rows`` with their provenance to the results."""
        device = torch.device(self.device)
        append_rows(results_file(self.out, device), [row | self.origin for row in rows])

    @property
    def origin(self) -> Row:
        if not hasattr(self, "_origin"):
            self._origin = provenance(torch.device(self.device))
        return self._origin

    def say(self, sentence: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s {sentence}", flush=True)


def smoke(stage: Running) -> str:
    """A kernel against its reference, then one step in every mode; rows are written at once."""
    device = torch.device(stage.device)
    stage.say(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {stage.origin['device']}")
    if shutil.which("nvidia-smi") is not None:
        subprocess.run(["nvidia-smi"])
    for name, (backend, why) in kernels.backends(device).items():
        print(f"kernel {name}: {backend}, {why}")
    x, x_adv, gradient = (torch.randn(4, 3, 33, 31) for _ in range(3))
    arguments = (x_adv, gradient, x, 0.01, 0.03)
    expected = reference.linf_step(*arguments)
    moved = [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments]
    found = kernels.linf_step(*moved).cpu()
    off = float((found - expected).abs().max())
    failed = []
    try:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    except AssertionError:
        failed.append(f"linf_step is off by {off:.1e}")
    stage.write([{"kind": "smoke", "what": "kernel linf_step", "off": off, "ok": not failed}])
    setting = stage.setting(8) if stage.tiny else replace(stage.setting(32), width=16)
    # Compiled modes come last: they take most of the time.
    tried = [(mode, "off") for mode in stage.modes("eager", "captured-eager")]
    tried += [(mode, "on") for mode in stage.modes("captured-eager")]
    if stage.device != "cpu":
        tried += [("captured", "off"), ("captured", "on")]
    for mode, fused_norm in tried:
        what = mode if fused_norm == "off" else f"{mode} with own BatchNorm kernels"
        try:
            row = _one_step(stage, setting, Spec("fast", fused_norm=fused_norm), mode)
        except Exception as error:
            # The next mode may still work, and its row must be written.
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0]
            row = {"ok": False, "error": f"{type(error).__name__}: {first[:200]}"}
            failed.append(f"{what} ({type(error).__name__}: {first[:80]})")
        stage.write([{"kind": "smoke", "what": what, "config": setting.as_row()} | row])
        stage.say(f"{what}: {row}")
    if failed:
        raise RuntimeError("; ".join(failed))
    return f"linf_step right to {off:.0e}, {len(tried)} steps; {_cache_words()}"


def _one_step(stage: Running, setting: Setting, spec: Spec, mode: str) -> Row:
    candidate = our_candidate(setting, spec, stage.dtype, mode)
    ms = 1e3 * candidate.turn()
    candidate.close()
    return {
        "ok": True,
        "ms": round(ms, 3),
        "first_calls_s": [round(value, 3) for value in candidate.warm_seconds],
        **_cache_counts(),
    }


def _cache_counts() -> Row:
    """The number of graphs found in the compile cache so far, and compiled."""
    counts = torch._dynamo.utils.counters
    found = {
        "hits": counts["inductor"]["fxgraph_cache_hit"]
        + counts["aot_autograd"]["autograd_cache_hit"],
        "misses": counts["inductor"]["fxgraph_cache_miss"],
    }
    return {f"cache_{name}": int(value) for name, value in found.items()}


def _cache_words() -> str:
    counts = _cache_counts()
    return f"compiled code: {counts['cache_hits']} found, {counts['cache_misses']} compiled"


def tests(stage: Running) -> str:
    """The tests that need a GPU, all files in parallel; nothing else runs at the same time."""
    # The project's own addopts name a plugin that may not be installed here.
    command = [sys.executable, "-P", "-m", "pytest", "-o", "addopts=", "--strict-markers", "-v"]
    command += ["-m", "gpu", "-p", "no:cacheprovider", "--durations=5"]
    running = {}
    for file in GPU_TESTS:
        log = stage.out / f"tests-{Path(file).stem}.log"
        with log.open("w") as opened:
            running[file] = subprocess.Popen(
                [*command, file], cwd=ROOT, stdout=opened, stderr=subprocess.STDOUT
            )
    results = {}
    while running:
        time.sleep(0.2)
        for file in [file for file, process in running.items() if process.poll() is not None]:
            row = _tests_row(file, running.pop(file).returncode, stage.out)
            stage.write([row])
            stage.say(f"{file}: {row['said']}")
            results[file] = row
    said = "; ".join(f"{Path(file).stem}: {row['said']}" for file, row in results.items())
    if not all(row["ok"] for row in results.values()):
        raise RuntimeError(said)
    return said


def _tests_row(file: str, code: int, out: Path) -> Row:
    log = (out / f"tests-{Path(file).stem}.log").read_text(errors="replace")
    lines = [line.strip("= \n") for line in log.splitlines()]
    last = next((line for line in reversed(lines) if line), "pytest did not start")
    return {"kind": "gpu tests", "file": file, "ok": code == 0, "said": last}


def parity(stage: Running) -> str:
    """One step of a tiny network, compiled, captured and with own BatchNorm kernels, against eager
    with PyTorch's."""
    device = torch.device(stage.device)
    failed = []
    for spec in parse_specs(",".join(PARITY_SPECS)):
        fused = spec.fused_norm == "on"
        # The compiled graphs are those that are captured.
        for mode in stage.modes("captured", *([] if fused else ["compiled"]), "captured-eager"):
            row: Row = {"kind": "parity", "method": str(spec), "mode": mode, "ok": True}
            row["fused_norm"] = fused
            try:
                require_same_step(spec, mode, device)
            except Exception as error:
                traceback.print_exc()
                row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
                failed.append(f"{spec} {mode}")
            stage.write([row])
            stage.say(f"{spec} {mode}: {row}")
    if failed:
        raise RuntimeError("differ from eager: " + ", ".join(failed))
    return f"{', '.join(PARITY_SPECS)}: as eager; {_cache_words()}"


def _parity_word(stage: Running, *, fused_norm: bool) -> str | None:
    """Description of this run's check against eager, or of that of own BatchNorm kernels; None if
    there was none or it failed."""
    rows = [row for row in rows_in(stage.out) if row.get("kind") == "parity"]
    rows = [row for row in rows if row["fused_norm"] == fused_norm]
    if not rows or not all(row["ok"] for row in rows):
        return None
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    if fused_norm:
        return f"{fused_parity_words(modes)}, in this run"
    return f"one float64 step of a tiny network, eager against {', '.join(modes)}, in this run"


def kernel_times(stage: Running) -> str:
    """Every kernel and its reference, and the rate of a copy."""
    command = [sys.executable, str(ROOT / "bench" / "kernels.py"), "--device", stage.device]
    command += ["--results", str(stage.out)]
    if importlib.util.find_spec("pytest_benchmark") is None:
        command += ["-p", "plain_benchmark"]
    else:  # times on the device come from CUDA events and need few rounds
        command += ["--benchmark-max-time=0.05", "--benchmark-min-rounds=3"]
    # Compiling the two dozen references would take all the time.
    command += ["-k", "linf_step and reference" if stage.tiny else "not compiled"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        cases = 0
        for line in running.stdout or ():
            print(line, end="", flush=True)
            cases += "GB/s; a copy" in line
    if running.returncode:
        raise RuntimeError("kernels.py failed")
    return f"{cases} cases"


def comparison(
    batch_size: int,
    methods: str = "pgd",
    *,
    modes: tuple[str, ...] = ("captured",),
    peers: tuple[str, ...] = (),
    with_passes: bool = False,
    kernels: bool = False,
    apart: bool = False,
    unchecked: bool = False,
    repeats: int = 7,
    model: str = "preact_resnet18",
) -> Callable[[Running], str]:
    """Steps of ``methods`` in ``modes`` and of ``peers``, interleaved.

    ``apart`` keeps of the rows only the kernel table. Own BatchNorm kernels that were not found
    right are left out, because an error of theirs may end the process; ``unchecked`` times them.
    """

    def run(stage: Running) -> str:
        word = _parity_word(stage, fused_norm=False)
        if peers and word is None:
            stage.say("no peers: the modes were not compared with eager, or differ from it")
        specs, fused_word = parse_specs(methods), _parity_word(stage, fused_norm=True)
        if fused_word is None and not unchecked:
            specs = [spec for spec in specs if spec.fused_norm != "on"]
        asked = Comparison(
            stage.setting(batch_size, model), specs, stage.dtype,
            stage.modes(*modes), 2 if stage.tiny else repeats, peers if word else (),
            with_passes=with_passes, deadline=stage.deadline(), tiny=stage.tiny, parity=word,
            fused_parity=fused_word or "", kernels=kernels,
        )  # fmt: skip
        folder = stage.out / "replay" if apart else stage.out
        console = rich.console.Console(width=150)
        rows = run_comparisons([asked], folder, console, say=stage.say)
        if apart:
            found = [row for row in read_rows(folder) if row["kind"] in ("kernel", "kernels")]
            append_rows(results_file(stage.out, torch.device(stage.device)), found)
        steps = [row for row in rows if row["kind"] == "step"]
        ours = [row for row in steps if row["by"] == "fastadv"]
        if not ours:
            raise RuntimeError("no step of ours was timed")
        best = max(ours, key=lambda row: row["images_per_s"])
        gains = [row["times"]["median"] for row in rows if row["kind"] == "fused norm"]
        own = f"own BatchNorm kernels {min(gains):.3f}-{max(gains):.3f}x; " if gains else ""
        return (
            f"{len(steps)} steps, fastest {best['name']}: {best['images_per_s']:,.0f} images/s; "
            f"{own}{_cache_words()}"
        )

    return run


def training(method: str, epochs: int | None) -> Callable[[Running], str]:
    """A training run on the images of the kit; ``epochs=None``: as many as fit."""

    def run(stage: Running) -> str:
        length = epochs if epochs is not None else _epochs_that_fit(stage)
        config = RunRequest(
            method=method, epochs=2 if stage.tiny else length, device=stage.device,
            out=str(stage.out / f"run-{method}"), **_data(stage),
        )  # fmt: skip
        summary = train(config)
        brought = facts(stage.kit).get("images", "the kit's images")
        data = brought if config.data.startswith("npz:") else config.data
        row = _training_row(Path(str(config.out)), method, data, summary)
        stage.write([row])
        # What comes back are the numbers; another stage may need the weights.
        shutil.copytree(str(config.out), trained(stage, method), dirs_exist_ok=True)
        for weights in Path(str(config.out)).glob("*.pt"):
            weights.unlink()
        scores = ", ".join(f"{name} {100 * value:.1f} %" for name, value in row["last"].items())
        return (
            f"{row['epochs']} epochs in {row['train_seconds']:.1f} s "
            f"({row['epoch_seconds']:.2f} s each), {scores}"
        )

    return run


def trained(stage: Running, method: str) -> Path:
    """The folder of the run of ``training``, with its weights."""
    return stage.work / f"run-{method}"


def evaluated(stage: Running) -> str:
    """AutoAttack and PGD-100 on the network of ``train-fast``, by ``bench/evaluation.py``."""
    if not trained(stage, "fast").exists():
        raise RuntimeError("train-fast has not trained a network")
    sys.path.append(str(site_of("evaluation")))
    import evaluation  # needs packages that only a kit brings

    asked = [str(trained(stage, "fast")), "--device", stage.device, "--repeats", "1"]
    asked += ["--out", str(results_file(stage.out, torch.device(stage.device)))]
    if stage.tiny:
        asked += ["--images", "3", "--batch", "3", "--eps", "1", "--search-dtypes", "float32"]
    else:
        asked += ["--images", "512", "--batch", "512", "--pgd", "100"]
    evaluation.main(asked)
    found = [row for row in read_rows(stage.out) if row.get("kind") == "evaluation"]
    gains = [
        f"{row['attack']} {row['name']} {row['faster']['median']:.2f}x"
        for row in found
        if "faster" in row
    ]
    return ", ".join(gains)


def _data(stage: Running) -> dict:
    """Settings of the data set: the kit's images, decoded once; digits if it has none."""
    if stage.tiny or not (stage.kit / IMAGES).exists():
        return {"data": "digits", "amp": not stage.tiny} | (
            {"limit": 256, "width": 4} if stage.tiny else {}
        )
    arrays = stage.work / "images.npz"
    if not arrays.exists():
        # In its own process, without CUDA, which does not survive a fork.
        decode = [sys.executable, str(ROOT / "bench" / "gpu_images.py")]
        subprocess.run([*decode, str(stage.kit / IMAGES), str(arrays)], check=True)
    return {
        "data": f"npz:{arrays}", "model": "preact_resnet18", "batch_size": BATCH, "amp": True,
        "eval_every": 5, "test_attacks": "clean,pgd-20",
    }  # fmt: skip


def _training_row(folder: Path, method: str, data: str, summary: dict) -> Row:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["train_seconds"] for line in lines]
    steady = (seconds[-1] - seconds[0]) / max(1, len(lines) - 1)  # the first epoch compiles
    return {
        "kind": "training run",
        "method": method,
        "data": data,
        "epochs": len(lines),
        "train_seconds": round(seconds[-1], 2),
        "epoch_seconds": round(steady, 3),
        "last": summary["last"],
        "n": summary["n"],
    }


def _epochs_that_fit(stage: Running) -> int:
    """At most the published 30 epochs; an epoch of F+FGSM, with the same two passes, gives the
    time."""
    rows = rows_in(stage.out)
    took = [row["epoch_seconds"] for row in rows if row.get("kind") == "training run"]
    if not took:
        return 10
    room = stage.left() - 60  # compiling, evaluation, the test at the end
    return max(2, min(APART_EPOCHS, int(room / (1.2 * took[-1]))))


def variants(batch_size: int, *names: str) -> Callable[[Running], str]:
    """PGD-10 with what is off by default, ``names`` of ``fastadv/benchmark/variants.py``."""

    def run(stage: Running) -> str:
        script = str(ROOT / "bench" / "inductor.py")
        command = [sys.executable, "-P", script, "--device", stage.device]
        command += ["--out", str(stage.out), "--seconds", str(0.75 * stage.seconds)]
        if stage.tiny:
            command += ["--width", "2", "--batch-size", "4", "--dtype", stage.dtype]
            command += ["--methods", "fast", "--repeats", "1", "--settings", "none"]
        else:
            command += ["--batch-size", str(batch_size), "--settings", ",".join(names)]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise RuntimeError("inductor.py failed")
        found = [row for row in read_rows(stage.out) if row.get("kind") == "inductor"]
        best = max(found, key=lambda row: row["none_over_it"]["median"])
        return f"{best['inductor']}: {best['none_over_it']['median']:.3f} times as fast as none"

    return run


STAGES: dict[str, Callable[[Running], str]] = {
    "smoke": smoke,
    "tests": tests,
    "parity": parity,
    "pgd-512": comparison(
        512, modes=("captured", "eager", "compiled"), peers=("helped",), with_passes=True
    ),
    "fused-512": comparison(
        512, "pgd:fused_norm=on,pgd:fused_norm=off,apart:fused_norm=on,apart:fused_norm=off",
        modes=("captured", "captured-eager"), kernels=True, unchecked=True,
    ),
    # A step that is profiled must not replace the row of the one that is timed at length.
    "replay-512": comparison(512, kernels=True, apart=True, repeats=3),
    "single-512": comparison(512, "apart,fast", with_passes=True),
    "pgd-128": comparison(
        128, "pgd:fused_norm=off,pgd:fused_norm=on",
        modes=("captured", "captured-eager", "eager", "compiled"), peers=("helped",),
    ),
    "pgd-eval-512": comparison(512, "pgd:attack_bn=eval", repeats=5),
    "methods-512": comparison(512, "trades,awp,rwp,advlc", modes=("captured-eager",), repeats=3),
    "peers-128": comparison(
        128, "pgd,pgd:attack_bn=eval,pgd:fused_norm=on",
        peers=("published", "published-tf32-off", "torchattacks", "torchattacks-train", "art"),
        repeats=5,
    ),
    "kernels": kernel_times,
    "wide-128": comparison(
        128, modes=("captured-eager",), repeats=5, model="wide_resnet34_10"
    ),
    "train-fast": training("fast", FAST_EPOCHS),
    "evaluation": evaluated,
    "train-apart": training("apart", None),
    "variants-128": variants(128, "padded", "combined"),
    "inductor": variants(128, "cooperative", "reuse", "tuned"),
}  # fmt: skip


def main() -> None:
    """Run one stage; the last line of its output is the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    # Rows contain the command to type, without the folders of this machine.
    (call,) = {stage.call for stage in PLAN if stage.name == given.stage}
    sys.argv = ["gpu_suite.py", call, "--only", given.stage]
    try:
        print("result: " + STAGES[given.stage](Running(given)))
    except (UserError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
