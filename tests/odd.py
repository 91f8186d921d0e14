"""What the tests of data that anybody may have made share."""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY_SWIN
from hypothesis import settings
from PIL import Image

import fastgn.data.check as checking
from fastgn import train
from fastgn.config.groups import DatasetConfig
from fastgn.data.datasets import Dataset, load_dataset
from fastgn.errors import UserError

often = settings(derandomize=True, deadline=None, max_examples=60, database=None)


def picture(colour: int = 0, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (colour, 9, 200)).save(out, kind)
    return out.getvalue()


PICTURE = picture()


def load(root: Path, data: str = "imagefolder") -> Dataset:
    return load_dataset(DatasetConfig(data=data, data_dir=str(root)))  # type: ignore[arg-type]


def refusal(root: Path, data: str = "imagefolder") -> str:
    """The line that refuses the data."""
    with pytest.raises(UserError) as caught:
        load(root, data)
    line = str(caught.value)
    assert line.isprintable(), line
    return line


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A new folder for each of Hypothesis' examples."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def files_below(root: Path) -> set[str]:
    return {os.path.relpath(os.path.join(f, n), root) for f, _, ns in os.walk(root) for n in ns}


trained: dict[str, int] = {}


def train_a_few(kind: str, root: Path, data: str = "imagefolder", most: int = 3) -> None:
    """Trains an update on the first few data sets of a kind."""
    trained[kind] = trained.get(kind, 0) + 1
    if trained[kind] <= most:
        with folder() as output:
            assert train.main(run_args(root, output / "run", "--data", data)) == 0


def run_args(root: Path, output: Path, *more: str) -> list[str]:
    tiny = TINY_SWIN[: TINY_SWIN.index("--data")]
    fixed = ("--data-dir", str(root), "--workers", "0", "--batch-size", "2", "--epochs", "1")
    fixed += ("--warmup-epochs", "0", "--max-updates", "1", "--eval-images", "0")
    return [*tiny, *fixed, "--output", str(output), *more]


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    """The same files in train/ and in val/."""
    for split in ("train", "val"):
        for name, content in files.items():
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            (root / split / name).write_bytes(content)
    return root


def run_check(root: Path) -> tuple[int, str]:
    """The exit status of the check, and all that it prints, which has no control characters."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = checking.main([str(root), "--workers", "0"])
    assert all(line.isprintable() for line in out.getvalue().split("\n")), out.getvalue()
    return status, out.getvalue()
