"""Helpers for the tests of data sets from untrusted sources."""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from PIL import Image

import fastgn.data.check as checking
from fastgn import train
from fastgn.config.groups import DatasetConfig
from fastgn.data.datasets import Dataset, load_dataset
from fastgn.errors import UserError
from support.runs import TINY_SWIN

often = settings(derandomize=True, deadline=None, max_examples=60, database=None)
"""Settings for Hypothesis with 60 examples, which are the same in every run."""


def picture(colour: int = 0, kind: str = "PNG") -> bytes:
    """Returns an encoded image of 16 x 16 pixels in one colour."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (colour, 9, 200)).save(out, kind)
    return out.getvalue()


PICTURE = picture()
"""Encoded PNG image."""


def load(root: Path, data: str = "imagefolder") -> Dataset:
    """Loads a data set from a folder."""
    return load_dataset(DatasetConfig(data=data, data_dir=str(root)))  # type: ignore[arg-type]


def refusal(root: Path, data: str = "imagefolder") -> str:
    """Returns the one-line message with which a data set is refused."""
    with pytest.raises(UserError) as caught:
        load(root, data)
    line = str(caught.value)
    assert line.isprintable(), line
    return line


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Creates a new folder for each of Hypothesis's examples."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def files_below(root: Path) -> set[str]:
    """Returns the relative paths of all files below a folder."""
    return {os.path.relpath(os.path.join(f, n), root) for f, _, ns in os.walk(root) for n in ns}


trained: dict[str, int] = {}
"""Kind of data set -> number of data sets that train_a_few was called with."""


def train_a_few(kind: str, root: Path, data: str = "imagefolder", most: int = 3) -> None:
    """Trains for one update on each of the first `most` data sets of a kind, and skips the
    others."""
    trained[kind] = trained.get(kind, 0) + 1
    if trained[kind] <= most:
        with folder() as output:
            assert train.main(run_args(root, output / "run", "--data", data)) == 0


def run_args(root: Path, output: Path, *more: str) -> list[str]:
    """Returns arguments for fastgn.train that make one update on a data set."""
    tiny = TINY_SWIN[: TINY_SWIN.index("--data")]
    fixed = ("--data-dir", str(root), "--workers", "0", "--batch-size", "2", "--epochs", "1")
    fixed += ("--warmup-epochs", "0", "--max-updates", "1", "--eval-images", "0")
    return [*tiny, *fixed, "--output", str(output), *more]


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    """Writes the same files into train/ and val/, and returns the folder."""
    for split in ("train", "val"):
        for name, content in files.items():
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            (root / split / name).write_bytes(content)
    return root


def run_check(root: Path) -> tuple[int, str]:
    """Returns the exit status and the output of fastgn.data.check.

    Fails if the output has control characters.
    """
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = checking.main([str(root), "--workers", "0"])
    assert all(line.isprintable() for line in out.getvalue().split("\n")), out.getvalue()
    return status, out.getvalue()
