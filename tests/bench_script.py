"""Import a script of bench/ as a module."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

BENCH = Path(__file__).parents[1] / "bench"


def script(name: str) -> ModuleType:
    """Execute bench/NAME.py, which may import others beside it, and return it as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(BENCH), *sys.path]):
        spec.loader.exec_module(module)
    return module
