"""Reads the archives that torch.save writes, without running code from them."""

import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastgn.errors import UserError, check, first_line
from fastgn.files import open_for_reading

if TYPE_CHECKING:
    from torch import Tensor


def read_archive(path: Path, *, legacy: bool = False) -> Any:
    """Returns the content of a file that torch.save has written, with all tensors on the CPU.

    No code in the file is run. The result consists of plain dicts, lists, tuples, strings, numbers,
    booleans, None, dtypes, and dense tensors that are not larger than the file. Raises UserError if
    the file contains anything else, is missing or truncated, or has a wrong checksum. Also raises
    UserError if an entry is compressed, because it could fill the memory.

    legacy: whether files of PyTorch before 1.6, which have no checksums, are read too. Other
    objects that training scripts store, such as arguments and NumPy numbers, then become None.
    """
    with open_for_reading(path) as file:
        archive = file.read(4) == b"PK\x03\x04"  # torch.load looks for the same bytes
        check(
            archive or legacy,
            f"{path} is neither a checkpoint nor an export of fastgn.train, or its beginning is "
            "damaged: give the folder of a run, a checkpoint (.pt) or an export (.safetensors)",
        )
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
            # A flipped bit in external_attr can mark an entry as a folder.
            # torch.load would then not fill the entry's tensor, and would raise no error.
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
        foreign = find_foreign_object(error)
        if foreign:
            raise UserError(
                f"{path} holds more than tensors ({foreign}): it was not loaded, because loading "
                "it could run code"
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

    Raises UserError if a tensor is sparse, quantized, on the meta device, or larger than the file.
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
