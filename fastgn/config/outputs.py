"""Where a program may write: not over what it reads, among the images, or over a run's own files.

No file that is read is a result: a program that would replace one is refused before it works. An
image may lie anywhere, because lists and links name it. So a file is only replaced if it is of the
kind that the option writes.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastgn.errors import check

SPOILT = "metrics.csv.spoilt"
"""Name of the copy of a metrics.csv that had lines which are no rows."""
RUN_FILES = (
    *("config.toml", "environment.json", "metrics.csv", "model.safetensors", "curves.png"),
    *("summary.json", "config.json", "wandb_id.txt", SPOILT),
)
"""What a run may write beside its checkpoints."""

REPORTS = (".json", ".html")
"""Endings of files that are no data."""
PICTURE = ("a figure of fastgn's", re.compile(rb"\x89PNG.{,200}Software\0fastgn", re.DOTALL))
KINDS = {
    "--output": ("JSON", re.compile(rb"\s*\{")),
    "--report": ("an HTML page", re.compile(rb"<!DOCTYPE html>", re.IGNORECASE)),
    "--curve": PICTURE,
    "--picture": PICTURE,
}
"""Option -> what it writes, and how such a file begins."""


def holds_run(folder: Path) -> bool:
    """Whether a folder has the weights of a run."""
    return (folder / "model.safetensors").exists() or any((folder / "checkpoints").glob("*.pt"))


def check_written(
    written: Mapping[str, str | Path | None], read: Iterable[tuple[str, str | None]] = ()
) -> None:
    """Raises UserError if two of the files to write are the same one, if one is read as well, if
    one is a run's own, or if one is there and of another kind than the option writes.

    written: option and the file that it names. read: the same for files to read.
    """
    taken = {os.path.realpath(path): option for option, path in read if path is not None}
    for option, path in written.items():
        if path is None:
            continue
        real = Path(os.path.realpath(path))
        other = taken.setdefault(str(real), option)
        check(
            other == option,
            f"{option} {path} would overwrite the file of {other}: name another file",
        )
        below = real.parent.name == "checkpoints" and holds_run(real.parent.parent)
        check(
            not below and (real.name not in RUN_FILES or not holds_run(real.parent)),
            f"{option} {path} would overwrite a file of the run there: name another file",
        )
        kind, start = KINDS.get(option, ("", None))
        head = beginning(real)
        check(
            start is None or not head or start.match(head) is not None,
            f"{option} {path} would overwrite a file that is not {kind}: name another file, or "
            "remove it first",
        )


def beginning(path: Path) -> bytes:
    """Returns a file's first bytes, none if there is no file or it cannot be read."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return file.read(512)
    except OSError:  # said by whoever writes there
        pass
    return b""


def check_replaced(option: str, folder: Path, names: Iterable[str], ours: bool, maker: str) -> None:
    """Raises UserError if a folder has one of the files to write and `ours` is false.

    ours: whether the program itself has made what is in the folder. maker: what makes such files.
    """
    for name in names:
        check(
            ours or not (folder / name).is_file() or not (folder / name).stat().st_size,
            f"{option} {folder} would overwrite {folder / name}, which no {maker} has made: give "
            f"another {option}",
        )


def check_outside_data(
    written: Mapping[str, str | Path | None], data_dir: str | None, splits: Iterable[str]
) -> None:
    """Raises UserError if something is to be written into one of the splits below --data-dir, or
    over another file there."""
    if data_dir is None:
        return
    root = Path(os.path.realpath(data_dir))
    for option, path in written.items():
        if path is None:
            continue
        real = Path(os.path.realpath(path))
        around = (real, *real.parents)
        for split in splits:
            check(
                Path(os.path.realpath(root / split)) not in around,
                f"{option} {path} lies in {root / split}, where the images are: give a place "
                "outside of it",
            )
        data = root in around and real.is_file() and real.suffix not in REPORTS
        check(
            not data,
            f"{option} {path} would overwrite a file below --data-dir {data_dir}: name another "
            "file",
        )
