"""The contract has no hook for a single part, and the engine names no part."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import Any

from fastadv.algorithms.contract import Part
from fastadv.algorithms.options import option_types
from fastadv.algorithms.parts import PARTS
from fastadv.algorithms.registry import BASES
from fastadv.algorithms.slots import NONE

PACKAGE = Path(__file__).parents[1] / "fastadv"
CONTRACT = "fastadv.algorithms.contract"
MOST_FOR_ONE = 4


def hooks(base: type) -> list[str]:
    """What a part may define in place of ``base``: its public methods, properties and class
    variables, without those that are final, and without fields."""
    found = []
    for name, member in vars(base).items():
        inner = getattr(member, "fget", member)
        called = callable(inner) or isinstance(member, property)
        if name.startswith("_") or not called or getattr(inner, "__final__", False):
            continue
        found.append(name)
    variables = [n for n, kind in base.__annotations__.items() if str(kind).startswith("ClassVar")]
    return [*found, *(name for name in variables if not name.startswith("_"))]


def implements(part: type, name: str) -> bool:
    """True if ``part`` or one of its bases outside of the contract defines ``name``."""
    own = [kind for kind in part.__mro__ if not kind.__module__.startswith(CONTRACT)]
    return any(name in vars(kind) for kind in own if kind is not object)


def implementers(parts: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Hook -> the parts that implement it."""
    found: dict[str, list[str]] = {}
    for base in (Part, *BASES.values()):
        slots = [slot for slot in parts if base is Part or BASES[slot] is base]
        for name in hooks(base):
            if base is not Part and hasattr(Part, name):
                continue  # a slot's own version of a hook of all parts
            found[f"{base.__name__}.{name}"] = [
                f"{slot} {label}"
                for slot in slots
                for label, part in parts[slot].items()
                if implements(part, name)
            ]
    return found


def test_a_hook_of_the_contract_is_for_several_parts() -> None:
    """What one part can do is an ability (``abilities.py``), asked for by its methods."""
    by_hook = implementers(PARTS)
    assert {"Part.prepare", "Part.on_data", "Adversary.make", "Adversary.takes_start"} <= set(
        by_hook
    )
    assert {"Adversary.alpha", "Part.uniform", "Regularizer.weight"}.isdisjoint(by_hook)
    few = {name: parts for name, parts in by_hook.items() if len(parts) <= 1}
    assert len(few) <= MOST_FOR_ONE, few


def test_a_hook_for_one_part_is_found() -> None:
    only = {slot: dict(list(parts.items())[:1]) for slot, parts in PARTS.items()}
    by_hook = implementers(only)
    assert by_hook["Objective.per_sample"] == ["objective ce"]
    assert by_hook["Part.sample_state"] == []


# -- names ------------------------------------------------------------------------------------

ENGINE = sorted(
    {
        *(PACKAGE / "training").glob("*.py"),
        *(PACKAGE / "engine").rglob("*.py"),
        *(PACKAGE / "algorithms/contract").glob("*.py"),
        *(
            PACKAGE / f"algorithms/{name}.py"
            for name in ("attack_loss", "cost", "plan", "refusals")
        ),
        PACKAGE / "run/presets.py",
    }
    # The method that is the default of ``fastadv.step`` has the name of its adversary.
    - {PACKAGE / "training/entry.py"}
)
# "none" is an empty slot, the word for no value, and the name of the adversary without an attack.
NAMES = {label for parts in PARTS.values() for label in parts} - {NONE}
OWNERS = Counter(
    name for parts in PARTS.values() for part in parts.values() for name in option_types(part)
)
OF_ONE_PART = {name for name, count in OWNERS.items() if count == 1}
MODULES = {part.__module__ for parts in PARTS.values() for part in parts.values()}


def named(source: str) -> set[str]:
    """Parts, options of one part alone, and modules of parts that ``source`` names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & (NAMES | OF_ONE_PART)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)} & MODULES
    return found


def test_the_engine_names_no_part() -> None:
    found = {file.relative_to(PACKAGE): named(file.read_text()) for file in ENGINE}
    assert len(found) > 60
    assert {file: names for file, names in found.items() if names} == {}


def test_a_name_is_found() -> None:
    assert {"pgd", "trades", "stored", "rat-lr"} <= NAMES
    assert {"replays", "c_min", "start_scale"} <= OF_ONE_PART
    assert OF_ONE_PART.isdisjoint({"alpha", "steps", "pad", "gamma"})
    pgd = "fastadv.algorithms.adversaries.pgd"
    sources = {
        'def f(p):\n    return p.slots["adversary"] == "atta"': {"atta"},
        'x = {"te_momentum": 1}': {"te_momentum"},
        'class A:\n    B = ("pgd", "none")': {"pgd"},
        f"import {pgd}": {pgd},
        f"def f():\n    from {pgd} import PGD": {pgd},
        "from fastadv.algorithms.adversaries import pgd": {pgd},
        'x = "none"\nfrom fastadv.algorithms.weakening import weakened': set(),
    }
    for source, expected in sources.items():
        assert named(source) == expected
