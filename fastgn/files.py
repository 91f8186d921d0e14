"""Files: written whole or not at all, and read with everything checked. Nothing that is read is
run.

Every reader of the package is here, one for each kind of file. Each of them raises UserError in one
line that begins with the file's name. docs/security.md says what they promise.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import re
import secrets
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastgn.errors import UserError, check, first_line

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "fastgn"
"""Key of our JSON in a safetensors header."""
DIGEST = "fastgn_sha256"
"""Key of the digest of all else in a safetensors file."""

# ------------------------------------------------------------------------------------------ writing


class RecordingFile(io.FileIO):
    """Keeps the error of a failed write, whose reason torch.save does not pass on."""

    failure: OSError | None = None
    """The last error, such as that of a full disk."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.failure = error
            raise


@contextlib.contextmanager
def atomic_open(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` only when all of it is on the disk.

    Raises UserError when `path` is something else than a file, or when the disk is full or refuses.
    Nothing half-written stays behind.
    """
    check_regular(path)
    # the name cannot be guessed, so that nobody can put a link there first
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
            f"{path} cannot be written: {cause or first_line(reason)}; what was there before is "
            "untouched"
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


def remove_file(path: Path) -> None:
    """Removes a file if it is there. Leaves a folder of that name alone."""
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        path.unlink()


def check_target(path: Path) -> None:
    """Raises UserError if a file cannot be written to `path`: before long work starts."""
    check_regular(path)
    parent = next((p for p in path.absolute().parents if p.exists()), Path("/"))
    check(
        parent.is_dir() and os.access(parent, os.W_OK),
        f"{path} cannot be written: {parent} is no folder that can be written to",
    )


def check_regular(path: Path) -> None:
    """Raises UserError if `path` is there and is not a plain file, which a rename would replace."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # not there, or the folder cannot be read: opening says so
        return
    kinds = {stat.S_ISDIR: "folder", stat.S_ISLNK: "symbolic link", stat.S_ISFIFO: "named pipe"}
    kind = next((name for is_kind, name in kinds.items() if is_kind(mode)), "device")
    check(
        stat.S_ISREG(mode),
        f"{path} is a {kind}, which writing would replace: name a plain file",
    )


# ------------------------------------------------------------------------------------------ reading


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Opens a plain file for reading, without a buffer.

    A named pipe without a writer would be waited for, and a device may never end.

    Raises OSError if the file cannot be opened or is of another kind.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file", os.fspath(path))
    return open(descriptor, "rb", buffering=0)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A plain file for reading. Raises UserError: absent, a folder, a device, unreadable."""
    try:
        with io.BufferedReader(open_regular(path)) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None


def read_text(path: Path) -> str:
    """Returns a file's text, which must be UTF-8; a byte-order mark is left out."""
    with opened(path) as file:
        try:
            return file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error.reason}") from None


def read_json(path: Path) -> Any:
    """Returns what a file of JSON holds. Raises UserError, also for numbers that are not finite."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """Returns the value of a JSON text. Raises UserError, which begins with `where`."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a finite number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {first_line(error)}") from None


def read_safetensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file.

    Raises UserError if it cannot be read, or if its own digest, where it has one, is not that of
    what it holds.
    """
    from safetensors import SafetensorError, safe_open

    with opened(path):
        pass  # says in plain words what safe_open says in Rust's
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is corrupt, or no safetensors file ({first_line(error)})"
        ) from None
    if DIGEST in metadata:
        same = metadata[DIGEST] == digest_of(tensors, metadata)
        check(same, f"{path} is corrupt: its SHA-256 is not the one that it was written with")
    return tensors, metadata


def write_safetensors(
    path: Path, weights: Mapping[str, "Tensor"], metadata: Mapping[str, Any]
) -> None:
    """Writes weights as safetensors, atomically, with `metadata` as JSON in the header and a digest
    of it all. Tensors that share memory are each written whole, because the format has no sharing.
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
    header[DIGEST] = digest_of(tensors, header)
    write_bytes(path, in_order(save(tensors, metadata=header)))


def in_order(content: bytes) -> bytes:
    """Returns a safetensors file with its metadata in alphabetical order.

    The library writes several keys in an order that differs from call to call. Here the same
    weights give the same bytes.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[end:]


def digest_of(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> str:
    """Returns the SHA-256, in hexadecimal, of names, types, shapes and values, and of the
    metadata but for the digest itself."""
    import torch

    digest = hashlib.sha256()
    digest.update(repr(sorted((k, v) for k, v in metadata.items() if k != DIGEST)).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_archive(path: Path, *, legacy: bool = False) -> Any:
    """Returns what torch.save has written, on the CPU. Runs no code from the file.

    The result is made of plain dicts, lists, tuples, strings, numbers, booleans, None, types of
    numbers and dense tensors that are no larger than the file. Anything else raises UserError, and
    so do a missing or cut file, flipped bits (all of the archive's checksums are verified) and
    compressed entries, which could be of any size.

    legacy: files without checksums, as torch.save wrote them before version 1.6, are read too; and
    things besides tensors that training scripts store, such as their arguments and NumPy's numbers,
    become None.
    """
    with opened(path) as file:
        archive = file.read(4) == b"PK\x03\x04"  # by which torch.load decides, too
        check(archive or legacy, f"{path} is corrupt: it is not an archive of torch.save")
        if archive:
            check_archive(file, path)
        file.seek(0)
        content = unpickle(file, path, legacy)
        return Plain(path, os.fstat(file.fileno()).st_size, legacy)(content)


def check_archive(file: IO[bytes], path: Path) -> None:
    """Raises UserError if an entry of a zip is compressed, damaged or not as torch.save writes
    it."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            packed = next((e.filename for e in entries if e.compress_type or e.flag_bits & 1), None)
            check(packed is None, f"{path}: {packed} is compressed, which torch.save never does")
            size = sum(entry.file_size for entry in entries)
            right = len(set(names)) == len(names) and size <= os.fstat(file.fileno()).st_size
            check(right, f"{path} is corrupt: its entries overlap")
            # torch's reader leaves tensors unfilled where a flipped bit makes an entry a folder
            bad = next((e.filename for e in entries if e.external_attr), None) or archive.testzip()
    except UserError:
        raise
    except Exception as error:  # zipfile raises all kinds of what is not as it should be
        raise UserError(f"{path} is corrupt ({first_line(error)})") from None
    check(bad is None, f"{path} is corrupt (checksum of {bad})")


class Ignored:
    """Stands for what training scripts store beside weights. It takes any argument and state and
    keeps none, so that no code of the stored thing's own class runs."""

    def __new__(cls, *args: Any) -> "Ignored":
        return super().__new__(cls)

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


IGNORED = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
)
"""What `Ignored` stands for: timm's stored arguments, NumPy's numbers and arrays. NumPy's own
functions are not called, because a made-up dtype can make them read any memory."""


def unpickle(file: IO[bytes], path: Path, legacy: bool) -> Any:
    """Returns torch.load's result for weights alone. Raises UserError."""
    import torch

    ignored: list[Any] = [(Ignored, name) for name in IGNORED] if legacy else []
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(ignored):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can make its reader raise anything
        what = foreign_object(error)
        if what:
            raise UserError(
                f"{path} holds more than tensors ({what}): it was not loaded, for loading it could "
                "run code"
            ) from None
        # torch's own first line recommends to load the file with its code
        known = re.search(r"WeightsUnpickler error: *(.*)", str(error))
        unpickling = isinstance(error, pickle.UnpicklingError)
        cause = (known and known[1]) or ("no pickle of torch.save" if unpickling else "")
        raise UserError(f"{path} is corrupt ({cause or first_line(error)})") from None


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


class Plain:
    """Copies what was unpickled into plain containers, and checks every tensor."""

    def __init__(self, path: Path, largest_bytes: int, legacy: bool):
        self.path = path
        self.largest_bytes = largest_bytes
        self.legacy = legacy
        self.copies: dict[int, Any] = {}
        """By the id of the original; Ellipsis while a container is being copied."""

    def __call__(self, value: Any, where: str = "it", depth: int = 0) -> Any:
        """Returns a copy. Raises UserError, which calls the value `where`."""
        import torch

        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, torch.Tensor):
            return self.tensor(value, where)
        if isinstance(value, torch.dtype):
            return value
        if not isinstance(value, (dict, list, tuple)):
            check(self.legacy, f"{self.path}: {where} is a {type(value).__name__}")
            return None
        check(
            depth < 100 and self.copies.get(id(value)) is not ...,
            f"{self.path}: {where[:80]} holds itself, or is nested too deeply",
        )
        if id(value) in self.copies:
            return self.copies[id(value)]
        self.copies[id(value)] = ...
        copy: Any
        if isinstance(value, dict):
            copy = {}
            for key, item in dict.items(value):  # an instance's own `items` may be anything
                named = type(key) in (str, int)
                check(named or self.legacy, f"{self.path}: {where} has a key that is no name")
                if named:
                    copy[key] = self(item, str(key), depth + 1)
        else:
            copy = [self(item, where, depth + 1) for item in value]
            copy = tuple(copy) if isinstance(value, tuple) else copy
        self.copies[id(value)] = copy
        return copy

    def tensor(self, value: "Tensor", where: str) -> "Tensor":
        """Returns a tensor without its history and attributes. Raises UserError unless it is dense,
        on the CPU, with plain numbers in memory that the file has filled."""
        import torch

        kind = None
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            kind = type(value).__name__
        elif value.layout != torch.strided or value.is_nested:
            kind = "sparse or nested tensor"
        elif value.device.type != "cpu":
            kind = f"tensor on {value.device.type}, without values"
        elif value.is_quantized:
            kind = "quantized tensor"
        elif value.numel() * value.element_size() > self.largest_bytes:
            kind = f"tensor of {value.numel()} elements, more than the file can hold"
        check(kind is None, f"{self.path}: {where} is a {kind}, and should be a plain tensor")
        return value.detach()
