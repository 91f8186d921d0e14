"""Records of measurements: JSON files that are whole or absent.

A program writes its record after each measurement, so that a run that ends early loses nothing.
A record that is not complete never replaces a complete one, and two programs never write the same
record at once.
"""

import atexit
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HELD: dict[Path, contextlib.AbstractContextManager[None]] = {}
"""Record -> its lock, which this process holds until it ends."""


def hold(path: Path) -> None:
    """Makes this process the only one that writes a record, until it ends.

    If another process holds the record already, ends this process with one line. Programs call this
    before they measure, because otherwise their measurements would be lost.
    """
    from fastgn.errors import UserError
    from fastgn.lock import lock_file

    real = path.resolve()
    if real in HELD:
        return
    lock = lock_file(real, f"--output {path}")
    try:
        lock.__enter__()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    HELD[real] = lock
    atexit.register(lock.__exit__, None, None, None)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically. Unlike fastgn.files, this works on a machine without fastgn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a file, or {} if the file is absent or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def unfinished(path: Path) -> Path:
    """Returns the path of the incomplete record that lies beside a complete one."""
    return path.with_name(f"{path.name}.incomplete")


def earlier(path: Path) -> dict[str, Any]:
    """Returns the record of an earlier run: the incomplete one if there is one."""
    return read_json(unfinished(path)) or read_json(path)


def started(path: Path) -> dict[str, Any]:
    """Returns what a call has measured that was ended early, {} if the last one was not."""
    before = earlier(path)
    return before if before.get("complete") is False else {}


def write_record(path: Path, record: Mapping[str, Any]) -> Path:
    """Writes a record and returns the path of the file.

    If the record is incomplete and `path` holds a complete one, writes to `unfinished(path)`. Files
    without the key "complete" count as complete.
    """
    hold(path)
    there = read_json(path)
    if not record["complete"] and there and there.get("complete", True):
        path = unfinished(path)
    elif record["complete"]:
        unfinished(path).unlink(missing_ok=True)
    write_json(path, record)
    return path
