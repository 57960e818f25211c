"""A run as it is carried out: every setting has its value, and every value its origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastadv.algorithms.plan import Plan
from fastadv.by_epoch import Points
from fastadv.data import augmentations
from fastadv.data.catalogue import require_known
from fastadv.declared import (
    Count,
    CountOrZero,
    NonNegative,
    Positive,
    Share,
    ShareBelowOne,
    declared,
    may_be_absent,
)
from fastadv.engine.model.fused_norm_choice import FusedNorm
from fastadv.errors import UserError
from fastadv.evaluation.accuracy import specs_of
from fastadv.evaluation.attacks.names import parse_attack
from fastadv.models import MODELS, VARIANTS, with_option
from fastadv.run import optimizer_kinds
from fastadv.run.keeping import kept
from fastadv.run.mixed_labels import require_mixable
from fastadv.run.origin import Origin
from fastadv.run.request import (
    ChangingSide,
    OpenShare,
    ScheduleName,
    Side,
    Width,
    strangers,
)
from fastadv.run.schedules import CYCLED_MOMENTUM, PEAKS, STEPPED, require_schedule
from fastadv.run.spelling import as_flag
from fastadv.threat import Threat


@dataclass(frozen=True)
class RunConfig:
    """What ``resolve_run`` makes of a ``RunRequest``. Only what a run may lack can be None.

    ``plan`` holds the parts, built once: they keep the state of one run, so one ``Session`` is
    built from a ``RunConfig``. ``origins``: setting, slot or option -> where its value came from.
    """

    method: str
    variant: str | None  # None: the form that the recipe follows
    data: str
    model: str
    width: Width | None  # None: the network's own, or a network without one
    depth: Width | None  # the same
    shortcut: Literal["raw", "preact"] | None  # None: a network without this choice
    stem: Literal["cifar", "imagenet"] | None  # the same
    normalize: bool
    dropout: ShareBelowOne
    blocks: tuple[str, ...] | None  # None: those that are recognised, or a method without them
    init: str | None  # None: weights drawn from the seed
    epochs: Count
    batch_size: Count
    optimizer: str
    optimizer_options: str | None  # None: torch's defaults
    lr: NonNegative
    schedule: ScheduleName
    points: Points | None  # None: another schedule
    end_factor: Share | None  # None: a schedule that does not end at a share of its peak
    warmup: Positive | None  # None: no warm-up
    drops: tuple[Positive, ...] | None  # None: a schedule without drops
    drop_factors: tuple[OpenShare, ...] | None  # None: each drop is tenfold, or there is none
    peak: OpenShare | None  # None: a schedule without a peak
    momentum: ShareBelowOne
    cycle_momentum: bool
    nesterov: bool
    weight_decay: NonNegative
    decay_norms: bool
    max_grad_norm: Positive | None  # None: gradients are not clipped
    eps: NonNegative
    eps_warmup: Positive | None  # None: eps from the first update on
    norm: Literal["linf", "l2"]
    amp: bool
    amp_dtype: Literal["bf16", "fp16"]
    attack_dtype: Literal["fp32", "bf16", "fp16"] | None  # None: as the outer pass
    tf32: bool | None  # None: as PyTorch is set
    mode: Literal["auto", "eager", "compiled", "captured"]
    fused_norm: FusedNorm
    bn: Literal["local", "global"]
    pad: CountOrZero
    flip: bool
    padding: Literal["constant", "grey", "reflect"]
    augmentation: str
    limit: Count | None  # None: all training images
    label_noise: Share
    image_size: Side | None  # None: as the files are
    image_sizes: ChangingSide | None  # None: every epoch trains on images as they are
    unlabelled: str | None  # None: labelled images only
    loader: Literal["auto", "device", "dali"]
    skip_broken: bool
    data_root: str | None  # None: the data set's usual place
    download: bool
    select: Literal["val", "test"]
    select_attack: str
    val_fraction: OpenShare
    eval_alpha: Positive | None  # None: each attack's own step
    eval_every: Count
    eval_train: Count | None  # None: no training images
    test_attacks: str
    test_limit: Count | None  # None: all test images
    seed: CountOrZero
    deterministic: bool
    device: str
    out: str | None  # None: runs/METHOD-DATA
    checkpoint_minutes: NonNegative
    save_every: Count
    keep: tuple[str, ...]
    guard_overfitting: Literal["tell", "stop", "back"] | None  # None: nothing looks
    plan: Plan = field(compare=False, repr=False)
    origins: Mapping[str, Origin] = field(compare=False, repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """The part in each slot, and every option of the parts: name -> value."""
        return {**self.plan.slots, **self.plan.options}


def required_settings() -> list[str]:
    """The settings that no run lacks."""
    hints = declared(RunConfig)
    others = ("plan", "origins")
    return [name for name in hints if name not in others and not may_be_absent(hints[name])]


def check(config: RunConfig) -> None:
    """Raise ``UserError`` for an unknown data set and for settings that contradict each other."""
    require_known(config.data)
    if config.drops is not None and config.schedule not in STEPPED:
        raise UserError(
            f"--drops is for --schedule piecewise or multistep; omit it with {config.schedule}."
        )
    require_schedule(
        config.schedule, config.points, config.end_factor, config.warmup, config.epochs
    )
    if config.drop_factors is not None:
        if config.drops is None:
            raise UserError(
                "--drop-factors is for --schedule piecewise or multistep; omit it with "
                f"{config.schedule}."
            )
        if len(config.drop_factors) != len(config.drops):
            raise UserError(
                f"--drop-factors has {len(config.drop_factors)} values for {len(config.drops)} "
                "drops; give one for each of --drops."
            )
    if config.peak is not None and config.schedule not in PEAKS:
        raise UserError(
            f"--peak is for --schedule triangular or one-cycle; omit it with {config.schedule}."
        )
    for name in ("width", "depth", *VARIANTS):
        if getattr(config, name) is None or config.model not in MODELS:
            continue
        takers = with_option(name)
        if config.model not in takers:
            raise UserError(
                f"{as_flag(name)} is for --model {', '.join(takers)}; omit it with {config.model}."
            )
    if config.origins.get("cycle_momentum") is Origin.USER and config.schedule not in PEAKS:
        raise UserError(
            "--cycle-momentum follows the peak of --schedule triangular or one-cycle; omit it with "
            f"{config.schedule}."
        )
    Threat(config.norm, config.eps).require_step(config.eval_alpha)
    # A cycle takes a tenth off at the peak; below it momentum would turn negative.
    cycles = config.cycle_momentum and config.schedule in PEAKS
    if cycles and 0 < config.momentum < CYCLED_MOMENTUM:
        raise UserError(
            f"--momentum must be 0 or at least {CYCLED_MOMENTUM:g} where a {config.schedule} "
            f"schedule lowers it by that much, not {config.momentum:g}; or add --no-cycle-momentum."
        )
    for name in strangers("optimizer", config.optimizer):
        if getattr(config, name):
            raise UserError(
                f"{as_flag(name)} is for --optimizer sgd; omit it with {config.optimizer}."
            )
    optimizer_kinds.require_built(
        config.optimizer,
        config.optimizer_options,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=False,
    )
    if config.nesterov and not config.momentum:
        raise UserError("--nesterov looks ahead along the momentum; omit --momentum 0.")
    require_mixable(config.plan, config.augmentation)
    if config.pad and augmentations.CROP in augmentations.names_in(config.augmentation):
        raise UserError(
            f"--augmentation {config.augmentation} takes the place of shifted crops; omit --pad "
            "with it."
        )
    if config.image_sizes is not None and config.plan.sized:
        plan = config.plan
        slot = next(slot for slot, part in plan.parts.items() if part is plan.sized[0])
        raise UserError(
            f"--image-sizes changes the size of the images, and {slot} {plan.slots[slot]!r} keeps "
            "perturbations of one size, which cannot follow; omit it, or choose another method."
        )
    if config.amp_dtype != "bf16" and not config.amp:
        raise UserError(f"--amp-dtype {config.amp_dtype} is for mixed precision: add --amp.")
    if config.blocks is not None and "block_gradients" not in config.plan.needs:
        raise UserError(
            "--blocks is for adversaries that perturb inside the network; omit it with "
            f"{config.method}."
        )
    kept(config.keep)
    specs_of(config.test_attacks)  # now, and not after the training
    parse_attack(config.select_attack)
