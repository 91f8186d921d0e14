"""Checks that the files which a command line names exist.

This module does not import torch, which takes seconds, so that a mistake is reported at once.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from fastgn.errors import SUGGESTIONS, UserError, check, find_mistyped


def check_data_dir(data: str | None, data_dir: str | None) -> None:
    """Raises UserError if --data-dir does not exist, or if it is given together with the digits.

    data: value of --data, or None if it is not given. data_dir: value of --data-dir, or None.
    """
    if data_dir is None:
        return
    check(
        data != "digits",
        f"--data-dir {data_dir}: the digits come with scikit-learn, so leave --data-dir out, or "
        f"add --data imagefolder to use the images in {data_dir}",
    )
    check_exists("--data-dir", data_dir, "file or folder")


def check_checkpoints(paths: Iterable[str]) -> None:
    """Raises UserError if a value of --checkpoint does not exist."""
    for path in paths:
        check_exists("--checkpoint", path, "run or file")


def check_exists(flag: str, path: str, kind: str) -> None:
    """Raises UserError if a file or folder does not exist. The message suggests names in the same
    folder that differ from the missing name by a typing error.

    flag: option that names the path. kind: kind of thing that the path should be.
    """
    try:
        if Path(path).exists():
            return
    except OSError:  # for example a folder without permission, which is reported when it is read
        return
    parent, name = os.path.split(os.path.normpath(path))
    try:
        names = [entry for entry in os.listdir(parent or ".") if not entry.startswith(".")]
    except OSError:
        names = []
    close = [str(Path(parent) / found) for found in find_mistyped(name, names)[:SUGGESTIONS]]
    below = "" if os.path.isabs(path) else f" below {Path.cwd()}"
    remedy = f": did you mean {' or '.join(close)}?" if close else below
    raise UserError(f"{flag} {path}: there is no such {kind}{remedy}")
