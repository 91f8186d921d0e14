"""Lists and folders of images that anybody may have made: read as they should be, or refused in a
line that names the file. What is right is said here again, in a few lines."""

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.images import image_folder, png_of
from support.odd import (
    PICTURE,
    files_below,
    folder,
    load,
    often,
    picture,
    refusal,
    run_args,
    run_check,
    train_a_few,
    write_tree,
)
from support.runs import folder_run

import fastgn.data.check as checking
import fastgn.data.pack as packing
from fastgn import evaluate, train
from fastgn.data.datasets import Dataset, Files
from fastgn.data.images import BadImageError, decode_image
from fastgn.errors import UserError

# -------------------------------------------------------------------------------------------- lists

names_st = st.lists(
    st.sampled_from(("0", "1", "2", "3", "7", "ant", "bee")), min_size=2, unique=True
)


@often
@given(
    names=names_st,
    labels=st.lists(
        st.sampled_from(("0", "1", "2", "3", "7", "ant", "x", "-1", "00", "²")), min_size=1
    ),
)
@example([str(i) for i in range(1, 12)], [str(i) for i in range(11)])
@example([str(i) for i in range(1, 12)], [str(i) for i in range(1, 12)])
@example(["ant", "bee"], ["0", "1", "1"])
@example(["ant", "bee"], ["ant", "1"])
@example(["0", "ant"], ["1", "1"])
def test_a_list_has_one_reading(names, labels):
    """Names where all labels are; else numbers, where no class is called as a number is."""
    with folder() as root:
        for name in names:
            (root / "train" / name).mkdir(parents=True)
            (root / "train" / name / "a.png").write_bytes(PICTURE)
        (root / "val").mkdir()
        (root / "val" / "a.png").write_bytes(PICTURE)
        lines = [f"val/{i}.png {label}\n" for i, label in enumerate(labels)]
        for i in range(len(labels)):
            (root / "val" / f"{i}.png").write_bytes(PICTURE)
        (root / "val.txt").write_text("".join(lines))
        classes = sorted(names)
        if set(labels) <= set(names):
            expected = [classes.index(label) for label in labels]
        elif set(labels) <= {str(i) for i in range(len(names))} and not any(
            name.isdecimal() for name in names
        ):
            expected = [int(label) for label in labels]
        else:
            line = refusal(root)
            assert f"{root / 'val.txt'}, line " in line
            return
        assert load(root).val.labels_N.tolist() == expected
        train_a_few("lists", root)


def test_what_to_write_where_names_are_numbers(tmp_path):
    write_tree(tmp_path, {f"{i}/{i}.png": PICTURE for i in range(1, 12)})
    lines = [f"val/{i}/{i}.png {i - 1}\n" for i in range(1, 12)]
    (tmp_path / "val.txt").write_text("".join(lines))
    line = refusal(tmp_path)
    assert "line 1: label 0 is the number of a class, but line 2 has a class's name (1)" in line
    assert line.endswith("write all labels as names")
    (tmp_path / "val.txt").write_text(lines[0])
    line = refusal(tmp_path)
    assert "no class has the name 0" in line and "one class has the name 1" in line


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_byte_order_mark_is_no_part_of_a_list(start, tmp_path):
    write_tree(tmp_path, {"ant/a.png": PICTURE, "bee/b.png": PICTURE})
    for split in ("train", "val"):
        text = f"{start}{split}/ant/a.png ant\r\n{split}/bee/b.png bee\r\n"
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "classes.txt").write_text(f"{start}ant\nbee\n", encoding="utf-8")
    dataset = load(tmp_path)
    assert dataset.classes == ("ant", "bee") and dataset.train.labels_N.tolist() == [0, 1]
    (tmp_path / "val.txt").write_text("val/ant/a.png ant\n", encoding="utf-16")
    assert "val.txt is text in UTF-16: save it as UTF-8" in refusal(tmp_path)


def test_images_that_are_listed_twice_are_said_or_refused(tmp_path, capsys):
    write_tree(tmp_path, {"ant/a.png": PICTURE, "bee/b.png": PICTURE})
    text = "train/ant/a.png ant\ntrain/bee/b.png bee\n./train//ant/a.png ant\n"
    (tmp_path / "train.txt").write_text(text)
    note = f"train.txt lists 1 of 3 images more than once, such as {tmp_path}/train/ant/a.png"
    assert note in load(tmp_path).notes[0] and "in lines 1 and 3" in load(tmp_path).notes[0]
    assert checking.main([str(tmp_path), "--workers", "0"]) == 0
    assert note in capsys.readouterr().out
    assert train.main(run_args(tmp_path, tmp_path / "run")) == 0
    assert note in capsys.readouterr().err
    (tmp_path / "train.txt").write_text(
        text.replace("./train//ant/a.png ant", "train/ant/a.png bee")
    )
    assert "line 3: " in refusal(tmp_path) and "has label bee, but in line 1 it has ant" in refusal(
        tmp_path
    )


@often
@given(
    lines=st.lists(
        st.one_of(
            st.just(b"train/ant/a.png ant"),
            st.just(b"train/bee/b.png bee"),
            st.binary(max_size=20),
            st.sampled_from(
                (b"/etc/passwd ant", b"../x ant", b"train/ant ant", b"train/fifo.png bee")
            ),
            st.sampled_from((b"train/a\0.png ant", b"x" * 400 + b"/a ant", b"\x1b[2J/a.png ant")),
        ),
        max_size=6,
    )
)
def test_any_list_is_read_or_refused(lines):
    """And checked and packed, whatever the listed files are."""
    with folder() as root:
        write_tree(root, {"ant/a.png": PICTURE, "bee/b.png": PICTURE})
        os.mkfifo(root / "train" / "fifo.png")
        (root / "train.txt").write_bytes(b"\n".join(lines))
        (root / "classes.txt").write_text("ant\nbee\n")
        before = files_below(root)
        status, said = run_check(root)
        try:
            dataset = load(root)
        except UserError as error:
            assert str(root) in str(error) and str(error).isprintable()
            assert status == 2 and said.count("\n") == 1
        else:
            wrong = [i for i in range(len(dataset.train)) if not is_image(dataset, i)]
            assert status == (1 if wrong else 0)
        assert files_below(root) == before


def is_image(dataset: Dataset, index: int) -> bool:
    try:
        dataset.train.load_image(index)
    except BadImageError as error:
        assert str(error).isprintable()
        return False
    return True


# ------------------------------------------------------------------------------------------ folders

KINDS = ("image", "empty", "ending", "hidden", "hidden folder", "thumbnails", "fifo", "dead link")
KINDS += ("link to itself", "link up", "link to the class", "link to the other", "image link")
ODD_NAMES = (
    "a",
    "B c",
    "x.y",
    "\x1b[31mred",
    "two\nlines",
    os.fsdecode(b"\xff"),
    "ümlaut",
    "$x$",
)
ENDINGS = (
    ".jpg",
    ".JPEG",
    ".jpe",
    ".jfif",
    ".png",
    ".gif",
    ".webp",
    ".avif",
    ".tif",
    ".bmp",
    ".ppm",
)


def plant(train: Path, where: Path, kind: str, name: str, ending: str) -> list[Path]:
    """Makes a thing in a class's folder; returns the images that it adds."""
    path = where / f"{name}{ending}"
    if kind == "image":
        path.write_bytes(PICTURE)
        return [path]
    if kind == "empty":
        path.write_bytes(b"")
        return [path]
    if kind == "image link":
        path.symlink_to(train / "outside.png")
        return [path]
    if kind == "ending":
        (where / f"{name}.text").write_bytes(PICTURE)
    elif kind == "hidden":
        (where / f".{name}{ending}").write_bytes(PICTURE)
    elif kind in ("hidden folder", "thumbnails"):
        inner = where / ("@eaDir" if kind == "thumbnails" else f".{name}")
        inner.mkdir(exist_ok=True)
        (inner / f"a{ending}").write_bytes(PICTURE)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        targets = {
            "dead link": where / "nothing",
            "link to itself": where / f"{name}.link",
            "link up": train if where.name == "deep" else train.parent,
            "link to the class": where,
            "link to the other": train / "ant",
        }
        (where / f"{name}.link").symlink_to(targets[kind])
    return []


things = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.sampled_from(ODD_NAMES),
        st.sampled_from(ENDINGS),
        st.sampled_from(("", "deep", "deep/er")),
    ),
    max_size=8,
    unique_by=lambda thing: (thing[1], thing[3]),
)


@pytest.mark.slow
@often
@given(ant=things, bee=things, odd=st.sampled_from(ODD_NAMES), sure=st.booleans())
def test_any_folders_are_read_or_refused(ant, bee, odd, sure):
    """The images are those of real folders, each once; all that is printed is one line a thing."""
    with folder() as root:
        expected: dict[str, list[Path]] = {"ant": [], "bee": [], odd: []}
        one = [("image", "one", ".png", "")]
        ant, bee = (ant + one, bee + one) if sure else (ant, bee)
        for name, planted in (("ant", ant), ("bee", bee), (odd, one)):
            (root / "train" / name).mkdir(parents=True)
            (root / "train" / "outside.png").write_bytes(PICTURE)
            for kind, title, ending, below in planted:
                where = root / "train" / name / below
                where.mkdir(parents=True, exist_ok=True)
                expected[name] += plant(root / "train", where, kind, title, ending)
        for name in expected:
            (root / "val" / name).mkdir(parents=True)
            (root / "val" / name / "a.png").write_bytes(PICTURE)
        (root / "train" / ".ipynb_checkpoints").mkdir()
        (root / "train" / "@eaDir").mkdir()
        before = files_below(root)
        status, said = run_check(root)
        assert files_below(root) == before
        empty = [name for name, images in expected.items() if not images]
        if empty:
            assert "has no image for the classes " in refusal(root) and status == 2
            return
        dataset = load(root)
        assert isinstance(dataset.train, Files)
        assert dataset.classes == tuple(sorted(expected))
        found = [
            (dataset.classes[label], path)
            for path, label in zip(
                dataset.train.paths, dataset.train.labels_N.tolist(), strict=True
            )
        ]
        assert sorted(found) == sorted((c, str(p)) for c, ps in expected.items() for p in ps)
        assert "left out below" in said and " hidden" in said
        bad = [p for ps in expected.values() for p in ps if not is_picture(p)]
        assert status == (1 if bad else 0)
        if not bad:
            train_a_few("folders", root)


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    ("content", "problem", "reason"),
    [(b"", "empty", "it is empty"), (png_of(0, 30), "no image", "its header gives it no pixels")],
)
def test_files_of_no_bytes_and_images_of_no_pixels(
    content, problem, reason, workers, tmp_path, capsys
):
    """The check counts them, a run stops with a line that names one, or replaces all of them."""
    root = write_tree(tmp_path / "data", {"ant/a.png": PICTURE, "bee/b.png": PICTURE})
    for name in ("ant/0.png", "ant/9.jpg", "bee/deep/5.png"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).write_bytes(content)
    status, said = run_check(root)
    assert status == 1 and said.count(reason) == 3 and problem in said
    args = run_args(root, tmp_path / "run", "--workers", workers, "--batch-size", "5")
    assert train.main(args) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert " cannot be read as an image: " in line and reason in line and f"{root}/train/" in line
    args = run_args(root, tmp_path / "other", "--workers", workers, "--batch-size", "5")
    assert train.main([*args, "--on-bad-image", "skip", "--log-interval", "1"]) == 0
    assert "bad training images, replaced " in capsys.readouterr().err


def is_picture(path: Path) -> bool:
    return path.is_file() and path.read_bytes() == PICTURE


def test_the_order_is_image_folders(tmp_path):
    from torchvision.datasets import ImageFolder

    names = [f"{c}/{p}" for c in ("b", "a b", "a", "B") for p in ("10.png", "9.png", "x/1.png")]
    names += [f"{c}/x-y/{i}.JPG" for c in ("b", "a") for i in range(3)] + [
        "a b/x.y/z.png",
        "B/é.png",
    ]
    write_tree(tmp_path, dict.fromkeys(names, PICTURE))
    expected = ImageFolder(str(tmp_path / "train"))
    found = load(tmp_path)
    assert isinstance(found.train, Files) and found.classes == tuple(expected.classes)
    assert found.train.paths == [path for path, _ in expected.samples]
    assert found.train.labels_N.tolist() == expected.targets and found.notes == ()


def test_what_was_left_out_is_said(tmp_path, capsys):
    """By the check and by a run, with its reasons."""
    write_tree(
        tmp_path, {f"{c}/{n}": PICTURE for c in "ab" for n in ("1.png", "x.txt", ".DS_Store")}
    )
    (tmp_path / "train" / "a" / "again").symlink_to(tmp_path / "train" / "a")
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "train" / "a" / "pipe.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "train" / "loose.png").write_bytes(PICTURE)
    assert checking.main([str(tmp_path), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert (
        f"left out below {tmp_path}/train: 2 hidden, 2 with the ending .txt, 2 linked folders that "
        "were read already, 1 " in out
    )
    assert "1 outside the folders of classes" in out and "1 that are no regular files" in out
    assert train.main(run_args(tmp_path, tmp_path / "run")) == 0
    said = capsys.readouterr().err
    for split in ("train", "val"):
        assert f"left out below {tmp_path}/{split}: 2 hidden, 2 with the ending .txt" in said


@pytest.mark.parametrize("below", ["train", "train/bee", "train/bee/deep"])
def test_a_folder_that_may_not_be_read_is_named(below, tmp_path, monkeypatch, capsys):
    """Root may read all: a stand-in for the kernel's answer."""
    write_tree(tmp_path, {"ant/a.png": PICTURE, "bee/deep/b.png": PICTURE})
    locked, scandir = str(tmp_path / below), os.scandir

    def refuse(path):
        if str(path) == locked:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{locked} cannot be read: Permission denied" in refusal(tmp_path)
    assert train.main(run_args(tmp_path, tmp_path / "run")) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_folder_of_a_list_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write_tree(tmp_path, {"ant/a.png": PICTURE, "bee/b.png": PICTURE})
    (tmp_path / "train.txt").write_text("train/ant/a.png 0\ntrain/bee/b.png 1\n")

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert f"line 1: {tmp_path}/train/ant cannot be read: Permission denied" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "a\0b"])
def test_a_folder_that_cannot_be_is_one_line(name):
    assert refusal(Path(name)).startswith("--data-dir ")


def test_one_folder_is_not_two_classes(tmp_path):
    write_tree(tmp_path, {"ant/a.png": PICTURE, "bee/b.png": PICTURE})
    (tmp_path / "train" / "cat").symlink_to("bee")
    assert "are the same folder, but would be two classes" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("source", "output", "more"),
    [
        ("data", "data", ()),
        ("data", "data/train", ()),
        ("data", "data/train/ant", ()),
        ("data", "data/val", ()),
        ("data", "link", ()),
        ("data", "data/train/x/..", ()),
        ("data", "out", ("--train-split", "../data/train")),
        ("data", "out", ("--val-split", "/tmp")),
    ],
)
def test_pack_writes_nothing_into_its_source(source, output, more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tree(
        tmp_path / "data", {f"{c}/{d}/{d}.png": PICTURE for c in ("ant", "bee") for d in "xy"}
    )
    (tmp_path / "link").symlink_to("data/train")
    before = files_below(tmp_path)
    assert packing.main([source, output, "--workers", "0", *more]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert files_below(tmp_path) == before


def test_pack_writes_nothing_around_its_source(tmp_path, capsys):
    write_tree(tmp_path / "out" / "train", {"ant/a.png": PICTURE, "bee/b.png": PICTURE})
    assert packing.main([str(tmp_path / "out" / "train"), str(tmp_path / "out")]) == 2
    assert "would lie one inside the other" in capsys.readouterr().err


def test_pack_beside_the_splits_is_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path, {"ant/a.png": PICTURE, "bee/b.png": PICTURE})
    assert packing.main([".", "packed", "--workers", "0"]) == 0
    assert load(tmp_path / "packed").classes == load(tmp_path).classes


def test_images_of_programs_are_not_opened(tmp_path):
    """PIL would start Ghostscript for an EPS, whatever its file is called."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(BadImageError, match="its format is not known"):
        decode_image(eps, "x.jpg")


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "PPM", "TGA"]
)
def test_each_ending_is_of_a_format_that_is_read(kind):
    image = decode_image(picture(40, kind), "x")
    assert image.size == (16, 16) and image.mode == "RGB"


def test_control_characters_of_any_name_are_escaped():
    error = UserError("a\nb\x1b[31m\udcff\u202e\ufeff and ümlaut")
    assert str(error) == r"a\nb\x1b[31m\udcff\u202e\ufeff and ümlaut"


@pytest.mark.slow
def test_classes_that_are_not_utf8_are_trained_evaluated_and_shown_as_escapes(tmp_path, capsys):
    names = [os.fsdecode(b"\xff"), "b"]
    data = image_folder(tmp_path / "data", names, names)  # type: ignore[arg-type]
    (data / "train" / "b" / "x.\x1b[31mred").write_text("left out")
    output = tmp_path / "run\nsecond line"
    short = ("--max-updates", "1", "--method", "natural", "--no-model-ema", "--eval-images", "0")
    assert train.main(folder_run(data, output, *short)) == 0
    report = tmp_path / "re\x1bport.html"
    args = ["--checkpoint", str(output), "--attacks", "clean", "--workers", "0"]
    assert evaluate.main([*args, "--report", str(report)]) == 0
    assert report.is_file() and (output / "evaluation.json").is_file()
    said = capsys.readouterr()
    shown = said.out + said.err
    assert "run\\nsecond line" in shown and "ending .\\x1b[31mred" in shown
    assert all(line.isprintable() for line in shown.splitlines()), shown
