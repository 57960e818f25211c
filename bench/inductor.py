"""The time of a step with what is off by default: ``python bench/inductor.py``.

The same compiled step is timed as each variant of ``fastadv/benchmark/variants.py`` and without,
interleaved: other settings of Inductor, and images with padded channels. fastadv uses none of them;
one that is faster here on the target machines should be adopted.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastadv.benchmark.arithmetic import Spread, paired_ratio
from fastadv.benchmark.interleave import Candidate, interleave
from fastadv.benchmark.ours import our_candidate
from fastadv.benchmark.rows import Row, append_rows, provenance, results_file
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import Spec, parse_specs
from fastadv.benchmark.variants import FOR_A_GPU, NONE, VARIANTS, variant
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError, unknown

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Parse the command line, time a step with each setting, write and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="pgd")
    parser.add_argument("--settings", help=f"separated by commas, of {', '.join(VARIANTS)}")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, help="compile nothing more after this time")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    deadline = None if given.seconds is None else time.monotonic() + given.seconds
    if given.threads:
        torch.set_num_threads(given.threads)
    device = choose_device(given.device)
    setting = Setting("preact_resnet18", given.width, given.batch_size, device=str(device))
    names = given.settings.split(",") if given.settings else settings_for(device)
    for name in names:
        if name not in VARIANTS:
            raise unknown("setting", name, VARIANTS)
    origin = provenance(device)
    for spec in parse_specs(given.methods):
        for row in rows(setting, spec, given.dtype, names, given.repeats, deadline):
            append_rows(results_file(given.out, device), [row | origin])
            ratio = row["none_over_it"]
            print(
                f"{spec}, {row['inductor']}: {row['ms']['median']:.4g} ms, speed-up over none "
                f"{ratio['median']:.3f} ({ratio['p10']:.3f}-{ratio['p90']:.3f})",
                flush=True,
            )


def settings_for(device: torch.device) -> list[str]:
    """The variants that change something on ``device``."""
    return [name for name in VARIANTS if device.type == "cuda" or name not in FOR_A_GPU]


def rows(
    setting: Setting, spec: Spec, dtype: str, names: Sequence[str], repeats: int,
    deadline: float | None = None,
) -> list[Row]:  # fmt: skip
    """A row for each setting in ``names`` that compiles; ``NONE`` is always among them.

    After ``deadline`` (of ``time.monotonic``) nothing more is compiled.
    """
    torch.backends.cudnn.benchmark = True
    mode = "captured" if setting.device.startswith("cuda") else "compiled"
    candidates: list[Candidate] = []
    for name in dict.fromkeys([NONE, *names]):
        if deadline is not None and candidates and time.monotonic() > deadline:
            print(f"{name}: skipped, the time limit was reached.")
            continue
        try:
            candidates.append(candidate(setting, spec, dtype, mode, name))
        except (UserError, RuntimeError) as error:
            if name == NONE:
                raise
            # The next setting may still compile.
            print(f"{name}: {(str(error).strip().splitlines() or [''])[0]}", flush=True)
    times = interleave(candidates, repeats, until=deadline)
    for each in candidates:
        each.close()
    return [
        {
            "kind": "inductor",
            "inductor": each.name,
            "settings": VARIANTS[each.name],
            "method": str(spec),
            "dtype": dtype,
            "mode": mode,
            "config": setting.as_row(),
            "ms": Spread.of(times[each.name]).times(1e3).as_row(),
            "none_over_it": paired_ratio(times[NONE], times[each.name]).as_row(),
            "compile_s": round(each.compile_seconds(Spread.of(times[each.name]).median), 1),
        }
        for each in candidates
    ]


def candidate(setting: Setting, spec: Spec, dtype: str, mode: str, name: str) -> Candidate:
    """The step, made and compiled as the variant ``name``."""
    with variant(name):
        return replace(our_candidate(setting, spec, dtype, mode), name=name)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
