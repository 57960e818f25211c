"""One process at a time: a lock file in a folder, which says who holds it.

The system's lock on the file decides: it ends with its process, however that ends. Where there is
none (some network file systems, Windows), the file itself is the lock: a dead process of this
computer is noticed, one of another computer is not.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastadv.engine.process.beginning import began, boot
from fastadv.errors import UserError
from fastadv.storage import files
from fastadv.storage.printable import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_MOST_BYTES = 1 << 12
_ATTEMPTS, _PAUSE = 200, 0.01  # seconds
_SETTLED = 0.1  # seconds after which all that saw one dead process have tried to take its lock
_UNWRITTEN = 2.0  # seconds after which nobody writes into an empty lock file any more
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)

Owner = dict[str, Any]


class Lock:
    """The lock file at ``path``, of processes that all do what ``doing`` says: "trains in RUN"."""

    def __init__(self, path: Path, doing: str) -> None:
        self.path, self._doing = path, doing
        self._handle: int | None = None  # of the file that the system has locked
        self._own: Owner | None = None  # the text of a file that is itself the lock

    def take(self) -> None:
        """Raises ``UserError`` while another process holds it, and ``OSError`` where the file
        cannot be made. What a killed process left is no hindrance."""
        if self._handle is not None or self._own is not None:
            return
        take = self._take_locked if self._system_locks() else self._take_file
        for _ in range(_ATTEMPTS):
            if take():
                return
            time.sleep(_PAUSE)
        raise self._refused()

    def release(self) -> None:
        """Let the next process take it. Not an error if it is not held."""
        handle, self._handle = self._handle, None
        own, self._own = self._own, None
        with suppress(OSError):
            if handle is not None and self._is_at_path(handle):
                self.path.unlink()
            if own is not None and self._owner() == own:
                self.path.unlink()
        if handle is not None:
            os.close(handle)

    def _system_locks(self) -> bool:
        """True if files in this folder can be locked."""
        probe = self._beside()
        handle = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | _PLAIN, 0o666)
        try:
            return _lock(handle)
        finally:
            os.close(handle)
            probe.unlink(missing_ok=True)

    def _take_locked(self) -> bool:
        """``take``; False to try again, since the holder removed the file in between."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | _PLAIN, 0o666)
        try:
            if _lock(handle) and self._is_at_path(handle):
                self._handle = handle
                with suppress(OSError):  # on a full disk it holds without its text
                    os.ftruncate(handle, 0)
                    os.write(handle, _text(_this_process()))
                return True
        except _HeldError:
            raise self._refused() from None
        finally:
            if self._handle is None:
                os.close(handle)
        return False

    def _take_file(self) -> bool:
        """The same where the system locks nothing: who makes the file holds it."""
        found = self._owner()
        if found is None:
            return self._made()
        if found and not _is_dead(found):
            raise self._refused()
        return bool(found or self._is_old()) and self._taken_from(found)

    def _beside(self) -> Path:
        """A new name beside that of the lock."""
        return self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")

    def _taken_from(self, dead: Owner) -> bool:
        """Take the lock of a ``dead`` process. Of two that try, one renames its file."""
        aside = self._beside()
        try:
            os.replace(self.path, aside)
        except OSError:
            return False
        mine = _owner_in(aside) == dead and self._made()
        if mine:
            aside.unlink(missing_ok=True)
            time.sleep(_SETTLED)
            return self._owner() == self._own
        with suppress(
            OSError, AttributeError
        ):  # a living one's, made meanwhile, unless a third made another
            os.link(aside, self.path)
        aside.unlink(missing_ok=True)
        return False

    def _made(self) -> bool:
        """Create the file, at once with its text where there are hard links; False if another
        process did."""
        own = _this_process()
        beside = self._beside()
        create = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAIN
        try:
            _write(os.open(beside, create, 0o666), _text(own))
            try:
                os.link(beside, self.path)
            except FileExistsError:
                return False
            except (OSError, AttributeError):
                _write(os.open(self.path, create, 0o666), _text(own))
        except FileExistsError:
            return False
        finally:
            beside.unlink(missing_ok=True)
        self._own = own
        return True

    def _owner(self) -> Owner | None:
        return _owner_in(self.path)

    def _is_old(self) -> bool:
        with suppress(OSError):
            return time.time() - os.lstat(self.path).st_mtime > _UNWRITTEN
        return False

    def _is_at_path(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _refused(self) -> UserError:
        owner = self._owner()
        for _ in range(20):
            if owner:
                break
            time.sleep(_PAUSE)  # it is about to write who it is
            owner = self._owner()
        if not owner:
            return UserError(f"Another process {self._doing}: wait for its end.")
        host = printable(str(owner.get("host")))
        here = owner.get("host") == socket.gethostname() and _can_look()
        more = "" if here else f"; if it has ended, delete {printable(self.path)}"
        return UserError(
            f"Another process {self._doing}: process {printable(str(owner.get('pid')))} on {host}, "
            f"since {printable(str(owner.get('since')))}. Wait for its end{more}."
        )


class _HeldError(Exception):
    """Another process has locked the file."""


_PLAIN = files.flags("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK")


def _lock(handle: int) -> bool:
    """Lock the file ``handle`` for this process; False where the system does not lock. Raises
    ``_HeldError``."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise _HeldError from None
        return False
    return True


def _this_process() -> Owner:
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    host = socket.gethostname()
    return {"pid": pid, "host": host, "boot": boot(), "started": began(pid), "since": since}


def _is_dead(owner: Owner) -> bool:
    """True if the process is known to have ended: one of this computer."""
    if owner.get("host") != socket.gethostname() or not _can_look():
        return False
    pid = owner.get("pid")
    if type(pid) is not int or pid < 1:
        return False
    if owner.get("boot") != boot():
        return True
    try:
        os.kill(pid, 0)  # asks only, on POSIX
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return owner.get("started") != began(pid)  # its number belongs to a later one


def _can_look() -> bool:
    return os.name == "posix"


def _text(owner: Owner) -> bytes:
    return json.dumps(owner).encode() + b"\n"


def _owner_in(path: Path) -> Owner | None:
    """Who holds the lock file ``path``: {} where it does not say, None where there is none."""
    try:
        content = files.read(path, _MOST_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, UserError):
        return {}
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(handle: int, content: bytes) -> None:
    try:
        os.write(handle, content)
    finally:
        os.close(handle)
