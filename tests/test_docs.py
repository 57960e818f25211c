"""Every row of "Your model, your loop" names a test that exists."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "your-model-your-loop.md"


def named_in(file: str) -> set[str]:
    tree = ast.parse((HERE / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_has_a_test():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [line for line in rows if not re.search(r"\| test \|$", line)]
    assert len(rows) > 45
    for row in rows:
        file, _, name = row.rstrip("| ").rpartition("|")[2].strip().strip("`").partition("::")
        assert name in named_in(file), row
