"""A virtual environment for each peer library, with the torch that runs fastadv.

The peer's own packages are installed in its environment; torch and fastadv are those of the
running interpreter, so that nothing but the peer differs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from fastadv.benchmark.rows import repository
from fastadv.errors import UserError, unknown

PACKAGES: dict[str, list[str]] = {
    # Without its own requirements: they pin a requests release of 2020.
    "torchattacks": ["--no-deps", "torchattacks"],
    "art": ["adversarial-robustness-toolbox"],
}


def default_folder() -> Path:
    """Where the environments live: in a checkout next to the benchmarks, otherwise in the cache."""
    root = repository()
    if root is not None:
        return root / "bench" / "peers" / "venvs"
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "fastadv" / "peers"


def interpreter(peer: str) -> Path:
    """The Python of ``peer`` (torchattacks or art), its environment created if it is missing.

    Raises ``UserError`` when it cannot be installed.
    """
    if peer not in PACKAGES:
        raise unknown("peer", peer, PACKAGES)
    home = default_folder() / peer
    python = home / "bin" / "python"
    done = home / "installed"
    if not done.exists():
        _make(home)
        _install(peer, python)
        done.touch()
    return python


def _make(home: Path) -> None:
    venv.create(home, with_pip=True, clear=True)
    tag = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = home / "lib" / tag / "site-packages"
    shared = dict.fromkeys(sysconfig.get_path(key) for key in ("purelib", "platlib"))
    # As a site directory, not a path, because editable installs are .pth files.
    lines = [f"import site; site.addsitedir({folder!r})" for folder in shared]
    (packages / "shared.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _install(peer: str, python: Path) -> None:
    command = [str(python), "-m", "pip", "install", "-q", *_constraints(), *PACKAGES[peer]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(
            f"The peer {peer} could not be installed ({said[-1] if said else 'pip said nothing'}); "
            "check the network and try again."
        )


def _constraints() -> Sequence[str]:
    root = repository()
    if root is None or not (root / "constraints.txt").exists():
        return []
    return ["-c", str(root / "constraints.txt")]
