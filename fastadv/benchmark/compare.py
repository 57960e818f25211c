"""One comparison: build the candidates, time them turn by turn, turn times into rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from fastadv.benchmark import peer_list
from fastadv.benchmark.bound import Bound, measure_bound
from fastadv.benchmark.geometry import Geometry, geometry
from fastadv.benchmark.interleave import Candidate, interleave
from fastadv.benchmark.limits import Limits, measure_limits
from fastadv.benchmark.ours import our_candidate
from fastadv.benchmark.pass_timing import pass_candidate
from fastadv.benchmark.results import Timed, pass_rows, speedup_rows, step_rows
from fastadv.benchmark.rows import Row
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import Spec, passes_of
from fastadv.cost import TRAINING, Pass
from fastadv.errors import UserError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """What to time against each other in one process.

    ``peers`` are names from ``peer_list``. ``deadline`` (of ``time.monotonic``) ends building and
    timing early; what was left out is said. ``tiny`` shrinks the device's limits for dry runs.
    """

    setting: Setting
    specs: Sequence[Spec]
    dtype: str
    modes: Sequence[str]
    repeats: int
    peers: Sequence[str] = ()
    with_passes: bool = True
    deadline: float | None = None
    tiny: bool = False


@dataclass
class Outcome:
    """Rows without provenance, and a sentence for whatever could not be timed."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    batch_size: int = 0


@contextmanager
def compared(comparison: Comparison, say: Say) -> Iterator[Outcome]:
    """Time everything; inside the block the candidates are alive, for a profile."""
    torch.backends.cudnn.benchmark = True  # for ours and for the peers in this process
    device = torch.device(comparison.setting.device)
    outcome = Outcome(batch_size=comparison.setting.batch_size)
    say("measuring the device's limits and each convolution alone")
    limits = measure_limits(device, comparison.dtype, tiny=comparison.tiny)
    shape = geometry(comparison.setting.make_model(), comparison.setting.image_shape)
    bound = _bound(comparison, shape, limits)
    try:
        for _ in _building(comparison, outcome, say):
            pass
        if not outcome.candidates:
            raise UserError("Nothing to time: " + " ".join(outcome.skipped))
        times = interleave(
            outcome.candidates,
            comparison.repeats,
            lambda turn: say(f"turn {turn + 1} of {comparison.repeats}"),
            comparison.deadline,
        )
        timed = Timed(comparison.setting, comparison.dtype, outcome.candidates, times, bound)
        outcome.rows = [*_limit_rows(comparison, limits), *pass_rows(timed)]
        outcome.rows += [*step_rows(timed), *speedup_rows(timed)]
        yield outcome
    finally:
        for candidate in outcome.candidates:
            candidate.close()


def warm_up(comparison: Comparison, say: Say) -> list[str]:
    """Build every candidate and nothing else, one after another, so that compiled code is in the
    cache when it counts; returns a sentence for whatever could not be built."""
    outcome = Outcome()
    for _ in _building(comparison, outcome, say):
        outcome.candidates.pop().close()  # its memory is the next one's
    return outcome.skipped


def _bound(comparison: Comparison, shape: Geometry, limits: Limits) -> Bound:
    setting = comparison.setting
    device = torch.device(setting.device)
    return measure_bound(shape, setting.batch_size, comparison.dtype, limits, device)


def _limit_rows(comparison: Comparison, limits: Limits) -> list[Row]:
    return [
        {
            "kind": "limits",
            "dtype": comparison.dtype,
            "copy_gb_per_s": round(limits.copy / 1e9, 2),
            "matmul_tflop_per_s": round(limits.matmul / 1e12, 4),
        }
    ]


def _building(comparison: Comparison, outcome: Outcome, say: Say) -> Iterator[Candidate]:
    """Build what is asked for, the most wanted first; what fails is left out and said."""
    for name, make in _wanted(comparison):
        if comparison.deadline is not None and time.monotonic() > comparison.deadline:
            outcome.skipped.append(f"{name}: left out, the time was up.")
            continue
        say(f"warming up {name}")
        try:
            outcome.candidates.append(make())
            yield outcome.candidates[-1]
        except (UserError, RuntimeError) as error:
            # A mode that does not compile, or too little memory, must not lose the other rows.
            first = str(error).strip().splitlines()[0]
            outcome.skipped.append(f"{name}: {first}")


Wanted = tuple[str, Callable[[], Candidate]]


def _wanted(comparison: Comparison) -> Iterator[Wanted]:
    """The mode named first, what needs no compiling, and the rest: when the time is short, that
    much is there."""
    first, rest = comparison.modes[:1], comparison.modes[1:]
    yield from _wanted_steps(comparison, [*first, *(mode for mode in rest if mode == "eager")])
    for peer in comparison.peers:
        yield peer, partial(peer_list.PEERS[peer], comparison.setting)
    yield from _wanted_steps(comparison, [mode for mode in rest if mode != "eager"])
    if comparison.with_passes:
        yield from _wanted_passes(comparison)


def _wanted_steps(comparison: Comparison, modes: Sequence[str]) -> Iterator[Wanted]:
    setting, dtype = comparison.setting, comparison.dtype
    for mode in modes:
        for spec in comparison.specs:
            make = partial(our_candidate, setting, spec, dtype, mode)
            yield f"{spec} {dtype} {mode}", make


def _wanted_passes(comparison: Comparison) -> Iterator[Wanted]:
    setting, dtype = comparison.setting, comparison.dtype
    needed: dict[Pass, None] = {}
    for spec in comparison.specs:
        needed |= dict.fromkeys(passes_of(spec.plan()) or ())
    for mode in comparison.modes:
        for kind, bn in sorted(needed, key=lambda entry: entry[0] != TRAINING):
            make = partial(pass_candidate, setting, kind, dtype, mode, bn)
            yield f"{kind} pass {dtype} {mode}, {bn} mode", make
