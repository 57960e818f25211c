"""Every row of "Your model, your loop" names a test that exists, and its code runs."""

import ast
import re
from pathlib import Path

import pytest
import torch

import fastadv

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


def test_the_code_of_the_readme_runs():
    """Its short sections begin with a model, an optimizer and a batch, as its loop has them."""
    model = fastadv.build_model("preact_resnet18", num_classes=10, width=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.rand(4, 3, 32, 32), torch.randint(10, (4,))
    space = {"fastadv": fastadv, "torch": torch, "model": model, "optimizer": optimizer}
    space |= {"x": x, "y": y, "__name__": "readme"}
    readme = (HERE.parent / "README.md").read_text()
    found = re.findall(r"(?ms)^<!-- runs -->\n```python\n(.*?)^```", readme)
    for block in found:
        exec(compile(block, "README.md", "exec"), space)
    assert len(found) == 2


ROOT = HERE.parent
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
)


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have in links."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    here = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", here.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = here.parent / path if path else here
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
