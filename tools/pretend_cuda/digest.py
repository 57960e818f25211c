"""The files that each section of ``run.py`` tests, and a digest of their code.

The digest covers the syntax trees of Python files without docstrings, and the text of C++ files
without comments and white space. It is the same for all versions of Python.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

RUNTIME = ("tools/pretend_cuda/runtime/*", "tools/pretend_cuda/build.py")
# The code of a step, without the command line, files, data and the evaluation of a run.
STEP = (
    *("fastadv/algorithms/**/*.py", "fastadv/engine/**/*.py", "fastadv/kernels/*.py"),
    *("fastadv/models/*.py", "fastadv/training/*.py"),
    *("fastadv/ranges.py", "fastadv/run/schedules.py", "fastadv/threat/*.py"),
)
DRIVERS = tuple(
    f"tools/pretend_cuda/{name}.py"
    for name in ("compiling", "counts", "forked", "numbers_off", "recipes")
)
STUBS = (
    *("tools/pretend_cuda/inductor_stubs.py", "tools/pretend_cuda/generated.py"),
    "fastadv/benchmark/launches.py",
)
BENCH = ("fastadv/benchmark/ours.py", "fastadv/benchmark/setting.py", "fastadv/benchmark/specs.py")
GPU_TESTS = (
    *("tests/test_gpu_capture.py", "tests/kernels/test_gpu_kernels.py"),
    *("tests/kernels/test_dispatch.py", "tests/kernels/test_operators.py", "tests/every_recipe.py"),
    *(
        "tests/tiny*.py",
        "fastadv/evaluation/attacks/*.py",
        "fastadv/data/*.py",
        "fastadv/evaluation/*.py",
    ),
)
COVERED: Mapping[str, tuple[str, ...]] = {
    "controls": (*RUNTIME, "tools/pretend_cuda/controls.py"),
    "tests": (*RUNTIME, *STEP, *GPU_TESTS, "tools/pretend_cuda/numbers_off.py"),
    "recipes": (*RUNTIME, *STEP, *BENCH, *DRIVERS),
    "shapes": (*RUNTIME, *STEP, *BENCH, *DRIVERS, "tools/pretend_cuda/shapes.py"),
    "generated": (*STEP, *BENCH, *DRIVERS, *STUBS, "fastadv/benchmark/variants.py"),
    "steps": (*RUNTIME, *STEP, *BENCH, *DRIVERS, *STUBS, "tools/pretend_cuda/steps.py"),
    "ranks": (*RUNTIME, *STEP, *BENCH, "tools/pretend_cuda/ranks.py"),
    # Only the suite's own scripts: each of the other sections covers what else it runs.
    "suite": (
        *(
            "bench/gpu_*.py",
            "bench/kernels.py",
            "fastadv/benchmark/*.py",
            "fastadv/benchmark/peers/*.py",
        ),
        *("tools/pretend_cuda/compiling.py", "tools/pretend_cuda/startup/*.py"),
    ),
}
"""The files of each section, as patterns relative to the project's root."""

# Fields that exist only in some versions of Python, or that do not change what the code does.
_UNSAID = {"type_comment", "type_ignores", "type_params", "kind", "ctx"}
_CODE = re.compile(r'("(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\')|//[^\n]*|/\*.*?\*/|\s+', re.DOTALL)


def digest(section: str, root: Path = ROOT) -> str:
    """16 hex digits over all files that ``section`` covers; raises ``ValueError`` for a pattern
    that matches no file."""
    hasher = hashlib.sha256()
    for file in sorted(set(_files(COVERED[section], root))):
        hasher.update(f"{file.relative_to(root)} {content(file)}\n".encode())
    return hasher.hexdigest()[:16]


def _files(patterns: Iterable[str], root: Path) -> Iterator[Path]:
    for pattern in patterns:
        found = [file for file in root.glob(pattern) if file.is_file()]
        if not found:
            raise ValueError(f"{pattern} matches no file; correct the pattern in digest.py.")
        yield from found


@cache
def content(file: Path) -> str:
    """A digest of one file."""
    text = file.read_text()
    told = tree(text) if file.suffix == ".py" else _CODE.sub(lambda found: found[1] or " ", text)
    return hashlib.sha256(told.encode()).hexdigest()


def tree(source: str) -> str:
    """The syntax tree of Python source, without docstrings and positions, as text."""
    return "".join(_said(ast.parse(source)))


def _said(node: object) -> Iterator[str]:
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if name in _UNSAID or value is None or value == []:
                continue
            yield f" {name}="
            yield from _said(_without_docstrings(value) if name == "body" else value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            yield from _said(item)
        yield "]"
    else:
        yield f"{type(node).__name__}:{node!r}"


def _without_docstrings(body: object) -> object:
    """``body`` without strings as statements: docstrings of modules, classes, functions and
    attributes."""
    if not isinstance(body, list):
        return body
    return [
        each
        for each in body
        if not (
            isinstance(each, ast.Expr)
            and isinstance(each.value, ast.Constant)
            and isinstance(each.value.value, str)
        )
    ]
