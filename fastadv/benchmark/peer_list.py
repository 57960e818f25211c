"""The peers by name, and which of them a machine is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastadv.benchmark.interleave import Candidate
from fastadv.benchmark.peers.library import library_candidate
from fastadv.benchmark.peers.published import published_candidate
from fastadv.benchmark.setting import Setting

PEERS: Mapping[str, Callable[[Setting], Candidate]] = {
    "published": lambda setting: published_candidate(setting),
    "published-tf32-off": lambda setting: published_candidate(setting, allow_tf32=False),
    "helped": lambda setting: published_candidate(setting, helped=True),
    "torchattacks": lambda setting: library_candidate(setting, "torchattacks", "eval"),
    "torchattacks-train": lambda setting: library_candidate(setting, "torchattacks", "train"),
    "art": lambda setting: library_candidate(setting, "art", "eval"),
}


def usual_peers(device: str) -> list[str]:
    """All of them; TF32 is a question on CUDA only."""
    return [name for name in PEERS if device.startswith("cuda") or "tf32" not in name]
