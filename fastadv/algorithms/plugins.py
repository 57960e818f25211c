"""Methods from elsewhere: a file that the user names, and installed packages.

A plugin is Python code that calls ``fastadv.register`` and ``fastadv.register_recipe``. Loading it
runs it, so only the user names one, on the command line or by installing a package; a file that is
loaded (a run folder, a checkpoint) never does.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path

from fastadv.errors import UserError, warn
from fastadv.storage.printable import printable

GROUP = "fastadv.plugins"
"""The entry points of installed packages; each names a module, which is imported."""

_loaded: dict[Path, str] = {}  # file -> name of its module


def load_file(path: str | Path) -> None:
    """Run the Python file ``path`` once, so that it registers what it holds. Raises ``UserError``
    for a file that is not there or that fails, with the line at which it does."""
    shown = printable(path)
    try:
        file = Path(path).resolve()
        is_there = file.is_file()
    except (OSError, RuntimeError, ValueError):  # links in a circle; no name of a file
        is_there = False
    if not is_there or file.suffix != ".py":
        raise UserError(f"--plugin names a Python file with your parts; {shown} is none.")
    if file in _loaded:
        return
    name = f"fastadv_plugin_{file.stem}_{len(_loaded)}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"The plugin {shown} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the hints of a class are looked up in its module
    try:
        spec.loader.exec_module(module)
    except UserError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(
            f"The plugin {shown} failed{_line(error, file)}: {_said(error)}."
        ) from error
    _loaded[file] = name


def loaded_files() -> list[Path]:
    """The files that ``load_file`` has run, in that order."""
    return list(_loaded)


def are_installed() -> bool:
    """True if an installed package has a plugin."""
    return bool(importlib.metadata.entry_points(group=GROUP))


@functools.cache
def load_installed() -> None:
    """Import the plugins of installed packages, once. A package that fails is left out with a
    warning, since it may have nothing to do with this run."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            warn(f"The installed plugin {entry.name!r} failed and is left out: {_said(error)}.")


def source_digest(kind: type) -> tuple[str, str] | None:
    """The name of the file that defines ``kind`` and the SHA-256 of its text; None for a class of
    fastadv itself and for one without a file."""
    if kind.__module__.partition(".")[0] == "fastadv":
        return None
    try:
        file = inspect.getsourcefile(kind)
    except TypeError:
        return None
    if file is None or not Path(file).is_file():
        return None
    return Path(file).name, hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".")


def _line(error: BaseException, file: Path) -> str:
    """Where in ``file`` the error arose, as words."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f" in line {error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    return f" in line {lines[-1]}" if lines else ""
