"""Which batch fits into memory: measured with steps that are undone.

``--batch-size auto`` measures the peak of a step at two sizes; the memory that an image takes is
their difference, and the batch is the largest of 1, 2, 3, 4, 6, 8, 12, ... images that leaves a
reserve. On a GPU it is tried as well.
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
from fastadv.run.trial_steps import fits_in, next_smaller
from fastadv.training.memory import free_what_is_kept

AUTO = "auto"
RESERVE = 0.4
"""Of what is free: for evaluation, gaps between what is freed, and what other programs start.
bench/batch_reserve.py measures what the first two take."""
RESERVE_OF_ADDRESSES = 0.7
"""The same where addresses are limited (``ulimit -v``), of which gaps take more: with 0.4 a run of
tests/test_full_memory.py's kind fitted for five steps and not for the sixth."""
_SMALL, _LARGE = 8, 32  # images of the steps that are measured


def fitting_batch(request: RunRequest) -> tuple[int, int]:
    """The batch size that fits for ``request``, which asks for ``auto``, and how many training
    images there are. Raises ``UserError`` if not even two images fit, and for several processes.
    """
    if distributed.world_size() > 1:
        raise UserError(
            "--batch-size auto is measured by one process: run it with one, and give as many times "
            "the batch size that it finds as there are processes."
        )
    session = Session.build(resolve_run(replace(request, batch_size=_SMALL, mode="eager")))
    found, trained_on = _largest(session), session.data.trained_on
    del session
    free_what_is_kept()
    return found, trained_on


def fitted(request: RunRequest, console: Console) -> RunConfig:
    """The configuration of ``request`` with the batch size that was found; it is said, and that the
    learning rate does not follow it."""
    usual = resolve_run(replace(request, batch_size=None)).batch_size
    found, trained_on = fitting_batch(request)
    larger = found * 4 // 3 if found % 3 == 0 else -(-found * 3 // 2)
    config = resolve_run(replace(request, batch_size=found))
    reserve = _reserve(choose_device(config.device))
    bound = (
        f"it fits, and the next size, {larger:,}, is above the {trained_on:,} training images"
        if larger > trained_on
        else f"the largest that fits with a reserve of {100 * reserve:.0f} % of the free memory"
    )
    console.say(
        f"batch size {found}: {bound}; the learning rate stays {config.lr:g}"
        + ("" if config.batch_size == usual else f", which is usual for {usual} images")
    )
    return config


def _largest(session: Session) -> int:
    """The images of the largest batch that fits, with a reserve."""
    most = max(2, session.data.trained_on)
    small, large = min(_SMALL, most), min(_LARGE, most)
    peaks = [_peak(session, count) for count in (small, large)]
    if None in peaks:
        found = next_smaller(session, 2 * small)
        if found is None:
            raise UserError(
                "Not even two images of this method fit into memory: take a smaller network, "
                "--amp, or another device."
            )
        return found
    each = max((peaks[1] - peaks[0]) / max(large - small, 1), 1.0)  # type: ignore[operator]
    free_what_is_kept()
    room = _free(session.device) * (1 - _reserve(session.device))
    count = _round_down(min(small + int(room / each), most))
    while session.device.type == "cuda" and count > 2 and not fits_in(session, count):
        count = _round_down(count - 1)
    return max(count, 2)


def _reserve(device: torch.device) -> float:
    """The share of what is free that is left free."""
    limited = device.type == "cpu" and memory.addresses_are_limited()
    return RESERVE_OF_ADDRESSES if limited else RESERVE


def _round_down(count: int) -> int:
    """The largest power of two, or three halves of one, up to ``count``."""
    power = 1 << max(count.bit_length() - 1, 0)
    return power * 3 // 2 if power * 3 // 2 <= count and power > 1 else power


def _peak(session: Session, count: int) -> int | None:
    """Bytes that are taken at most in a step on ``count`` images, with what is taken without one;
    None if they do not fit. To be asked for few images first."""
    device = session.device
    if not fits_in(session, min(count, 2)):  # what the first step allocates is no image's
        return None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        fitted = fits_in(session, count)
        return torch.cuda.max_memory_allocated(device) if fitted else None
    free_what_is_kept()  # of a step before, which would be taken for that of this one
    memory.forget_peak()  # where it cannot be, the larger of the two steps is still the larger one
    if not fits_in(session, count):
        return None
    peak = memory.peak()
    if peak is None:
        raise UserError(
            "--batch-size auto measures how much memory a step takes, which this system does not "
            "say: give a number."
        )
    return peak


def _free(device: torch.device) -> float:
    """Bytes that are free for this process's tensors."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    return float(memory.free())
