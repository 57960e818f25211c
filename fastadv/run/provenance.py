"""What a run depends on: written into last.pt and compared on resume.

What is trained must be the same; a difference that may change single bits is reported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import platform
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastadv.data.array_file import user_cache
from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.models.packaged import library_version, packaged_library
from fastadv.run.config import RunConfig
from fastadv.run.config_file import to_toml, whole
from fastadv.run.own_schedule import is_own
from fastadv.storage.digests import digest
from fastadv.storage.printable import printable

_FREE = {
    "data",
    "data_root",
    "download",
    "unlabelled",
    "init",
    "skip_broken",
    "option teachers",
    "option helper",
    "out",
    "checkpoint_minutes",
    "save_every",
    "keep",
}
"""Settings that may change: paths (the content is compared), when to save and what to keep."""
_SAID = {"device", "epochs", "mode", "fused_norm", "deterministic", "guard_overfitting"}
"""Settings that may change, and may change bits."""
_ONLY_EVALUATION = {"test_limit", "test_attacks", "eval_alpha", "eval_train", "eval_every"}
"""Settings that do not influence the weights."""
_CHOOSES = {"select", "select_attack", "eval_alpha"}
"""Settings by which the best epoch is chosen: it would be the best by two measures."""


def record(config: RunConfig, digests: Mapping[str, str], device: torch.device) -> dict[str, Any]:
    """What the run of ``config`` depends on: ``digests`` of data and networks from outside by
    name, versions, threads, the device."""
    own = {"source of the schedule": source(config.schedule)} if is_own(config.schedule) else {}
    return {
        "configuration": configuration(config),
        "digests": dict(digests),
        "machine": {
            "torch": str(torch.__version__),  # plain, as a checkpoint must be
            "fastadv": version("fastadv"),
            "Python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "processor": _processor(device),
            "processes": distributed.world_size(),
            "source of the network": source(config.model),
            **own,
        },
    }


def configuration(config: RunConfig) -> str:
    """The settings that decide what is trained: without the folder and how often it is saved."""
    return to_toml(dataclasses.replace(config, out=None, checkpoint_minutes=0.0))


def configuration_digest(config: RunConfig) -> str:
    """A digest of the settings that decide what is trained, the same wherever the run lies."""
    settings = _flat(configuration(config))
    return digest({name: settings[name] for name in sorted(settings.keys() - _FREE - _SAID)})


def require_own(saved: Mapping[str, Any], config: RunConfig, path: Path) -> None:
    """Raise ``UserError`` unless the checkpoint ``saved`` from ``path`` is of a run of ``config``.

    Weights of one architecture fit any run of it: nothing else would show a mix-up.
    """
    try:
        text = saved.get("configuration") or saved["provenance"]["configuration"]
        differences = list(_differences(text, configuration(config)))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):  # no TOML
        raise UserError(
            f"{printable(path)} does not say which run it belongs to: restore the run's own file."
        ) from None
    for name, before, after in differences:
        if name in _ONLY_EVALUATION:
            continue
        raise UserError(
            f"{printable(path)} is of a run with {name} {_shown(before)}, and config.toml says "
            f"{_shown(after)}: restore the one that is not of this run."
        )


def _differences(before: str, after: str) -> Iterator[tuple[str, Any, Any]]:
    """The settings that must not change and did: name, before, after."""
    old, new = _flat(before), _flat(after)
    for name in sorted((old.keys() | new.keys()) - _FREE - _SAID):
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)


def may_change(name: str) -> bool:
    """True for a setting that a resumed run may have otherwise, whether bits change or not."""
    return name in _FREE | _SAID or _allowed(name)


def _allowed(name: str) -> bool:
    """True for a setting that may change on resume, and changes no bit of what is trained."""
    return name in (_FREE | _ONLY_EVALUATION) - _CHOOSES


def compare(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Sentences about settings that were changed, and about what may change single bits. Raises
    ``UserError`` if it is another run."""
    for name, began, found in _differences(saved["configuration"], now["configuration"]):
        if _allowed(name):
            continue
        why = "the best epoch is chosen by it" if name in _CHOOSES else "it decides what is trained"
        raise UserError(
            f"The run was begun with {name} {_shown(began)}, and config.toml now says "
            f"{_shown(found)}; {why}: restore it, or train into another --out."
        )
    before, after = (_flat(each["configuration"]) for each in (saved, now))
    harmless = [
        f"{name} {_shown(before.get(name))} before, {_shown(after.get(name))} now"
        for name in sorted(filter(_allowed, before.keys() | after.keys()))
        if before.get(name) != after.get(name) and not _is_own_cache(name, after)
    ]
    told = []
    if harmless:
        told = [f"settings have changed, and change no weights: {'; '.join(harmless)}."]
    old, new = saved["digests"], now["digests"]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise UserError(
                f"The run's {name} is not what it was begun with, so this would be another "
                "run: restore it, or train into another --out."
            )
    said = [
        f"{name} {_shown(before.get(name))} before, {_shown(after.get(name))} now"
        for name in sorted(_SAID)
        if before.get(name) != after.get(name)
    ]
    machine = saved["machine"]
    said += [
        f"{name} {_shown(machine.get(name))} before, {_shown(value)} now"
        for name, value in now["machine"].items()
        if machine.get(name) != value
    ]
    if not said:
        return told
    return [
        *told,
        f"the run continues under other conditions, so not bit for bit: {'; '.join(said)}.",
    ]


def _flat(text: str) -> dict[str, Any]:
    tables = whole(tomllib.loads(text))
    options = tables.pop("options", {})
    return tables | {f"option {name}": value for name, value in options.items()}


def _is_own_cache(name: str, after: Mapping[str, Any]) -> bool:
    """True for the cache that ``RunFolder`` takes for a run from elsewhere: nobody has set it."""
    return name == "data_root" and after.get(name) == str(user_cache())


def _shown(value: object) -> str:
    return "not set" if value is None else printable(str(value))


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {torch.backends.cpu.get_cpu_capability()}"


def source(model: str) -> str:
    """A digest of the source file of a ``module:callable``, or name and version of the library of a
    network; "" for fastadv's own."""
    if packaged_library(model):
        return library_version(model)
    if ":" not in model:
        return ""
    found = importlib.util.find_spec(model.partition(":")[0])  # imported before
    if found is None or found.origin is None:
        return ""
    try:
        with open(found.origin, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return ""
