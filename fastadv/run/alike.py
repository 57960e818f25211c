"""Which runs can be in one table, and which of them are seeds of one method."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastadv.errors import UserError, warn
from fastadv.run import places
from fastadv.run.config import RunConfig
from fastadv.run.ended import has_ended
from fastadv.run.request import roles
from fastadv.run.run_folder import RunFolder
from fastadv.run.short_paths import short_paths
from fastadv.run.spelling import in_dashes, shown
from fastadv.run.way_on import resume_command
from fastadv.run.which import weights_file
from fastadv.storage.printable import printable


def open_alike(
    paths: Sequence[str], which: Sequence[str], *, eps: object, alpha: object, on: str = "test"
) -> dict[str, RunConfig]:
    """The configurations of the runs in ``paths``, whose weights ``which`` exist.

    ``eps`` and ``alpha`` are those of the evaluation, None: each run's own, and ``on`` is the set
    of images. Raises ``UserError``
    unless all can be evaluated on the same images under the same attacks; warns of runs that have
    not ended.
    """
    _require_different(paths)
    configs: dict[str, RunConfig] = {}
    for path in paths:
        folder = RunFolder.open(path)
        for name in which:
            weights_file(folder, name)  # raises
        configs[path] = folder.read_config()
        if len(paths) > 1 and not has_ended(folder, configs[path]):
            warn(
                f"{printable(path)} has not ended, so it is compared with runs that were trained "
                f"longer: {resume_command(path)}."
            )
    for path in paths[1:]:
        _require_alike(configs, paths[0], path, eps=eps, alpha=alpha)
        if on != "test":
            _require_one_division(configs, paths[0], path)
    return configs


def _require_different(paths: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for path in paths:
        place = os.path.realpath(path)
        if place in seen:
            raise UserError(f"{printable(path)} is given twice; give each run once.")
        seen[place] = path


def _require_alike(
    configs: Mapping[str, RunConfig], one: str, other: str, *, eps: object, alpha: object
) -> None:
    first, second = configs[one], configs[other]
    names = f"{printable(one)} and {printable(other)}"
    kinds = [config.data.partition(":")[0] for config in (first, second)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{names} are of different data sets, {kinds[0]} and {kinds[1]}; evaluate them one by "
            "one."
        )
    if first.norm != second.norm:
        raise UserError(
            f"{names} are robust in different norms, {first.norm} and {second.norm}; evaluate them "
            "one by one."
        )
    if eps is None and first.eps != second.eps:
        raise UserError(
            f"{names} were trained for different radii, eps {first.eps:.4g} and {second.eps:.4g}; "
            "choose the one to evaluate both with: --eps."
        )
    if eps is None and alpha is None and first.eval_alpha != second.eval_alpha:
        raise UserError(
            f"{names} are evaluated with different steps, alpha {_step(first)} and "
            f"{_step(second)}; choose the one for both: --alpha."
        )


def _require_one_division(configs: Mapping[str, RunConfig], one: str, other: str) -> None:
    """Raise ``UserError`` unless both runs train on the same images with the same labels, as far as
    their settings say."""
    first, second = configs[one], configs[other]
    decides = ["limit", "select", "label_noise"]
    if first.select == "val":
        decides += ["val_fraction", "seed"]
    elif first.label_noise:
        decides.append("seed")
    for name in decides:
        values = [getattr(config, name) for config in (first, second)]
        if values[0] != values[1]:
            both = " and ".join(map(shown, values))
            raise UserError(
                f"{printable(one)} and {printable(other)} were trained on different images or "
                f"labels ({in_dashes(name)} {both}): evaluate them one by one, or --on "
                "test."
            )


def _step(config: RunConfig) -> str:
    return "of each attack" if config.eval_alpha is None else f"{config.eval_alpha:.4g}"


def methods_of(configs: Mapping[str, RunConfig]) -> dict[str, list[str]]:
    """Name of a method -> its runs, one per seed, in the order of ``configs``.

    Runs that differ in anything but their seed are different methods; where they have one name,
    what differs is added to it.
    """
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for path, config in configs.items():
        traits = _traits(config)
        same = next((runs for held, runs in groups if held == traits), None)
        if same is None:
            groups.append((traits, [path]))
        else:
            same.append(path)
    found: dict[str, list[str]] = {}
    for traits, runs in groups:
        namesakes = [held for held, _ in groups if held["method"] == traits["method"]]
        names = dict.fromkeys(name for held in namesakes for name in held)
        differing = [
            f"{in_dashes(name)} {_told(name, traits, namesakes)}"
            for name in names
            if any(held.get(name) != traits.get(name) for held in namesakes)
        ]
        found[", ".join([traits["method"], *differing])] = runs
    return found


def _told(name: str, traits: Mapping[str, Any], namesakes: Sequence[Mapping[str, Any]]) -> str:
    """What ``traits`` say of ``name``; of a path, what tells it from those of ``namesakes``."""
    said = {shown(held.get(name)) for held in (traits, *namesakes)}
    word = shown(traits.get(name))
    return short_paths(said)[word] if name in places.of_a_run() else word


def _traits(config: RunConfig) -> dict[str, Any]:
    """What makes the method of a run: its name, settings and options."""
    settings = {name: getattr(config, name) for name, role in roles().items() if role.of_method}
    return settings | config.options
