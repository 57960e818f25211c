"""The peers by name, and which of them a machine is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastadv.benchmark.interleave import Candidate
from fastadv.benchmark.peers.library import library_candidate, published_without_tf32
from fastadv.benchmark.peers.published import published_candidate
from fastadv.benchmark.setting import Setting

Make = Callable[[Setting], Candidate]

# They change no process-wide setting and may run in our process.
BESIDE_OURS: Mapping[str, Make] = {
    "helped": lambda setting: published_candidate(setting, helped=True),
    "published": lambda setting: published_candidate(setting),
}
# Other packages, and process-wide settings, on which our compiled code would depend.
APART: Mapping[str, Make] = {
    "published-tf32-off": published_without_tf32,
    "torchattacks": lambda setting: library_candidate(setting, "torchattacks", "eval"),
    "torchattacks-train": lambda setting: library_candidate(setting, "torchattacks", "train"),
    "art": lambda setting: library_candidate(setting, "art", "eval"),
}
PEERS: Mapping[str, Make] = {**BESIDE_OURS, **APART}


def usual_peers(device: str) -> list[str]:
    """All of them; TF32 is a question on CUDA only."""
    return [name for name in PEERS if device.startswith("cuda") or "tf32" not in name]
