"""One comparison: build the candidates, time them turn by turn, turn times into rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from fastadv.algorithms.contract.passes import TRAINING, Pass
from fastadv.benchmark import peer_list
from fastadv.benchmark.bound import Bound, measure_bound
from fastadv.benchmark.geometry import geometry
from fastadv.benchmark.interleave import LEAST_TURNS, Candidate, interleave
from fastadv.benchmark.launches import Launches, watched_launches
from fastadv.benchmark.limits import Limits, measure_limits
from fastadv.benchmark.operator_timing import operator_candidate
from fastadv.benchmark.ours import our_candidate
from fastadv.benchmark.pass_timing import pass_candidate
from fastadv.benchmark.progress import Estimate
from fastadv.benchmark.results import (
    Timed,
    fused_norm_rows,
    operator_rows,
    pass_rows,
    speedup_rows,
    step_rows,
)
from fastadv.benchmark.rows import Row
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import Spec, passes_of
from fastadv.engine.process.stop import Stopped
from fastadv.errors import UserError

Say = Callable[[str], None]
SoFar = Callable[[list[Row]], None]
Times = Mapping[str, Sequence[float]]
Wanted = tuple[str, Callable[[], Candidate]]

# Turns of a candidate alone before the next one is built; a killed run has at least these. One on
# a CPU, where a step takes seconds.
TURNS_ALONE = {"cpu": 1, "cuda": 3}


@dataclass(frozen=True)
class Comparison:
    """What to time against each other in one process.

    ``peers`` are names from ``peer_list``. ``deadline`` (of ``time.monotonic``) ends building and
    timing early; what was skipped is reported. ``tiny`` shrinks the device's limits for dry runs.
    ``parity`` names the check of the modes against eager; if it is None and there are peers,
    ``run_comparisons`` runs the parity tests. ``fused_parity`` names the check of own BatchNorm
    kernels against PyTorch's; if it is None, ``run_comparisons`` makes it where steps have them,
    and if it is "" it failed: then such steps are timed, without a speed-up.
    ``kernels`` asks for a kernel table of the first candidate (on CUDA). ``with_steps`` False
    times only parts: the passes of ``specs`` (of the kinds in ``pass_kinds``; None: all),
    ``operators`` of ``fastadv.kernels``, and peers.
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
    parity: str | None = None
    fused_parity: str | None = None
    kernels: bool = False
    with_steps: bool = True
    pass_kinds: Sequence[str] | None = None
    operators: Sequence[str] = ()

    @property
    def needs_parity(self) -> bool:
        """True if a step of ours is compared with a peer's."""
        ours = self.with_steps and any(spec.is_the_peers for spec in self.specs)
        return bool(self.peers) and ours and not self.parity


@dataclass
class Outcome:
    """Rows without provenance, and a message for each candidate that could not be timed.
    ``interrupted``: the signal that ended it early; the rows are those of the turns that were
    done."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    batch_size: int = 0
    copy_rate: float = 0.0
    launches: Launches = field(default_factory=dict)
    interrupted: str = ""


@contextmanager
def compared(
    comparison: Comparison, say: Say, so_far: SoFar = lambda rows: None
) -> Iterator[Outcome]:
    """Time all candidates; inside the block they exist, for a profile.

    ``so_far`` receives all results so far as rows marked preliminary: each candidate's turns alone
    when it is warm, then the interleaved turns from the third on. Raises ``ValueError`` for peers
    without ``parity``. Ctrl-C while candidates are built or timed ends it early.
    """
    if comparison.needs_parity:
        raise ValueError("peers are timed only after parity: run_comparisons sees to it")
    torch.backends.cudnn.benchmark = True  # for ours and for the peers in this process
    device = torch.device(comparison.setting.device)
    outcome = Outcome(batch_size=comparison.setting.batch_size)
    wanted = list(_wanted(comparison))
    estimate = Estimate(len(wanted), comparison.repeats)
    say("measuring the device's limits")
    limits = measure_limits(device, comparison.dtype, tiny=comparison.tiny)
    outcome.copy_rate = limits.copy
    so_far(_preliminary(_limit_rows(comparison, limits)))
    bound: Bound | None = None

    def known(times: Times, *, interleaved: bool = True) -> list[Row]:
        setting = comparison.setting
        candidates = [each for each in outcome.candidates if each.name in times]
        timed = Timed(setting, comparison.dtype, candidates, times, bound, interleaved)
        rows = [*_limit_rows(comparison, limits), *pass_rows(timed), *step_rows(timed)]
        rows += operator_rows(timed)
        if interleaved:  # ratios are computed within turns only
            rows += _ratio_rows(comparison, timed)
        return rows

    alone: dict[str, list[float]] = {}
    found: dict[str, list[float]] = {}

    def last_turn() -> float | None:
        return next(reversed(alone.values()))[-1] if alone else None

    def after_turn(times: Times) -> None:
        if len(next(iter(times.values()))) >= LEAST_TURNS:
            so_far(_preliminary(known(times)))

    try:
        try:
            building = _building(
                comparison, wanted, outcome, lambda name: say(estimate.candidate(name, last_turn()))
            )
            for name, turns in building:
                alone[name] = turns
                so_far(_preliminary(known(alone, interleaved=False)))
                # The most important candidate is built; now the bound of all.
                if len(alone) == 1 and (comparison.with_steps or comparison.with_passes):
                    say("measuring each convolution alone")
                    bound = _bound(comparison, limits, outcome)
            if not outcome.candidates:
                raise UserError("Nothing to time: " + " ".join(outcome.skipped))
            outcome.rows = known(
                interleave(
                    outcome.candidates,
                    comparison.repeats,
                    lambda turn: say(estimate.turn(turn, last_turn())),
                    comparison.deadline,
                    after_turn,
                    found,
                )
            )
        except (KeyboardInterrupt, Stopped) as stopped:
            outcome.interrupted = stopped.by if isinstance(stopped, Stopped) else "SIGINT"
            whole = min(map(len, found.values()), default=0)
            done = {name: values[:whole] for name, values in found.items()} if whole else alone
            outcome.rows = known(done, interleaved=bool(whole))
        yield outcome
    finally:
        for candidate in outcome.candidates:
            candidate.close()


def _ratio_rows(comparison: Comparison, timed: Timed) -> Iterator[Row]:
    """The speed-ups whose steps were found to be right."""
    fused = comparison.fused_parity
    if comparison.parity:
        yield from speedup_rows(timed, comparison.parity, fused)
    if fused:
        yield from fused_norm_rows(timed, fused)


def _preliminary(rows: Sequence[Row]) -> list[Row]:
    return [row | {"preliminary": True} for row in rows]


def _bound(comparison: Comparison, limits: Limits, outcome: Outcome) -> Bound | None:
    setting = comparison.setting
    device = torch.device(setting.device)
    shape = geometry(setting.make_model(), setting.image_shape)
    try:
        return measure_bound(shape, setting.batch_size, comparison.dtype, limits, device)
    except RuntimeError as error:
        # Rows without a bound are also valid.
        outcome.skipped.append(f"the bound: {_first_line(error)}")
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _limit_rows(comparison: Comparison, limits: Limits) -> list[Row]:
    return [
        {
            "kind": "limits",
            "dtype": comparison.dtype,
            "copy_gb_per_s": round(limits.copy / 1e9, 2),
            "matmul_tflop_per_s": round(limits.matmul / 1e12, 4),
            "spread": {name: spread.as_row() for name, spread in limits.spreads.items()},
        }
    ]


def _building(
    comparison: Comparison, wanted: Sequence[Wanted], outcome: Outcome, begins: Say
) -> Iterator[tuple[str, list[float]]]:
    """Build the candidates, the most important first, and yield the times of their turns alone; a
    candidate that fails is skipped and reported."""
    turns = TURNS_ALONE[torch.device(comparison.setting.device).type]
    for name, make in wanted:
        if comparison.deadline is not None and time.monotonic() > comparison.deadline:
            outcome.skipped.append(f"{name}: skipped, the time limit was reached.")
            continue
        begins(name)
        watched = comparison.kernels and not outcome.candidates
        # A replay launches the recorded kernels, other modes those that Python launches.
        watch = partial(watched_launches, only_recorded=comparison.modes[0] == "captured")
        try:
            with watch() if watched else nullcontext(outcome.launches) as launches:
                candidate = make()
            outcome.launches = launches
            with ExitStack() as unless_it_works:
                unless_it_works.callback(candidate.close)
                alone = [candidate.turn() for _ in range(turns)]
                unless_it_works.pop_all()
            outcome.candidates.append(candidate)
            yield candidate.name, alone
        except (UserError, RuntimeError) as error:
            # A mode that does not compile, or out of memory, must not lose the other rows.
            outcome.skipped.append(f"{name}: {_first_line(error)}")


def _wanted(comparison: Comparison) -> Iterator[Wanted]:
    """The candidates by importance, for runs with little time: the first mode with its passes, what
    needs no compiling, the other modes, the operators, the peers in this process, the other modes'
    passes, and last the peers in other processes."""
    first, rest = comparison.modes[:1], comparison.modes[1:]
    passes = _wanted_passes if comparison.with_passes else lambda comparison, modes: ()
    steps = _wanted_steps if comparison.with_steps else lambda comparison, modes: ()
    yield from steps(comparison, first)
    yield from passes(comparison, first)
    yield from steps(comparison, sorted(rest, key=lambda mode: mode != "eager"))
    for name in comparison.operators:
        yield f"kernel {name}", partial(operator_candidate, comparison.setting, name)
    yield from _wanted_peers(comparison, peer_list.BESIDE_OURS)
    yield from passes(comparison, rest)
    yield from _wanted_peers(comparison, peer_list.APART)


def _wanted_peers(comparison: Comparison, peers: Mapping[str, peer_list.Make]) -> Iterator[Wanted]:
    for name, make in peers.items():
        if name in comparison.peers:
            yield name, partial(make, comparison.setting)


def _wanted_steps(comparison: Comparison, modes: Sequence[str]) -> Iterator[Wanted]:
    setting, dtype = comparison.setting, comparison.dtype
    for mode in modes:
        for spec in comparison.specs:
            make = partial(our_candidate, setting, spec, dtype, mode)
            yield f"{spec} {dtype} {mode}", make


def _wanted_passes(comparison: Comparison, modes: Sequence[str]) -> Iterator[Wanted]:
    setting, dtype = comparison.setting, comparison.dtype
    needed: dict[Pass, None] = {}
    for spec in comparison.specs:
        needed |= dict.fromkeys(passes_of(spec.plan()) or ())
    if comparison.pass_kinds is not None:
        needed = {each: None for each in needed if each.kind in comparison.pass_kinds}
    for mode in modes:
        for kind, bn in sorted(needed, key=lambda entry: entry[0] != TRAINING):
            make = partial(pass_candidate, setting, kind, dtype, mode, bn)
            yield f"{kind} pass {dtype} {mode}, {bn} mode", make
