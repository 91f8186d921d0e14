"""Checks that a program does not overwrite files that it should keep.

A program should keep the files that it reads, the images of the data set, and the files of a run.
Links and image lists can point to any folder. So the folder alone does not tell whether a file is
an image of the data set. Therefore an option that names an output file replaces an existing file
only if that file is of the kind that the option writes.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastgn.errors import check

SPOILT = "metrics.csv.spoilt"
"""Name under which a run keeps a copy of a metrics.csv that contained invalid lines."""
RUN_FILES = (
    *("config.toml", "environment.json", "metrics.csv", "model.safetensors", "curves.png"),
    *("summary.json", "config.json", "wandb_id.txt", SPOILT),
)
"""Files that a run may write, besides its checkpoints."""

REPORTS = (".json", ".html")
"""Endings of the names of files that an option may overwrite below --data-dir. Files with these
endings cannot be images."""
PICTURE = ("a figure of fastgn's", re.compile(rb"\x89PNG.{,200}Software\0fastgn", re.DOTALL))
KINDS = {
    "--output": ("JSON", re.compile(rb"\s*\{")),
    "--report": ("an HTML page", re.compile(rb"<!DOCTYPE html>", re.IGNORECASE)),
    "--curve": PICTURE,
    "--picture": PICTURE,
}
"""Option -> (kind of file that it writes, pattern that matches the beginning of such a file)."""


def holds_run(folder: Path) -> bool:
    """Returns whether a folder contains the final weights or a checkpoint of a run."""
    return (folder / "model.safetensors").exists() or any((folder / "checkpoints").glob("*.pt"))


def check_written(
    written: Mapping[str, str | Path | None], read: Iterable[tuple[str, str | None]] = ()
) -> None:
    """Raises UserError if a program would overwrite a file that it should keep.

    Two options must not name the same file. An option must not name a file that is also read, or a
    file of a run. Nor may it name an existing file of a kind that this option does not write.

    written: option -> file that the program writes for it. read: pairs of an option and the file
    that the program reads for it.
    """
    taken = {os.path.realpath(path): option for option, path in read if path is not None}
    for option, path in written.items():
        if path is None:
            continue
        real = Path(os.path.realpath(path))
        other_option = taken.setdefault(str(real), option)
        check(
            other_option == option,
            f"{option} {path} would overwrite the file of {other_option}: name another file",
        )
        below = real.parent.name == "checkpoints" and holds_run(real.parent.parent)
        check(
            not below and (real.name not in RUN_FILES or not holds_run(real.parent)),
            f"{option} {path} would overwrite a file of the run in this folder: name another file",
        )
        kind, start = KINDS.get(option, ("", None))
        head = read_beginning(real)
        check(
            start is None or not head or start.match(head) is not None,
            f"{option} {path} would overwrite a file that is not {kind}: name another file, or "
            "remove the old file first",
        )


def read_beginning(path: Path) -> bytes:
    """Returns the first 512 bytes of a file, or b"" if it does not exist or cannot be read."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return file.read(512)
    except OSError:  # the error is reported later, when the program writes the file
        pass
    return b""


def check_replaced(option: str, folder: Path, names: Iterable[str], ours: bool, maker: str) -> None:
    """Raises UserError if a folder already contains one of the files to write, unless `ours` is
    True. Empty files do not count.

    option: flag that names the folder. names: files to write. ours: whether an earlier call of the
    program wrote the files in the folder. maker: what writes such files, such as "run", for the
    message.
    """
    for name in names:
        check(
            ours or not (folder / name).is_file() or not (folder / name).stat().st_size,
            f"{option} {folder} would overwrite {folder / name}, which is not from an earlier "
            f"{maker}: give another {option}",
        )


def check_outside_data(
    written: Mapping[str, str | Path | None], data_dir: str | None, splits: Iterable[str]
) -> None:
    """Raises UserError if a file would be written into a split's folder of images, or would
    overwrite a file below --data-dir.

    A .json or .html file may be overwritten, because it cannot be an image.

    written: option -> file or folder that the program writes for it. data_dir: value of --data-dir.
    splits: names of the folders of images below data_dir, such as train.
    """
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
                f"{option} {path} lies in {root / split}, where the images are: give a path "
                "outside of that folder",
            )
        data = root in around and real.is_file() and real.suffix not in REPORTS
        check(
            not data,
            f"{option} {path} would overwrite a file below --data-dir {data_dir}: name another "
            "file",
        )
