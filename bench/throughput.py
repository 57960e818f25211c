"""The README's speed table: ``python bench/throughput.py``.

One PGD-10 AT step of PreActResNet-18 on 32x32 images, batch 64: fastadv in each mode and the peers,
interleaved in one run, in both BatchNorm modes because ART attacks only in eval mode. Then the time
of the other methods over the sum of their passes. Rows are written to ``bench/results/``; ``python
bench/tables.py`` makes tables of them. The script takes about half an hour on two cores; the
machine must do nothing else.
"""

import argparse
import sys
from pathlib import Path

import torch

from fastadv.benchmark.compare import Comparison
from fastadv.benchmark.peer_list import PEERS, usual_peers
from fastadv.benchmark.running import run_comparisons, wide_console
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import parse_specs
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError, unknown

RESULTS = Path(__file__).parent / "results"
METHODS = "awp,rwp,advlc,trades,fast,apart"


def main() -> None:
    """Parse the command line, check that the modes agree, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, help="the network's width; a small one is for a trial")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--modes", help="separated by commas [all modes of this device]")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--methods", default=METHODS, help="timed after pgd, without peers")
    parser.add_argument("--peers", help=f"separated by commas, of {', '.join(PEERS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny device limits, for a dry run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    plan = comparisons(given)
    console = wide_console()
    run_comparisons(plan, given.out, console)


def comparisons(given: argparse.Namespace) -> list[Comparison]:
    """PGD with all peers, then every other method with its passes."""
    device = choose_device(given.device)
    setting = Setting(
        width=given.width,
        batch_size=given.batch_size,
        image_size=given.image_size,
        device=str(device),
    )
    usual = "captured,compiled,eager" if device.type == "cuda" else "compiled,eager"
    modes = (given.modes or usual).split(",")
    peers = given.peers.split(",") if given.peers else usual_peers(str(device))
    first = parse_specs("pgd,pgd:attack_bn=eval")
    for peer in peers:
        if peer not in PEERS:
            raise unknown("peer", peer, PEERS)
    others = parse_specs(given.methods)
    return [
        Comparison(setting, first, given.dtype, modes, given.repeats, peers, tiny=given.tiny),
        Comparison(setting, others, given.dtype, modes[:1], given.repeats, tiny=given.tiny),
    ]


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
