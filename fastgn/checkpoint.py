"""Files that are whole or absent: checkpoints, exports, and any other file of a run."""

import contextlib
import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fastgn.config import run_folder
from fastgn.errors import UserError, check

FORMAT = 1
"""Of the checkpoint's content; raised when an older reader could not use it."""


@contextlib.contextmanager
def atomic_open(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` only when all of it is on the disk.

    Raises UserError when the disk is full or refuses; nothing half-written stays behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps a failed write in RuntimeError
        cause = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else str(error).split("\n")[0]
        )
        raise UserError(
            f"{path} cannot be written: {cause}; what was there before is untouched"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be what cannot be had
            temporary.unlink()


def write_bytes(path: Path, content: bytes | str) -> None:
    """Writes a whole file atomically."""
    with atomic_open(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, indented, keys in the order given."""
    write_bytes(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


class Checkpoints:
    """A run's checkpoints/: the last few, best.pt, and the epochs that are kept for good."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder / "checkpoints"
        self.keep = keep

    def path(self, update: int) -> Path:
        return self.folder / f"update_{update:08d}.pt"

    def epoch_path(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch:04d}.pt"

    def all(self) -> list[Path]:
        """Returns update_*.pt, oldest first."""
        found = (
            p for p in self.folder.glob("update_*.pt") if re.fullmatch(r"update_\d+\.pt", p.name)
        )
        return sorted(found, key=lambda p: int(p.stem.split("_")[1]))

    def last(self) -> Path | None:
        paths = self.all()
        return paths[-1] if paths else None

    def save(
        self,
        state: Mapping[str, Any],
        update: int,
        *,
        best: bool = False,
        keep_epoch: int | None = None,
    ) -> Path:
        """Writes update_N.pt, with best.pt and epoch_M.pt as further names of the same file if
        asked for. Removes the oldest update_*.pt, those of a continuation given up for an earlier
        checkpoint, and what a kill left of others.
        """
        path = self.path(update)
        for name in ("update_", "epoch_", "best.pt"):
            for left in self.folder.glob(f".{name}*.tmp"):
                left.unlink(missing_ok=True)
        names = [self.folder / "best.pt"] if best else []
        names += [] if keep_epoch is None else [self.epoch_path(keep_epoch)]
        # update_N.pt last: a kill between two names replays the update that they belong to
        first, *others = [*names, path]
        with atomic_open(first) as file:
            torch.save({"format": FORMAT, **state}, file)
        for other in others:
            self._link(first, other)
        there = self.all()
        end = there.index(path) + 1
        for old in there[: max(end - self.keep, 0)] + there[end:]:
            old.unlink(missing_ok=True)
        return path

    @staticmethod
    def _link(path: Path, name: Path) -> None:
        temporary = name.with_name(f".{name.name}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            write_bytes(temporary, path.read_bytes())
        os.replace(temporary, name)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its class's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def foreign_object(error: BaseException) -> str | None:
    """What torch.load(weights_only=True) met besides tensors and plain values, from its refusal: a
    class's or function's dotted name. None where the refusal is of another kind.

    A pickle of protocol 4 or later is never torch.save's; its reader stops at the first opcode and
    so knows no name.
    """
    if not isinstance(error, pickle.UnpicklingError):
        return None
    named = re.search(r"\bGLOBAL ([\w.]+)", str(error))
    if named:
        return named[1]
    return "a bare pickle" if "Unsupported operand 149" in str(error) else None


def not_run(path: Path, what: str) -> str:
    """The line for a file that `foreign_object` found something in."""
    return (
        f"{path} holds more than tensors ({what}): it was not loaded, for loading it could run code"
    )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU. Runs no code from the file.

    Raises UserError: absent, cut short, flipped bits (every checksum in the file is verified),
    objects besides tensors and plain values, or not a checkpoint of this program.
    """
    check(path.is_file(), f"{path}: there is no such checkpoint")
    others = [p.name for p in sorted(path.parent.glob("*.pt")) if p != path]
    hint = f"; others there: {', '.join(others)}" if others else ""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
            # torch's reader leaves tensors unfilled where a flipped bit makes an entry a folder
            bad = bad or next((i.filename for i in archive.infolist() if i.external_attr), None)
        check(bad is None, f"{path} is corrupt (checksum of {bad}){hint}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        ValueError,
        struct.error,
        pickle.UnpicklingError,
    ) as error:
        what = foreign_object(error)
        if what:
            raise UserError(not_run(path, what) + hint) from None
        raise UserError(f"{path} is corrupt ({first_line(error)}){hint}") from None
    check(
        isinstance(state, dict) and state.get("format") == FORMAT,
        f"{path} is not a checkpoint of fastgn.train, format {FORMAT}",
    )
    return state


def find_checkpoint(where: Path) -> Path:
    """The checkpoint that --resume names: a file, or the last one of a run's folder."""
    if where.is_file():
        return where
    check(where.is_dir(), f"--resume {where}: there is no such run or checkpoint")
    last = Checkpoints(run_folder(where / "config.toml"), 1).last()
    if last is None:
        raise UserError(f"--resume {where}: no checkpoint below it")
    return last


def export_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Weights as safetensors with the metadata's values as JSON in the header (key 'fastgn')."""
    tensors = {k: v.detach().contiguous().cpu() for k, v in weights.items()}
    write_bytes(path, to_safetensors(tensors, metadata={"fastgn": json.dumps(metadata)}))


def read_metadata(path: Path) -> dict[str, Any]:
    """What export_weights put into the header. Raises UserError where it did not."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None
    check("fastgn" in header, f"{path} was not exported by fastgn.train: it carries no config")
    return json.loads(header["fastgn"])
