"""Patches every Python process of a rehearsal: ``numbers_off`` and folding of constants on the CPU.

Python imports this file at its start if the folder is on PYTHONPATH, also in workers and test runs.
Each patch is applied after the module that it changes has been imported; nothing else is imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

TOOLS = str(Path(__file__).resolve().parents[1])
# Module -> (file, function) to call after the module has been imported.
FOLLOWS = {
    "fastadv.training.training_step": ("numbers_off", "switch_off"),
    "torch._inductor.compile_fx": ("compiling", "fold_on_the_cpu"),
}


class _Afterwards(importlib.abc.MetaPathFinder):
    """Finds the modules in ``FOLLOWS`` with the usual finders and patches them when executed."""

    def __init__(self) -> None:
        self.waiting = dict(FOLLOWS)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.waiting:
            return None
        file, function = self.waiting.pop(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                # If pytest loads the file as a plugin, the file itself imports the module.
                if file not in sys.modules:
                    patches = importlib.import_module(file)
                    getattr(patches, function)()
                    setattr(patches, function, lambda: None)  # once, even if pytest calls it

            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


sys.path.append(TOOLS)
sys.meta_path.insert(0, _Afterwards())
os.environ["PYTEST_ADDOPTS"] = "-p numbers_off"
