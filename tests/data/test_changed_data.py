"""A run that is resumed on other images, in another order, or with other labels."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.odd import PICTURE, picture, run_args, write_tree
from support.states import read_state

import fastgn.data.pack as packing
from fastgn import train
from fastgn.checkpoint import find_checkpoint
from fastgn.config.groups import DatasetConfig
from fastgn.data.arrays import Arrays
from fastgn.data.datasets import Dataset, load_dataset
from fastgn.data.identity import describe_changes, describe_dataset

NAMES = sorted(f"{name}/{i}.png" for name in ("ant", "bee") for i in range(12))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images in data/, and a run on them that was stopped at update 9; not to be changed."""
    root = tmp_path_factory.mktemp("changed")
    write_tree(root / "data", {name: picture(i) for i, name in enumerate(NAMES)})
    args = run_args(root / "data", root / "run", "--epochs", "3", "--max-updates", "9")
    assert train.main(args) == 0
    return root


def resume(root: Path, *more: str) -> int:
    args = ["--resume", str(root / "run"), "--data-dir", str(root / "data"), "--max-updates", "10"]
    return train.main([*args, *more])


def drop(data: Path) -> None:
    for name in NAMES[:2] + NAMES[-2:]:
        (data / "train" / name).unlink()


def rename(data: Path) -> None:
    (data / "train" / NAMES[3]).rename(data / "train" / "ant" / "another.png")


def relabel(data: Path) -> None:
    lines = [f"train/{name} {name[:3]}\n" for name in NAMES]
    (data / "train.txt").write_text("".join([*lines[:-1], lines[-1].replace(" bee", " ant")]))


def reorder(data: Path) -> None:
    lines = [f"train/{name} {name[:3]}\n" for name in NAMES]
    (data / "train.txt").write_text("".join(lines[:12][::-1] + lines[12:]))


def replace(data: Path) -> None:
    (data / "train" / NAMES[5]).write_bytes(picture(5, "BMP"))


def drop_validation(data: Path) -> None:
    (data / "val" / NAMES[0]).unlink()


CHANGES: dict[str, Callable[[Path], None]] = {
    "24 training images are now 20": drop,
    "the names of the training images have changed": rename,
    "the labels of the training images have changed": relabel,
    "the names of the training images have changed ": reorder,
    "the sizes of the training images have changed": replace,
    "24 validation images are now 23": drop_validation,
}


@pytest.mark.parametrize("said", CHANGES)
def test_changed_data_are_refused_or_allowed_and_said(said, stopped, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(stopped, root)
    CHANGES[said](root / "data")
    before = {p: p.read_bytes() for p in (root / "run").rglob("*") if p.is_file()}
    assert resume(root) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and said.strip() in line and "--allow-changed-data" in line
    assert {p: p.read_bytes() for p in (root / "run").rglob("*") if p.is_file()} == before
    assert resume(root, "--allow-changed-data") == 0
    assert f"the data is not the checkpoint's: {said.strip()}" in capsys.readouterr().err
    # the flag is of that one start, and the data of today are the checkpoint's from then on
    assert "allow_changed_data = true" not in (root / "run" / "config.toml").read_text()
    assert resume(root, "--max-updates", "11") == 0
    assert "other data" not in capsys.readouterr().err


def test_another_seed_is_refused_or_allowed_and_said(stopped, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(stopped, root)
    assert resume(root, "--seed", "5") == 2
    assert "--seed 0 is now 5: give the same" in capsys.readouterr().err
    assert resume(root, "--seed", "5", "--allow-changed-data") == 0
    assert "the data is not the checkpoint's: --seed 0 is now 5" in capsys.readouterr().err


def test_the_same_data_elsewhere_and_packed_are_the_same(stopped, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(stopped, root)
    (root / "data").rename(tmp_path / "elsewhere")
    shards = tmp_path / "shards"
    assert packing.main([str(tmp_path / "elsewhere"), str(shards), "--workers", "0"]) == 0
    for data in (tmp_path / "elsewhere", shards):
        assert resume(root, "--data-dir", str(data)) == 0
        assert "other data" not in capsys.readouterr().err


def test_a_checkpoint_that_does_not_know_its_data(stopped, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(stopped, root)
    path = find_checkpoint(root / "run")
    state = read_state(path)
    assert state.pop("data")["training"]["images"] == 24
    torch.save(state, path)
    assert resume(root) == 2
    assert "does not say which images" in capsys.readouterr().err


def arrays(colour: int = 0, label: int = 0) -> Dataset:
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    images[2, 1] = colour
    labels = torch.tensor([0, 1, 0, 1, 0, label])
    return Dataset("x", Arrays(images, labels), Arrays(images, labels), ("a", "b"))


def test_arrays_are_told_by_their_content():
    before = describe_dataset(arrays())
    assert describe_changes(before, describe_dataset(arrays())) == []
    assert describe_changes(before, describe_dataset(arrays(colour=1))) == [
        "the content of the training images have changed",
        "the content of the validation images have changed",
    ]
    assert (
        "labels of the training" in describe_changes(before, describe_dataset(arrays(label=1)))[0]
    )


def test_shards_are_told_by_the_content_of_their_images(tmp_path):
    known = []
    for colour in (1, 2):
        images = {"ant/a.bmp": picture(colour, "BMP"), "bee/b.png": PICTURE}
        write_tree(tmp_path / f"{colour}", images)
        output = tmp_path / f"packed {colour}"
        assert packing.main([str(tmp_path / f"{colour}"), str(output), "--workers", "0"]) == 0
        known.append(describe_dataset(load_dataset(DatasetConfig(data_dir=str(output)))))
    assert (
        describe_changes(known[0], known[1])[0] == "the content of the training images have changed"
    )
