"""Turn typed settings into command-line options, so that no flag is written twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_origin

import typer

from fastadv.algorithms.options import all_options
from fastadv.algorithms.parts import PARTS, names
from fastadv.declared import describe, plain_type
from fastadv.run.defaults import DEFAULTS
from fastadv.run.request import setting_types

SETTING_HELP: Mapping[str, str] = {
    "method": "training method; `fastadv methods` lists them",
    "data": "digits, cifar10, cifar100, svhn, synthetic, folder:PATH, npz:PATH, tinyimagenet:PATH",
    "model": "network, or module:callable for your own",
    "width": "channels of the first stage (Wide ResNet: widening factor)",
    "depth": "layers of a Wide ResNet",
    "shortcut": "which published PreAct shortcut: raw or preact",
    "stem": "first layers of a ResNet: cifar (3x3) or imagenet (7x7, pooled)",
    "normalize": "scale images by the data's mean and deviation as the network's first layer",
    "dropout": "dropout before the classifier",
    "epochs": "passes over the training set",
    "batch_size": "images a step",
    "lr": "peak learning rate",
    "schedule": "triangular, piecewise, multistep, cosine or constant",
    "drops": "epochs (below 1: shares of the run) at which the rate falls tenfold [0.5,0.75]",
    "momentum": "SGD momentum",
    "cycle_momentum": "lower momentum by 0.1 at the peak of a triangular schedule, as published",
    "nesterov": "Nesterov momentum",
    "weight_decay": "SGD weight decay",
    "max_grad_norm": "clip the gradient norm",
    "eps": "radius of the threat model in pixels of [0,1], such as 8/255",
    "norm": "linf or l2",
    "amp": "mixed precision for attack and outer pass",
    "amp_dtype": "bf16, or fp16 with loss scaling",
    "attack_dtype": "the attack's own precision: fp32, bf16 or fp16",
    "tf32": "float32 products on a GPU rounded to TF32 [torch's own: convolutions only]",
    "mode": "auto, eager, compiled or captured",
    "pad": "random crops of the image padded by this many pixels",
    "flip": "random horizontal flips",
    "padding": "how crops are padded: constant (black), grey or reflect",
    "augmentation": "base (crop, flip), rotate (15 degrees at most too) or autoaugment (with "
    "cutout, both from half of the run on)",
    "limit": "train on this many images only",
    "unlabelled": "images with pseudo-labels (fastadv pseudo-label writes them), for RST",
    "image_size": "bring the images of a folder to this height and width",
    "loader": "auto, device (all images in memory) or dali (decode files while training)",
    "data_root": "where data sets lie",
    "download": "fetch a missing data set",
    "select": "choose the best epoch on a validation split (val) or on the test set (test)",
    "select_attack": "the attack that chooses the best epoch",
    "val_fraction": "share of the training images held out to choose the best epoch",
    "eval_alpha": "step of the evaluation attacks, in pixels [eps/4]",
    "eval_every": "evaluate every so many epochs",
    "test_attacks": "attacks of the final table, separated by commas",
    "test_limit": "evaluate on this many test images only",
    "seed": "seed of weights, order, views and noise",
    "deterministic": "refuse operations that are not reproducible",
    "device": "auto, cpu, cuda or cuda:N",
    "out": "run folder; runs/METHOD-DATA when not given",
    "checkpoint_minutes": "also save inside an epoch when the last checkpoint is this old",
}


def _as_text(hint: Any) -> Any:
    """Numbers are taken as text so that fractions like 8/255 can be read, choices as text so
    that a mistake is answered in one way, several values as one text such as "3,4"."""
    kind = plain_type(hint)
    if kind is float or get_origin(kind) in (Literal, tuple):
        return str
    return kind


def _option(name: str, kind: Any, text: str, panel: str) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    flags = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    declared = typer.Option(flags, help=text, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, declared],
    )


def train_parameters() -> list[inspect.Parameter]:
    """Every option of ``fastadv train``: the run's settings, the slots, the parts' options."""
    found = []
    for name, hint in setting_types().items():
        text = SETTING_HELP[name]
        default = DEFAULTS.get(name)
        if default is not None and not isinstance(default, bool):
            text += f" [{default}]"
        if get_origin(plain_type(hint)) is not Literal:  # whose help names the choices
            text += _allowed(hint)
        found.append(_option(name, _as_text(hint), text, "The run"))
    for slot in PARTS:
        text = ", ".join(names(slot))
        found.append(_option(slot, str, text, "Swap a part of the method"))
    for name, (hint, owners) in _part_options().items():
        text = f"of {owners}{_allowed(hint)}"
        found.append(_option(name, _as_text(hint), text, "Options of the parts"))
    return found


def _allowed(hint: Any) -> str:
    words = describe(hint)
    return f"; {words}" if words else ""


def _part_options() -> dict[str, tuple[Any, str]]:
    classes = [part for parts in PARTS.values() for part in parts.values()]
    owners: dict[str, list[str]] = {}
    for parts in PARTS.values():
        for label, part in parts.items():
            for name in all_options([part]):
                owners.setdefault(name, []).append(label)
    settings = setting_types()
    return {
        name: (hint, ", ".join(owners[name]))
        for name, hint in all_options(classes).items()
        if name not in settings
    }


def with_options(
    command: Callable[[dict[str, Any]], None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    """``command`` as a function with ``parameters``, called with what was given of them."""

    def run(**given: Any) -> None:
        command({name: value for name, value in given.items() if value is not None})

    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    return run
