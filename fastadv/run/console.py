"""The terminal output of a run: a progress bar, a row per epoch, a table at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import rich.console
from rich.console import RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fastadv.engine.model.precision import shown
from fastadv.engine.process import distributed
from fastadv.engine.process.one_voice import is_first
from fastadv.printing.terminal import SAY_EVERY, Terminal
from fastadv.run.epoch_progress import EpochTick, epoch_progress
from fastadv.run.epoch_table import EpochTable
from fastadv.run.short_words import clock, end_of
from fastadv.run.time_left import TimeLeft
from fastadv.storage.printable import printable, safe_sentence

if TYPE_CHECKING:
    from fastadv.run.run_folder import RunFolder
    from fastadv.run.session import Session


class Tick(Protocol):
    """Takes how many images have been evaluated, a line about them and the seconds left (None: as
    the images before took)."""

    def __call__(self, images: int, note: str = "", left: float | None = None) -> None: ...


class _Titled(Progress):
    """Bars between a sentence and a line."""

    title = note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield Text(self.title, no_wrap=False, overflow="fold")  # as narrow as the terminal is
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(end_of(self.note, self.console.width), no_wrap=True)


class Console:
    """Writes to the terminal, or plain lines without one. Only rank 0 writes."""

    def __init__(self, console: rich.console.Console | None = None) -> None:
        quiet = distributed.rank() != 0 or not is_first()  # also before the group is joined
        self.out = console or Terminal(quiet=quiet)
        self._total = 1
        self._table = EpochTable(1, {}, "")
        self._left: TimeLeft | None = None  # None: before the first epoch

    def start(self, session: Session, folder: RunFolder, epoch: int) -> None:
        """Print the method, the data, the network and the device."""
        config = session.config
        parts = ", ".join(f"{s} {n}" for s, n in session.step.plan.slots.items() if n != "none")
        weights = sum(parameter.numel() for parameter in session.model.parameters())
        form = f", variant {config.variant}," if config.variant else ""
        self.out.print(
            f"[bold]{escape(config.method)}[/]{escape(form)} on "
            f"{escape(printable(config.data))}: {parts}"
        )
        runs_as = session.step.internals.runs_as
        warmup = config.eps_warmup
        rises = "" if warmup is None else f" (from 0 over {warmup:g} epochs)"
        self.out.print(
            f"{escape(printable(config.model))}, {weights:,} weights, {session.data.trained_on:,} "
            f"training images, {config.norm} eps {session.threat.eps:.4g}{rises}, batch "
            f"{config.batch_size}, {session.device}, {trained_in(session)}, {runs_as}"
        )
        if distributed.world_size() > 1:
            of_all = ", with batch statistics of all" if config.bn == "global" else ""
            self.out.print(f"{distributed.world_size()} processes share each batch{of_all}")
        evaluated_in = shown(None, session.model, session.device)
        if trained_in(session) != evaluated_in:
            self.out.print(f"trains in {trained_in(session)}, evaluates in {evaluated_in}")
        if config.label_noise:
            self.out.print(f"label noise: {session.data.training.label_noise}")
        if session.initial is not None and session.initial.said and not epoch:
            begun = f"begins with {printable(str(config.init))}: {session.initial.said}"
            self.out.print(escape(begun))
        self.out.print(f"run folder: {escape(printable(folder.path))}")
        if config.select == "test":
            self.out.print(
                "[yellow]The best epoch is chosen on the test set, as published code does: "
                'the "best" row is then too high; compare it only with other such numbers.[/]'
            )
        if epoch:
            ended = epoch >= config.epochs
            self.say(f"continuing {'with the final test' if ended else f'in epoch {epoch + 1}'}")
        self._total = config.epochs
        sets: dict[str, int] = {config.select: len(session.data.validation)}
        if config.eval_train is not None:
            sets["train"] = len(session.data.training.limited(config.eval_train))
        self._table = EpochTable(config.epochs, sets, config.select_attack)

    def epoch(self, epoch: int, done: int, batches: int) -> AbstractContextManager[EpochTick]:
        """A bar over the batches of ``epoch``, or one line per minute; gives what to call after
        each batch."""
        if self._left is None:
            self._left = TimeLeft(self._total, batches, epoch, done)
        return epoch_progress(self.out, self._total, self._left, epoch, done, batches)

    @contextmanager
    def evaluating(self, title: str, attack: str, done: int, total: int) -> Iterator[Tick]:
        """A bar over ``total`` images below ``title``; yields the function to call with what is
        done so far. Without a terminal, a line when an evaluation takes long."""
        began = said = time.monotonic()
        name = end_of(attack, 16)
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
                    pace += f"  {clock(left)} left"
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

    def line(self, line: dict[str, Any]) -> None:
        """One epoch."""
        seconds, left = line["train_seconds"] + line["eval_seconds"], None
        if self._left is not None:
            self._left.epoch_ends(line["epoch"])
            left = self._left.after(line["epoch"], 0)
        for text in (*self._table.heads(), self._table.row(line, seconds, left)):
            self.out.print(escape(text))

    def say(self, sentence: str) -> None:
        """A fact about the run."""
        self.out.print(escape(sentence))

    def warn(self, sentence: str) -> None:
        self.out.print(f"[yellow]warning:[/] {escape(safe_sentence(sentence))}")

    def finish_again(self, summary: dict[str, Any], folder: RunFolder) -> None:
        """The results of a run that has ended before."""
        self.say(f"{printable(folder.path)} has finished; there is nothing left to train")
        self.finish(summary, folder)

    def finish(self, summary: dict[str, Any], folder: RunFolder) -> None:
        """The results table, in the papers' form."""
        table = Table(title=f"test accuracy, % of {summary['n']:,} images, and its 95 % interval")
        for name in ("attack", "best", "", "last", "", "diff"):
            table.add_column(name, justify="left" if name == "attack" else "right")
        if summary["best"] is None:  # those weights are not there
            table = _one_column(summary, str(table.title))
        for attack in summary["last"] if summary["best"] is not None else ():
            best, last = 100 * summary["best"][attack], 100 * summary["last"][attack]
            ends = [as_interval(summary["intervals"][w][attack]) for w in ("best", "last")]
            diff = f"{best - last:.2f}"
            table.add_row(attack, f"{best:.2f}", ends[0], f"{last:.2f}", ends[1], diff)
        self.out.print(table)
        self.out.print(
            f"best epoch {summary['best_epoch']}, training {summary['train_seconds']:.1f} s, "
            f"evaluation {summary['eval_seconds']:.1f} s; saved in {escape(printable(folder.path))}"
        )


def _one_column(summary: dict[str, Any], title: str) -> Table:
    """The results of the last weights alone."""
    table = Table("attack", title=title)
    for name in ("last", ""):
        table.add_column(name, justify="right")
    for attack, score in summary["last"].items():
        ends = as_interval(summary["intervals"]["last"][attack])
        table.add_row(attack, f"{100 * score:.2f}", ends)
    return table


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
