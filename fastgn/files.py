"""Reads and writes files safely.

A file is written completely or not at all. Everything that is read is checked, and no code from a
file is run. There is one reader for each kind of file. Readers raise UserError with one line that
begins with the file's name. docs/security.md says what is guaranteed.
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


def read_archive(path: Path, *, legacy: bool = False) -> Any:
    """Returns the content of a file that torch.save has written, on the CPU. No code is run.

    The result consists of plain dicts, lists, tuples, strings, numbers, booleans, None, dtypes, and
    dense tensors that are not larger than the file. Raises UserError if the file contains anything
    else, is missing or truncated, or has a wrong checksum. Also raises UserError if an entry is
    compressed, because it could fill the memory.

    legacy: whether to read also the files that PyTorch before 1.6 wrote, which have no checksums.
    Other objects that training scripts store, such as arguments and NumPy numbers, then become
    None.
    """
    with open_for_reading(path) as file:
        archive = file.read(4) == b"PK\x03\x04"  # torch.load looks for the same bytes
        check(archive or legacy, f"{path} is corrupt: it is not an archive of torch.save")
        if archive:
            check_archive(file, path)
        file.seek(0)
        content = unpickle(file, path, legacy)
        return Plain(path, os.fstat(file.fileno()).st_size, legacy)(content)


def check_archive(file: IO[bytes], path: Path) -> None:
    """Raises UserError if an entry of a zip file is compressed, damaged or not as torch.save writes
    it."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            packed = next((e.filename for e in entries if e.compress_type or e.flag_bits & 1), None)
            check(
                packed is None,
                f"{path}: its entry {packed} is compressed, which torch.save never does",
            )
            size = sum(entry.file_size for entry in entries)
            right = len(set(names)) == len(names) and size <= os.fstat(file.fileno()).st_size
            check(right, f"{path} is corrupt: its entries overlap")
            # if a flipped bit turns an entry into a folder, torch.load leaves its tensor empty
            bad = next((e.filename for e in entries if e.external_attr), None) or archive.testzip()
    except UserError:
        raise
    except Exception as error:  # zipfile raises many kinds of errors
        raise UserError(f"{path} is corrupt ({first_line(error)})") from None
    check(bad is None, f"{path} is corrupt (wrong checksum of its entry {bad})")


class Ignored:
    """Replaces an object that a training script has stored beside the weights.

    This class accepts any arguments and state, and keeps none of them. No code of the replaced
    object's class runs.
    """

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
"""Names of classes whose objects are not read from a file: an `Ignored` object replaces each.

These are stored arguments of timm, and numbers and arrays of NumPy. NumPy's own functions are not
called, because a forged dtype can make them read any memory.
"""


def unpickle(file: IO[bytes], path: Path, legacy: bool) -> Any:
    """Returns the result of torch.load with weights_only=True. Raises UserError if that fails."""
    import torch

    ignored: list[Any] = [(Ignored, name) for name in IGNORED] if legacy else []
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(ignored):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # reading a pickle can raise any error
        what = find_foreign_object(error)
        if what:
            raise UserError(
                f"{path} holds more than tensors ({what}): it was not loaded, because loading it "
                "could run code"
            ) from None
        # leave out the rest of torch's message, which recommends to run the code in the file
        known = re.search(r"WeightsUnpickler error: *(.*)", str(error))
        unpickling = isinstance(error, pickle.UnpicklingError)
        cause = (known and known[1]) or ("not a pickle of torch.save" if unpickling else "")
        raise UserError(f"{path} is corrupt ({cause or first_line(error)})") from None


def find_foreign_object(error: BaseException) -> str | None:
    """Returns the name of the class or function that torch.load(weights_only=True) refused.

    None means that `error` has another cause. The result is "a bare pickle" if the pickle has
    protocol 4 or later, because torch.load then stops before it has read any name.
    """
    if not isinstance(error, pickle.UnpicklingError):
        return None
    named = re.search(r"\bGLOBAL ([\w.]+)", str(error))
    if named:
        return named[1]
    return "a bare pickle" if "Unsupported operand 149" in str(error) else None


class Plain:
    """Copies unpickled values into plain dicts, lists and tuples.

    Raises UserError if a tensor is sparse, quantized, without values, or larger than the file.
    """

    def __init__(self, path: Path, largest_bytes: int, legacy: bool):
        self.path = path
        self.largest_bytes = largest_bytes
        self.legacy = legacy
        self.copies: dict[int, Any] = {}
        """id() of an original dict, list or tuple -> its copy, or Ellipsis while it is being
        copied."""

    def __call__(self, value: Any, where: str = "it", depth: int = 0) -> Any:
        """Returns a copy of a value.

        Raises UserError unless the value consists of dicts, lists, tuples, tensors, dtypes,
        strings, numbers, booleans and None. where: name of the value in the message. depth: number
        of containers around the value.
        """
        import torch

        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, torch.Tensor):
            return self.copy_tensor(value, where)
        if isinstance(value, torch.dtype):
            return value
        if not isinstance(value, (dict, list, tuple)):
            kind = type(value).__name__
            check(self.legacy, f"{self.path}: {where} is a {kind}, not a tensor or plain value")
            return None
        check(
            depth < 100 and self.copies.get(id(value)) is not ...,
            f"{self.path}: {where[:80]} contains itself or is nested too deeply",
        )
        if id(value) in self.copies:
            return self.copies[id(value)]
        self.copies[id(value)] = ...
        copy: Any
        if isinstance(value, dict):
            copy = {}
            for key, item in dict.items(value):  # not value.items, which a subclass may override
                named = type(key) in (str, int)
                check(
                    named or self.legacy,
                    f"{self.path}: {where} has a key that is not a string or a number",
                )
                if named:
                    copy[key] = self(item, str(key), depth + 1)
        else:
            copy = [self(item, where, depth + 1) for item in value]
            copy = tuple(copy) if isinstance(value, tuple) else copy
        self.copies[id(value)] = copy
        return copy

    def copy_tensor(self, value: "Tensor", where: str) -> "Tensor":
        """Returns a tensor without its autograd history and Python attributes.

        Raises UserError unless the tensor is dense, on the CPU, has plain numbers and is not larger
        than the file.
        """
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
        check(kind is None, f"{self.path}: {where} is a {kind}, but should be a plain tensor")
        return value.detach()
