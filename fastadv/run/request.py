"""What a person asks of a run: settings and options of parts, each of which may be left open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

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
from fastadv.run.origin import Origin

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


@dataclass(frozen=True)
class RunRequest:
    """One training run as it is asked for. None: not said, so ``resolve_run`` chooses.

    ``options``: slots of the method (``{"regularizer": "igr"}``) and options of its parts.
    ``of_file``: the settings and options that a file of ``--config`` says.
    ``fastadv train --help`` says what each setting means.
    """

    method: str | None = None
    variant: str | None = None
    data: str | None = None
    model: str | None = None
    width: Width | None = None
    depth: Width | None = None
    shortcut: Literal["raw", "preact"] | None = None
    stem: Literal["cifar", "imagenet"] | None = None
    normalize: bool | None = None
    dropout: ShareBelowOne | None = None
    blocks: tuple[str, ...] | None = None
    init: str | None = None
    epochs: Count | None = None
    batch_size: CountOrAuto | None = None
    optimizer: str | None = None
    optimizer_options: str | None = None
    lr: NonNegative | None = None
    schedule: ScheduleName | None = None
    points: Points | None = None
    end_factor: Share | None = None
    warmup: Positive | None = None
    drops: tuple[Positive, ...] | None = None
    drop_factors: tuple[OpenShare, ...] | None = None
    peak: OpenShare | None = None
    momentum: ShareBelowOne | None = None
    cycle_momentum: bool | None = None
    nesterov: bool | None = None
    weight_decay: NonNegative | None = None
    decay_norms: bool | None = None
    max_grad_norm: Positive | None = None
    eps: NonNegative | None = None
    eps_warmup: Positive | None = None
    norm: Literal["linf", "l2"] | None = None
    amp: bool | None = None
    amp_dtype: Literal["bf16", "fp16"] | None = None
    attack_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    tf32: bool | None = None
    mode: Literal["auto", "eager", "compiled", "captured"] | None = None
    fused_norm: FusedNorm | None = None
    bn: Literal["local", "global"] | None = None
    pad: CountOrZero | None = None
    flip: bool | None = None
    padding: Literal["constant", "grey", "reflect"] | None = None
    augmentation: str | None = None
    limit: Count | None = None
    label_noise: Share | None = None
    image_size: Side | None = None
    image_sizes: ChangingSide | None = None
    unlabelled: str | None = None
    loader: Literal["auto", "device", "dali"] | None = None
    skip_broken: bool | None = None
    data_root: str | None = None
    download: bool | None = None
    select: Literal["val", "test"] | None = None
    select_attack: str | None = None
    val_fraction: OpenShare | None = None
    eval_alpha: Positive | None = None
    eval_every: Count | None = None
    eval_train: Count | None = None
    test_attacks: str | None = None
    test_limit: Count | None = None
    seed: CountOrZero | None = None
    deterministic: bool | None = None
    device: str | None = None
    out: str | None = None
    checkpoint_minutes: NonNegative | None = None
    save_every: Count | None = None
    keep: tuple[str, ...] | None = None
    guard_overfitting: Literal["tell", "stop", "back"] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    of_file: frozenset[str] = field(default=frozenset(), compare=False)

    def origin(self, name: str) -> Origin:
        """Who said the setting or option ``name``: the user, or the file of ``--config``."""
        return Origin.FILE if name in self.of_file else Origin.USER


def setting_types() -> dict[str, Any]:
    """Every setting of a run except the parts' options: name -> type."""
    others = ("options", "of_file")
    return {name: hint for name, hint in declared(RunRequest).items() if name not in others}


def as_flag(name: str) -> str:
    """The setting or option ``name`` as the command line writes it: --batch-size."""
    return "--" + name.replace("_", "-")
