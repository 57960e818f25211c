"""What a benchmark was asked for: the settings its document keeps, so that they can be measured
again, and the choice of rows by ``--only``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, get_args, get_origin, get_type_hints

import torch

from fastadv.algorithms.contract.passes import UNITS
from fastadv.algorithms.recipes.table import METHODS
from fastadv.benchmark.compare import Comparison
from fastadv.benchmark.limits import ELEMENT_BYTES
from fastadv.benchmark.ours import require_mode
from fastadv.benchmark.peer_list import PEERS
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import Spec, parse_specs, passes_of
from fastadv.errors import UserError, unknown
from fastadv.kernels.dispatch import OPERATORS
from fastadv.run.spelling import as_flag

EVAL_PEERS_NEED = Spec("pgd", (("attack_bn", "eval"),))


@dataclass(frozen=True)
class Asked:
    """The settings of a benchmark. ``steps`` is False where only parts of the methods are timed;
    ``passes`` are the kinds of pass, ``operators`` the kernels, each timed alone."""

    methods: tuple[str, ...]
    model: str
    width: int | None
    batch_sizes: tuple[int, ...]
    image_size: int
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    repeats: int
    peers: tuple[str, ...]
    steps: bool
    passes: tuple[str, ...]
    operators: tuple[str, ...]
    device_type: str
    threads: int

    def as_json(self) -> dict[str, Any]:
        """For the document."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Asked:
        """The inverse of ``as_json``. Raises ``KeyError`` where one is missing, ``TypeError`` for a
        value of another type."""
        values: dict[str, Any] = {each.name: told[each.name] for each in fields(cls)}
        for name, value in values.items():
            values[name] = tuple(value) if isinstance(value, list) else value
            if not _has_type(values[name], _TYPES[name]):
                raise TypeError(f"{name} is {value!r}")
        return cls(**values)


_TYPES: Mapping[str, Any] = get_type_hints(Asked)


def _has_type(value: Any, wanted: Any) -> bool:
    """True if ``value`` is of a field's type: bool, int, str, None or a tuple of them."""
    if get_origin(wanted) is tuple:
        inner = get_args(wanted)[0]
        return isinstance(value, tuple) and all(_has_type(each, inner) for each in value)
    kinds = get_args(wanted) or (wanted,)
    return type(value) in kinds


def checked(asked: Asked, device: torch.device) -> Asked:
    """``asked``, every value of which is known on ``device``; raises ``UserError`` otherwise."""
    if not (asked.batch_sizes and asked.dtypes and asked.modes and asked.methods):
        raise UserError("Nothing to time: give at least one method, batch size, dtype and mode.")
    for size in asked.batch_sizes:
        if size < 2:
            raise UserError(
                f"--batch-size takes whole numbers above 1 such as 64,128, not {str(size)!r}."
            )
    for name in ("repeats", "image_size", "threads"):
        if getattr(asked, name) < 1:
            raise UserError(f"{as_flag(name)} must be at least 1, not {getattr(asked, name)}.")
    for dtype in asked.dtypes:
        if dtype not in ELEMENT_BYTES:
            raise unknown("precision", dtype, ELEMENT_BYTES)
    for mode in asked.modes:
        require_mode(mode, device)
    for kind, names, known in (
        ("pass", asked.passes, UNITS),
        ("kernel", asked.operators, OPERATORS),
        ("peer", asked.peers, PEERS),
    ):
        for name in names:
            if name not in known:
                raise unknown(kind, name, known)
    for method in asked.methods:
        Spec.parse(method)
    return asked


def selected(
    asked: Asked,
    text: str,
    *,
    methods: Sequence[str] | None = None,
    among: Asked | None = None,
) -> Asked:
    """``asked`` without the rows that no pattern in ``text`` names.

    Patterns are separated by commas. One is the name of a method, a kind of pass, a kernel or a
    peer, with ``*`` and ``?`` as in a shell, or such a name after its group (``kernel:*``). All
    recipes can be named unless ``methods`` lists them, and all else unless ``among`` has the rows
    there are. Raises ``UserError`` for a pattern that names nothing.
    """
    patterns = [each.strip() for each in text.split(",") if each.strip()]
    if not patterns:
        raise UserError("--only takes names of rows such as trades,linf_step,helped.")
    known: dict[str, Sequence[str]] = {
        "step": (methods or [*METHODS])
        if among is None
        else (among.methods if among.steps else ()),
        "pass": [*UNITS] if among is None else among.passes,
        "kernel": [*OPERATORS] if among is None else among.operators,
        "peer": [*PEERS] if among is None else among.peers,
    }
    chosen: dict[str, dict[str, None]] = {group: {} for group in known}
    for pattern in patterns:
        found = [(g, name) for g, names in known.items() for name in names if _is(pattern, g, name)]
        if not found and "=" in pattern and among is None:
            found = [("step", str(Spec.parse(pattern.removeprefix("step:"))))]
        if not found:
            raise unknown("row", pattern, _names(known), _some(known))
        for group, name in found:
            chosen[group][name] = None
    steps = bool(chosen["step"])
    own = tuple(chosen["step"]) if steps else asked.methods
    needed = {kind for method in own for kind, _ in passes_of(Spec.parse(method).plan()) or ()}
    for pattern in patterns:
        if _is_only(pattern, known["pass"]) and not any(_is(pattern, "pass", n) for n in needed):
            has = ", ".join(sorted(needed)) or "no fixed passes"
            raise UserError(f"There is no pass {pattern!r} in {', '.join(own)}: {has}.")
    return replace(
        asked,
        methods=own,
        steps=steps,
        passes=tuple(kind for kind in chosen["pass"] if kind in needed),
        operators=tuple(chosen["kernel"]),
        peers=tuple(chosen["peer"]),
    )


def _is(pattern: str, group: str, name: str) -> bool:
    plain = pattern.replace(": ", ":")
    return fnmatchcase(name, plain) or fnmatchcase(f"{group}:{name}", plain)


def _is_only(pattern: str, passes: Sequence[str]) -> bool:
    """True for the name of a pass alone, which no star made."""
    return pattern.replace(": ", ":").removeprefix("pass:") in passes


def _some(known: Mapping[str, Sequence[str]]) -> list[str]:
    """The first names of each group, and every name of a group."""
    return [f"{name} ({group})" for group, names in known.items() for name in names[:3]] + [
        f"{group}:*" for group, names in known.items() if names
    ]


def _names(known: Mapping[str, Iterable[str]]) -> list[str]:
    return [name for names in known.values() for name in names]


def with_eval(asked: Asked) -> Asked:
    """Some peers attack in eval mode only; adds our attack in that mode for them."""
    specs = parse_specs(",".join(asked.methods))
    if not any(spec.is_the_peers for spec in specs):
        raise UserError("The peers train PGD-10 AT: add pgd to --methods to compare with them.")
    more = () if EVAL_PEERS_NEED in specs else (str(EVAL_PEERS_NEED),)
    return replace(asked, methods=(*asked.methods, *more))


def plan_of(asked: Asked, device: torch.device) -> list[Comparison]:
    """One comparison for each batch size and precision; the operators, whose sizes are their own,
    are in the first."""
    known = checked(asked, device)
    return [
        Comparison(
            Setting(known.model, known.width, size, known.image_size, device=str(device)),
            [Spec.parse(method) for method in known.methods],
            dtype,
            known.modes,
            known.repeats,
            known.peers,
            with_passes=bool(known.passes),
            with_steps=known.steps,
            pass_kinds=known.passes,
            operators=known.operators if (place, number) == (0, 0) else (),
        )
        for place, size in enumerate(known.batch_sizes)
        for number, dtype in enumerate(known.dtypes)
    ]
