"""Peers in their own processes, as candidates."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from fastadv.benchmark.interleave import Candidate
from fastadv.benchmark.ours import WARM_CALLS
from fastadv.benchmark.peers import venvs
from fastadv.benchmark.peers.worker import Worker
from fastadv.benchmark.setting import Setting

LIBRARIES = {"torchattacks": "torchattacks", "art": "ART"}


def library_candidate(setting: Setting, peer: str, attack_bn: str) -> Candidate:
    """``peer`` (torchattacks or art) with its worker started and warmed up.

    Raises ``UserError`` if it cannot be installed or started.
    """
    name = f"{LIBRARIES[peer]} fp32 bn={attack_bn}"
    python = str(venvs.interpreter(peer))
    return _candidate(setting, name, python, peer, attack_bn, {"by": peer})


def published_without_tf32(setting: Setting) -> Candidate:
    """The published loop without TF32, which is a setting of a whole process."""
    name, facts = "published fp32, TF32 off", {"by": "published", "tf32": False}
    return _candidate(setting, name, sys.executable, "published", "train", facts)


def _candidate(
    setting: Setting, name: str, python: str, peer: str, attack_bn: str, facts: Mapping[str, Any]
) -> Candidate:
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
        **facts,
        "version": said["version"],
        "method": "pgd",
        "dtype": "fp32",
        "mode": "eager",
        "layout": "contiguous",
        "attack_bn": attack_bn,
    }
    return Candidate(name, worker.step, said["warm_seconds"], facts, close=worker.close)
