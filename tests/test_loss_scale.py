"""The scale of the losses in fp16: exact, adaptive on the device, and without a trace of a skipped
update."""

import contextlib
import math
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import first_is_quick
from support.processes import exit_code, on_two_ranks, start_process, start_two
from support.runs import error_line, tiny_run, without
from support.states import differences, last_state, read_state, trained_state
from torch import Tensor, nn

from fastgn import loss_scale as loss_scale_module
from fastgn import optim, train
from fastgn.config.cli import parse_config
from fastgn.loss_scale import (
    FIRST,
    GROWTH_INTERVAL,
    LARGEST,
    SMALLEST,
    LossScale,
    differentiate_images,
    is_state,
)
from fastgn.metrics import read_rows
from fastgn.run import Run
from fastgn.step.step import Step
from fastgn.updating import count_copied_bytes, take_step_unless

CPU = torch.device("cpu")


def loss_scale(value: float = FIRST, finite_updates: int = 0) -> LossScale:
    made = LossScale(CPU)
    made.load(torch.tensor([value, finite_updates]))
    return made


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("scale", [SMALLEST, 1.0, FIRST, LARGEST])
@pytest.mark.parametrize("count", [0, 7, GROWTH_INTERVAL - 1])
def test_the_scale_moves_as_in_grad_scaler(skipped: bool, scale: float, count: int) -> None:
    """PyTorch's own kernel is the reference, within the limits of the scale."""
    ours = loss_scale(scale, count)
    address = ours.scale.data_ptr()
    theirs, growth = torch.tensor(scale), torch.tensor(count, dtype=torch.int32)
    found = torch.tensor(float(skipped))
    torch._amp_update_scale_(theirs, growth, found, 2.0, 0.5, GROWTH_INTERVAL)
    ours.update(torch.tensor(skipped))
    assert float(ours.scale) == min(max(float(theirs), SMALLEST), LARGEST)
    assert int(ours.finite_updates) == int(growth)
    assert ours.scale.data_ptr() == address and is_state(ours.state())


def test_2000_updates_double_the_scale_and_one_overflow_halves_it() -> None:
    scale = loss_scale()
    for _ in range(GROWTH_INTERVAL):
        scale.update(torch.tensor(False))
    assert scale.state().tolist() == [2 * FIRST, 0]
    scale.update(torch.tensor(True))
    assert scale.state().tolist() == [FIRST, 0]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(value: float) -> None:
    """Else only the process with that loss would skip the update."""
    w = torch.ones(3, requires_grad=True)
    total = loss_scale().multiply(w.sum() + value)
    (grad,) = torch.autograd.grad(total, w)
    assert not grad.isfinite().any()
    (grad,) = torch.autograd.grad(loss_scale().multiply(w.sum()), w)
    assert torch.equal(grad, torch.full((3,), FIRST))


@pytest.mark.parametrize("summed", [1, 4])
def test_scaling_changes_no_bit_in_fp32(summed: int) -> None:
    x = torch.rand(4, 1, 2, 2, requires_grad=True)
    w = torch.rand(4, requires_grad=True)
    found = []
    for scale in (None, torch.tensor(2.0**13)):
        score = (x.flatten(1).square() @ w).sum().tanh()
        grad = differentiate_images(score, x, scale, summed=summed, create_graph=True)
        found.append((grad, *torch.autograd.grad(grad.abs().sum(), w)))
    assert differences(*found) == []


def test_scaling_saves_what_fp16_would_lose() -> None:
    x = torch.rand(1, 1, 2, 2, requires_grad=True)
    found = [
        differentiate_images((1e-9 * x.half().float()).sum(), x, scale)
        for scale in (None, torch.tensor(2.0**16))
    ]
    assert float(found[0].abs().max()) == 0.0
    assert found[1].flatten().tolist() == pytest.approx([1e-9] * 4, rel=0.01)


@pytest.mark.parametrize(
    ("state", "fits"),
    [
        (torch.tensor([8192.0, 3.0]), True),
        (torch.tensor([8192.0, 3.0], dtype=torch.float64), False),
        (torch.tensor([8193.0, 3.0]), False),
        (torch.tensor([math.nan, 3.0]), False),
        (torch.tensor([-8192.0, 3.0]), False),
        (torch.tensor([2.0**30, 3.0]), False),
        (torch.tensor([8192.0, 2000.0]), False),
        (torch.tensor([8192.0, 0.5]), False),
        (torch.tensor([8192.0]), False),
        (8192.0, False),
    ],
)
def test_what_a_checkpoint_may_hold(state: Any, fits: bool) -> None:
    assert is_state(state) is fits


# ---------------------------------------------------------------------------- optimizers

OPTIMIZERS = ("adamw", "sgd", "momentum", "lion", "lamb", "adafactor", "nadam", "kron")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_a_skipped_step_changes_nothing(opt: str, fused: bool) -> None:
    cfg = parse_config(["--opt", opt]).optimizer
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    if fused and opt not in ("adamw", "sgd"):
        pytest.skip("PyTorch has no fused version")
    if fused:
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[opt]
        values = {} if opt == "adamw" else {"momentum": 0.9}
        optimizer: torch.optim.Optimizer = kind(model.parameters(), 1e-2, fused=True, **values)
    else:
        optimizer = optim.build_optimizer(cfg, model, 1e-2)

    def step(skipped: bool) -> list[Any]:
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan) if skipped else torch.rand_like(p)
        with torch.compiler.set_stance("force_eager"):
            take_step_unless(optimizer, torch.tensor(skipped))
        states = [optimizer.state[p] for p in model.parameters()]
        tensors = [x for x in torch.utils._pytree.tree_leaves(states) if torch.is_tensor(x)]
        return [x.detach().clone() for x in (*model.parameters(), *tensors)]

    before = step(False)
    after = step(True)
    assert differences(before, after) == []
    moved = step(False)
    assert differences(moved, after) and all(x.isfinite().all() for x in moved)


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("opt", ["adamw", "lamb"])
def test_the_plan_has_room_for_the_copies_of_an_update(opt: str, ema: bool) -> None:
    args = ["--opt", opt, "--model-ema" if ema else "--no-model-ema"]
    model = nn.Linear(4, 3)
    counted = []
    for precision in ("fp16", "fp32"):
        cfg = parse_config([*args, "--precision", precision])
        optimizer = optim.build_optimizer(cfg.optimizer, model, 1e-2)
        counted.append(count_copied_bytes(cfg, model, optimizer))
    weights = 4 * 15
    state = optim.measure_state_bytes(cfg.optimizer, model)
    # the copies are those of an optimizer that is not fused, as on the CPU
    assert counted == [weights + state, 0]
    fused = torch.optim.AdamW(model.parameters(), fused=True)
    cfg = parse_config([*args, "--precision", "fp16"])
    assert count_copied_bytes(cfg, model, fused) == (weights if ema else 0)


# ---------------------------------------------------------------------------- whole runs

START = 2.0**8
"""Scale at the beginning of these runs, with which nothing overflows that is not planted."""
FP16 = ("--precision", "fp16", "--eval-images", "0", "--log-interval", "2", "--epochs", "1")


@contextlib.contextmanager
def plant(updates: Sequence[int], in_images: bool = False) -> Iterator[None]:
    """Makes some updates, counted from 0, overflow in one gradient of the first rank.

    in_images: whether an image of its last micro-batch is infinite instead.
    """
    original = Step._accumulate

    def overflow(self: Step, batches: Any, ramp: Tensor, update: int, attack_ramp: Tensor) -> Any:
        planted = update in updates and os.environ.get("RANK", "0") == "0"
        if planted and in_images:
            *before, (images, targets) = batches
            batches = [*before, (images.index_fill(0, torch.tensor([0]), math.inf), targets)]
        loss = original(self, batches, ramp, update, attack_ramp)
        if planted and not in_images:
            grad = self.weights[0].grad
            assert grad is not None
            grad.flatten()[0] = math.inf
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale_module, "FIRST", START)
        patch.setattr(Step, "_accumulate", overflow)
        yield


def train_with_overflows(
    args: Sequence[str], updates: Sequence[int], stops: Sequence[int], in_images: bool = False
) -> int:
    """Trains with planted overflows. stops: updates after which the run ends and is resumed."""
    folder = args[args.index("--output") + 1]
    for stop in stops:
        with plant(updates, in_images):
            if train.main([*args, "--max-updates", str(stop)]):
                return 2
        args = resumed(folder)
    return 0


def resumed(folder: str | Path) -> list[str]:
    """Returns arguments that continue a run."""
    return ["--resume", str(folder), "--output", str(folder)]


def everything(folder: Path) -> dict[str, Any]:
    """Returns the content of the last checkpoint, apart from the command line and accuracies."""
    state = last_state(folder)
    return {k: v for k, v in state.items() if k not in ("config", "accuracy", "best")}


RESNET = (
    *("--model", "preact_resnet18", "--model-kwargs", "width=4", "--activation", "gelu"),
    *("--data", "digits", "--img-size", "16", "--batch-size", "24", "--warmup-epochs", "0"),
)
"""A network with BatchNorm."""


def test_an_overflow_skips_one_update_and_halves_the_scale(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """And a run that was stopped there goes on to the last bit."""
    runs = {}
    for name, stops in (("unbroken", (6,)), ("broken", (3, 4, 6))):
        runs[name] = tmp_path / name
        args = [*RESNET, *FP16, "--grad-accum-steps", "2", "--output", str(runs[name])]
        assert train_with_overflows(args, (3,), stops) == 0
    state = everything(runs["unbroken"])
    assert differences(state, everything(runs["broken"])) == []
    assert state["loss_scale"].tolist() == [START / 2, 2]
    rows = [r for r in read_rows(runs["unbroken"] / "metrics.csv") if "loss_scale" in r]
    assert [r["skipped_updates"] for r in rows] == [0, 1, 0]
    assert [r["loss_scale"] for r in rows] == [START, START / 2, START / 2]
    assert all(math.isfinite(r["loss"]) and math.isfinite(r["grad_norm"]) for r in rows)
    assert "skipped 1" in capfd.readouterr().err
    steps = {float(s["step"]) for s in state["optimizer"]["state"].values()}
    assert steps == {5.0} and state["update"] == 6


def test_a_skipped_update_changes_neither_weights_nor_statistics(tmp_path: Path) -> None:
    states = []
    args = [*RESNET, *FP16, "--output", str(tmp_path / "run")]
    for stop in (3, 4):
        assert train_with_overflows(args, (3,), (stop,)) == 0
        states.append(trained_state(tmp_path / "run"))
        for group in states[-1]["optimizer"]["param_groups"]:
            del group["lr"]  # it follows its schedule
        args = resumed(tmp_path / "run")
    before, after = states
    assert differences(before, after) == ["/update: 3, 4"]
    assert any("running_mean" in name for name in before["model"])


def kill_after_update(
    args: Sequence[str], updates: Sequence[int], kill_at: int, in_images: bool = False
) -> int:
    """Trains with planted overflows and is killed in the update after a checkpoint."""
    original = Run.save

    def save(self: Run) -> None:
        original(self)
        if self.update == kill_at:
            self.checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    Run.save = save  # type: ignore[method-assign]
    return train_with_overflows(args, updates, (100,), in_images)


WITH_BATCH_NORM = [
    *without(RESNET, "--batch-size"),
    *(*FP16, "--batch-size", "8", "--checkpoint-interval", "1"),
]
ON_TWO_RANKS = {
    "BatchNorm": [*WITH_BATCH_NORM, "--grad-accum-steps", "2", "--clip-grad", "0.1"],
    "sync_bn": [*WITH_BATCH_NORM, "--sync-bn"],
    "overlap": [
        *without(tiny_run(Path(), *FP16, "--checkpoint-interval", "1"), "--output"),
        *("--batch-size", "24", "--compile", "on"),
        *("--grad-sync", "overlap", "--grad-dtype", "bf16"),
    ],
}
"""Options of runs that sum their gradients and statistics in different ways."""


def train_on_a_rank(args: Sequence[str], kill_at: int | None = None) -> int:
    """Trains with an infinite image in update 2. kill_at: update after which the rank is killed."""
    # the sums of a compiled step, without the time to compile it
    torch.compile = lambda function, **_: function  # type: ignore[assignment]
    if kill_at is not None:
        return kill_after_update(args, (2,), kill_at, in_images=True)
    return train_with_overflows(args, (2,), (4,), in_images=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_two_ranks_skip_the_same_update(name: str, tmp_path: Path) -> None:
    """The overflow is in one micro-batch of one rank. Both skip the update, and change nothing. A
    run that is killed there and resumed ends the same."""
    folders = {n: tmp_path / n for n in ("unbroken", "broken")}
    args = {n: [*ON_TWO_RANKS[name], "--output", str(folders[n])] for n in folders}
    on_two_ranks(tmp_path, train_on_a_rank, args["unbroken"])
    ranks = start_two(tmp_path, train_on_a_rank, args["broken"], 3)
    assert [exit_code(process) for process in ranks] == [-signal.SIGKILL] * 2
    paths = sorted((folders["broken"] / "checkpoints").glob("update_*.pt"))
    before, after = (read_state(path) for path in paths)
    for state in (before, after):
        for group in state["optimizer"]["param_groups"]:
            del group["lr"]  # it follows its schedule
    assert (before["update"], after["update"]) == (2, 3)
    for key in ("model", "ema", "optimizer"):
        assert differences(before[key], after[key]) == []
    on_two_ranks(tmp_path, train_on_a_rank, resumed(folders["broken"]))
    state = everything(folders["unbroken"])
    assert differences(state, everything(folders["broken"])) == []
    assert state["loss_scale"].tolist() == [START / 2, 1]
    rows = [r for r in read_rows(folders["unbroken"] / "metrics.csv") if "loss_scale" in r]
    assert sum(r["skipped_updates"] for r in rows) == 1
    assert {float(s["step"]) for s in state["optimizer"]["state"].values()} == {3.0}


def test_a_run_that_is_killed_at_the_overflow_ends_the_same(tmp_path: Path) -> None:
    more = (*FP16, "--checkpoint-interval", "1")
    unbroken, broken = (tiny_run(tmp_path / n, *more) for n in ("unbroken", "broken"))
    assert train_with_overflows(unbroken, (2,), (4,)) == 0
    assert exit_code(start_process(kill_after_update, broken, (2,), 3)) == -signal.SIGKILL
    assert train_with_overflows(resumed(tmp_path / "broken"), (2,), (4,)) == 0
    states = [everything(tmp_path / n) for n in ("unbroken", "broken")]
    assert differences(*states) == []


def test_overflows_from_the_start_wait_for_the_first_good_update(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """The optimizer gets its state in the first update that is not skipped, resumed or not. A run
    that ends before has not trained, which it says."""
    args = [tiny_run(tmp_path / n, *FP16, "--opt", "momentum") for n in ("unbroken", "broken")]
    assert train_with_overflows(args[0], (0, 1, 2), (5,)) == 0
    capfd.readouterr()
    assert train_with_overflows(args[1], (0, 1, 2), (2,)) == 2
    line = error_line(capfd.readouterr().err, "fastgn.train")
    assert "all 2 updates were skipped" in line and "--precision fp32" in line
    assert not (tmp_path / "broken" / "summary.json").exists()
    assert train_with_overflows(resumed(tmp_path / "broken"), (0, 1, 2), (5,)) == 0
    states = [everything(tmp_path / n) for n in ("unbroken", "broken")]
    assert differences(*states) == []
    assert states[0]["loss_scale"].tolist() == [START / 8, 2]


def test_a_run_that_skips_all_updates_ends_with_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    args = tiny_run(tmp_path / "run", *FP16)
    number = int(math.log2(START / SMALLEST))
    for updates, named in ((range(100), number), (range(3, 100), number + 3)):
        with plant(updates):
            assert train.main([*args, "--max-updates", "100"]) == 2
        line = error_line(capfd.readouterr().err, "fastgn.train")
        assert f"gradient of update {named}, even with the smallest loss scale" in line
        assert "--precision fp32" in line
        args = tiny_run(tmp_path / "later", *FP16)


@pytest.mark.parametrize("steps", first_is_quick(["2", "1"]))
def test_the_gradient_is_clipped_without_its_scale(tmp_path: Path, steps: str) -> None:
    """steps: value of --grad-accum-steps."""
    rows = {}
    for precision in ("fp32", "fp16"):
        run = tmp_path / precision
        args = tiny_run(run, "--clip-grad", "0.1", "--max-updates", "4", "--log-interval", "4")
        args += ["--grad-accum-steps", steps]
        assert train.main([*args, "--precision", precision, "--eval-images", "0"]) == 0
        rows[precision] = next(r for r in read_rows(run / "metrics.csv") if "loss" in r)
    for name in ("loss", "ce", "penalty", "grad_l1", "grad_norm"):
        assert rows["fp16"][name] == pytest.approx(rows["fp32"][name], rel=0.05)
    assert "loss_scale" not in rows["fp32"] and "skipped_updates" not in rows["fp32"]


@pytest.mark.slow
def test_precisions_continue_each_other(tmp_path: Path) -> None:
    """The scale begins anew after fp32, and a checkpoint in fp32 holds none."""
    args = tiny_run(tmp_path / "run", "--eval-images", "0")
    expected: list[Any] = [None, [FIRST, 2.0], [FIRST, 3.0], None, [FIRST, 1.0]]
    precisions = ("fp32", "fp16", "fp16-pure", "bf16", "fp16")
    stops = (1, 3, 4, 5, 6)
    for precision, stop, state in zip(precisions, stops, expected, strict=True):
        assert train.main([*args, "--precision", precision, "--max-updates", str(stop)]) == 0
        found = last_state(tmp_path / "run")["loss_scale"]
        assert state == (None if found is None else found.tolist())
        args = resumed(tmp_path / "run")
