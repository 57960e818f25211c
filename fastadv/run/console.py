"""The terminal output of a run: a progress bar, a line per epoch, a table at the end."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import rich.console
from rich.console import RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fastadv.engine.model.precision import shown
from fastadv.engine.process import distributed

if TYPE_CHECKING:
    from fastadv.run.run_folder import RunFolder
    from fastadv.run.session import Session

SAY_EVERY = 30.0  # seconds between lines about an evaluation where there is no terminal


class Tick(Protocol):
    """Takes how many images have been evaluated, a line about them and the seconds left (None: as
    the images before took)."""

    def __call__(self, images: int, note: str = "", left: float | None = None) -> None: ...


class Terminal(rich.console.Console):
    """A closed pipe (``| head``) does not end the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


class _Titled(Progress):
    """Bars between a sentence and a line."""

    title = note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield Text(self.title, no_wrap=False, overflow="fold")  # as narrow as the terminal is
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(_end_of(self.note, self.console.width), no_wrap=True)


class Console:
    """Writes to the terminal, or plain lines without one. Only rank 0 writes."""

    def __init__(self, console: rich.console.Console | None = None) -> None:
        quiet = distributed.rank() != 0
        self.out = console or Terminal(highlight=False, soft_wrap=True, quiet=quiet)
        self._total = 1
        self._began = time.monotonic()
        self._done_before = 0

    def start(self, session: Session, folder: RunFolder, epoch: int) -> None:
        """Print the method, the data, the network and the device."""
        config = session.config
        parts = ", ".join(f"{s} {n}" for s, n in session.step.plan.slots.items() if n != "none")
        weights = sum(parameter.numel() for parameter in session.model.parameters())
        form = f", variant {config.variant}," if config.variant else ""
        self.out.print(
            f"[bold]{escape(config.method)}[/]{escape(form)} on {escape(config.data)}: {parts}"
        )
        runs_as = session.step.internals.runs_as
        warmup = config.eps_warmup
        rises = "" if warmup is None else f" (from 0 over {warmup:g} epochs)"
        self.out.print(
            f"{escape(config.model)}, {weights:,} weights, {session.data.trained_on:,} "
            f"training images, {config.norm} eps {session.threat.eps:.4g}{rises}, batch "
            f"{config.batch_size}, {session.device}, {trained_in(session)}, {runs_as}"
        )
        if distributed.world_size() > 1:
            self.out.print(f"{distributed.world_size()} processes share each batch")
        evaluated_in = shown(None, session.model, session.device)
        if trained_in(session) != evaluated_in:
            self.out.print(f"trains in {trained_in(session)}, evaluates in {evaluated_in}")
        if config.label_noise:
            self.out.print(f"label noise: {session.data.training.label_noise}")
        self.out.print(f"run folder: {escape(str(folder.path))}")
        if config.select == "test":
            self.out.print(
                "[yellow]The best epoch is chosen on the test set, as published code does: "
                'the "best" row is then too high; compare it only with other such numbers.[/]'
            )
        if epoch:
            self.out.print(f"continuing in epoch {epoch + 1}")
        self._total = config.epochs
        self._began, self._done_before = time.monotonic(), epoch

    @contextmanager
    def epoch(self, epoch: int, done: int, batches: int) -> Iterator[Callable[[int], None]]:
        """A bar over the batches of ``epoch``; yields the function to call after each."""
        images, began = 0, time.monotonic()
        columns = (
            TextColumn(f"epoch {epoch + 1}/{self._total}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
        )
        bar = Progress(*columns, console=self.out, transient=True, disable=not self.out.is_terminal)
        with bar:
            task = bar.add_task("", total=batches, completed=done, rate="", eta="")

            def tick(count: int) -> None:
                nonlocal images
                images += count
                rate = images / max(time.monotonic() - began, 1e-9)
                bar.update(task, advance=1, rate=f"{rate:,.0f} images/s", eta=self._eta(epoch))

            yield tick

    @contextmanager
    def evaluating(self, title: str, attack: str, done: int, total: int) -> Iterator[Tick]:
        """A bar over ``total`` images below ``title``; yields the function to call with what is
        done so far. Without a terminal, a line when an evaluation takes long."""
        began = said = time.monotonic()
        name = _end_of(attack, 16)
        bar = _Titled(
            TextColumn(escape(name)),
            BarColumn(min(20, 26 - len(name))),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.fields[pace]}"),
            TimeElapsedColumn(),
            console=self.out,
            transient=True,
            disable=not self.out.is_terminal,
        )
        bar.title = title
        with bar:
            task = bar.add_task("", total=total, completed=done, pace="")

            def tick(images: int, note: str = "", left: float | None = None) -> None:
                nonlocal said
                now = time.monotonic()
                rate = (images - done) / max(now - began, 1e-9)
                pace = f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"
                if left is None:
                    left = (total - images) / rate if rate > 0 else math.nan
                if not math.isnan(left):
                    pace += f"  {_clock(left)} left"
                bar.note = note
                bar.update(task, completed=images, pace=pace)
                if not self.out.is_terminal and now - said >= SAY_EVERY:
                    said = now
                    line = f"{title}; {attack}: {images:,}/{total:,}  {pace}"
                    self.out.print(escape(f"{line}  {note}" if note else line))

            yield tick

    @contextmanager
    def checking(
        self, title: str
    ) -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
        """A bar over the passes of a sanity check of ``title``; yields the function that says what
        it will cost, and the one to call with the passes done and the most there can be."""
        columns = (TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
        terminal = self.out.is_terminal
        with Progress(*columns, console=self.out, transient=True, disable=not terminal) as bar:
            task = bar.add_task("checking", total=None)

            def say(sentence: str) -> None:
                self.out.print(escape(f"{title}: {sentence}"))

            yield say, lambda done, most: bar.update(task, completed=done, total=most)

    def _eta(self, epoch: int) -> str:
        """The estimated time of the remaining epochs, evaluation included."""
        finished = epoch - self._done_before
        if finished < 1:
            return ""
        left = (time.monotonic() - self._began) / finished * (self._total - epoch)
        return f"run: {_clock(left)} left"

    def line(self, line: dict[str, Any]) -> None:
        """One epoch."""
        scores = "  ".join(
            _scores(line, of) for of in ("val", "test", "train") if f"{of}_n" in line
        )
        self.out.print(
            f"epoch {line['epoch']:3d}/{self._total}  loss {line['loss']:.4f}  "
            f"lr {line['lr']:.4f}  {scores}  train {line['train_seconds']:.1f} s  "
            f"eval {line['eval_seconds']:.1f} s"
        )

    def say(self, sentence: str) -> None:
        """A fact about the run."""
        self.out.print(escape(sentence))

    def warn(self, sentence: str) -> None:
        self.out.print(f"[yellow]warning:[/] {escape(sentence)}")

    def finish(self, summary: dict[str, Any], folder: RunFolder) -> None:
        """The results table, in the papers' form."""
        table = Table(title=f"test accuracy, % of {summary['n']:,} images, and its 95 % interval")
        for name in ("attack", "best", "", "last", "", "diff"):
            table.add_column(name, justify="left" if name == "attack" else "right")
        for attack in summary["last"]:
            best, last = 100 * summary["best"][attack], 100 * summary["last"][attack]
            ends = [as_interval(summary["intervals"][w][attack]) for w in ("best", "last")]
            diff = f"{best - last:.2f}"
            table.add_row(attack, f"{best:.2f}", ends[0], f"{last:.2f}", ends[1], diff)
        self.out.print(table)
        self.out.print(
            f"best epoch {summary['best_epoch']}, training {summary['train_seconds']:.1f} s, "
            f"evaluation {summary['eval_seconds']:.1f} s; saved in {escape(str(folder.path))}"
        )


def _scores(line: dict[str, Any], of: str) -> str:
    """The accuracies on the images called ``of``, and how many there are."""
    shown = [
        f"{name.replace('_', ' ')} {100 * value:5.1f} %"
        for name, value in line.items()
        if name.startswith(f"{of}_") and f"{name}_interval" in line
    ]
    return "  ".join(shown) + f" of {line[f'{of}_n']:,}"


def as_interval(ends: Sequence[float]) -> str:
    """The ends of an interval in [0,1], as percentages."""
    return f"{100 * ends[0]:.1f}-{100 * ends[1]:.1f}"


def trained_in(session: Session) -> str:
    """The precision of a step's passes, in words."""
    net = session.step.internals.net
    outer, attack = (
        shown(dtype, session.model, session.device) for dtype in (net.outer_dtype, net.attack_dtype)
    )
    return outer if attack == outer else f"{outer} (attack {attack})"


def _end_of(text: str, width: int) -> str:
    """``text``, or as much of its end as there is room for."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
