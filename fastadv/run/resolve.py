"""From what was asked for to what is carried out: ``RunRequest`` -> ``RunConfig``, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastadv.algorithms.parts import names
from fastadv.algorithms.plan import Plan
from fastadv.algorithms.recipes.table import methods
from fastadv.algorithms.resolution import VARIANT, recipe_options, resolve
from fastadv.algorithms.slots import SLOTS
from fastadv.data import augmentations
from fastadv.declared import coerce
from fastadv.errors import UserError
from fastadv.run import optimizer_kinds
from fastadv.run.companions import replaced
from fastadv.run.config import RunConfig, check, required_settings
from fastadv.run.defaults import DEFAULTS
from fastadv.run.origin import Origin
from fastadv.run.presets import presets_for
from fastadv.run.request import RunRequest, setting_types, strangers
from fastadv.run.schedules import ENDS, PEAKS, STEPPED, USUAL_DROPS
from fastadv.run.spelling import as_flag
from fastadv.storage.printable import printable

ALSO_OPTIONS = frozenset({"pad"})
"""The settings of a run that a part may take as an option of its own too: a stored perturbation is
as wide as the loader shifts."""


def resolve_run(request: RunRequest) -> RunConfig:
    """``request`` with every open setting and option filled in, and checked.

    What the user said comes before a file of ``--config``, this before the recipe, this before the
    data preset, this before the plain defaults and those of the parts. Raises ``UserError`` for
    unknown names, values outside their range and settings that contradict each other.
    """
    given = typed(request)
    options = {name: value for name, value in request.options.items() if value is not None}
    presets = presets_for(
        given.get("method", DEFAULTS["method"]),
        given.get("data", DEFAULTS["data"]),
        given,
        options,
    )
    values = replaced({**DEFAULTS, **presets.settings}, given)
    origins = dict.fromkeys(DEFAULTS, Origin.DEFAULT) | presets.origins
    origins |= {name: request.origin(name) for name in given}
    if values["epochs"] != presets.settings["epochs"] and "image_sizes" not in given:
        values.pop("image_sizes", None)  # phases of a run of that length
    if values.get("eps_warmup") is not None and "eps_warmup" not in given:
        values["eps_warmup"] = min(values["eps_warmup"], values["epochs"])  # or eps is not reached
    if values["optimizer"] != "sgd":
        of_others = strangers("optimizer", values["optimizer"])
        others = {name: 0.0 if name == "momentum" else False for name in of_others}
        if presets.settings.get("optimizer", DEFAULTS["optimizer"]) == "sgd":
            others["lr"] = optimizer_kinds.usual_rate(values["optimizer"])
        if "weight_decay" not in optimizer_kinds.parameters(values["optimizer"]):
            others["weight_decay"] = 0.0
        for name in others.keys() - given.keys():
            values[name], origins[name] = others[name], Origin.DEFAULT
    if values["schedule"] in STEPPED and "drops" not in values:
        values["drops"], origins["drops"] = USUAL_DROPS, Origin.DEFAULT
    if values["schedule"] in PEAKS and "peak" not in values:
        values["peak"], origins["peak"] = PEAKS[values["schedule"]], Origin.DEFAULT
    if values["schedule"] in ENDS and "end_factor" not in values:
        values["end_factor"], origins["end_factor"] = ENDS[values["schedule"]], Origin.DEFAULT
    if values.get("points") is not None:
        if "lr" in given:
            raise UserError("--points gives the learning rates themselves; omit --lr.")
        values["lr"], origins["lr"] = max(values["points"].values()), origins["points"]

    chosen = presets.options | options
    for name in (ALSO_OPTIONS & presets.known) - options.keys():
        chosen[name] = values[name]
    plan = resolve(values["method"], chosen | {VARIANT: values.get(VARIANT)}, spelled=as_flag)
    from_recipe = recipe_options(plan.recipe, plan.slots)
    for name in plan.slots:
        origins[name] = request.origin(name) if name in options else Origin.RECIPE
    for name in plan.options:
        if name in options:
            origins[name] = request.origin(name)
        elif name in presets.options:
            origins[name] = presets.option_origins[name]
        elif name in from_recipe:
            origins[name] = Origin.RECIPE
        elif name not in ALSO_OPTIONS:
            origins[name] = Origin.PART
    if "augmentation" not in given and plan.keeps_perturbations:
        values["augmentation"], origins["augmentation"] = "base", Origin.DEFAULT
    crops = augmentations.CROP in augmentations.names_in(values["augmentation"])
    if crops and "pad" not in given:
        values["pad"], origins["pad"] = 0, origins["augmentation"]
        if "pad" in chosen.keys() - options.keys():
            plan = resolve(values["method"], chosen | {"pad": 0}, spelled=as_flag)
    return _checked(values, plan, origins)


def resolve_stored(
    request: RunRequest, plugins: Sequence[str] = (), *, unchanged: bool = False
) -> RunConfig:
    """The configuration that a run folder holds, which leaves nothing open. ``plugins`` are the
    files that it was begun with, for the message about a method that is not known. ``unchanged``:
    the file is as fastadv wrote it, so what it lacks did not exist then.

    A file that lost a line would otherwise continue another run, with a default. Raises
    ``UserError`` that names the lost settings and options.
    """
    values = typed(request)
    lost = [name for name in required_settings() if name not in values]
    if values.get("schedule") in STEPPED and "drops" not in values:
        lost.append("drops")
    if values.get("schedule") in PEAKS and "peak" not in values:
        lost.append("peak")
    if values.get("schedule") in ENDS and "end_factor" not in values:
        lost.append("end_factor")
    _require_none(lost, unchanged)
    _require_known(values["method"], request.options, plugins)
    plan = resolve(values["method"], {**request.options, VARIANT: values.get(VARIANT)})
    parts = {**plan.slots, **plan.options}
    _require_none(
        [name for name in parts if parts[name] is not None and name not in request.options],
        unchanged,
    )
    return _checked(values, plan, dict.fromkeys([*values, *request.options], Origin.STORED))


def typed(request: RunRequest) -> dict[str, Any]:
    """The settings that are not left open, in their own types: name -> value. Raises ``UserError``
    for one that is none."""
    said = {name: getattr(request, name) for name in setting_types()}
    types = setting_types()
    found = {
        name: coerce(as_flag(name), value, types[name])
        for name, value in said.items()
        if value is not None
    }
    for name, value in found.items():
        if value == "" or (isinstance(value, tuple) and "" in value):
            raise UserError(f"{as_flag(name)} is empty: name something, or omit it.")
    if "optimizer" in found:
        found["optimizer"] = optimizer_kinds.known(found["optimizer"])
    if "augmentation" in found:
        found["augmentation"] = augmentations.canonical(found["augmentation"])
    if "points" in found:
        found.setdefault("schedule", "points")
    return found


def _require_known(method: str, options: Mapping[str, Any], plugins: Sequence[str]) -> None:
    """Raise ``UserError`` if the run's method or one of its parts is not known here."""
    parts = [(slot, options[slot], names(slot)) for slot in SLOTS if slot in options]
    for kind, name, known in [("method", method, list(methods())), *parts]:
        if name not in known:
            named = f" (begun with {', '.join(map(printable, plugins))})" if plugins else ""
            raise UserError(
                f"The run's {kind} {name!r} is not one of fastadv's: add --plugin with the file it "
                f"came from{named}, or in Python import that file first."
            )


def _require_none(lost: list[str], unchanged: bool) -> None:
    if not lost:
        return
    if unchanged:
        raise UserError(
            f"The run was begun with an older fastadv, which did not have {', '.join(lost)}: use "
            "that version for it, or train into another --out."
        )
    raise UserError(
        f"The run's configuration lacks {', '.join(lost)}; restore its original config.toml."
    )


def _checked(values: Mapping[str, Any], plan: Plan, origins: Mapping[str, Origin]) -> RunConfig:
    settings: dict[str, Any] = {name: values.get(name) for name in setting_types()}
    set_ones = {
        name: origin
        for name, origin in origins.items()
        if name not in settings or settings[name] is not None
    }
    config = RunConfig(**settings, plan=plan, origins=set_ones)
    check(config)
    return config
