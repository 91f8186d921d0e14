"""Saves the results of an evaluation one by one, so that a killed evaluation can continue."""

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastgn.errors import UserError
from fastgn.files import read_json, write_json


class Parts:
    """A hidden folder with the results of an unfinished evaluation, one JSON file per result.

    A result belongs to one attack on one batch, or to one analysis. It is found by its key, which
    is a tuple of values. The folder lies beside the output. When the evaluation ends, the results
    that it has used are removed. Other results, of an evaluation that has not ended, stay there for
    a week.
    """

    KEPT_S = 7 * 86400
    """Seconds without a change after which an evaluation that has not ended counts as
    abandoned."""

    def __init__(self, output: Path, inputs: Any):
        """Chooses the folder, whose name contains a hash of `inputs`.

        output: file that the evaluation writes at its end. inputs: everything that the results
        depend on, ready for JSON. Results for other inputs are in another folder, so they are never
        mixed with these.
        """
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = output.with_name(f".{output.stem}.{digest}.parts")
        self.used: set[Path] = set()
        """Files that the evaluation needs no longer after its end."""

    def path(self, *key: object) -> Path:
        """Returns the path of the file that holds the result with this key."""
        return self.folder / (quote("_".join(map(str, key)), safe="@") + ".json")

    def get(self, *key: object) -> dict[str, Any] | None:
        """Returns the saved result with this key. None if it is missing or cannot be read."""
        try:
            part = read_json(self.path(*key))
        except UserError:
            return None
        return part if isinstance(part, dict) else None

    def mark_used(self, *key: object) -> None:
        """Notes that the evaluation has used the result with this key."""
        self.used.add(self.path(*key))

    def put(self, part: dict[str, Any], *key: object) -> None:
        """Saves a result under a key."""
        write_json(self.path(*key), part)

    def compute_once(self, compute: Callable[[], Any], *key: object) -> Any:
        """Returns the saved result with this key. If there is none, computes and saves it.

        compute: function that returns the result, which is anything that JSON can hold.
        """
        part = self.get(*key)
        if part is None or "made" not in part:
            part = {"made": compute()}
            self.put(part, *key)
        self.mark_used(*key)
        return part["made"]

    def remove(self) -> None:
        """Removes the results that were used, and the folder if nothing else is in it.

        Also removes the folders of abandoned evaluations with the same output.
        """
        with contextlib.suppress(OSError):  # the folder may be missing, or hold other results
            # a killed process may have left a file that was not written completely
            for path in (*self.used, *self.folder.glob(".*.tmp")):
                path.unlink(missing_ok=True)
            self.folder.rmdir()
        name = self.folder.name.split(".")
        for other in self.folder.parent.glob(".*.parts"):
            is_digest = re.fullmatch(r"[0-9a-f]{16}", other.name.split(".")[-2])
            if not is_digest or other.name.split(".")[:-2] != name[:-2]:
                continue
            with contextlib.suppress(OSError):  # another process may have removed the folder
                if time.time() - other.stat().st_mtime > self.KEPT_S:
                    shutil.rmtree(other, ignore_errors=True)
