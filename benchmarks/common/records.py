"""Reads and writes records, the JSON files that hold the results of the benchmarks.

A program writes its record after each measurement, so that a run that ends early loses nothing.
A file is never written partly. An incomplete record never replaces a complete one, and two programs
never write the same record at the same time.
"""

import atexit
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgn import files
from fastgn.lock import lock_file

HELD: set[Path] = set()
"""Paths of the JSON records that this process has locked."""
LOCKS = contextlib.ExitStack()
"""Locks of all JSON records in HELD. They are released when this process ends."""
atexit.register(LOCKS.close)


def hold(path: Path) -> None:
    """Locks a JSON record, so that no other process writes it until this process ends.

    Raises UserError if another process has locked the record. Benchmarks call this function
    first, so that they do not measure what they could not save.
    """
    real = path.resolve()
    if real not in HELD:
        LOCKS.enter_context(lock_file(real, f"--output {path}"))
        HELD.add(real)


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON atomically. Makes the folder of the file if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file, or {} if the file is absent or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def unfinished(path: Path) -> Path:
    """Returns the path for an incomplete JSON record, so that the complete one at `path` stays."""
    return path.with_name(f"{path.name}.incomplete")


def earlier(path: Path) -> dict[str, Any]:
    """Returns the JSON record that an earlier call of a benchmark has written, or {} if none has.

    If there is a record at `unfinished(path)`, returns that one, otherwise the one at `path`.
    """
    return read_json(unfinished(path)) or read_json(path)


def taken_over(path: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON record that an earlier call has written, or {} if it differs from `head`.

    head: keys and values that the record must have, such as the options and versions.
    """
    before = earlier(path)
    return before if all(before.get(key) == value for key, value in head.items()) else {}


def write_record(path: Path, record: Mapping[str, Any]) -> Path:
    """Writes a benchmark's results as a JSON file and returns the path of that file.

    If the results are incomplete and `path` holds complete ones, writes to `unfinished(path)`.
    Files without the key "complete" count as complete.
    """
    hold(path)
    there = read_json(path)
    if not record["complete"] and there and there.get("complete", True):
        path = unfinished(path)
    elif record["complete"]:
        unfinished(path).unlink(missing_ok=True)
    write_json(path, record)
    return path
