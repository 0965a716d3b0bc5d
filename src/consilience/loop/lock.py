"""The lock of a run's folder: one process at a time, and a process that has died holds nothing."""

from __future__ import annotations

import errno
import os
import weakref
from contextlib import suppress
from pathlib import Path

from consilience.core.errors import ConsilienceError
from consilience.core.params import cannot_write, make_folder
from consilience.core.warning import warn


class FolderLock:
    """A lock on a folder, held until `release` or the end of the process, however it ends.

    The system frees it, so that nobody has to delete a file after a crash. Raises ConsilienceError where
    another process (or another run of this one) has it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        try:
            make_folder(folder)
            self.handle: int | None = self._locked()
            # For the message of the next one; the lock holds without it, as on a full disk.
            with suppress(OSError):
                os.ftruncate(self.handle, 0)
                os.write(self.handle, str(os.getpid()).encode())
        except OSError as error:
            raise cannot_write(self.path, error) from error
        HELD.add(self)

    def _locked(self) -> int:
        """Open the file, and lock it."""
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if not _lock(handle):
                    owner = os.read(handle, 20).decode(errors="replace") or "unknown"
                    raise ConsilienceError(
                        f"{self.path.parent} is in use by process {owner}; wait until it ends, or choose "
                        "another folder."
                    )
                # Who held it before may have deleted the file after we had opened it.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.stat(self.path), os.fstat(handle)):
                        return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def release(self) -> None:
        """Free the folder."""
        handle, self.handle = self.handle, None
        if handle is None:
            return
        # Deleted while it is held, so that nobody else's file is meant.
        try:
            with suppress(OSError):
                os.unlink(self.path)
        finally:
            os.close(handle)


HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()
"""The locks of this process."""


def _lock(handle: int) -> bool:
    """Lock an open file; whether it was free."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some network file systems have no locks, and a run is worth more than one.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        warn("this file system has no locks; let one process at a time use the folder")
    return True


def _let_go() -> None:
    """Close the locks in a forked process: workers that outlive a run must not hold its folder."""
    for lock in list(HELD):
        handle, lock.handle = lock.handle, None
        if handle is not None:
            os.close(handle)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
