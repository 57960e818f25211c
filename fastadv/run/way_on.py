"""The command by which a run goes on, for sentences: with the plugins and the launcher with which
this process was started."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from fastadv.algorithms.plugins import loaded_files
from fastadv.errors import Interrupted
from fastadv.storage.printable import safe_sentence


def train_command(*words: str) -> str:
    """``fastadv train`` with ``words``, quoted for a shell; under torchrun with the launcher and as
    many processes."""
    plugins = [word for file in loaded_files() for word in ("--plugin", str(file))]
    launcher, told = _launcher()
    command = [*launcher, "train", *plugins, *words]
    return " ".join(shlex.quote(_on_one_line(word)) for word in command) + told


def resume_command(path: Path | str) -> str:
    """The command that goes on with the run in ``path``."""
    return train_command("--resume", str(path))


def continued(path: Path) -> str:
    """The command that goes on with the run in ``path``, as the end of a sentence."""
    return f"continue with: {resume_command(path)}"


def interrupted(path: Path, by: str) -> Interrupted:
    """What ends the run in ``path`` when it was stopped ``by`` something and can go on."""
    return Interrupted(f"Stopped by {by}; {continued(path)}", by)


def _on_one_line(word: str) -> str:
    """``word`` whole, and safe for a terminal."""
    return safe_sentence(word).replace("\n", "\\n")


def _launcher() -> tuple[list[str], str]:
    """The words before ``train``, and what is to be said behind the command."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment or environment.get("WORLD_SIZE", "1") == "1":
        return ["fastadv"], ""
    words = ["fastadv-torchrun"]
    nodes, here = (environment.get(name, "1") for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if nodes != "1":
        words += ["--nnodes", nodes]
    words += ["--nproc-per-node", here, "-m", "fastadv"]
    return words, " (on each machine, with its rendezvous options)" if nodes != "1" else ""
