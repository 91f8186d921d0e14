"""A user's mistake: one line that names it, exit status 2, nothing half-written left behind."""

import os
import resource
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.images import image_folder
from support.runs import contents, error_line, folder_run, tiny_run
from support.states import differences, read_state, small_state

import fastgn.data.check as check
import fastgn.data.pack as pack
from fastgn import evaluate, optim, train
from fastgn.checkpoint import Checkpoints, find_checkpoint
from fastgn.config.groups import OptimizerConfig
from fastgn.errors import UserError
from fastgn.objectives.methods import gradnorm


def refused(capsys: pytest.CaptureFixture[str], args: list[str]) -> str:
    """What fastgn.train says about a mistake, checked to be one line and nothing else."""
    capsys.readouterr()
    assert train.main(args) == 2
    return error_line(capsys.readouterr().err, "fastgn.train")


def half_written(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tmp"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("errors") / "run"
    assert train.main(tiny_run(folder, "--max-updates", "2", "--checkpoint-interval", "1")) == 0
    return folder


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown model": (["--model", "swin_x"], "--model 'swin_x' is unknown: did you mean 'swin_"),
    "unknown recipe": (["--recipe", "quickstart_grad"], "did you mean 'quickstart_gradnorm'?"),
    "missing recipe file": (["--recipe", "nowhere/my.toml"], "nowhere/my.toml: there is no such"),
    "unknown activation": (
        ["--activation", "gelo"],
        "--activation 'gelo' is unknown: did you mean",
    ),
    "wrong class count": (["--num-classes", "7"], "--num-classes 7 does not fit the data, which"),
    "missing data dir": (
        ["--data", "imagefolder", "--data-dir", "nowhere/images"],
        "--data-dir nowhere/images: there is no such file or folder",
    ),
    "no data dir": (["--data", "imagefolder"], "--data imagefolder needs --data-dir"),
    "data dir of digits": (["--data-dir", "."], "the digits come with scikit-learn"),
    "batch that does not divide": (
        ["--batch-size", "5", "--global-batch-size", "48"],
        "--global-batch-size 48 is not a multiple of 1 ranks x --batch-size 5",
    ),
    "batch larger than the data": (
        ["--batch-size", "1500"],
        "an update takes 1500 images, but there are only 1437 training images: use a lower --batch",
    ),
    "accumulation larger than the data": (
        ["--batch-size", "1000", "--grad-accum-steps", "2"],
        "2000 images (1000 x 2 micro-batches x 1 processes), but there are only 1437 training",
    ),
    "odd batch with mixup": (
        ["--mixup", "0.8", "--batch-size", "7"],
        "so --batch-size 7 must be even",
    ),
    "odd batch with cutmix": (
        ["--cutmix", "1.0", "--batch-size", "7"],
        "so --batch-size 7 must be even",
    ),
    "auto-augment on the device": (["--aa", "rand-m9-mstd0.5-inc1"], "add --loader torch"),
    "unknown auto-augment policy": (
        ["--aa", "original9", "--loader", "torch"],
        "--aa original9: did you mean 'original' or 'originalr'?",
    ),
    "wrong model argument": (["--model-kwargs", "embed_dimm=8"], "embed_dimm"),
    "kernels of a GPU on a CPU": (
        ["--kernels", "triton", "--device", "cpu"],
        "--kernels triton needs a CUDA device, but this run is on cpu: leave --kernels out, or",
    ),
    "unknown kernels": (["--kernels", "tritan"], "--kernels 'tritan': did you mean 'triton'?"),
    "missing initial checkpoint": (
        ["--initial-checkpoint", "nowhere/weights.pt"],
        "--initial-checkpoint nowhere/weights.pt: there is no such file or run below /",
    ),
    "resuming nothing": (["--resume", "nowhere/run"], "nowhere/run: there is no run in it"),
    "resuming nothing with a recipe": (
        ["--recipe", "quickstart_natural", "--resume", "nowhere/run"],
        "--resume nowhere/run: there is no such run or checkpoint",
    ),
}


@pytest.mark.parametrize(("more", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(more, expected, tmp_path, capsys):
    line = refused(capsys, tiny_run(tmp_path / "run", "--max-updates", "1", *more))
    assert expected in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        (
            "--eps",
            "4",
            "it must be at least 0 and at most 1: pixels are in 0..1, so write 4/255",
        ),
        ("--eps", "four", "--eps 'four' should be a number, such as 0.5 or 4/255"),
        ("--eps", "4/0", "'4/0' divides by 0"),
        ("--epochs", "3.5", "'3.5'"),
        ("--method", "gradnrom", "--method 'gradnrom': did you mean 'gradnorm'?"),
        ("--epochz", "3", "--epochz is unknown: did you mean '--epochs'?"),
        ("--lerning-rate", "0.1", "--lerning-rate is unknown: did you mean '--lr"),
    ],
)
def test_what_the_parser_refuses_is_one_line(flag, value, expected, tmp_path, capsys):
    args = tiny_run(tmp_path / "run", flag, value)
    assert train.main(args) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert expected in error_line(said.err, "fastgn.train")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("program", "args", "expected"),
    [
        ("fastgn.train", ["--method", "gradnrom"], "--method 'gradnrom': did you mean 'gradnorm'?"),
        ("fastgn.evaluate", ["--num-imgs", "3"], "--num-imgs is unknown: did you mean '--num-im"),
    ],
)
def test_a_refusal_is_one_line_whatever_the_locale(program, args, expected, encoding, tmp_path):
    """tyro draws its box of other characters where stdout has no Unicode."""
    out = subprocess.run(
        [sys.executable, "-m", program, *args],
        env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": encoding, "COLUMNS": "40"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert out.returncode == 2 and out.stdout == ""
    assert out.stderr.count("\n") == 1, out.stderr
    assert error_line(out.stderr, program).startswith(expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epoch = 3", "unknown key 'epoch': did you mean 'epochs'?"),
        ("epochs = 3.5", "epochs = 3.5 should be of type int"),
        ("method = 'gradnrom'", "did you mean 'gradnorm'?"),
        ("eps = 4", "--eps 4 is out of range"),
        ("mean = ['a', 'b', 'c']", "'a' is not a number"),
        ("mean = [0.5]", "mean = [0.5] should be a list of 3 values"),
        ("epochs = ", "not valid TOML"),
    ],
)
def test_a_mistake_in_a_recipe_names_the_recipe(text, expected, tmp_path, capsys):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(text)
    line = refused(capsys, ["--recipe", str(recipe), "--output", str(tmp_path / "run")])
    assert expected in line and str(recipe) in line
    assert list(tmp_path.iterdir()) == [recipe]


# ------------------------------------------------------------------------------------ image folders


@pytest.mark.parametrize(
    ("train_classes", "val_classes", "expected"),
    [
        ("", "", "train is missing"),
        ("a", "a", "train has 1 class"),
        ("ab", "", "val is missing"),
        ("abc", "ab", "train has 3 classes, val has 2; c is in only one of them"),
        ("ab", "cd", "train has 2 classes, val has 2; a, b, c are in only one of them"),
    ],
)
def test_image_folders_that_do_not_fit(train_classes, val_classes, expected, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    data = image_folder(tmp_path / "data", train_classes, val_classes)
    line = refused(capsys, folder_run(data, tmp_path / "run"))
    assert expected in line and str(data) in line
    assert not (tmp_path / "run").exists()


def test_a_class_folder_without_images(tmp_path, capsys):
    data = image_folder(tmp_path / "data")
    (data / "train" / "c").mkdir()
    line = refused(capsys, folder_run(data, tmp_path / "run"))
    assert "train has no image for the classes c: add images" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_no_image_is_named(workers, tmp_path, capsys):
    data = image_folder(tmp_path / "data")
    bad = data / "train" / "a" / "2.png"
    bad.write_text("not an image")
    more = ("--workers", str(workers), "--batch-size", "8")
    line = refused(capsys, folder_run(data, tmp_path / "run", *more))
    assert line.startswith(f"{bad} cannot be read as an image")
    assert half_written(tmp_path) == []


def test_the_device_loader_takes_no_image_folder(tmp_path, capsys):
    data = image_folder(tmp_path / "data")
    line = refused(capsys, folder_run(data, tmp_path / "run", "--loader", "device"))
    assert "--loader device: image folders need --loader torch" in line
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------- checkpoints


def test_a_run_that_is_there_is_not_overwritten(finished, capsys):
    before = contents(finished)
    line = refused(capsys, tiny_run(finished, "--max-updates", "2"))
    assert f"--output {finished} holds a run already: use --resume {finished} to" in line
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--model", "preact_resnet18", "--model-kwargs", "width=4"],
            "another model: model: ",
        ),
        (["--img-size", "24"], "another model: img_size: 24, not 16"),
        (["--batch-size", "24"], "made with 48 images per update, but this run has 24"),
        (["--no-model-ema"], "the checkpoint has a moving average of the weights: add --model-ema"),
    ],
)
def test_resuming_what_does_not_fit_leaves_the_run_as_it_was(more, expected, finished, capsys):
    before = contents(finished)
    assert expected in refused(capsys, ["--resume", str(finished), *more])
    assert contents(finished) == before


def test_resuming_with_data_of_other_classes(finished, tmp_path, capsys):
    before = contents(finished)
    data = image_folder(tmp_path / "data", images=24)
    more = ["--data", "imagefolder", "--data-dir", str(data), "--workers", "0"]
    line = refused(capsys, ["--resume", str(finished), *more])
    assert "knows 10 classes (0, 1, 2, ...), but the data has 2 (a, b, ...)" in line
    assert contents(finished) == before


def test_a_truncated_checkpoint_is_named_with_the_others(run_copy, capsys):
    last = Checkpoints(run_copy, 1).last()
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    before = contents(run_copy)
    line = refused(capsys, ["--resume", str(run_copy)])
    assert line.startswith(f"{last} is corrupt")
    assert "other checkpoints in its folder: best.pt, update_00000001.pt" in line
    assert contents(run_copy) == before


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_a_flipped_byte_in_a_checkpoint_is_found(where, run_copy, capsys):
    last = Checkpoints(run_copy, 1).last()
    content = bytearray(last.read_bytes())
    tensor = read_state(last)["model"]["backbone.head.fc.weight"].numpy().tobytes()
    index = content.find(tensor)
    assert index >= 0
    content[index + int(where * len(tensor))] ^= 0x10
    last.write_bytes(content)
    assert "is corrupt (wrong checksum of " in refused(capsys, ["--resume", str(run_copy)])


@pytest.mark.slow
def test_no_flipped_or_missing_byte_goes_unnoticed_or_unexplained(tmp_path):
    """Over a whole small checkpoint, its zip directory included: the right content or UserError."""
    state = small_state(3, model={"weight": torch.arange(8.0)})
    path = Checkpoints(tmp_path, 2).save(state)
    content = path.read_bytes()
    spoilt = [content[:n] for n in range(0, len(content), 7)]
    for index in range(0, len(content)):
        flipped = bytearray(content)
        flipped[index] ^= 0xFF
        spoilt.append(bytes(flipped))
    refusals = 0
    for version in spoilt:
        path.write_bytes(version)
        try:
            loaded = read_state(path)
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
        else:
            assert loaded["update"] == 3 and torch.equal(
                loaded["model"]["weight"], state.model["weight"]
            )
    assert refusals > len(spoilt) / 3


def test_a_file_that_is_no_checkpoint(run_copy, capsys):
    other = run_copy / "checkpoints" / "update_00000009.pt"
    torch.save({"weight": torch.zeros(2)}, other)
    line = refused(capsys, ["--resume", str(run_copy)])
    assert line == f"{other} is not a checkpoint of fastgn.train with format 1"


# ------------------------------------------------------------------------------- full disk, folders


@pytest.fixture
def full_disk() -> Iterator[None]:
    """A limit on a file's size stands in for it: a checkpoint is the first file to reach it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_no_half_checkpoint(full_disk, tmp_path, capsys):
    run = tmp_path / "run"
    line = refused(capsys, tiny_run(run, "--max-updates", "1"))
    first = run / "checkpoints" / "best.pt"
    assert line.startswith(f"{first} cannot be written")
    assert half_written(tmp_path) == []
    assert list((run / "checkpoints").iterdir()) == []


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoints(run_copy, full_disk, capsys):
    before = contents(run_copy / "checkpoints")
    assert "update_00000002.pt" in before
    line = refused(capsys, ["--resume", str(run_copy), "--max-updates", "4"])
    assert line.startswith(f"{run_copy}/checkpoints/update_00000003.pt cannot be written")
    assert contents(run_copy / "checkpoints") == before
    assert half_written(run_copy) == []


def test_an_output_that_is_a_file(tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    line = refused(capsys, tiny_run(taken, "--max-updates", "1"))
    assert f"{taken}" in line and "cannot be written" in line
    assert taken.read_text() == "mine"


# ---------------------------------------------------------------------------- numbers, device, apex


def test_a_learning_rate_too_high_is_found_and_named(tmp_path, capsys, monkeypatch):
    args = tiny_run(tmp_path / "run", "--max-updates", "8", "--checkpoint-interval", "1")
    monkeypatch.setattr(optim, "compute_peak_lr", lambda *_: 1e30)  # above what --lr takes
    line = refused(capsys, [*args, "--log-interval", "1"])
    last = Checkpoints(tmp_path / "run", 1).last()
    update = int(last.stem.split("_")[1]) + 1
    assert f"the loss or gradient of update {update} is not finite" in line
    assert f"(the last good checkpoint is {last}):" in line
    assert "try a lower --lr, --clip-grad 1.0, a longer --ramp-epochs" in line
    for value in read_state(last)["model"].values():
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("bad", ["first", "third"])
def test_a_loss_that_is_not_finite_stops_before_the_next_checkpoint(
    bad, tmp_path, capsys, monkeypatch
):
    """The third update's loss, found only at the next log row or checkpoint, is named by number."""
    calls = 0
    number = {"first": 1, "third": 3}[bad]
    real = gradnorm.cross_entropy

    def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(logits, targets) * (torch.nan if calls == number else 1.0)

    monkeypatch.setattr(gradnorm, "cross_entropy", cross_entropy)
    run = tmp_path / "run"
    more = ("--max-updates", "6", "--checkpoint-interval", "2", "--precision", "bf16")
    line = refused(capsys, tiny_run(run, *more))
    first = "the gradient of update 1, the first one since the start of this process, is not finite"
    later = f"the loss or gradient of update {number} is not finite"
    assert (first if bad == "first" else later) in line
    assert "--precision fp32" in line
    good = f"the last good checkpoint is {run}/checkpoints/update_00000002.pt"
    assert {"first": "every layer alone is finite", "third": good}[bad] in line
    assert half_written(run) == []
    assert not (run / "model.safetensors").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(tmp_path, capsys):
    line = refused(capsys, tiny_run(tmp_path / "run", "--device", "cuda"))
    assert line.startswith("--device cuda: this machine has no CUDA device")
    assert list(tmp_path.iterdir()) == []


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = types.ModuleType(name)
    module.__path__ = []  # type: ignore[attr-defined]
    for key, value in content.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_fusedadamw_without_apex(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    line = refused(capsys, tiny_run(tmp_path / "run", "--opt", "fusedadamw"))
    assert "--opt fusedadamw needs NVIDIA apex" in line
    assert list(tmp_path.iterdir()) == []


def test_fusedadamw_with_the_unrelated_apex(tmp_path, capsys, monkeypatch):
    install(monkeypatch, "apex", __version__="0.9.10dev")
    line = refused(capsys, tiny_run(tmp_path / "run", "--opt", "fusedadamw"))
    assert "the installed package apex is not NVIDIA's" in line
    assert list(tmp_path.iterdir()) == []


def test_fusedadamw_with_an_apex_that_does_not_import(tmp_path, capsys, monkeypatch):
    """As PyPI's does on a current Python."""
    broken = tmp_path / "path" / "apex"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("from pyramid.session import Unencrypted\n")
    monkeypatch.syspath_prepend(str(broken.parent))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    line = refused(capsys, tiny_run(tmp_path / "run", "--opt", "fusedadamw"))
    assert "--opt fusedadamw needs NVIDIA apex" in line
    assert not (tmp_path / "run").exists()


class FusedAdam(torch.optim.AdamW):
    """NVIDIA apex's, as far as its signatures go (apex/optimizers/fused_adam.py)."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ):
        assert adam_w_mode and bias_correction
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def zero_grad(self) -> None:  # type: ignore[override]
        super().zero_grad(set_to_none=True)


def test_nvidias_apex_needs_cuda(tmp_path, capsys, monkeypatch):
    install(monkeypatch, "apex")
    install(monkeypatch, "apex.optimizers", FusedAdam=FusedAdam)
    args = tiny_run(tmp_path / "run", "--opt", "fusedadamw", "--device", "cpu")
    assert "--opt fusedadamw needs a CUDA device: use --opt adamw" in refused(capsys, args)
    assert list(tmp_path.iterdir()) == []


def test_nvidias_apex_trains_as_adamw(finished, tmp_path, monkeypatch):
    """As on CUDA, but for the device: the loop calls nothing that apex's optimizer lacks."""

    def build_optimizer(
        cfg: OptimizerConfig, model: torch.nn.Module, peak: float
    ) -> torch.optim.Optimizer:
        groups = optim.make_decay_groups(model, cfg.weight_decay)
        return FusedAdam(groups, adam_w_mode=True, lr=peak)

    monkeypatch.setattr(optim, "build_optimizer", build_optimizer)
    assert train.main(tiny_run(tmp_path / "run", "--max-updates", "2")) == 0
    mine, theirs = (
        read_state(find_checkpoint(folder))["model"] for folder in (tmp_path / "run", finished)
    )
    assert differences(mine, theirs) == []


# -------------------------------------------------------------------- fastgn.data.pack, check


@pytest.mark.parametrize(
    ("module", "args", "expected"),
    [
        (pack, [], "missing: SOURCE and OUTPUT (see --help)"),
        (pack, ["nowhere", "out"], "--data-dir nowhere: there is no such file or folder"),
        (pack, [".", "out", "--shard-size", "0"], "--shard-size 0 is out of range"),
        (
            pack,
            [".", "out", "--quality", "101"],
            "--quality 101 is out of range: it must be at least 1 and at most 100",
        ),
        (pack, [".", "out"], "train is missing; it should hold one folder of images per class or"),
        (check, [], "missing: DATA-DIR (see --help)"),
        (check, ["."], "train is missing"),
        (check, [".", "--wrokers", "3"], "--wrokers is unknown: did you mean '--workers'?"),
    ],
)
def test_what_pack_and_check_refuse_is_one_line(
    module, args, expected, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert module.main(args) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert expected in error_line(said.err, module.__name__)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_was_cut_is_named_before_training(tmp_path, capsys):
    data, output = image_folder(tmp_path / "data"), tmp_path / "packed"
    assert pack.main([str(data), str(output), "--workers", "0"]) == 0
    shard = output / "train" / "shard-000000.tar"
    os.truncate(shard, 3000)
    line = refused(capsys, folder_run(output, tmp_path / "run"))
    assert line.startswith(f"shard {shard} has 3000 bytes, ")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------- fastgn.evaluate


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--data-dir", "nowhere"], "or add --data imagefolder to use the images in nowhere"),
        (["--data", "imagefolder", "--data-dir", "nowhere"], "--data-dir nowhere: there is no"),
    ],
)
def test_evaluating_on_data_that_is_not_there(more, expected, finished, tmp_path, capsys):
    output = tmp_path / "evaluation.json"
    args = ["--checkpoint", str(finished), "--output", str(output), *more]
    capsys.readouterr()
    assert evaluate.main(args) == 2
    assert expected in error_line(capsys.readouterr().err, "fastgn.evaluate")
    assert list(tmp_path.iterdir()) == []


def test_training_on_the_folder_of_a_split(tmp_path, capsys):
    data = image_folder(tmp_path / "data")
    line = refused(capsys, folder_run(data / "train", tmp_path / "run"))
    assert line.endswith(f"train/train is missing: give the folder above, --data-dir {data}")


def test_evaluating_what_is_no_run(tmp_path, capsys):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"nothing")
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG")
    for where, expected in (
        (tmp_path / "nowhere", "there is no such run or file"),
        (tmp_path / "picture.pgn", f"there is no such run or file: did you mean {picture}?"),
        (picture, "is neither a checkpoint nor an export of fastgn.train, or its beginning is dam"),
        (tmp_path, "there is no checkpoint in this folder"),
        (weights, "not a safetensors file"),
    ):
        assert evaluate.main(["--checkpoint", str(where)]) == 2
        line = error_line(capsys.readouterr().err, "fastgn.evaluate")
        assert expected in line and str(where) in line


def test_evaluating_on_other_classes(finished, tmp_path, capsys):
    data = image_folder(tmp_path / "data")
    args = ["--checkpoint", str(finished), "--data", "imagefolder", "--data-dir", str(data)]
    capsys.readouterr()
    assert evaluate.main([*args, "--attacks", "clean"]) == 2
    line = error_line(capsys.readouterr().err, "fastgn.evaluate")
    assert "knows 10 classes (0, 1, 2, ...), but the data has 2 (a, b, ...)" in line


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--attacks", "pgd", "'pgd' is unknown"),
        ("--attacks", "pgd-0", "'pgd-0' is unknown"),
        ("--attacks", "pgd20", "'pgd20' is unknown: did you mean 'pgd-20'?"),
        *(
            ("--attacks", f"pgd-10@{step}", f"'pgd-10@{step}': the step after @ must be a")
            for step in ("0", "-1/255", "nan", "inf", "1/0", "eps", "eps/0", "eps/-4", "STEP")
        ),
        ("--eps", "4", "4 is out of range"),
        ("--eps", "four", "'four'"),
        ("--num-images", "0", "--num-images 0 is out of range"),
        ("--data", "digit", "--data 'digit': did you mean 'digits'?"),
        ("--num-imags", "3", "--num-imags is unknown: did you mean '--num-images'?"),
    ],
)
def test_what_evaluate_refuses_is_one_line(flag, value, expected, finished, capsys):
    before = contents(finished)
    capsys.readouterr()
    assert evaluate.main(["--checkpoint", str(finished), flag, value]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert expected in error_line(said.err, "fastgn.evaluate")
    assert contents(finished) == before
