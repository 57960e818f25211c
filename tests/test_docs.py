"""Every row of "Your model, your loop" names a test that exists, and its code runs."""

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


def test_its_code_runs():
    """The blocks of one section follow each other; an expression with a comment has that value."""
    blocks = 0
    for section in re.split(r"(?m)^## ", PAGE.read_text()):
        space = {"__name__": "docs"}
        for block in re.findall(r"(?ms)^```python\n(.*?)^```", section):
            exec(compile(block, PAGE.name, "exec"), space)
            for expression, value in re.findall(r"(?m)^(\S.*?)  # (\[.*\])$", block):
                assert eval(expression, space) == eval(value, space), expression
            blocks += 1
    assert blocks >= 4
