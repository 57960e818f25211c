"""Which modules are at the top level, and the import contracts of pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
MOST_AT_THE_TOP = 7


def test_few_modules_are_at_the_top_level() -> None:
    found = sorted(file.name for file in (ROOT / "fastadv").glob("*.py"))
    assert len(found) <= MOST_AT_THE_TOP, found


def test_there_are_no_import_cycles() -> None:
    """Lazy imports and imports for type checkers are included."""
    graph = grimp.build_graph("fastadv", cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    # A module that nothing left imports, or that imports nothing left, is in no circle.
    while True:
        imported = set().union(*imports.values()) if imports else set()
        ends = {name for name, others in imports.items() if not others or name not in imported}
        if not ends:
            break
        imports = {name: others - ends for name, others in imports.items() if name not in ends}
    assert not imports, sorted(imports)


LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
UPWARD = {
    "Imports go downward": ("engine/noise.py", "from fastadv.training import training_step"),
    "No circles": ("engine/gradient.py", "from fastadv.engine.model import network"),
    "knows no other slot": (
        "algorithms/objectives/ce.py",
        "from fastadv.algorithms.targets import one_hot",
    ),
    "Triton is for the kernels": ("engine/noise.py", "import triton"),
    "Triton is for": ("threat/mask.py", "import triton"),
    "Triton is": ("ranges.py", "import triton"),
}


@pytest.mark.parametrize("contract", ["kept", *UPWARD])
def test_the_contracts_find_what_they_are_for(contract: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fastadv", tmp_path / "fastadv")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if contract != "kept":
        file, line = UPWARD[contract]
        path = tmp_path / "fastadv" / file
        # Inside of a function: lazy imports count.
        path.write_text(f"{path.read_text()}\n\ndef _late() -> None:\n    {line}\n")
    done = subprocess.run(
        [sys.executable, "-P", "-c", LINT, "--no-cache"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    broken = [line for line in done.stdout.splitlines() if line.endswith("BROKEN")]
    if contract == "kept":
        assert "4 kept, 0 broken" in done.stdout, done.stdout + done.stderr
    else:
        assert any(contract in line for line in broken), done.stdout + done.stderr
