"""Which batch fits into memory: measured by steps that are tried.

``--batch-size auto`` steps 2, 8, 32, ... images, as far as the peak of each step says that the next
one fits, and then sizes between (2, 3, 4, 6, 8, 12, ... images). The batch is the largest whose own
step left a reserve. Nothing is extrapolated from a few images: there a phase whose memory does not
grow with the batch (first values for every training image, copies of the weights) hides what an
image takes.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fastadv.engine.process import distributed, memory
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError
from fastadv.run.config import RunConfig
from fastadv.run.console import Console
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.session import Session
from fastadv.run.trial_steps import fits_in
from fastadv.training.memory import free_what_is_kept

AUTO = "auto"
RESERVE = 0.4
"""Of what is free: for evaluation, gaps between what is freed, and what other programs start.
bench/batch_reserve.py measures what the first two take: at most 19 % of the memory of a run
(bench/results/batch-reserve.jsonl)."""
RESERVE_OF_ADDRESSES = 0.7
"""The same where addresses are limited (``ulimit -v``), of which gaps take more: with 0.4 a run of
tests/test_full_memory.py's kind fitted for five steps and not for the sixth."""
_FIRST = 2  # images of the first step
_GROWTH = 4  # times as many images are tried next at most: one may take more in a large batch


def fitting_batch(request: RunRequest) -> tuple[int, int]:
    """The batch size that fits for ``request``, which asks for ``auto``, and how many training
    images there are. Raises ``UserError`` if not even two images fit, and for several processes.
    """
    if distributed.world_size() > 1:
        raise UserError(
            "--batch-size auto is measured by one process: run it with one, and give as many times "
            "the batch size that it finds as there are processes."
        )
    session = trial_session(request)
    found, trained_on = _largest(session), session.data.trained_on
    del session
    free_what_is_kept()
    return found, trained_on


def trial_session(request: RunRequest) -> Session:
    """The run of ``request``, of which only steps are tried."""
    return Session.build(resolve_run(replace(request, batch_size=_FIRST, mode="eager")))


def fitted(request: RunRequest, console: Console) -> RunConfig:
    """The configuration of ``request`` with the batch size that was found; it is said, and that the
    learning rate does not follow it."""
    usual = resolve_run(replace(request, batch_size=None)).batch_size
    found, trained_on = fitting_batch(request)
    larger = _next_larger(found)
    config = resolve_run(replace(request, batch_size=found))
    reserve = _reserve(choose_device(config.device))
    bound = (
        f"it fits, and the next size, {larger:,}, is above the {trained_on:,} training images"
        if larger > trained_on
        else f"the largest that fits with a reserve of {_percent(reserve)} of the free memory"
    )
    console.say(
        f"batch size {found}: {bound}; the learning rate stays {config.lr:g}"
        + ("" if config.batch_size == usual else f", which is usual for {usual} images")
    )
    return config


def _largest(session: Session) -> int:
    """The images of the largest batch whose step leaves the reserve free."""
    device = session.device
    free_what_is_kept()
    taken = taken_now(device)
    reserve = _reserve(device)
    allowed = taken + _free(device) * (1 - reserve)
    most = max(_FIRST, session.data.trained_on)
    first = peak_of_first_step(session)
    begun = first is not None and first <= allowed
    count, peak = 0, taken  # of the largest step that fitted
    tried = _FIRST if begun else None
    while tried is not None:
        found = peak_of_step(session, tried)
        if found is None or found > allowed:
            most = tried - 1
        else:
            count, peak = tried, found
        tried = _next_tried(count, most, peak - taken, allowed - taken) if count else None
    if not count:
        raise UserError(
            "Not even two images of this method fit into memory with a reserve of "
            f"{_percent(reserve)} of what is free: take a smaller network, --amp, or another "
            "device."
        )
    return count


def _next_tried(count: int, most: int, used: float, room: float) -> int | None:
    """The batch to try after one of ``count`` images, which used ``used`` bytes of ``room``; None
    if the next size is above ``most`` images.

    The memory of a phase is a constant and a share for each image, and the peak is that of the
    largest phase. So another image takes at most its share of all that is used, constants too. The
    next size is tried even where it may exceed the room, by less than the reserve: it takes no more
    than 3/2 of what is used.
    """
    larger = _next_larger(count)
    if larger > most:
        return None
    each = max(used / count, 1.0)
    return max(larger, _round_down(min(int(room / each), _GROWTH * count, most)))


def _reserve(device: torch.device) -> float:
    """The share of what is free that is left free."""
    limited = device.type == "cpu" and memory.addresses_are_limited()
    return RESERVE_OF_ADDRESSES if limited else RESERVE


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _next_larger(count: int) -> int:
    """The next power of two, or three halves of one, after ``count``, which is one of them."""
    return count * 4 // 3 if count % 3 == 0 else -(-count * 3 // 2)


def _round_down(count: int) -> int:
    """The largest power of two, or three halves of one, up to ``count``."""
    power = 1 << max(count.bit_length() - 1, 0)
    return power * 3 // 2 if power * 3 // 2 <= count and power > 1 else power


def peak_of_first_step(session: Session) -> int | None:
    """Bytes that are taken at most in the first step of the run, on two images; None if they do not
    fit. It is not undone, so what the parts keep is allocated and drawn once; the next step is
    in the last epoch, in which every part is active and begins its epoch."""
    peak = _peak(session, _FIRST, undone=False)
    last = (session.config.epochs - 1) * len(session.data.loader)
    session.step.internals.clock.calls = last
    return peak


def peak_of_step(session: Session, count: int) -> int | None:
    """Bytes that are taken at most in a step on ``count`` images, with what is taken without one;
    None if they do not fit. To be asked for few images first."""
    return _peak(session, count, undone=True)


def _peak(session: Session, count: int, *, undone: bool) -> int | None:
    device = session.device
    free_what_is_kept()  # of a step before, which would be taken for that of this one
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        memory.forget_peak()  # where it cannot be, a larger step still has a larger peak
    if not fits_in(session, count, undone=undone):
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = memory.peak()
    if peak is None:
        raise UserError(
            "--batch-size auto measures how much memory a step takes, which this system does not "
            "say: give a number."
        )
    return peak


def taken_now(device: torch.device) -> int:
    """Bytes that this process's tensors take; on a CPU, all that the process takes."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return memory.resident() or memory.peak() or 0


def _free(device: torch.device) -> float:
    """Bytes that are free for this process's tensors."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    return float(memory.free())
