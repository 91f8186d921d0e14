"""The program end to end: every method on CIFAR-10, Swin-B at 224 px, what a run leaves behind."""

import dataclasses
import json
import subprocess
import sys
import tarfile
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import SHARED
from support.runs import tiny_run

from fastgn import optim, resolved, train
from fastgn.distributed import World
from fastgn.failures import too_large
from fastgn.metrics import COLUMNS, read_rows
from fastgn.models import network
from fastgn.objectives import build_objective
from fastgn.resolved import Batching, make_plan
from fastgn.run import Run
from fastgn.step.double_backward import count_graphs
from fastgn.train import main
from fastgn.trained import load_trained

CIFAR = SHARED / "cifar10_lossless_5k_1k.npz"
IMAGENET = SHARED / "imagenet_sample_200.tar"


@pytest.mark.parametrize("method", ["natural", "gradnorm", "pgd_at", "fgsm_rs"])
@pytest.mark.skipif(not CIFAR.is_file(), reason="needs the CIFAR-10 sample")
def test_cifar10_trains_with_each_method(method: str, tmp_path: Path) -> None:
    """The paper's CIFAR-10 network, narrowed, falls below its first loss within an epoch's half."""
    args = ["--model", "preact_resnet18", "--activation", "gelu", "--model-kwargs", "width=8"]
    args += [
        "--data",
        "cifar10",
        "--data-dir",
        str(CIFAR),
        "--method",
        method,
        "--batch-size",
        "50",
    ]
    args += ["--epochs", "1", "--warmup-epochs", "0", "--lr", "0.003", "--max-updates", "40"]
    args += ["--ramp-epochs", "5"]  # the paper's: the loss of attacked images falls later
    args += ["--log-interval", "10", "--eval-images", "50", "--output", str(tmp_path / "run")]
    assert main(args) == 0
    rows = [r for r in read_rows(tmp_path / "run" / "metrics.csv") if "ce" in r]
    assert [r["update"] for r in rows] == [10, 20, 30, 40]
    assert rows[-1]["ce"] < rows[0]["ce"] - 0.1
    assert ("grad_l1" in rows[0]) is (method == "gradnorm")


@pytest.mark.skipif(not IMAGENET.is_file(), reason="needs the ImageNet sample")
def test_swin_b_takes_gradnorm_steps_at_224_px(tmp_path: Path) -> None:
    with tarfile.open(IMAGENET) as archive:
        archive.extractall(tmp_path, filter="data")
    data = [
        "--data-dir",
        str(tmp_path / "imagenet_sample"),
        "--train-split",
        ".",
        "--val-split",
        ".",
    ]
    args = ["--model", "swin_b", *data, "--batch-size", "2", "--max-updates", "2", "--epochs", "6"]
    args += ["--log-interval", "1", "--eval-images", "0", "--workers", "0", "--no-model-ema"]
    args += ["--ramp-epochs", "0", "--compile", "off", "--aa", "rand-m9-mstd0.5-inc1"]
    args += [
        "--mixup",
        "0.8",
        "--cutmix",
        "1.0",
        "--reprob",
        "0.25",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main(args) == 0
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert [r["update"] for r in rows] == [1, 2]
    assert all(r["penalty"] > 0 and r["grad_norm"] > 0 for r in rows)
    header = load_trained(str(tmp_path / "run"), torch.device("cpu"))
    assert len(header.classes) == 200


@pytest.mark.parametrize(
    ("flags", "penalised"),
    [
        ("--method edge", True),
        ("--method pag", True),
        ("--method pag --pag-representative nearest-neighbour", True),
        ("--method trades --attack-eps 0.1", True),
        ("--method gradnorm+fgsm", True),
        ("--method gradnorm --gn-norm l2 --gn-of logit --gn-start 4/255", True),
        ("--method fgsm_rs", False),
    ],
)
def test_digits_train_with_each_method(flags: str, penalised: bool, tmp_path: Path) -> None:
    """Its penalty is logged, above 0; a run of the same seed is the same, another's is not."""
    args = [*flags.split(), "--max-updates", "6", "--log-interval", "3", "--ramp-epochs", "0"]
    seeds = {"run": "0", "same": "0", "other": "1"}
    for name, seed in seeds.items():
        assert main(tiny_run(tmp_path / name, *args, "--seed", seed)) == 0
    run, same, other = (
        [r for r in read_rows(tmp_path / name / "metrics.csv") if "ce" in r] for name in seeds
    )
    assert len(run) == 2
    for row in run:
        assert np.isfinite(row["loss"]) and row["grad_norm"] > 0
        assert (row["penalty"] > 0) is penalised
    losses = [[row["loss"] for row in rows] for rows in (run, same, other)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.curves
def test_what_a_run_leaves_behind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "run"
    assert main(tiny_run(folder, "--max-updates", "4", "--log-interval", "2")) == 0
    names = {p.relative_to(folder).parts[0] for p in folder.rglob("*")}
    assert names == {
        *("config.toml", "environment.json", "metrics.csv", "tensorboard", "checkpoints"),
        *("model.safetensors", "config.json", "summary.json", "curves.png"),
    }
    assert (folder / "metrics.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert list((folder / "tensorboard").glob("events.*"))
    with Image.open(folder / "curves.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5, "curves, and not an empty sheet"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"commit", "hardware", "resolved"} <= set(environment)
    resolved = environment["resolved"]
    assert (resolved["data"], resolved["img_size"], resolved["ranks"]) == ("digits", 16, 1)
    assert resolved["batch_size"] == 48 and resolved["lr"] == 0.003 and not resolved["compiled"]
    said = capsys.readouterr().err
    assert "gradnorm on digits at 16 px" in said and "finished" in said


def test_a_piecewise_linear_network_is_warned_of(tmp_path: Path, capsys) -> None:
    args = ["--model", "preact_resnet18", "--model-kwargs", "width=4", "--data", "digits"]
    args += ["--batch-size", "8", "--max-updates", "1", "--eval-images", "0"]
    assert main([*args, "--output", str(tmp_path / "relu")]) == 0
    assert "ReLU" in (said := capsys.readouterr().err) and "--activation gelu" in said
    assert main([*args, "--activation", "gelu", "--output", str(tmp_path / "gelu")]) == 0
    said = capsys.readouterr().err
    assert "warning" not in said and "no --lr: the peak learning rate is only 9.77e-06" in said


def test_bare_command_takes_the_embedded_digits(tmp_path: Path, capsys) -> None:
    args = tiny_run(tmp_path / "run", "--max-updates", "1")
    position = args.index("--data")
    assert main(args[:position] + args[position + 2 :]) == 0
    assert "no --data-dir: training on the digits that scikit-learn contains, at 16 px" in (
        capsys.readouterr().err
    )


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(tiny_run(tmp_path / name, "--max-updates", "3", "--seed", seed)) == 0
        weights.append((tmp_path / name / "checkpoints" / "update_00000003.pt").read_bytes())
        loaded = load_trained(str(tmp_path / name), torch.device("cpu")).model.state_dict()
        weights[-1] = torch.cat([t.flatten().float() for t in loaded.values()])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def weights_of(folder: Path) -> torch.Tensor:
    model = load_trained(str(folder), torch.device("cpu")).model
    return torch.cat([p.flatten() for p in model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "graphs"), [("gradnorm", 1), ("pgd_at", 2)])
def test_a_compiled_run_is_the_eager_one(
    method: str, graphs: int, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Traced as ever, but run as ATen: Inductor's code takes a minute. Two epochs, a growing ramp
    and evaluations compile nothing anew."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    more = ("--method", method, "--batch-size", "480", "--epochs", "2", "--no-model-ema")
    assert main(tiny_run(tmp_path / "eager", "--compile", "off", *more)) == 0
    assert "cpu, fp32, eager:" in capsys.readouterr().err
    before = count_graphs()
    assert main(tiny_run(tmp_path / "compiled", "--compile", "on", *more)) == 0
    assert count_graphs() - before == graphs + 1  # the batches' augmentation
    assert "cpu, fp32, compiled:" in capsys.readouterr().err
    eager, compiled = weights_of(tmp_path / "eager"), weights_of(tmp_path / "compiled")
    assert (compiled - eager).norm() < 1e-4 * eager.norm()
    assert (
        main(
            tiny_run(
                tmp_path / "other",
                "--compile",
                "off",
                *more,
                "--gn-weight",
                "0",
                "--attack-eps",
                "0",
            )
        )
        == 0
    )
    assert (weights_of(tmp_path / "other") - eager).norm() > 1e-3 * eager.norm(), "moves too little"


class FakeWandb(types.ModuleType):
    """What the trainer calls of wandb, noted down."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.rows: list[dict[str, float]] = []
        self.finished = 0

    def init(self, **options: Any) -> "FakeWandb":
        self.begun.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        assert self.begun and not self.finished
        self.rows.append({**values, "step": step})

    def finish(self) -> None:
        self.finished += 1


def test_a_run_is_logged_to_wandb(tmp_path: Path, monkeypatch) -> None:
    wandb, folder = FakeWandb(), tmp_path / "run"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert main(tiny_run(folder, "--max-updates", "4", "--log-interval", "2")) == 0
    assert wandb.begun == [], "only when asked for"
    more = ("--max-updates", "8", "--log-wandb", "--weight-decay", "0.03")
    assert main(["--resume", str(folder), *more]) == 0
    (begun,) = wandb.begun
    assert (begun["project"], begun["name"], begun["dir"]) == ("fastgn", "run", str(folder))
    assert begun["config"]["weight_decay"] == 0.03 and begun["config"]["model"] == "swin_t"
    rows = [r for r in read_rows(folder / "metrics.csv") if r["update"] > 4]
    assert [r["step"] for r in wandb.rows] == [6, 8, 8] and [r["update"] for r in rows] == [6, 8]
    logged = {r["step"]: {} for r in wandb.rows}
    for row in wandb.rows:
        logged[row["step"]] |= row
    for row in rows:
        assert {k: logged[row["update"]][k] for k in row} == pytest.approx(row, rel=1e-5)
    assert wandb.finished == 1


def test_wandb_is_finished_when_the_run_fails(tmp_path: Path, monkeypatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("fastgn.optim.compute_peak_lr", lambda *_: 1e30)  # above what --lr takes
    args = tiny_run(tmp_path / "run", "--max-updates", "4", "--log-wandb", "--log-interval", "1")
    assert main(args) == 2
    assert wandb.rows and wandb.finished == 1


def test_without_the_package_wandb(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(tiny_run(tmp_path / "run", "--max-updates", "1", "--log-wandb")) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    said = "--log-wandb needs the package wandb: run pip install wandb"
    assert lines == [f"fastgn.train: error: {said}"]
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.slow
def test_torchrun_runs_the_module(tmp_path: Path) -> None:
    """As a user types it, one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "fastgn.train"]
    out = subprocess.run(
        [*command, *tiny_run(tmp_path / "run", "--max-updates", "1")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------ schedules


@pytest.mark.slow
def test_auto_plans_the_update_and_says_what_it_took(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """The recipe's 24 images x 2 are one batch to the loader, which the step splits as the memory
    wants; predicted and measured stand side by side."""
    run = tmp_path / "run"
    args = tiny_run(run, "--batch-size", "24", "--grad-accum-steps", "2", "--schedule", "auto")
    assert main([*args, "--max-updates", "6", "--log-interval", "3"]) == 0
    said = capfd.readouterr().err.splitlines()
    schedule, plan = (next(x for x in said if x.startswith(y)) for y in ("schedule", "plan:"))
    assert schedule.startswith("schedule exact, fp32: 5 passes, ")
    assert schedule.endswith(" an update of 48 images")
    assert plan.startswith("plan: micro-batches ") and "predicted peak" in plan
    measured = [line for line in said if line.startswith("plan: measured")]
    assert len(measured) == 1 and "(predicted" in measured[0]
    resolved = json.loads((run / "environment.json").read_text())["resolved"]
    assert (resolved["batch_size"], resolved["grad_accum_steps"]) == (48, 1)
    assert 48 % resolved["micro_batch"] == 0


@pytest.mark.slow
def test_auto_takes_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """In a device with little memory left, smaller micro-batches train the same run; in one with
    next to none, a line says what is missing."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    args = ["--schedule", "auto", "--max-updates", "4", "--log-interval", "2"]
    assert main(tiny_run(whole, *args)) == 0
    monkeypatch.setattr(resolved, "free_memory", lambda device: 2 * 2**20)
    assert main(tiny_run(parts, *args)) == 0
    folders = (whole, parts)
    sizes = [json.loads((f / "environment.json").read_text())["resolved"] for f in folders]
    assert sizes[1]["micro_batch"] < sizes[0]["micro_batch"]
    rows = [[r["loss"] for r in read_rows(f / "metrics.csv") if "loss" in r] for f in folders]
    assert rows[1] == pytest.approx(rows[0], rel=1e-4)
    monkeypatch.setattr(resolved, "free_memory", lambda device: 2**10)
    assert main(tiny_run(tmp_path / "none", *args)) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("fastgn.train: error: --schedule auto: one image at a time needs ")
    assert "MiB of device memory, but only 0.000977 MiB are free, and 10% of them stay" in line


def out_of_memory_above(limit: int) -> Callable[..., Any]:
    """network.build_model, of a network with room for `limit` images."""
    original = network.build_model

    def build(*args: Any, **kwargs: Any) -> Any:
        model, report = original(*args, **kwargs)

        def run_out(module: Any, inputs: Any) -> None:
            if module.training and torch.is_grad_enabled() and len(inputs[0]) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        model.backbone.register_forward_pre_hook(run_out)
        return model, report

    return build


def test_a_run_survives_running_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Same losses as with enough memory; without room for one image, a line and no traceback."""
    args = ["--max-updates", "4", "--log-interval", "1", "--method", "pgd_at"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(tiny_run(whole, *args, "--attack-eps", "1e-9")) == 0
    capfd.readouterr()
    monkeypatch.setattr(network, "build_model", out_of_memory_above(20))
    assert main(tiny_run(parts, *args, "--attack-eps", "1e-9")) == 0
    line = "out of memory with 48 images at a time: going on with 24 at a time, with the same"
    said = capfd.readouterr().err
    assert said.count("out of memory") == 2 and line in said and "going on with 12" in said
    rows = [[r["ce"] for r in read_rows(f / "metrics.csv") if "ce" in r] for f in (whole, parts)]
    assert len(rows[0]) == 4 and rows[1] == pytest.approx(rows[0], rel=1e-4)
    monkeypatch.undo()
    monkeypatch.setattr(network, "build_model", out_of_memory_above(0))
    assert main(tiny_run(tmp_path / "none", *args)) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "fastgn.train: error: out of memory at update 1 with 1 images at a time;"
    )
    assert "--schedule auto" in last


def test_memory_that_runs_out_with_overlap_suggests_flat():
    """With flat sums, the update would have been repeated in smaller micro-batches."""
    run: Any = types.SimpleNamespace(
        update=4, images_at_a_time=8, last_checkpoint=lambda _: "the last checkpoint is 3.pt"
    )
    for grad_sync in ("flat", "overlap"):
        run.resolved = types.SimpleNamespace(compiled=True, grad_sync=grad_sync)
        said = too_large(run)
        assert ("try --grad-sync flat or" in said) == (grad_sync == "overlap")


def batchnorm_run(output: Path, *more: str) -> list[str]:
    """A run of a network whose last BatchNorm gets one value per channel from an image."""
    network = ["--model", "resnet18", "--model-kwargs", "channels=(4, 8, 8, 8)", "--img-size", "32"]
    fixed = ["--data", "digits", "--warmup-epochs", "0", "--eval-images", "8", "--log-interval"]
    fixed += ["1", "--max-updates", "2", "--epochs", "1"]
    return [*network, *fixed, "--output", str(output), *more]


@pytest.mark.slow
def test_no_plan_brings_one_image_through_batchnorm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """However little memory there is: of one image it has no variance."""
    args = ["--schedule", "auto", "--batch-size", "6"]

    def least(cost: Any, rates: Any, **options: Any) -> Any:  # the smallest micro-batch that fits
        several = plan(cost, rates, **options)
        asked.append(options["fewest"])
        sizes = [n for n in range(options["fewest"], 7) if 6 % n == 0]
        return dataclasses.replace(several, micro_batch=sizes[0], micro_batches=6 // sizes[0])

    asked: list[int] = []
    plan = resolved.choose_plan
    monkeypatch.setattr(resolved, "choose_plan", least)
    assert main(batchnorm_run(tmp_path / "run", *args)) == 0
    assert asked == [2]
    made = json.loads((tmp_path / "run" / "environment.json").read_text())["resolved"]
    assert made["micro_batch"] == 2
    monkeypatch.setattr(resolved, "choose_plan", plan)
    monkeypatch.setattr(resolved, "free_memory", lambda device: 2**10)
    assert main(batchnorm_run(tmp_path / "none", *args)) == 2
    assert "--schedule auto: 2 images at a time need " in capfd.readouterr().err.splitlines()[-1]


def test_halving_stops_before_batchnorm_gets_one_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(network, "build_model", out_of_memory_above(2))
    assert main(batchnorm_run(tmp_path / "fits", "--batch-size", "8")) == 0
    assert "going on with 2 at a time, with the same number" in capfd.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(network, "build_model", out_of_memory_above(1))
    assert main(batchnorm_run(tmp_path / "none", "--batch-size", "8")) == 2
    said = capfd.readouterr().err
    assert "out of memory at update 1 with 2 images at a time" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--batch-size", "1"), "--batch-size 1: BatchNorm in --model resnet18 at 32 px gets one "),
        (
            ("--batch-size", "2", "--schedule", "subset"),
            "--batch-size 2 and --subset-fraction 0.5: BatchNorm in --model resnet18 at 32 px ",
        ),
    ],
)
def test_one_image_for_batchnorm_is_refused(
    more: tuple[str, ...], line: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """And twice as many train; one is enough without BatchNorm in training mode."""
    assert main(batchnorm_run(tmp_path / "run", *more)) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"fastgn.train: error: {line}") and said.count("\n") == 1
    needed = str(2 * int(more[1]))
    assert f"use --batch-size {needed} or more" in said and not (tmp_path / "run").exists()
    enough = ("--batch-size", needed, *more[2:])
    assert main(batchnorm_run(tmp_path / "run", *enough)) == 0
    assert main(batchnorm_run(tmp_path / "eval", *more, "--train-in-eval-mode")) == 0


def test_an_evaluation_follows_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """It takes no more images at a time than training could, fewer where they do not fit, and
    counts each once: room for 12 in training and 8 in an evaluation, where pictures come in 48s."""
    build = out_of_memory_above(20)
    sizes = []

    def built(*args: Any, **options: Any) -> Any:
        model, report = build(*args, **options)

        def no_room(module: Any, inputs: Any) -> None:
            if not module.training:
                sizes.append(len(inputs[0]))
                if len(inputs[0]) > 8:
                    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x")

        model.backbone.register_forward_pre_hook(no_room)
        return model, report

    monkeypatch.setattr(network, "build_model", built)
    args = ["--max-updates", "2", "--no-model-ema", "--epochs", "1"]
    assert main(tiny_run(tmp_path / "run", *args)) == 0
    said = capfd.readouterr().err
    assert "going on with 12" in said and "PGD-10" in said
    assert max(sizes) == 12 and sizes[-1] == 6
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    right = 48 * summary["clean_accuracy"]
    assert right == pytest.approx(round(right), abs=1e-3) and 0 <= right <= 48
    # clean, PGD-10 from a random start, and its result: 12 times through the network, after a
    # first batch that did not fit
    assert sizes == [12, *[6] * (48 // 6 * 12)]


def test_what_a_step_cannot_do_is_said_before_it_runs(tmp_path: Path, capfd) -> None:
    for args, line in (
        (("--activation-memory-budget", "0.5"), "--activation-memory-budget 0.5 works only"),
        (
            ("--schedule", "subset", "--subset-fraction", "0.3"),
            "--subset-fraction 0.3 of --batch-size 48 is not a whole number of images: use "
            "a --batch-size that is a multiple of 10, or another --subset-fraction",
        ),
    ):
        assert main(tiny_run(tmp_path / "run", *args)) == 2
        said = capfd.readouterr().err.splitlines()
        assert said[-1].startswith(f"fastgn.train: error: {line}") and len(said) == 1
        assert not (tmp_path / "run").exists()


def test_a_clipped_lazy_run_is_warned(tmp_path: Path, capfd) -> None:
    args = ["--schedule", "lazy", "--clip-grad", "1", "--max-updates", "1", "--eval-images", "0"]
    assert main(tiny_run(tmp_path / "run", *args)) == 0
    assert "but --clip-grad 1 also limits the gradient" in capfd.readouterr().err


def test_a_lazy_run_logs_the_penalty_of_the_updates_that_had_it(tmp_path: Path) -> None:
    """Updates 1, 4 and 7 of 9: each row of three has one, whose value is not divided by three."""
    args = ["--max-updates", "9", "--log-interval", "3", "--ramp-epochs", "0"]
    norms = {}
    for schedule in ("exact", "lazy"):
        run = tmp_path / schedule
        more = ("--schedule", schedule, "--lazy-interval", "3", "--lr", "1e-9")
        assert main(tiny_run(run, *args, *more, "--opt-eps", "1")) == 0
        rows = [r for r in read_rows(run / "metrics.csv") if "loss" in r]
        norms[schedule] = [r["grad_l1"] for r in rows] + [r["penalty"] for r in rows]
    assert len(norms["lazy"]) == 6
    assert norms["lazy"] == pytest.approx(norms["exact"], rel=0.1)


@pytest.mark.parametrize("schedule", ["finite-difference", "subset", "exact-eager"])
def test_runs_of_every_schedule(schedule: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = ["--schedule", schedule, "--max-updates", "6", "--log-interval", "3"]
    assert main(tiny_run(run, *args, "--precision", "bf16-pure")) == 0
    rows = [r for r in read_rows(run / "metrics.csv") if "loss" in r]
    assert len(rows) == 2 and all(r["grad_l1"] > 0 for r in rows)


@pytest.mark.slow
def test_what_a_run_says_it_took(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Of an update of two batches, resumed, with a first wait for data that is long: the time of an
    update is that of those made since the first, and no rate counts another process's."""
    args = tiny_run(tmp_path / "run", "--schedule", "auto", "--log-interval", "4")
    assert main([*args, "--max-updates", "2"]) == 0
    capfd.readouterr()
    original = Run.updates_of

    def late(self: Run, epoch: int) -> Any:
        self.waited += 100.0
        self.began -= 100.0
        yield from original(self, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "updates_of", late)
        more = ("--max-updates", "4", "--resume", str(tmp_path / "run"))
        assert main([*args, *more]) == 0
    said = capfd.readouterr().err
    line = next(x for x in said.splitlines() if x.startswith("plan: measured"))
    assert 0 < float(line.split()[2]) < 50, line
    first = next(x for x in said.splitlines() if x.startswith("the first update took"))
    assert float(first.split()[4]) >= 100, first
    rows = [r for r in read_rows(tmp_path / "run" / "metrics.csv") if "images_per_s" in r]
    assert rows[-1]["images_per_s"] < 2 * 48 / 100


def test_a_plan_is_of_the_whole_update(tmp_path: Path) -> None:
    cfg = train.parse_config([*tiny_run(tmp_path / "run"), "--batch-size", "8"])
    model, _ = network.build_model(cfg.architecture, 10)
    optimizer = optim.build_optimizer(cfg.optimizer, model, 1e-3)
    world = World(0, 1, torch.device("cpu"))
    objective = build_objective(cfg.objective)
    made = make_plan(cfg, world, model, objective, optimizer, 10, Batching(8, 4, ranks=1))
    assert made is not None
    assert (made.micro_batch, made.micro_batches) == (8, 4)
    assert made.lines()[0].endswith("an update of 32 images")
