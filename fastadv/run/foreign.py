"""A network whose weights are a file from elsewhere, and the data it is evaluated on."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastadv.engine.process import distributed
from fastadv.engine.process.device import choose_device
from fastadv.errors import warn
from fastadv.evaluation.accuracy import specs_of, warn_of_ignored_alpha
from fastadv.run.config import RunConfig
from fastadv.run.eval_pass import EvalScores
from fastadv.run.finished import evaluate_loaded
from fastadv.run.foreign_network import OPTIONS, Network, load_network
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.run_folder import RunFolder
from fastadv.run.session import data_facts
from fastadv.run.source import Source, open_source
from fastadv.storage.printable import printable

_METHOD = "standard"  # of a configuration whose training is not looked at


@dataclass(frozen=True)
class Foreign:
    """What ``load_run`` gives of a run; where results are kept, as in a run folder; and a line that
    says how the file was understood."""

    config: RunConfig
    data: Source
    model: nn.Module
    folder: RunFolder
    said: str


def load_foreign(weights: str, request: RunRequest) -> Foreign:
    """The network ``request.model`` with the weights in the file ``weights``, and the data.

    ``request`` names them as for training; for all else a run's defaults hold, such as the data's
    usual eps. Pixels are scaled by the numbers in the file if it has some, with
    ``request.normalize`` by those of the data, otherwise not. Raises ``UserError`` as
    ``load_network`` does.
    """
    request = dataclasses.replace(request, method=_METHOD, normalize=bool(request.normalize))
    config = resolve_run(request)
    data = open_source(config, choose_device(config.device))
    facts = data_facts(data)
    if not config.normalize:
        facts |= {"mean": None, "std": None}
    said = [name for name in OPTIONS if getattr(request, name) is not None]
    options = {name: getattr(config, name) for name in said}
    found = load_network(weights, request.model, facts, options, config.data)
    settings: dict[str, Any] = {name: found.options.get(name) for name in OPTIONS}
    settings |= {"model": found.name, "normalize": found.scaled_by is not None}
    config = dataclasses.replace(config, **settings)
    folder = RunFolder(Path(f"{weights}.evaluations"))
    return Foreign(config, data, found.model, folder, _line(weights, found, config.data))


def evaluate_foreign(found: Foreign, attacks: str, **options: Any) -> EvalScores:
    """``evaluate_run`` of a network from elsewhere, with its ``options``.

    Warns of a network that classifies hardly more images than chance would: its file does not show
    everything that matters.
    """
    specs = specs_of(attacks)  # a name with a typo leaves no folder behind
    warn_of_ignored_alpha(specs, options.get("alpha"))
    make_folder(found)
    loaded = (found.config, found.data, found.model)
    scores = evaluate_loaded(loaded, found.folder, "weights", attacks, **options)
    chance = 1 / found.data.num_classes
    if scores.get("clean", 1.0) < chance + 0.1 * (1 - chance):
        warn(
            f"The network classifies {100 * scores['clean']:.1f} % of the images correctly, and "
            f"chance {100 * chance:.1f} %: its code may scale pixels otherwise (--normalize), "
            "number the classes otherwise, or be another variant (--shortcut)."
        )
    return scores


def make_folder(found: Foreign) -> None:
    """Make the folder of the results, if there is none and one can be made."""
    if distributed.rank() == 0:
        with suppress(OSError):  # which the records say
            found.folder.path.mkdir(exist_ok=True)


def _line(weights: str, found: Network, data: str) -> str:
    sizes = "".join(f", {key} {value}" for key, value in found.options.items())
    count = sum(parameter.numel() for parameter in found.model.parameters())
    renamed = ", under the names of other code" if found.renamed else ""
    scaling = {
        "file": "pixels are scaled by the mean and deviation in the file",
        "caller": f"pixels are scaled by the mean and deviation of {data}",
        None: "pixels go in as they are, from 0 to 1 (--normalize: scaled by the data's mean and "
        "deviation)",
    }[found.scaled_by]
    return f"{printable(weights)}: {found.name}{sizes}, {count:,} weights{renamed}; {scaling}"
