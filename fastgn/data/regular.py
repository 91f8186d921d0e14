"""Opens the files of a data set, which others may have made."""

import errno
import os
import stat
from io import FileIO


def open_regular(path: str | os.PathLike[str]) -> FileIO:
    """Opens a regular file for reading, without a buffer.

    A named pipe, a device or a socket would block whoever reads it, or never end.

    Raises OSError if the file cannot be opened or is none of the kind.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    return open(descriptor, "rb", buffering=0)
