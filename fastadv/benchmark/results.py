"""From seconds to rows: rates of a step, cost of its passes, comparison with the peers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastadv.algorithms.contract.passes import Pass
from fastadv.benchmark.arithmetic import Spread, paired_ratio
from fastadv.benchmark.bound import Bound
from fastadv.benchmark.interleave import Candidate
from fastadv.benchmark.pass_timing import pass_name, sum_of_passes
from fastadv.benchmark.profiling import idle_share, profiled
from fastadv.benchmark.rows import Row
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import Spec, passes_of


@dataclass(frozen=True)
class Timed:
    """Candidates with their seconds, and the bound for the same batches (None: not measured).

    ``interleaved``: turn by turn. Otherwise each was timed alone, at another time, and ratios
    between them mean nothing.
    """

    setting: Setting
    dtype: str
    candidates: Sequence[Candidate]
    times: Mapping[str, Sequence[float]]
    bound: Bound | None
    interleaved: bool = True

    def steps(self) -> Iterator[Candidate]:
        """Everything that trains a whole step."""
        return (entry for entry in self.candidates if entry.is_step)

    def taken(self, candidate: Candidate) -> Spread:
        """The seconds of ``candidate``."""
        return Spread.of(self.times[candidate.name])


def step_rows(timed: Timed) -> Iterator[Row]:
    """A row for every whole step, ours and the peers'."""
    for candidate in timed.steps():
        seconds = timed.taken(candidate)
        passes = _passes(candidate)
        row = _shared(timed, candidate, seconds)
        row["peak_mib"] = _mib(candidate.peak_bytes)
        if passes is not None:
            row["passes"] = _by_kind(passes)
            if timed.bound is not None:
                row |= _reached(timed.bound, passes, seconds.median)
            if candidate.facts["by"] == "fastadv":
                if timed.bound is not None:
                    row |= _against_bound(timed.bound, passes, seconds.median)
                row |= _against_passes(timed, candidate, passes)
        yield row


def idle_rows(
    setting: Setting, candidates: Sequence[Candidate], device: torch.device
) -> Iterator[Row]:
    """The GPU's idle share in each of our own steps; a profile of one step each."""
    ours = [each for each in candidates if device.type == "cuda" and each.is_our_step]
    for candidate in ours[:1]:
        profiled(candidate.turn, device)  # the first profile of a process starts the profiler
    for candidate in ours:
        yield {
            "kind": "idle",
            "name": candidate.name,
            "config": setting.as_row(),
            "idle_share": round(idle_share(candidate.turn, device), 4),
        }


def _passes(candidate: Candidate) -> Counter[Pass] | None:
    """A peer's method is listed with the mode in which it attacks."""
    spec, bn = Spec.parse(candidate.facts["method"]), candidate.facts["attack_bn"]
    if candidate.facts["by"] != "fastadv" and bn is not None:
        spec = Spec(spec.method, (*spec.options, ("attack_bn", bn)))
    return passes_of(spec.plan())


def _by_kind(passes: Counter[Pass]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for (kind, _), count in passes.items():
        total[kind] += count
    return dict(total)


def _shared(timed: Timed, candidate: Candidate, seconds: Spread) -> Row:
    return {
        "kind": "step" if candidate.is_step else "pass",
        **_timed(timed, candidate, seconds),
        "images_per_s": float(f"{timed.setting.batch_size / seconds.median:.4g}"),
        "compile_s": round(candidate.compile_seconds(seconds.median), 2),
    }


def _timed(timed: Timed, candidate: Candidate, seconds: Spread) -> Row:
    """What each row of a candidate says; with every turn, so that runs can be compared."""
    turns = [float(f"{1e3 * taken:.5g}") for taken in timed.times[candidate.name]]
    return {
        **({} if timed.interleaved else {"alone": True}),
        "name": candidate.name,
        **candidate.facts,
        "config": timed.setting.as_row(),
        "ms": seconds.times(1e3).as_row(),
        "turns_ms": turns,
    }


def operator_rows(timed: Timed) -> Iterator[Row]:
    """A row for every operator timed alone."""
    for candidate in timed.candidates:
        if "operator" in candidate.facts:
            yield {"kind": "operator", **_timed(timed, candidate, timed.taken(candidate))}


def _mib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**20, 1)


def _reached(bound: Bound, passes: Mapping[Pass, int], seconds: float) -> Row:
    """Rates by the operations and bytes the recipe needs, whatever else a peer computes."""
    rate = bound.flops(passes) / seconds
    moved = bound.bytes_moved(passes) / seconds
    return {
        "gflop": round(bound.flops(passes) / 1e9, 3),
        "tflop_per_s": float(f"{rate / 1e12:.4g}"),
        "of_matmul": round(rate / bound.limits.matmul, 4),
        "of_copy": round(moved / bound.limits.copy, 4),
    }


def _against_bound(bound: Bound, passes: Mapping[Pass, int], seconds: float) -> Row:
    best = bound.of_step(passes)
    return {"bound_ms": float(f"{best * 1e3:.4g}"), "over_bound": round(seconds / best, 3)}


def _against_passes(
    timed: Timed, candidate: Candidate, passes: Mapping[Pass, int]
) -> dict[str, Any]:
    if candidate.facts.get("fused_norm"):
        return {}  # the passes alone have PyTorch's BatchNorm
    dtype, mode = candidate.facts["dtype"], candidate.facts["mode"]
    used = [pass_name(kind, dtype, mode, bn) for kind, bn in passes]
    if not timed.interleaved or any(name not in timed.times for name in used):
        return {}
    total = sum_of_passes(timed.times, passes, dtype, mode)
    ratio = paired_ratio(timed.times[candidate.name], total)
    return {"passes_ms": Spread.of(total).times(1e3).as_row(), "over_passes": ratio.as_row()}


def pass_rows(timed: Timed) -> Iterator[Row]:
    """A row for every pass timed alone, with its own bound."""
    for candidate in timed.candidates:
        if "pass" not in candidate.facts:
            continue
        seconds = timed.taken(candidate)
        row = _shared(timed, candidate, seconds) | {"bound_ms": None, "over_bound": None}
        if timed.bound is not None:
            best = timed.bound.of_pass(candidate.facts["pass"], candidate.facts["attack_bn"])
            row["bound_ms"] = float(f"{best * 1e3:.4g}")
            row["over_bound"] = round(seconds.median / best, 3)
        yield row


def speedup_rows(timed: Timed, parity: str, fused_parity: str | None = None) -> Iterator[Row]:
    """How many times faster ours is than each peer, turn by turn, for the peers' own method.

    ``parity`` names the check of the modes against eager; without it no speed-up is reported. A
    step with own BatchNorm kernels also needs ``fused_parity``, that of these kernels.
    """
    if not parity.strip():
        raise ValueError("a speed-up needs the name of the check that the modes agree")
    steps = list(timed.steps())
    ours = [entry for entry in steps if entry.facts["by"] == "fastadv"]
    for peer in steps:
        if peer.facts["by"] == "fastadv":
            continue
        for mine in ours:
            if not Spec.parse(mine.facts["method"]).is_the_peers:
                continue
            if mine.facts.get("fused_norm") and not fused_parity:
                continue
            if (mine.facts["attack_bn"], peer.facts["attack_bn"]) == ("eval", "train"):
                continue  # an eval-mode attack is less work
            ratio = paired_ratio(timed.times[peer.name], timed.times[mine.name])
            yield {
                "kind": "speedup",
                "peer": peer.name,
                "by": peer.facts["by"],
                "ours": mine.name,
                "mode": mine.facts["mode"],
                "dtype": mine.facts["dtype"],
                "peer_bn": peer.facts["attack_bn"],
                "our_bn": mine.facts["attack_bn"],
                "config": timed.setting.as_row(),
                "times": ratio.as_row(),
                "parity": fused_parity if mine.facts.get("fused_norm") else parity,
            }


def fused_norm_rows(timed: Timed, parity: str) -> Iterator[Row]:
    """How many times faster each of our steps is with own BatchNorm kernels than the same step with
    PyTorch's, turn by turn. ``parity`` names the check of one against the other."""
    ours = [entry for entry in timed.steps() if entry.facts["by"] == "fastadv"]
    plain = {_but_for_norms(entry): entry for entry in ours if not entry.facts.get("fused_norm")}
    for mine in ours:
        other = plain.get(_but_for_norms(mine))
        if not mine.facts.get("fused_norm") or other is None:
            continue
        seconds = {"own": timed.times[mine.name], "pytorch": timed.times[other.name]}
        yield {
            "kind": "fused norm",
            "ours": mine.name,
            "without": other.name,
            **{name: mine.facts[name] for name in ("mode", "dtype", "attack_bn")},
            "config": timed.setting.as_row(),
            "ms": {name: Spread.of(taken).times(1e3).as_row() for name, taken in seconds.items()},
            "times": paired_ratio(seconds["pytorch"], seconds["own"]).as_row(),
            "parity": parity,
        }


def _but_for_norms(candidate: Candidate) -> tuple[Any, ...]:
    """What a step is besides its setting of ``fused_norm``."""
    spec = Spec.parse(candidate.facts["method"]).with_norm("auto")
    return spec, candidate.facts["dtype"], candidate.facts["mode"]
