"""Reads .npz archives that anybody may have made: nothing is unpickled, and no array is larger than
its file makes likely."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastgn.errors import UserError, check
from fastgn.files import open_regular

INFLATED_BYTES = 2**28
"""Arrays of this many bytes together are always read. Larger ones may have INFLATED_TIMES the bytes
of their file: photographs compress to a half, and no data set to a hundredth."""
INFLATED_TIMES = 100


class Field(NamedTuple):
    """What an array of an archive must be."""

    dtype: str
    """A name of NumPy's, or one of KINDS."""
    shapes: tuple[str, ...] = ("N",)
    """The shapes that fit, such as "N x H x W x 3"; a letter stands for any size, and
    "" for a single value."""

    def fits(self, dtype: np.dtype, shape: tuple[int, ...]) -> bool:
        """Returns whether an array of this dtype and shape is what the field must be."""
        right = dtype.kind in KINDS[self.dtype] if self.dtype in KINDS else dtype == self.dtype
        return right and any(shape_fits(shape, wanted) for wanted in self.shapes)

    def __str__(self) -> str:
        return f"{self.dtype} {' or '.join(self.shapes)}"


def shape_fits(shape: tuple[int, ...], wanted: str) -> bool:
    """Returns whether a shape has the wanted sizes."""
    sizes = wanted.split(" x ") if wanted else []
    return len(shape) == len(sizes) and all(
        str(found) == size or (size.isalpha() and found >= 0)
        for found, size in zip(shape, sizes, strict=True)
    )


KINDS = {"integers": "iu", "text": "U", "bytes": "S"}
"""Name of a family of dtypes -> their kinds, as NumPy has them."""
IMAGES = Field("uint8", ("N x H x W x 3",))
LABELS = Field("integers", ("N", "N x 1"))


def read_npz(path: Path, fields: Mapping[str, Field], where: str) -> dict[str, Any]:
    """Reads the named arrays; text comes as a list of strings, or as one string.

    Raises UserError, which begins with `where`, if the file is no .npz, lacks an array, holds one
    that is not what its field says, would fill the memory, or fails its own checksums.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            there = set(archive.namelist())
            missing = [name for name in fields if f"{name}.npy" not in there]
            check(not missing, f"{where}: the .npz lacks {', '.join(missing)}")
            file_bytes = os.fstat(file.fileno()).st_size
            total = sum(archive.getinfo(f"{name}.npy").file_size for name in fields)
            check(
                total <= max(INFLATED_BYTES, INFLATED_TIMES * file_bytes),
                f"{where}: {file_bytes} bytes would become {total} in memory: it was not read",
            )
            for name, field in fields.items():
                check_header(archive, name, field, where)
            return {name: read_array(archive, name) for name in fields}
    except UserError:
        raise
    except Exception as error:  # readers raise all kinds of a file that lies
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{where} cannot be read as .npz: {reason}") from None


def check_header(archive: zipfile.ZipFile, name: str, field: Field, where: str) -> None:
    """Raises UserError unless an array's header says what the field must be and is as long as the
    array."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        check(read is not None, f"{where}: {name} has format {version}, which is not known")
        assert read is not None
        shape, _, dtype = read(member)
        check(field.fits(dtype, shape), f"{where}: {name} should be {field}, not {dtype} {shape}")
        expected = dtype.itemsize
        for size in shape:
            expected *= size
        found = archive.getinfo(f"{name}.npy").file_size - member.tell()
        check(
            found == expected,
            f"{where}: {name} should take {expected} bytes, there are {found}",
        )


def read_array(archive: zipfile.ZipFile, name: str) -> Any:
    """Reads an array whose header was checked."""
    with archive.open(f"{name}.npy") as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
    return array.tolist() if array.dtype.kind == "U" else array
