"""Reads .npz files from untrusted sources.

Nothing is unpickled. Arrays that are much larger than their file are refused, so that a small file
cannot fill the memory.
"""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastgn.errors import UserError, check
from fastgn.files import open_regular

INFLATED_BYTES = 2**28
"""Arrays that together take at most this number of bytes in memory are always allowed.

Larger arrays may take at most INFLATED_TIMES as many bytes as their file. Photographs compress to
about one half, and no data set compresses to one hundredth.
"""
INFLATED_TIMES = 100
"""Largest ratio of the bytes in memory to the bytes of the file. It holds for arrays that together
take more than INFLATED_BYTES in memory."""


class Field(NamedTuple):
    """Dtype and shape that an array of a file must have."""

    dtype: str
    """Name of a NumPy dtype, or a key of KINDS."""
    shapes: tuple[str, ...] = ("N",)
    """Allowed shapes, such as "N x H x W x 3". A letter means any size, "" means a single value."""

    def fits(self, dtype: np.dtype, shape: tuple[int, ...]) -> bool:
        """Returns whether an array's dtype and shape are allowed."""
        right = dtype.kind in KINDS[self.dtype] if self.dtype in KINDS else dtype == self.dtype
        return right and any(matches_shape(shape, wanted) for wanted in self.shapes)

    def __str__(self) -> str:
        return f"{self.dtype} {' or '.join(self.shapes)}"


def matches_shape(shape: tuple[int, ...], wanted: str) -> bool:
    """Returns whether a shape matches a pattern such as "N x H x W x 3" (see Field)."""
    sizes = wanted.split(" x ") if wanted else []
    return len(shape) == len(sizes) and all(
        str(found) == size or (size.isalpha() and found >= 0)
        for found, size in zip(shape, sizes, strict=True)
    )


KINDS = {"integers": "iu", "text": "U", "bytes": "S"}
"""Name of a family of dtypes -> characters that NumPy's dtype.kind has for these dtypes."""
IMAGES = Field("uint8", ("N x H x W x 3",))
LABELS = Field("integers", ("N", "N x 1"))


def read_npz(path: Path, fields: Mapping[str, Field], where: str) -> dict[str, Any]:
    """Returns the named arrays of a file. Text becomes a string or a list of strings.

    fields: name of an array -> dtype and shape that the array must have.

    Raises UserError if the file is not an .npz or is damaged, or if an array is missing or does not
    match its field. Arrays that would fill the memory are refused too. Messages begin with `where`.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            there = set(archive.namelist())
            missing = [name for name in fields if f"{name}.npy" not in there]
            check(not missing, f"{where}: the .npz lacks the arrays {', '.join(missing)}")
            file_bytes = os.fstat(file.fileno()).st_size
            total = sum(archive.getinfo(f"{name}.npy").file_size for name in fields)
            check(
                total <= max(INFLATED_BYTES, INFLATED_TIMES * file_bytes),
                f"{where}: {file_bytes} bytes would become {total} bytes in memory: the file is "
                "refused, because it could fill the memory",
            )
            for name, field in fields.items():
                check_header(archive, name, field, where)
            return {name: read_array(archive, name) for name in fields}
    except UserError:
        raise
    except Exception as error:  # readers raise many kinds of errors for damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{where} cannot be read as .npz: {reason}") from None


def check_header(archive: zipfile.ZipFile, name: str, field: Field, where: str) -> None:
    """Raises UserError unless the header of an array fits the field, and the array's data has the
    length that the header implies. name: the array's name. Messages begin with `where`."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        check(
            read is not None,
            f"{where}: array {name} has version {version} of the .npy format, which is not known",
        )
        assert read is not None
        shape, _, dtype = read(member)
        check(
            field.fits(dtype, shape),
            f"{where}: array {name} should be {field}, not {dtype} {shape}",
        )
        expected = dtype.itemsize
        for size in shape:
            expected *= size
        found = archive.getinfo(f"{name}.npy").file_size - member.tell()
        check(
            found == expected,
            f"{where}: array {name} should take {expected} bytes, but takes {found}: the file is "
            "damaged",
        )


def read_array(archive: zipfile.ZipFile, name: str) -> Any:
    """Returns an array of an .npz file. Text becomes a string or a list of strings. `check_header`
    must have checked the array before."""
    with archive.open(f"{name}.npy") as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
    return array.tolist() if array.dtype.kind == "U" else array
