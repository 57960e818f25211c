"""Peers that live in their own environments, as candidates."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from fastadv.benchmark.interleave import Candidate
from fastadv.benchmark.ours import WARM_CALLS
from fastadv.benchmark.peers import venvs
from fastadv.benchmark.peers.worker import Worker
from fastadv.benchmark.setting import Setting

LIBRARIES = {"torchattacks": "torchattacks", "art": "ART"}


def library_candidate(
    setting: Setting, peer: str, attack_bn: str, folder: Path | None = None
) -> Candidate:
    """``peer`` (torchattacks or art) with its worker started and warmed up.

    Raises ``UserError`` when it cannot be installed or cannot run.
    """
    python = str(venvs.interpreter(peer, folder))
    worker = Worker(peer, [python, "-P", "-m", f"fastadv.benchmark.peers.{peer}_worker"])
    try:
        said = worker.setup(
            setting=asdict(setting),
            attack_bn=attack_bn,
            threads=torch.get_num_threads(),
            warm_calls=WARM_CALLS - 1,
        )
    except BaseException:
        worker.close()
        raise
    facts = {
        "by": peer,
        "version": said["version"],
        "method": "pgd",
        "dtype": "fp32",
        "mode": "eager",
        "layout": "contiguous",
        "attack_bn": attack_bn,
    }
    name = f"{LIBRARIES[peer]} fp32 bn={attack_bn}"
    return Candidate(name, worker.step, said["warm_seconds"], facts, close=worker.close)
