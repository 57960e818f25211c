"""For every Python that a rehearsal starts: what numbers decide is off (``numbers_off.py``).

With this folder on PYTHONPATH Python imports this file by itself, in workers and test runs, too.
Nothing is imported until fastadv's step is: the patches follow it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

FOLLOWS = "fastadv.training_step"
TOOLS = str(Path(__file__).resolve().parents[1])


class _Afterwards(importlib.abc.MetaPathFinder):
    """Lets the usual finders find ``FOLLOWS`` and patches once it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != FOLLOWS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                import numbers_off

                numbers_off.switch_off()

            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


sys.path.append(TOOLS)
sys.meta_path.insert(0, _Afterwards())
os.environ["PYTEST_ADDOPTS"] = "-p numbers_off"
