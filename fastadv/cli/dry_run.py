"""``fastadv train --dry-run``: what a run would do and take, without a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from fastadv.cli.explain import passes
from fastadv.cli.settings import SETTINGS
from fastadv.cli.value_words import shown
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError
from fastadv.printing.layout import columns, filled
from fastadv.run.config import RunConfig
from fastadv.run.fitting import AUTO
from fastadv.run.origin import Origin
from fastadv.run.rehearsal import NOT_COUNTED, Rehearsal, chosen, prepared, rehearse, with_batch
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.spelling import in_dashes
from fastadv.storage.printable import printable

NAME, VALUE = 22, 24  # columns


def dry_run(request: RunRequest) -> None:
    """Print every setting of the run with its origin, its cost, and the time and memory that a few
    of its steps take. Raises ``UserError`` where the run would."""
    config = resolve_run(request)
    choose_device(config.device)
    with _telling_of_download(config):
        config = with_batch(request)
    with ExitStack() as ending:
        try:
            with _telling_of_download(config):
                session = ending.enter_context(prepared(config))
        except UserError:
            _show(config, {})
            raise
        _show(config, chosen(session))
        found = rehearse(session)
    for line in measured(found):
        print(filled(line, hang="  "))


def _show(config: RunConfig, used: Mapping[str, str]) -> None:
    for line in described(config, used):
        print(line)
    print(flush=True)


@contextmanager
def _telling_of_download(config: RunConfig) -> Iterator[None]:
    """Inside, a ``UserError`` says that nothing was downloaded, if that was asked for."""
    try:
        yield
    except UserError as error:
        if not config.download:
            raise
        raise UserError(
            f"Nothing was measured, since a dry run does not --download: {error}"
        ) from None


def described(config: RunConfig, used: Mapping[str, str]) -> Iterator[str]:
    """Lines about every setting, in the groups of the help, and the cost of the method. ``used``:
    what settings that are "auto" stand for here."""
    width = columns()
    unset = []
    for title, names in SETTINGS.items():
        yield f"{title}:"
        for name in names:
            value = getattr(config, name)
            if value is None:
                unset.append(in_dashes(name))
            elif value == AUTO and name in used:
                yield _line(name, f"{used[name]} ({AUTO})", config.origins[name], width)
            else:
                yield _line(name, value, config.origins[name], width)
    yield "Parts of the method:"
    for slot, part in config.plan.slots.items():
        yield _line(slot, part, config.origins[slot], width)
    options = {n: v for n, v in config.plan.options.items() if n not in vars(config)}
    if options:
        yield "Options of the parts:"
    for name, value in options.items():
        yield _line(name, value, config.origins.get(name, Origin.PART), width)
    if unset:
        yield filled(f"Not set: {', '.join(unset)}", width, hang="  ")
    yield ""
    yield filled(f"passes per batch: {passes(config.plan)}", width, hang="  ")


def _line(name: str, value: Any, origin: Origin, width: int) -> str:
    text = printable(shown(value))
    line = f"  {in_dashes(name):{NAME}}{text:{VALUE}}  {origin}"
    return filled(line.rstrip(), width, hang="  " + " " * NAME)


def measured(found: Rehearsal) -> Iterator[str]:
    """Sentences about what was measured."""
    config = found.session.config
    many = sum(len(stage.seconds) for stage in found.stages)
    sizes = f" at {len(found.stages)} image sizes" if len(found.stages) > 1 else ""
    low, middle, high = (found.training(share) for share in (0.1, 0.5, 0.9))
    a_step = 1000 * middle / (found.batches * config.epochs)
    yield (
        f"measured: {many} steps on {found.session.device}{sizes}, after {NOT_COUNTED} that do not "
        f"count; {a_step:,.4g} ms each (median), {found.session.step.internals.runs_as}"
    )
    yield (
        f"training: {_time(middle)} for {config.epochs:,} epochs of {found.batches:,} batches; "
        f"{_time(low)} to {_time(high)} if all steps were as the 10 % fastest or slowest"
    )
    often = -(-config.epochs // config.eval_every)
    yield (
        f"evaluation: {_time(found.evaluation())}, from one batch of each set: {often:,} "
        f"of {config.select_attack}, and the final test of the best and the last weights"
        + (f"; not included: {', '.join(found.not_included)}" if found.not_included else "")
    )
    if found.peak is not None:
        where = "of the device" if found.session.device.type == "cuda" else "of the process"
        yield f"memory: {found.peak / 2**20:,.0f} MiB {where} at most"
    yield "dry run: nothing was written"


def _time(seconds: float) -> str:
    """``seconds`` in the unit that reads best."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
