"""The typed configuration of a run, the home of its defaults: TOML in, TOML out.

Hyper-parameters of the parts have their defaults in the parts, those of a method in its row of
``recipes.py``, those of a data set in ``presets.py``; ``settled`` puts them together, once, and
what it found is written into the run folder and used again on resume.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from fastadv.algorithms.plan import Plan
from fastadv.algorithms.resolution import resolve
from fastadv.declared import (
    Count,
    CountOrZero,
    NonNegative,
    Positive,
    Range,
    ShareBelowOne,
    coerce,
    declared,
)
from fastadv.errors import UserError, unknown
from fastadv.evaluation.attacks.names import parse_attack
from fastadv.models import VARIANTS
from fastadv.run.presets import preset_for
from fastadv.run.schedules import STEPPED, TRIANGULAR_MOMENTUM
from fastadv.storage import files, sealed
from fastadv.storage.printable import printable
from fastadv.threat import Threat

OpenShare = Annotated[float, Range(0, 1, open_low=True, open_high=True)]
Width = Annotated[int, Range(1, 65536)]  # more channels or layers than any network has
Side = Annotated[int, Range(1, 65536)]  # the most that JPEG holds

MOST_BYTES = 1 << 20  # of a config.toml


@dataclass(frozen=True)
class TrainConfig:
    """One training run. None means: what the method and the data set usually take."""

    method: str = "apart"
    data: str = "digits"
    model: str | None = None
    width: Width | None = None
    depth: Width | None = None
    shortcut: Literal["raw", "preact"] | None = None
    stem: Literal["cifar", "imagenet"] | None = None
    normalize: bool | None = None
    dropout: ShareBelowOne = 0.0
    epochs: Count | None = None
    batch_size: Count | None = None
    lr: NonNegative | None = None
    schedule: Literal["triangular", "piecewise", "multistep", "cosine", "constant"] | None = None
    drops: tuple[Positive, ...] | None = None
    momentum: ShareBelowOne = 0.9
    cycle_momentum: bool | None = None
    nesterov: bool | None = None
    weight_decay: NonNegative | None = None
    max_grad_norm: Positive | None = None
    eps: NonNegative | None = None
    norm: Literal["linf", "l2"] = "linf"
    amp: bool = False
    amp_dtype: Literal["bf16", "fp16"] = "bf16"
    attack_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    tf32: bool | None = None
    mode: Literal["auto", "eager", "compiled", "captured"] = "auto"
    pad: CountOrZero | None = None
    flip: bool | None = None
    padding: Literal["constant", "grey", "reflect"] | None = None
    augmentation: Literal["base", "rotate", "autoaugment"] | None = None
    limit: Count | None = None
    image_size: Side | None = None
    unlabelled: str | None = None
    loader: Literal["auto", "device", "dali"] = "auto"
    data_root: str | None = None
    download: bool = False
    select: Literal["val", "test"] = "val"
    select_attack: str = "pgd-10"
    val_fraction: OpenShare | None = None
    eval_alpha: Positive | None = None
    eval_every: Count = 1
    test_attacks: str = "clean,pgd-20"
    test_limit: Count | None = None
    seed: CountOrZero = 0
    deterministic: bool = False
    device: str = "auto"
    out: str | None = None
    checkpoint_minutes: NonNegative = 5.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def plan(self) -> Plan:
        """The parts of the method with this run's options."""
        return resolve(self.method, self.options)


# What is None in no run, though it may be left open.
ALWAYS_SETTLED: tuple[str, ...] = (
    *("model", "normalize", "epochs", "batch_size", "lr", "schedule", "cycle_momentum"),
    *("nesterov", "weight_decay", "eps", "pad", "flip", "padding", "augmentation"),
    "val_fraction",
)


def config_types() -> dict[str, Any]:
    """Every setting of a run but the parts' options: name -> type."""
    return {name: hint for name, hint in declared(TrainConfig).items() if name != "options"}


def settled(config: TrainConfig) -> TrainConfig:
    """``config`` with every None that a preset knows filled in, checked; parts' options too."""
    types = config_types()
    given = {
        name: coerce(_flag(name), getattr(config, name), types[name])
        for name in types
        if getattr(config, name) is not None
    }
    usual, usual_options = preset_for(config.method, config.data, given, config.options)
    plan = resolve(config.method, usual_options | dict(config.options))
    # Published settings come before these, the user's before both.
    plain = {"augmentation": "base", "cycle_momentum": True, "nesterov": False}
    values: dict[str, Any] = plain | {"normalize": True} | usual | given
    # What goes with a published setting goes away with it where the user replaced that.
    if values["schedule"] not in STEPPED and "drops" not in given:
        values.pop("drops", None)
    for name, networks in VARIANTS.items():
        if values["model"] not in networks and name not in given:
            values.pop(name, None)
    if "augmentation" not in given and plan.adversary.sample_state():
        values["augmentation"] = "base"
    if values["model"] != usual["model"] and "width" not in given:
        values.pop("width", None)
    if "eps" in given and "eval_alpha" not in given:
        values.pop("eval_alpha", None)
    if "pad" in plan.options and "pad" not in config.options:
        plan = resolve(config.method, usual_options | dict(config.options) | {"pad": values["pad"]})
    settings = TrainConfig(**values, options=dict(plan.slots) | dict(plan.options))
    _check(settings)
    return settings


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check(config: TrainConfig) -> None:
    if config.drops is not None and config.schedule not in STEPPED:
        raise UserError(
            f"--drops are for --schedule piecewise or multistep; {config.schedule} has none, "
            "leave them away."
        )
    Threat(config.norm, float(config.eps or 0.0)).require_step(config.eval_alpha)
    # CyclicLR's defaults take a tenth off at the peak; below it momentum would turn negative.
    cycles = config.cycle_momentum and config.schedule == "triangular"
    if cycles and 0 < config.momentum < TRIANGULAR_MOMENTUM:
        raise UserError(
            f"--momentum must be 0 or at least {TRIANGULAR_MOMENTUM:g} where a triangular schedule "
            f"lowers it by that much, not {config.momentum:g}; or add --no-cycle-momentum."
        )
    if config.nesterov and not config.momentum:
        raise UserError("--nesterov looks ahead along the momentum; leave --momentum 0 away.")
    if config.amp_dtype != "bf16" and not config.amp:
        raise UserError(f"--amp-dtype {config.amp_dtype} is for mixed precision: add --amp.")
    for name in config.test_attacks.split(","):
        parse_attack(name)  # not only when all is trained
    parse_attack(config.select_attack)


def to_toml(config: TrainConfig) -> str:
    """The configuration as TOML; settings that are None are left out."""
    flat = {
        entry.name: getattr(config, entry.name)
        for entry in dataclasses.fields(config)
        if entry.name != "options"
    }
    lines = [f"{name} = {_literal(value)}" for name, value in flat.items() if value is not None]
    lines += ["", "[options]"]
    lines += [f"{k} = {_literal(v)}" for k, v in config.options.items() if v is not None]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text) + '"'


def from_toml(path: Path) -> TrainConfig:
    """The configuration in ``path``; an unknown key is an error that names the nearest."""
    try:
        content = files.read(path, MOST_BYTES)
    except OSError as error:
        raise UserError(
            f"Cannot read the configuration {printable(path)}: {error.strerror}."
        ) from None
    return from_bytes(content, path)


def from_bytes(content: bytes, path: Path) -> TrainConfig:
    """The configuration that ``content`` of the file ``path`` holds, whole by its checksum."""
    shown = printable(path)
    try:
        text = content.decode("utf-8")
        sealed.check_text(text)
        found = tomllib.loads(text)
    except sealed.Broken:
        raise UserError(
            f"{shown} is damaged or was changed: its checksum does not match. Put back what it "
            "was, or take its last line away to use it as it is."
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:  # what is no TOML, and what nests
        raise UserError(
            f"Cannot read the configuration {shown}: {printable(str(error))}."
        ) from None
    try:
        return _from_tables(found, shown)
    except UserError as error:
        raise UserError(printable(str(error))) from None
    except (TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise UserError(
            f"A setting in {shown} is of another type than it has: {printable(str(error))}."
        ) from None


def _from_tables(found: dict[str, Any], path: str) -> TrainConfig:
    options = found.pop("options", {})
    if not isinstance(options, Mapping):
        raise UserError(f"The options in {path} must be a table, not {options!r}.")
    known = config_types()
    for name in found:
        if name not in known:
            raise unknown(f"setting in {path}", name, known)
        is_text = isinstance(getattr(TrainConfig, name), str) or known[name] == str | None
        if is_text and not isinstance(found[name], str):
            raise UserError(f"{name} in {path} must be a text, not {found[name]!r}.")
    values = {name: coerce(name, value, known[name]) for name, value in found.items()}
    return TrainConfig(**values, options=options)


def require_settled(config: TrainConfig) -> None:
    """Raise ``UserError`` unless ``config`` is whole, as ``settled`` leaves it.

    A run folder's file that lost a line would otherwise go on as another run, with a default.
    """
    plan = config.plan()
    parts = {**plan.slots, **plan.options}
    lost = [name for name in ALWAYS_SETTLED if getattr(config, name) is None]
    lost += [name for name in parts if parts[name] is not None and name not in config.options]
    if lost:
        raise UserError(
            f"The run's configuration has lost {', '.join(lost)}; put back what it was begun with."
        )
    _check(config)
