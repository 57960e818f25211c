"""Bytes and launches of each compiled pass; ``inductor_stubs.py`` says how they are counted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import forked
import inductor_stubs
import numbers_off
from recipes import call

from fastadv.benchmark.ours import LONG_RUN, make_step
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import Spec
from fastadv.benchmark.variants import NONE, variant

# Methods, batch sizes and variants, for PreActResNet-18 at its published width.
WORK = (
    "pgd at 512",
    "pgd:attack_bn=eval at 512",
    "apart at 512",
    "fast at 512",
    "trades at 512",
    "pgd at 128",
    "pgd at 128 with cooperative",
    "pgd at 512 with padded",
)
TINY = 2e6  # bytes at 512 images; a launch below this takes no longer than its start
LIMIT = 1800.0


def main() -> None:
    """Write the launches and bytes of each pass in ``WORK`` to a JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as 'pgd at 512'; all if none is given")
    parser.add_argument("--out", type=Path, required=True, help="JSON of all results")
    parser.add_argument(
        "--kept", type=Path, required=True, help="results of single jobs, written at once"
    )
    parser.add_argument("--digest", default="", help="digest of the files that results belong to")
    given = parser.parse_args()
    numbers_off.switch_off()
    found = forked.each(given.names or list(WORK), generated, given.kept, given.digest, LIMIT)
    given.out.write_text(json.dumps(found, indent=1) + "\n")


def generated(name: str) -> dict[str, Any]:
    """The passes of one compiled step; ``name`` is METHOD at BATCH_SIZE, or METHOD at BATCH_SIZE
    with VARIANT (``fastadv/benchmark/variants.py``)."""
    method, rest = name.split(" at ")
    size, _, chosen = rest.partition(" with ")
    setting = Setting(batch_size=int(size), device="cuda")
    found = inductor_stubs.watch(TINY * setting.batch_size / 512)
    with variant(chosen or NONE):
        step = make_step(setting, Spec.parse(method), "bf16", "compiled", LONG_RUN)
        call(step, setting.batches(1, channels_last=True)[0])
    return {"passes": found.passes()}


if __name__ == "__main__":
    main()
