"""Reads and writes files safely.

A file is written completely or not at all. Everything that is read is checked, and no code from a
file is run. There is one reader for each kind of file, and the one for archives of torch.save is in
archive.py. Readers raise UserError with one line that begins with the file's name. docs/security.md
says what is guaranteed.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastgn.errors import UserError, check, first_line

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "fastgn"
"""Key for fastgn's own values, as JSON, in the header of a safetensors file."""
DIGEST = "fastgn_sha256"
"""Key in the header of a safetensors file for the digest of all other content of the file."""

# ------------------------------------------------------------------------------------------ writing


class RecordingFile(io.FileIO):
    """File that keeps the error of a failed write, because torch.save does not pass it on."""

    failure: OSError | None = None
    """Error of the last failed write, such as a full disk."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.failure = error
            raise


@contextlib.contextmanager
def atomic_open(path: Path) -> Iterator[IO[bytes]]:
    """Opens a binary file for writing, which appears at `path` only when it is completely on the
    disk.

    Raises UserError if `path` exists and is not a plain file, or if the disk is full or read-only.
    In that case an older file at `path` is unchanged and no part of the new one remains.
    """
    check_regular(path)
    # use a name that cannot be guessed, so that nobody can create a link of this name first
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    raw: RecordingFile | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        raw = RecordingFile(os.open(temporary, flags, 0o666), "wb")
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps a failed write in RuntimeError
        reason = raw.failure if raw is not None and raw.failure is not None else error
        cause = reason.strerror if isinstance(reason, OSError) and reason.strerror else None
        raise UserError(
            f"{path} cannot be written: {cause or first_line(reason)}; an existing file is "
            "unchanged"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # the file or its folder may be missing
            temporary.unlink()


def write_bytes(path: Path, content: bytes | str) -> None:
    """Writes a whole file atomically."""
    with atomic_open(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Writes content as indented JSON, atomically. Keys keep their order."""
    write_bytes(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def remove_file(path: Path) -> None:
    """Removes a file if it exists. A folder of that name is left alone."""
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        path.unlink()


def check_target(path: Path) -> None:
    """Raises UserError if a file cannot be written to `path`.

    It is called before long work starts, so that the result of this work is not lost.
    """
    check_regular(path)
    parent = next((p for p in path.absolute().parents if p.exists()), Path("/"))
    check(
        parent.is_dir() and os.access(parent, os.W_OK),
        f"{path} cannot be written: {parent} is not a folder that can be written to",
    )


def check_regular(path: Path) -> None:
    """Raises UserError if `path` exists but is not a plain file, because writing ends with a rename
    that would replace it."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # the file is missing or unreadable, which is reported when it is opened
        return
    kinds = {stat.S_ISDIR: "folder", stat.S_ISLNK: "symbolic link", stat.S_ISFIFO: "named pipe"}
    kind = next((name for is_kind, name in kinds.items() if is_kind(mode)), "device")
    check(
        stat.S_ISREG(mode),
        f"{path} is a {kind}, which a new file would replace: name a plain file",
    )


# ------------------------------------------------------------------------------------------ reading


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Opens a plain file for reading, without a buffer.

    Raises OSError if the file cannot be opened or is not a plain file. A named pipe would make the
    process wait for a writer, and a device may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file", os.fspath(path))
    return open(descriptor, "rb", buffering=0)


@contextlib.contextmanager
def open_for_reading(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for reading. Raises UserError if it is missing, unreadable or not a plain
    file."""
    try:
        with io.BufferedReader(open_regular(path)) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None


def read_text(path: Path) -> str:
    """Returns a file's text without a byte-order mark. Raises UserError unless the text is
    UTF-8."""
    with open_for_reading(path) as file:
        try:
            return file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error.reason}") from None


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file. Raises UserError if it is not JSON or has a NaN or
    infinity."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """Returns the value of a JSON text. Raises UserError if the text is not valid. where: beginning
    of the error's message."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a finite number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {first_line(error)}") from None


def read_safetensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file.

    Raises UserError if the file cannot be read, or if it has a digest that does not match its
    content.
    """
    from safetensors import SafetensorError, safe_open

    with open_for_reading(path):
        pass  # raises UserError if the file is missing, in plainer words than safe_open
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is corrupt, or not a safetensors file ({first_line(error)})"
        ) from None
    if DIGEST in metadata:
        same = metadata[DIGEST] == compute_digest(tensors, metadata)
        check(same, f"{path} is corrupt: its content does not have the SHA-256 in its header")
    return tensors, metadata


def write_safetensors(
    path: Path, weights: Mapping[str, "Tensor"], metadata: Mapping[str, Any]
) -> None:
    """Writes weights as a safetensors file, atomically.

    The header contains `metadata` as JSON and a digest of everything else. Tensors that share
    memory are each written completely, because the format cannot express sharing.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in weights.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    header = {METADATA: json.dumps(metadata)}
    header[DIGEST] = compute_digest(tensors, header)
    write_bytes(path, sort_metadata(save(tensors, metadata=header)))


def sort_metadata(content: bytes) -> bytes:
    """Returns a safetensors file with its metadata in alphabetical order.

    content: the bytes of the file. The safetensors library writes metadata in an order that differs
    from call to call. Sorted metadata makes equal weights give equal bytes.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # pad the header to 8 bytes, so that the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[end:]


def compute_digest(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> str:
    """Returns the SHA-256, in hexadecimal, of all tensors and of the metadata.

    The name, dtype, shape and values of each tensor are hashed. The digest that the metadata may
    already contain is left out.
    """
    import torch

    digest = hashlib.sha256()
    digest.update(repr(sorted((k, v) for k, v in metadata.items() if k != DIGEST)).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
