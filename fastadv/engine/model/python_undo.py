"""Restores the Python state of modules: attributes, and the content of their containers."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from operator import is_
from typing import Any

from torch import Tensor, nn

from fastadv.engine.model.python_code import Cells, code_readings
from fastadv.engine.model.python_values import (
    DEEP,
    LEAVES,
    MANY,
    MISSING,
    OF_EVERY_MODULE,
    has_insides,
    insides,
)


def undo_functions(modules: list[nn.Module]) -> Iterator[Callable[[], None]]:
    """Functions that restore the present content of the containers of the modules' Python state."""
    waiting: list[tuple[Any, int]] = []
    for module in modules:
        own = vars(module)
        content = {key: own[key] for key in own if key not in OF_EVERY_MODULE}
        yield functools.partial(_put_back_keys, own, content, OF_EVERY_MODULE)
        waiting += [(each, DEEP) for each in content.values()]
    for reading in code_readings(modules):
        values = {key: reading.space[key] for key in reading.names()}
        if isinstance(reading.space, Cells):
            yield functools.partial(_put_back_cells, reading.space.cells, values)
        elif isinstance(reading.space, dict):
            yield functools.partial(_put_back_keys, reading.space, values, None)
        waiting += [(each, DEEP) for each in values.values()]
    seen: set[int] = set()
    while waiting:
        holder, depth = waiting.pop()
        if id(holder) in seen or not depth or isinstance(holder, (nn.Module, Tensor, type)):
            continue
        seen.add(id(holder))
        if isinstance(holder, (list, deque)) and len(holder) <= MANY:
            yield functools.partial(_put_back_entries, holder, list(holder))
            waiting += [(each, depth - 1) for each in holder]
        elif isinstance(holder, dict) and len(holder) <= MANY:
            yield functools.partial(_put_back_keys, holder, dict(holder), frozenset())
            waiting += [(each, depth - 1) for each in holder.values()]
        elif isinstance(holder, tuple) and len(holder) <= MANY:
            waiting += [(each, depth - 1) for each in holder]
        elif type(holder) not in LEAVES and has_insides(holder):
            own = insides(holder)
            yield functools.partial(_put_back_attributes, holder, own)
            waiting += [(each, depth - 1) for each in own.values()]


def _put_back_entries(holder: Any, content: list[Any]) -> None:
    if len(holder) != len(content) or not all(map(is_, holder, content)):
        holder.clear()
        holder.extend(content)


def _put_back_keys(
    holder: dict[Any, Any], content: dict[Any, Any], left_alone: frozenset[str] | None
) -> None:
    """Restore ``content`` in ``holder``. Other keys are deleted except those in ``left_alone``;
    None deletes none."""
    if left_alone is not None:
        for key in [key for key in holder if key not in content and key not in left_alone]:
            del holder[key]
    for key, value in content.items():
        if holder.get(key, MISSING) is not value:
            holder[key] = value


def _put_back_attributes(holder: Any, content: dict[str, Any]) -> None:
    for name in [name for name in getattr(holder, "__dict__", ()) if name not in content]:
        delattr(holder, name)
    for name, value in content.items():
        if getattr(holder, name, MISSING) is not value:
            object.__setattr__(holder, name, value)


def _put_back_cells(cells: Mapping[str, Any], content: dict[str, Any]) -> None:
    for name, value in content.items():
        cells[name].cell_contents = value
