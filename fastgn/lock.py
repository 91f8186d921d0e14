"""Locks that allow one writer at a time for a folder or a file.

Other processes are refused before they change anything. The operating system releases a lock when
its process ends for any reason. The locks are POSIX locks, which belong to a process. They work
over NFS, and the forked workers of a data loader do not inherit them.
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
"""Error numbers of file systems that do not support locks."""
HELD: set[tuple[int, int]] = set()
"""(device, inode) of each lock file that this process has locked.

The set is needed because POSIX lets a process lock a file that it has locked already. If the
process then closes the file once, it loses both locks.
"""


ATTEMPTS = 100
"""Number of attempts to create a lock. An attempt fails if another process removes the lock file or
its folder at the same moment."""


class HeldError(UserError):
    """Another process holds the lock on a folder or file. The message names this process."""


@contextlib.contextmanager
def lock_folder(folder: Path, name: str) -> Iterator[None]:
    """Makes this process the only writer of a folder inside the block.

    The folder is created if it is missing. Folders that were created are removed at the end if they
    are still empty. The lock is also released if the process is killed.

    name: name of the folder in messages, such as "--output runs/a". Raises HeldError if another
    process holds the lock, and UserError if the folder cannot be written to.
    """
    with _lock(folder / ".lock", name):
        yield


@contextlib.contextmanager
def lock_file(path: Path, name: str) -> Iterator[None]:
    """Makes this process the only writer of a file inside the block.

    Also removes temporary files that killed processes have left while they wrote the file. name:
    name of the file in messages. Raises HeldError if another process holds the lock, and UserError
    if the file cannot be written.
    """
    check(
        len(os.fsencode(path.name)) <= 200,
        f"{name}: the file's name is longer than 200 bytes: give a shorter one",
    )
    with _lock(path.with_name(f".{path.name}.lock"), name):
        remove_leftovers(path.parent, [path.name])
        yield


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Removes temporary files that killed processes have left while they wrote files of these
    names.

    Call this only while holding the lock on the files or their folder. Otherwise another process
    could be writing such a temporary file.
    """
    ours = re.compile(rf"\.(?:{'|'.join(re.escape(name[:40]) for name in names)})\.[^.]*\.tmp")
    for left in folder.glob(".*.tmp"):
        if ours.fullmatch(left.name):
            remove_file(left)


@contextlib.contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    """Holds a lock on the file at `path` inside the block, and creates missing folders for it.

    At the end, the created folders are removed if they are empty. name: name of the locked folder
    or file in messages.
    """
    created = [p for p in (path.parent, *path.parent.parents) if not os.path.lexists(p)]
    descriptor = None
    try:
        try:
            descriptor = _acquire(path, name)
        except OSError as error:
            raise UserError(
                f"{name} cannot be written: {error.strerror or error}: give another path"
            ) from None
        yield
    finally:
        if descriptor is not None:
            _release(descriptor, path)
        for folder in created:  # remove the innermost folder first, and stop if one is not empty
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                break


def _acquire(path: Path, name: str) -> int | None:
    """Locks the file at `path` and returns its file descriptor.

    Returns None if the file system does not support locks. name: name of the locked folder or file
    in messages.
    """
    for attempt in range(ATTEMPTS):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path, follow_symlinks=False)
            check(
                stat.S_ISREG(status.st_mode),
                f"{name} cannot be written: its lock file {path} is not a plain file: remove it",
            )
            if _get_identity(status) in HELD:
                raise HeldError(f"{name} is in use by this process already: give another path")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another process has just removed the folder
            # after many attempts the cause must be the folder itself, such as /proc
            if attempt == ATTEMPTS - 1:
                raise
            continue
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise HeldError(
                    f"{name} is in use by {_read_holder(path)}: wait until it has ended, or give "
                    "another path"
                ) from None
            if error.errno not in NO_LOCKS:
                raise
            print_line(
                f"warning: {name}: {path} cannot be locked, because the file system has no locks"
            )
            return None
        HELD.add(_get_identity(os.fstat(descriptor)))
        if not _is_file_at(descriptor, path):  # the previous holder of the lock removed the file
            _close(descriptor)
            continue
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on host {socket.gethostname()}".encode())
        except OSError:
            _release(descriptor, path)
            raise
        return descriptor
    raise HeldError(f"{name} is in use by {_read_holder(path)}: wait until it has ended")


def _release(descriptor: int, path: Path) -> None:
    """Removes the lock file and releases the lock."""
    with contextlib.suppress(OSError):
        if _is_file_at(descriptor, path):
            path.unlink()  # do this before _close, after which another process may hold the lock
    _close(descriptor)


def _close(descriptor: int) -> None:
    """Closes the descriptor of a lock, which releases the lock."""
    HELD.discard(_get_identity(os.fstat(descriptor)))
    os.close(descriptor)


def _get_identity(status: os.stat_result) -> tuple[int, int]:
    """Returns (device, inode), which identify a file."""
    return status.st_dev, status.st_ino


def _is_file_at(descriptor: int, path: Path) -> bool:
    """Returns whether an open file is still the file at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _read_holder(path: Path) -> str:
    """Returns a description of the process that holds a lock, for messages.

    A process that has just taken the lock may not have written its name yet, so reading is
    repeated.
    """
    for _ in range(20):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            holder = path.read_text().strip()
            if holder.isprintable() and 0 < len(holder) < 300:
                return holder
        time.sleep(0.05)
    return "another process"
