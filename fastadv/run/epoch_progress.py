"""Within an epoch: a bar in a terminal, one line per minute in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.console
from rich.progress import BarColumn, Progress, TextColumn

from fastadv.printing.terminal import SAY_EVERY
from fastadv.run.short_words import clock
from fastadv.run.time_left import TimeLeft

_BAR = 16  # columns, where there is room
_PACE = len("12,345 images/s  123:45:00 left + evaluation")


EpochTick = Callable[[int, Callable[[], float]], None]
"""Takes the images of a batch that was launched, and how to find the mean loss so far, which waits
for the device and is asked for a line of a log file only."""


@contextmanager
def epoch_progress(
    out: rich.console.Console, epochs: int, left: TimeLeft, epoch: int, done: int, batches: int
) -> Iterator[EpochTick]:
    """Shows ``epoch`` (from 0) of ``epochs``, of which ``done`` of ``batches`` were trained before;
    yields the function to call after each batch."""
    images, began = 0, time.monotonic()
    said, batch = began, done
    name = f"epoch {epoch + 1}/{epochs}"
    room = out.width - len(f"{name}  {batches}/{batches}  ") - _PACE - 1
    columns = (
        TextColumn(name),
        BarColumn(max(4, min(_BAR, room))),
        TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[pace]}"),
    )
    bar = Progress(*columns, console=out, transient=True, disable=not out.is_terminal)
    with bar:
        task = bar.add_task("", total=batches, completed=done, pace="")

        def tick(count: int, loss: Callable[[], float]) -> None:
            nonlocal images, said, batch
            images, batch = images + count, batch + 1
            now = time.monotonic()
            if not out.is_terminal and now - said < SAY_EVERY:
                return
            pace = f"{_rate(images / max(now - began, 1e-9))} images/s"
            rest = clock(left.after(epoch, batch))
            if rest:
                pace += f"  {rest} left" + ("" if left.knows_evaluation else " + evaluation")
            if out.is_terminal:
                bar.update(task, completed=batch, pace=pace)
                return
            said = now
            out.print(f"{name}  batch {batch}/{batches}  loss {loss():.4f}  {pace}")

        yield tick


def _rate(images: float) -> str:
    return f"{images:,.0f}" if images >= 10 else f"{images:.2g}"
