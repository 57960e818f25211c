"""For every Python that a rehearsal starts: what numbers decide is off, constants fold on the CPU.

With this folder on PYTHONPATH Python imports this file by itself, in workers and test runs, too.
Nothing is imported until what is to be patched is: the patches follow it.
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
# After which module is imported, which function of which file is called.
FOLLOWS = {
    "fastadv.training.training_step": ("numbers_off", "switch_off"),
    "torch._inductor.compile_fx": ("compiling", "fold_on_the_cpu"),
}


class _Afterwards(importlib.abc.MetaPathFinder):
    """Lets the usual finders find the modules of ``FOLLOWS`` and patches what they define."""

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
                # Where pytest loads the file as its plugin, that is what imports the module.
                if file not in sys.modules:
                    patches = importlib.import_module(file)
                    getattr(patches, function)()
                    setattr(patches, function, lambda: None)  # once, also if pytest asks later

            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


sys.path.append(TOOLS)
sys.meta_path.insert(0, _Afterwards())
os.environ["PYTEST_ADDOPTS"] = "-p numbers_off"
