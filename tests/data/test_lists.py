"""Lists of files: what they say, and lines that are refused."""

import pytest
import torch
from support.images import encoded
from support.sources import CLASSES, dataset_at, encoded_images, refusal, write_lists

from fastgn.data.datasets import Files


@pytest.mark.parametrize("kind", ["names", "numbers", "numbers of named classes"])
def test_lists_of_files(kind, source, tmp_path):
    label = {"names": str}.get(kind, lambda name: str(CLASSES.index(name)))
    write_lists(tmp_path, source, label)
    if kind.endswith("classes"):
        (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    dataset, folder = dataset_at(tmp_path), dataset_at(source)
    assert dataset.classes == (("0", "1", "2") if kind == "numbers" else CLASSES)
    assert isinstance(dataset.train, Files)
    for mine, theirs in ((dataset.train, folder.train), (dataset.val, folder.val)):
        assert encoded_images(mine) == encoded_images(theirs)[::-1]
        assert mine.labels_N.tolist() == theirs.labels_N.tolist()[::-1]
        assert mine.labels_N.dtype == torch.int64


def test_a_list_beside_a_folder(source, tmp_path):
    """ImageNet's usual shape: training folders, and a list with numbers for one flat folder."""
    (tmp_path / "train").symlink_to(source / "train")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a picture.jpg").write_bytes(encoded(3))
    (tmp_path / "val.txt").write_text("val/a picture.jpg\t2\r\n\n")
    dataset = dataset_at(tmp_path)
    assert dataset.classes == CLASSES and dataset.val.labels_N.tolist() == [2]
    assert encoded_images(dataset.val) == [encoded(3)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train/ant/pic.0.jpg", "train.txt, line 19: 'train/ant/pic.0.jpg' has no label: write"),
        ("train/ant/pic.0.jpg 3", "line 19: label 3 is none of the 3 classes"),
        ("train/ant/pic.0.jpg -1", "line 19: label -1 is none of the 3 classes"),
        ("train/ant/pic.0.jpg dog", "line 19: label dog is none of the 3 classes"),
        ("train/ant/gone.jpg 0", "line 19: no such file: "),
        ("gone/pic.jpg 0", "line 19: no such file: "),
    ],
)
def test_a_bad_line_of_a_list_is_named(line, expected, source, tmp_path):
    write_lists(tmp_path, source, lambda name: str(CLASSES.index(name)))
    (tmp_path / "train").symlink_to(source / "train")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    with open(tmp_path / "train.txt", "a") as file:
        file.write(line)
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [("123", "label 3 is none of the 3"), ("018", "label 8 is none of the 3")],
)
def test_numbers_without_names_count_from_0_without_a_gap(numbers, expected, source, tmp_path):
    """Else a list that counts from 1 would train a class that there is not."""
    write_lists(tmp_path, source, lambda name: numbers[CLASSES.index(name)])
    assert expected in refusal(tmp_path)


def test_what_else_is_no_list(source, tmp_path):
    write_lists(tmp_path, source, str)
    (tmp_path / "classes.txt").write_text("ant\nbee\nant\ncat")
    assert "classes.txt has the class ant twice" in refusal(tmp_path)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "val.txt").write_text("\n")
    assert "val.txt lists no images: write `path label`" in refusal(tmp_path)
    (tmp_path / "val.txt").unlink()
    line = refusal(tmp_path)
    assert f"{tmp_path / 'val'} is missing" in line and "fastgn.data.pack" in line
    assert "or val.txt should list its images; --val-split names another folder" in line
