"""What the programs write: never over what they read, and only where files can be."""

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from support.runs import tiny_run
from support.states import read_state, small_state

from fastgn import evaluate, export, lock, sweep, train
from fastgn.analysis import report
from fastgn.analysis.canvas import to_png
from fastgn.checkpoint import Checkpoints
from fastgn.config.outputs import RUN_FILES
from fastgn.config.programs import CheckConfig, EvaluateConfig
from fastgn.data import check, pack
from fastgn.errors import UserError

TEMPLATE = Path(report.__file__).with_name("report.html.jinja")
MAINS = {
    "train": (train.main, ["--output", "run"]),
    "evaluate": (evaluate.main, ["--checkpoint", "run"]),
    "sweep": (sweep.main, ["--space", "lr=1e-3:1e-2"]),
    "pack": (pack.main, ["source", "output"]),
    "check": (check.main, ["source", "--output", "report.json"]),
}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Content of each file below a folder, and None for each folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


# -------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("program", MAINS)
def test_a_removed_working_directory_is_one_line(program, tmp_path, capsys, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    main, args = MAINS[program]
    assert main(args) == 2
    assert capsys.readouterr().err.endswith(
        ": error: the working directory was removed: change to another one\n"
    )


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_a_lock_that_is_no_file_is_named(kind, tmp_path):
    path = tmp_path / ".lock"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("x")}[
        kind
    ]()
    with pytest.raises(UserError, match=rf"^--output .*{path} is not a plain file: remove it$"):
        with lock.lock_folder(tmp_path, f"--output {tmp_path}"):
            pass
    assert os.path.lexists(path) and len(list(tmp_path.iterdir())) == 1


def test_a_folder_in_which_nothing_can_be_created_is_one_line():
    code = (
        "from pathlib import Path; from fastgn import errors, lock\n"
        "try:\n"
        "    with lock.lock_file(Path('/proc/x.json'), '--output /proc/x.json'): pass\n"
        "except errors.UserError as error:\n"
        "    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=400, check=True
    )
    assert done.stdout.startswith("--output /proc/x.json cannot be written: ")


# ------------------------------------------------------------------- folders where files should be


def test_folders_with_the_names_of_files_are_left_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    left = [checkpoints.folder / ".x.tmp", checkpoints.path(1), tmp_path / ".metrics.csv.ab.tmp"]
    for folder in left:
        folder.mkdir(parents=True)
    checkpoints.remove_leftovers()
    lock.remove_leftovers(tmp_path, ["metrics.csv"])
    assert checkpoints.last() is None
    for update in (2, 3):
        checkpoints.save(small_state(update))
    assert [p.name for p in checkpoints.all()] == ["update_00000003.pt"]
    assert all(folder.is_dir() for folder in left)


def test_a_folder_in_place_of_a_checkpoint_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    path = checkpoints.epoch_path(1)
    path.mkdir(parents=True)
    with pytest.raises(UserError, match=f"^{path} is a folder"):
        checkpoints.save(small_state(1), best=True, keep_epoch=1)


# ----------------------------------------------------------------------------------- unclear lines


def test_a_write_that_fails_says_why(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot be written: File too large; an existing file"):
            Checkpoints(tmp_path, 1).save(small_state(1, model={"weight": torch.ones(50_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_without_a_run_is_named_by_its_flag(tmp_path, capsys):
    assert evaluate.main(["--checkpoint", str(tmp_path)]) == 2
    assert (
        f"error: --checkpoint {tmp_path}: there is no checkpoint in this" in capsys.readouterr().err
    )


# ---------------------------------------------------------------------- inputs that are no outputs


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder that looks like a run's."""
    folder = tmp_path / "run"
    Checkpoints(folder, 1).save(small_state(1), best=True)
    for name in ("config.toml", "metrics.csv", "model.safetensors"):
        (folder / name).write_text("")
    return folder


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """A folder with the names of a data set's files."""
    for split in ("train", "val"):
        (tmp_path / "data" / split / "cat").mkdir(parents=True)
        (tmp_path / "data" / split / "cat" / "0.png").write_text("")
    (tmp_path / "data" / "images.npz").write_text("")
    return tmp_path / "data"


def refuses(main, args: list[str], expected: str, tmp_path: Path, capsys) -> None:
    """Checks that a program refuses in one line, and leaves everything as it was."""
    before = snapshot(tmp_path)
    assert main(args) == 2
    line = capsys.readouterr().err
    assert expected in line and line.count("\n") == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("flag", ["output", "report", "picture"])
@pytest.mark.parametrize(
    "name",
    ["config.toml", "metrics.csv", "model.safetensors"]
    + ["checkpoints/best.pt", "checkpoints/update_00000001.pt", "checkpoints/new.json"],
)
def test_an_evaluation_replaces_nothing_of_a_run(flag, name, run, tmp_path, capsys):
    args = ["--checkpoint", str(run), f"--{flag}", str(run / name)]
    expected = f"--{flag} {run / name} would overwrite a file of the run in this folder"
    refuses(evaluate.main, args, expected, tmp_path, capsys)


def test_an_evaluation_may_write_new_files_into_a_run(run):
    config = EvaluateConfig(checkpoint=(str(run),), report=str(run / "report.html"))
    assert config.written["--output"] == str(run / "evaluation.json")
    with pytest.raises(UserError, match="--report .* would overwrite the file of --output"):
        EvaluateConfig(checkpoint=(str(run),), report=str(run / "evaluation.json"))


@pytest.mark.parametrize("flag", ["image-list", "data-dir"])
def test_an_evaluation_replaces_nothing_that_it_reads(flag, tmp_path, capsys):
    path = tmp_path / "read"
    path.write_text("1")
    args = ["--checkpoint", "run", f"--{flag}", str(path), "--output", str(path)]
    refuses(evaluate.main, args, f"would overwrite the file of --{flag}", tmp_path, capsys)


@pytest.mark.parametrize("name", ["train/cat/0.png", "train/index.npz", "val/x.json", "images.npz"])
def test_no_report_replaces_data(name, data_dir, tmp_path, capsys):
    path = str(data_dir / name)
    expected = f"--output {path} "
    refuses(check.main, [str(data_dir), "--output", path], expected, tmp_path, capsys)
    args = ["--checkpoint", "run", "--data-dir", str(data_dir), "--output", path]
    if not name.startswith("train"):  # which an evaluation knows of only from the run
        refuses(evaluate.main, args, expected, tmp_path, capsys)


def test_a_report_may_lie_beside_the_splits(data_dir):
    CheckConfig(data_dir=str(data_dir), output=str(data_dir / "report.json"))


FOREIGN = {
    "photograph": lambda: encoded_image("JPEG"),
    "picture": lambda: encoded_image("PNG"),
    "recipe": lambda: b"epochs = 1\n",
    "index": lambda: b"PK\x03\x04 an index",
    "list": lambda: b"cat/0.png 0\n",
}
"""Files that fastgn reads, some of which lie anywhere: lists and links name them."""


def encoded_image(form: str) -> bytes:
    """Returns an image file's bytes."""
    out = io.BytesIO()
    Image.new("RGB", (9, 9)).save(out, form)
    return out.getvalue()


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("flag", ["output", "report", "curve", "picture"])
def test_an_evaluation_replaces_only_files_of_its_own_kind(flag, kind, tmp_path, capsys):
    path = tmp_path / "listed.png"
    path.write_bytes(FOREIGN[kind]())
    more = ["--eps", "0.1", "0.2", "--data-dir", str(tmp_path / "elsewhere")]
    args = ["--checkpoint", "run", f"--{flag}", str(path), *more]
    expected = f"--{flag} {path} would overwrite a file that is not "
    refuses(evaluate.main, args, expected, tmp_path, capsys)
    if flag == "output":
        args = [str(tmp_path), "--output", str(path), "--val-split", "v"]
        refuses(check.main, args, expected, tmp_path, capsys)


def test_an_evaluation_replaces_its_own_files_and_empty_ones(tmp_path):
    record = {"norm": "Linf", "eps_units": "0..1 pixels", "seed": 0, "models": []}
    made = {
        "output": json.dumps(record, indent=2).encode(),
        "report": TEMPLATE.read_bytes().partition(b"#}\n")[2],
        "curve": to_png(Figure()),
        "picture": to_png(Figure()),
    }
    for content in (made, dict.fromkeys(made, b"")):
        written = {flag: str(tmp_path / f"{flag}.x") for flag in made}
        for flag, path in written.items():
            Path(path).write_bytes(content[flag])
        EvaluateConfig(checkpoint=("run",), eps=(0.1, 0.2), **written)


@pytest.mark.slow
def test_an_export_replaces_only_an_export(trained, tmp_path, capsys):
    target = ["--checkpoint", str(trained), "--robustbench", str(tmp_path)]
    for name in ("model.py", "weights.pt", "weights.safetensors"):
        (tmp_path / name).write_text("mine")
        expected = f"would overwrite {tmp_path / name}, which is not from an earlier export"
        refuses(export.main, [*target], expected, tmp_path, capsys)
        (tmp_path / name).unlink()
    assert export.main(target) == export.main(target) == 0


def test_an_export_replaces_nothing_that_it_reads(tmp_path, capsys):
    for flag, name in (("checkpoint", "weights.safetensors"), ("evaluation", "model_info.json")):
        path = tmp_path / name
        path.write_text("")
        args = ["--checkpoint", "run", f"--{flag}", str(path), "--robustbench", str(tmp_path)]
        expected = f"{path} would overwrite the file of --{flag}"
        args = args[2:] if flag == "checkpoint" else args
        refuses(export.main, args, expected, tmp_path, capsys)


def test_a_sweep_replaces_no_file_that_is_not_its_own(tmp_path, capsys):
    study = ["--study", str(tmp_path / "s.db"), "--space", "lr=1e-3:1e-2"]
    recipe = tmp_path / "s_best.toml"
    recipe.write_text("")
    expected = f"its file {recipe} would overwrite the file of --recipe"
    refuses(sweep.main, [*study, "--recipe", str(recipe)], expected, tmp_path, capsys)
    pytest.importorskip("optuna")
    expected = f"would overwrite {recipe}, which does not belong to this study"
    refuses(sweep.main, study, expected, tmp_path, capsys)
    recipe.unlink()
    (tmp_path / "s").write_text("mine")
    expected = f"{tmp_path / 's'}, where its runs would go, is not a folder"
    refuses(sweep.main, study, expected, tmp_path, capsys)


def test_training_writes_into_no_split(data_dir, tmp_path, capsys):
    args = ["--data-dir", str(data_dir), "--output"]
    for name in ("train", "val/run"):
        expected = f"--output {data_dir / name} lies in {data_dir / name.split('/')[0]}, where"
        refuses(train.main, [*args, str(data_dir / name)], expected, tmp_path, capsys)


@pytest.mark.parametrize("name", ["curves.png", "summary.json", "checkpoints/best.pt"])
def test_a_new_run_replaces_no_file(name, tmp_path, capsys):
    """Such as an image of a list, or the weights that it starts from."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    expected = f"--output {tmp_path} would overwrite {path}, which is not from an earlier run"
    for more in ([], ["--resume", "auto"], ["--initial-checkpoint", str(path)]):
        refuses(train.main, ["--output", str(tmp_path), *more], expected, tmp_path, capsys)


def test_packing_replaces_no_index(tmp_path, capsys):
    output = tmp_path / "packed"
    (output / "train").mkdir(parents=True)
    (output / "train" / "index.npz").write_text("mine")
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        folder = tmp_path / "source" / split / name
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(encoded_image("PNG"))
    expected = f"{output / 'train'} holds shards or an index that fastgn.data.pack has not made"
    source = [str(tmp_path / "source"), str(output), "--workers", "0"]
    assert pack.main(source) == 2
    assert expected in capsys.readouterr().err
    assert (output / "train" / "index.npz").read_text() == "mine"


def test_a_recipe_is_not_replaced_by_the_run(tmp_path, capsys):
    recipe = tmp_path / "config.toml"
    recipe.write_text("epochs = 1")
    expected = f"--output {tmp_path} would overwrite {recipe}, which is not from an earlier run"
    for more in ([], ["--resume", "auto"]):
        args = ["--recipe", str(recipe), "--output", str(tmp_path), *more]
        refuses(train.main, args, expected, tmp_path, capsys)


# -------------------------------------------------------------------------------- trained with care


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train.main(tiny_run(folder, "--max-updates", "1")) == 0
    return folder


def test_resuming_elsewhere_leaves_another_run_alone(trained, run, tmp_path, capsys):
    args = ["--resume", str(trained), "--output", str(run)]
    expected = f"--output {run} holds a run already: use --resume {run} to continue this run"
    refuses(train.main, args, expected, tmp_path, capsys)


def test_a_run_goes_on_by_its_own_recipe(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    args = ["--recipe", str(copy / "config.toml"), "--output", str(copy), "--resume", "auto"]
    assert train.main([*args, "--max-updates", "2"]) == 0
    assert Checkpoints(copy, 1).last().name == "update_00000002.pt"


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_refused_target_leaves_the_run_as_it_was(name, trained, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(copy / "checkpoints" / "best.pt")
    args = ["--recipe", str(trained / "config.toml"), "--output", str(copy), "--resume", "auto"]
    refuses(train.main, args, f"{copy / name} is a symbolic link", tmp_path, capsys)


def test_a_damaged_checkpoint_is_named(trained, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    path = Checkpoints(copy, 1).last()
    state = read_state(path)
    torch.save(state | {"sums": torch.zeros(1, 1)}, path)
    assert train.main(["--resume", str(copy)]) == 2
    assert f"error: {path} is damaged: its entry 'sums' has shape " in capsys.readouterr().err
