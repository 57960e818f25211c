"""Options of a network from elsewhere, in place of a run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastadv.cli import completion
from fastadv.errors import UserError
from fastadv.run.spelling import as_flag

if TYPE_CHECKING:
    from fastadv.run.request import RunRequest

_PANEL = "In place of a run folder"


def _option(flags: str, text: str, names: str | None = None) -> Any:
    completed = None if names is None else completion.of(names)
    return typer.Option(*flags.split(), help=text, rich_help_panel=_PANEL, autocompletion=completed)


Weights = Annotated[
    str | None, _option("--weights", "a .safetensors, .pt or .pth file, read without running code")
]
Model = Annotated[
    str | None,
    _option(
        "--model", "its network: a name as for train, timm:NAME, module:callable, ...", "model"
    ),
]
Data = Annotated[
    str | None,
    _option(
        "--data",
        "the data set whose test images are evaluated; a run's, if they have moved",
        "data",
    ),
]
DataRoot = Annotated[str | None, _option("--data-root", "folder of the data sets; also for a run")]
Download = Annotated[bool | None, _option("--download", "download a missing data set")]
ImageSize = Annotated[int | None, _option("--image-size", "pixels to which images are resized")]
SkipBroken = Annotated[
    bool | None, _option("--skip-broken", "leave out images that cannot be decoded")
]
Norm = Annotated[str | None, _option("--norm", "norm of the threat model: linf, l2")]
Normalize = Annotated[
    bool | None,
    _option(
        "--normalize", "scale pixels by the data's mean and deviation, if the network's code did so"
    ),
]
Shortcut = Annotated[
    str | None, _option("--shortcut", "form of a PreActResNet: preact (if not said) or raw")
]
Width = Annotated[int | None, _option("--width", "width, where the tensors do not show it")]
Depth = Annotated[int | None, _option("--depth", "depth, where the tensors do not show it")]
Stem = Annotated[str | None, _option("--stem", "stem, where the tensors do not show it")]


OF_A_RUN = ("data", "data_root")
"""Those that a run folder takes as well: its data may have moved."""


def foreign_request(
    run: str | None, which: str, weights: str | None, **given: Any
) -> tuple[str, RunRequest] | None:
    """The file of a network from elsewhere and what was ``given`` of it; None for a run folder.

    Raises ``UserError`` unless it is one of the two.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if run is not None:
        given = {name: value for name, value in given.items() if name not in OF_A_RUN}
    flags = [as_flag(name) for name in given]
    if weights is not None:
        flags.insert(0, "--weights")
    if run is not None:
        if flags:
            raise UserError(
                f"A run folder says itself what it holds; omit {', '.join(flags)}, or the folder."
            )
        return None
    if weights is None or "data" not in given:
        raise UserError(
            "Name a run folder, or a network from elsewhere with --model, --weights and --data"
            + (f" (given: {', '.join(flags)})." if flags else ".")
        )
    if which != "best":
        raise UserError(f"A file of weights holds one network: omit --which {which}.")
    from fastadv.run.request import RunRequest

    return weights, RunRequest(**given)
