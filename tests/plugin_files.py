"""The example plugin, loaded as the command line loads it, and forgotten again."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from fastadv.algorithms import plugins
from fastadv.algorithms.parts import PARTS
from fastadv.algorithms.recipes.table import METHODS
from fastadv.engine import noise

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "plugins" / "pairing.py"


@contextmanager
def forgotten_after(*imported: str) -> Iterator[None]:
    """Parts, recipes, noise streams and modules of plugins are those from before on exit, as are
    the modules called ``imported``."""
    tables = [*PARTS.values(), METHODS, plugins._loaded, noise._names]
    before = [dict(table) for table in tables]
    modules = set(sys.modules)
    plugins.load_installed.cache_clear()
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
        for name in set(sys.modules) - modules:
            if name.startswith("fastadv_plugin") or name in imported:
                del sys.modules[name]
        plugins.load_installed.cache_clear()


def load() -> ModuleType:
    """The module of the example."""
    path = EXAMPLE.resolve()
    plugins.load_file(path)
    return sys.modules[plugins._loaded[path]]


def lines_of_code(text: str) -> int:
    """The lines of a module with one statement each, without docstrings and comments."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return sum(bool(line.strip()) for line in ast.unparse(tree).splitlines())
