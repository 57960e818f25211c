"""A run that has begun, as its last checkpoint has it: read once, and handed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastadv.data import is_tree
from fastadv.data.listing import Listing
from fastadv.errors import UserError
from fastadv.run.config import RunConfig
from fastadv.run.initial import DIGEST, Initial
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_models import check_fit
from fastadv.storage import checkpoint
from fastadv.storage.printable import printable


@dataclass(frozen=True)
class Begun:
    """The run of ``config`` in ``folder``. ``saved``: what last.pt holds (``saved_run.contents``);
    None as long as there is no checkpoint."""

    folder: RunFolder
    config: RunConfig
    saved: Mapping[str, Any] | None

    @classmethod
    def read(cls, folder: RunFolder, config: RunConfig) -> Begun:
        """Raises ``UserError`` for a checkpoint that cannot be read."""
        return cls(folder, config, checkpoint.load(folder.last) if folder.last.exists() else None)

    @property
    def files(self) -> Listing | None:
        """The image files that the run was begun with, if its checkpoint names any."""
        found = None if self.saved is None else self.saved.get("files")
        return (
            Listing.from_state(found) if found is not None and is_tree(self.config.data) else None
        )

    def initial(self) -> Initial | None:
        """The weights that the run began with, as its checkpoint remembers them; None where it has
        none, so that their file is needed.

        Raises ``UserError`` if somebody else's folder would have a file read."""
        config, folder = self.config, self.folder
        if config.init is None:
            return None
        if self.saved is None:
            if not folder.own:
                raise UserError(
                    f"{printable(folder.path)} was not begun here and holds no checkpoint, so its "
                    f"config.toml would have {printable(config.init)} read: begin anew, with "
                    "--init and another --out."
                )
            return None
        recorded = self.saved.get("provenance")
        found = recorded.get("digests") if isinstance(recorded, dict) else None
        value = found.get(DIGEST) if isinstance(found, dict) else None
        return Initial(value) if isinstance(value, str) else None

    def require_fit(self, facts: dict[str, Any]) -> None:
        """Raise ``UserError`` unless the weights are of the network of ``config`` for data with
        these ``facts``; to be called before memory is taken for it."""
        if self.saved is not None:
            check_fit(self.config, facts, self.saved.get("model"), self.folder.last)


def progress_of(saved: Mapping[str, Any] | None, name: str) -> int:
    """A number of the ``Progress`` in a checkpoint; 0 if it holds none."""
    progress = (saved or {}).get("progress")
    value = progress.get(name) if isinstance(progress, dict) else None
    return value if type(value) is int else 0
