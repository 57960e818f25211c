"""Which code may run: ``module:callable`` in a run folder, only for the user who began the run.

A run folder may come from anywhere, and importing the module that its config.toml names runs code.
When a run is begun, a note is kept outside of the folder. A folder without a note is refused unless
the user passed ``--trust-code``.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from fastadv.errors import UserError
from fastadv.storage import files
from fastadv.storage.printable import printable

_KEY_BYTES = 32
_allowed: ContextVar[bool] = ContextVar("code of any run folder may be called", default=False)


@contextmanager
def trusting(wanted: bool) -> Iterator[None]:
    """Inside, if ``wanted``, code that any run folder names may be imported and called."""
    before = _allowed.set(wanted or _allowed.get())
    try:
        yield
    finally:
        _allowed.reset(before)


def remember(folder: Path, config: bytes) -> None:
    """Note that this user began the run in ``folder`` with these bytes of config.toml.

    If no note can be written, the run continues; reading it later then needs ``--trust-code``.
    """
    with suppress(OSError, UserError):
        notes = _home() / "trusted"
        notes.mkdir(mode=0o700, parents=True, exist_ok=True)
        with files.replaced(notes / _name(folder, config, _key(make=True))):
            pass


def require(folder: Path, config: bytes, named: str) -> None:
    """Raise ``UserError`` unless the code that ``folder`` names may be called; ``named`` says what
    for and which: "model module:callable"."""
    if _allowed.get() or is_noted(folder, config):
        return
    raise UserError(
        f"{printable(folder)} names code to run, {printable(named)}, and you did not begin "
        "it here in this form; add --trust-code if you know that module and who wrote the folder."
    )


def is_own(folder: Path, config: bytes) -> bool:
    """True if this user began the run here, or passed ``--trust-code``."""
    return _allowed.get() or is_noted(folder, config)


def sign(content: bytes) -> str:
    """A mark that only this user can put on ``content``; "" if no key can be stored."""
    try:
        key = _key(make=True)
    except (OSError, UserError):
        return ""
    return hmac.new(key, b"record:" + content, hashlib.sha256).hexdigest()


def is_noted(folder: Path, config: bytes) -> bool:
    """True if this user began the run in ``folder`` with these bytes of config.toml."""
    try:
        return (_home() / "trusted" / _name(folder, config, _key(make=False))).is_file()
    except (OSError, UserError):
        return False


def _name(folder: Path, config: bytes, key: bytes) -> str:
    """The file name of a note. A moved or copied folder, or another config.toml, has another."""
    place = os.fsencode(folder.resolve())
    content = len(place).to_bytes(8, "big") + place + config
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def _key(*, make: bool) -> bytes:
    """The user's random key. Without it, the file name of a valid note cannot be computed."""
    path = _home() / "key"
    if make and not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | files.flags("O_NOFOLLOW")
            handle = os.open(path, how, 0o600)
            with open(handle, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
    key = files.read(path, _KEY_BYTES)
    if len(key) != _KEY_BYTES or not _is_private(path.stat()):
        raise UserError(f"{printable(path)} is not a private key of this user; delete it.")
    return key


def _is_private(found: os.stat_result) -> bool:
    """True if only this user may read the file; on Windows it lies in the user's own folder."""
    if not hasattr(os, "getuid"):
        return True
    return found.st_uid == os.getuid() and not found.st_mode & 0o077


def _home() -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "fastadv"
