"""What a person asks of a run: settings and options of parts, each of which may be left open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, get_args

from fastadv.by_epoch import Phases, Points
from fastadv.declared import (
    Count,
    CountOrAuto,
    CountOrZero,
    MayChange,
    NonNegative,
    OrCode,
    Positive,
    Range,
    Share,
    ShareBelowOne,
    declared,
)
from fastadv.engine.model.fused_norm_choice import FusedNorm
from fastadv.models import VARIANTS
from fastadv.run.origin import Origin
from fastadv.run.role import Effect, For, Role, setting
from fastadv.run.schedules import ENDS, STEPPED

OpenShare = Annotated[float, Range(0, 1, open_low=True, open_high=True)]
Width = Annotated[int, Range(1, 65536)]  # more channels or layers than any network has
ScheduleName = Annotated[
    Literal[
        "triangular",
        "piecewise",
        "multistep",
        "cosine",
        "cosine-epoch",
        "linear",
        "exponential",
        "points",
        "one-cycle",
        "constant",
    ],
    OrCode(),
]
Side = Annotated[int, Range(1, 65536)]  # the most that JPEG holds
ChangingSide = Annotated[int | Phases, Range(1, 65536), MayChange(ramps=False)]

_RATED = tuple(name for name in get_args(ScheduleName) if name != "points")
_STEPPED = For("schedule", STEPPED)
_SGD = For("optimizer", ("sgd",))
_MODEL, _NORM = For("model"), For("norm")


@dataclass(frozen=True)
class RunRequest:
    """One training run as it is asked for. None: not said, so ``resolve_run`` chooses.

    ``options``: slots of the method (``{"regularizer": "igr"}``) and options of its parts.
    ``of_file``: the settings and options that a file of ``--config`` says.
    ``fastadv train --help`` says what each setting means, and its field here what it is to the
    run (``Role``): one that says nothing decides what is trained.
    """

    method: str | None = None
    variant: str | None = setting(For("method"))
    data: str | None = setting(effect=Effect.NOTHING, place=True, of_method=False)
    model: str | None = None
    width: Width | None = setting(_MODEL)
    depth: Width | None = setting(_MODEL)
    shortcut: Literal["raw", "preact"] | None = setting(For("model", VARIANTS["shortcut"]))
    stem: Literal["cifar", "imagenet"] | None = setting(For("model", VARIANTS["stem"]))
    normalize: bool | None = None
    dropout: ShareBelowOne | None = None
    blocks: tuple[str, ...] | None = setting(_MODEL)
    init: str | None = setting(effect=Effect.NOTHING, place=True, may_be_missing=True)
    epochs: Count | None = setting(effect=Effect.LENGTH)
    batch_size: CountOrAuto | None = setting(measured=True)
    optimizer: str | None = None
    optimizer_options: str | None = setting(For("optimizer"))
    lr: NonNegative | None = setting(For("schedule", _RATED))
    schedule: ScheduleName | None = None
    points: Points | None = setting(For("schedule"))
    end_factor: Share | None = setting(For("schedule", tuple(ENDS)))
    warmup: Positive | None = None
    drops: tuple[Positive, ...] | None = setting(_STEPPED)
    drop_factors: tuple[OpenShare, ...] | None = setting(_STEPPED, For("drops"))
    peak: OpenShare | None = setting(For("schedule"))
    momentum: ShareBelowOne | None = setting(_SGD)
    cycle_momentum: bool | None = setting(_SGD)
    nesterov: bool | None = setting(_SGD)
    weight_decay: NonNegative | None = None
    decay_norms: bool | None = None
    max_grad_norm: Positive | None = None
    eps: NonNegative | None = setting(_NORM)
    eps_warmup: Positive | None = None
    norm: Literal["linf", "l2"] | None = None
    amp: bool | None = None
    amp_dtype: Literal["bf16", "fp16"] | None = setting(For("amp"))
    attack_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    tf32: bool | None = None
    mode: Literal["auto", "eager", "compiled", "captured"] | None = setting(
        effect=Effect.BITS, measured=True, of_method=False
    )
    fused_norm: FusedNorm | None = setting(effect=Effect.BITS, measured=True, of_method=False)
    bn: Literal["local", "global"] | None = None
    pad: CountOrZero | None = setting(For("augmentation"))
    flip: bool | None = None
    padding: Literal["constant", "grey", "reflect"] | None = None
    augmentation: str | None = None
    limit: Count | None = None
    label_noise: Share | None = None
    image_size: Side | None = None
    image_sizes: ChangingSide | None = None
    unlabelled: str | None = setting(effect=Effect.NOTHING, place=True)
    loader: Literal["auto", "device", "dali"] | None = setting(of_method=False)
    skip_broken: bool | None = setting(effect=Effect.NOTHING, of_method=False)
    data_root: str | None = setting(
        effect=Effect.NOTHING, place=True, may_be_missing=True, each_process=True, of_method=False
    )
    download: bool | None = setting(effect=Effect.NOTHING, of_method=False)
    select: Literal["val", "test"] | None = setting(chooses=True)
    select_attack: str | None = setting(effect=Effect.EVALUATION, chooses=True)
    val_fraction: OpenShare | None = None
    eval_alpha: Positive | None = setting(
        For("eps"), _NORM, effect=Effect.EVALUATION, chooses=True, of_method=False
    )
    eval_every: Count | None = setting(effect=Effect.EVALUATION)
    eval_train: Count | None = setting(effect=Effect.EVALUATION, of_method=False)
    test_attacks: str | None = setting(effect=Effect.EVALUATION, of_method=False)
    test_limit: Count | None = setting(effect=Effect.EVALUATION, of_method=False)
    seed: CountOrZero | None = setting(of_method=False)
    deterministic: bool | None = setting(effect=Effect.BITS, of_method=False)
    device: str | None = setting(effect=Effect.BITS, each_process=True, of_method=False)
    out: str | None = setting(effect=Effect.NOTHING, each_process=True, of_method=False)
    checkpoint_minutes: NonNegative | None = setting(effect=Effect.NOTHING, of_method=False)
    save_every: Count | None = setting(effect=Effect.NOTHING, of_method=False, of_folder=True)
    keep: tuple[str, ...] | None = setting(effect=Effect.NOTHING, of_method=False, of_folder=True)
    guard_overfitting: Literal["tell", "stop", "back"] | None = setting(
        effect=Effect.BITS, of_method=False
    )
    options: Mapping[str, Any] = field(default_factory=dict)
    of_file: frozenset[str] = field(default=frozenset(), compare=False)

    def origin(self, name: str) -> Origin:
        """Who said the setting or option ``name``: the user, or the file of ``--config``."""
        return Origin.FILE if name in self.of_file else Origin.USER


def setting_types() -> dict[str, Any]:
    """Every setting of a run except the parts' options: name -> type."""
    others = ("options", "of_file")
    return {name: hint for name, hint in declared(RunRequest).items() if name not in others}


def roles() -> dict[str, Role]:
    """What each of these settings is to its run: name -> role."""
    said = {entry.name: entry.metadata.get("role", Role()) for entry in fields(RunRequest)}
    return {name: said[name] for name in setting_types()}


def strangers(setting: str, value: str) -> tuple[str, ...]:
    """The settings that go with some values of ``setting``, and not with ``value``."""
    found = [(name, other) for name, role in roles().items() for other in role.beside]
    return tuple(
        name
        for name, other in found
        if other.setting == setting and other.values and value not in other.values
    )
