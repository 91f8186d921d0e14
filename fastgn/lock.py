"""One writer at a time for a folder or a file: the others are refused before they change anything.

The kernel takes a lock back when its process dies, however it dies. It is POSIX's, of the process:
over NFS the server keeps it, and a loader's worker, which is forked, does not inherit it.
"""

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastgn.errors import UserError, check, print_line
from fastgn.files import remove_file

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system answers that has no locks."""
HELD: set[tuple[int, int]] = set()
"""(device, inode) of each lock that this process holds. POSIX would let a process take a lock
twice, and closing the second would release the first."""


ATTEMPTS = 100
"""Tries to create a lock, each of which a holder that leaves may spoil."""


class HeldError(UserError):
    """Another process writes there."""


@contextlib.contextmanager
def lock_folder(folder: Path, name: str) -> Iterator[None]:
    """Makes this process the only writer of a folder for as long as the block or the process lives.

    Creates the folder. Whatever it has created goes at the end if it is still empty. `name` is what
    the user calls the folder, such as "--output runs/a". Raises HeldError if another process writes
    there, and UserError if the folder cannot be written to.
    """
    with _lock(folder / ".lock", name):
        yield


@contextlib.contextmanager
def lock_file(path: Path, name: str) -> Iterator[None]:
    """Makes this process the only writer of a file; see `lock_folder`. Removes what kills have left
    of it half-written."""
    check(len(os.fsencode(path.name)) <= 200, f"{name}: the file's name is too long")
    with _lock(path.with_name(f".{path.name}.lock"), name):
        remove_leftovers(path.parent, [path.name])
        yield


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Removes what kills have left of files of these names. Only the holder of the lock may."""
    ours = re.compile(rf"\.(?:{'|'.join(re.escape(name[:40]) for name in names)})\.[^.]*\.tmp")
    for left in folder.glob(".*.tmp"):
        if ours.fullmatch(left.name):
            remove_file(left)


@contextlib.contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    created = [p for p in (path.parent, *path.parent.parents) if not os.path.lexists(p)]
    descriptor = None
    try:
        try:
            descriptor = _acquire(path, name)
        except OSError as error:
            raise UserError(
                f"{name} cannot be written: {error.strerror or error}; give another one"
            ) from None
        yield
    finally:
        if descriptor is not None:
            _release(descriptor, path)
        for folder in created:  # the innermost first, until one is not empty
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                break


def _acquire(path: Path, name: str) -> int | None:
    """Returns the locked file's descriptor, or None on a file system without locks."""
    for attempt in range(ATTEMPTS):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path, follow_symlinks=False)
            check(
                stat.S_ISREG(status.st_mode),
                f"{name} cannot be written: its lock, {path}, is no plain file: remove it",
            )
            if _identity(status) in HELD:
                raise HeldError(f"{name} is in use by this process already: give another one")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # a holder that leaves has just removed the folder
            if attempt == ATTEMPTS - 1:  # or files cannot be created there, as in /proc
                raise
            continue
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise HeldError(
                    f"{name} is in use by {_holder(path)}: wait until it has ended, or give "
                    "another one"
                ) from None
            if error.errno not in NO_LOCKS:
                raise
            print_line(f"warning: {name}: {path} cannot be locked: the file system has no locks")
            return None
        HELD.add(_identity(os.fstat(descriptor)))
        if not _is_at(descriptor, path):  # the holder before has removed it in the meantime
            _close(descriptor)
            continue
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on host {socket.gethostname()}".encode())
        except OSError:
            _release(descriptor, path)
            raise
        return descriptor
    raise HeldError(f"{name} is in use by {_holder(path)}: wait until it has ended")


def _release(descriptor: int, path: Path) -> None:
    with contextlib.suppress(OSError):
        if _is_at(descriptor, path):
            path.unlink()  # before the lock goes: afterwards it may be another process's
    _close(descriptor)


def _close(descriptor: int) -> None:
    HELD.discard(_identity(os.fstat(descriptor)))
    os.close(descriptor)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """Returns which process holds a lock. One that has just come has yet to write its name."""
    for _ in range(20):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            holder = path.read_text().strip()
            if holder.isprintable() and 0 < len(holder) < 300:
                return holder
        time.sleep(0.05)
    return "another process"
