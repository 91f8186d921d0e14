"""Two processes on gloo do what one does at the same global batch."""

import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import TORCHRUN, free_port, on_two_ranks, start_two
from support.runs import TINY_SWIN, tiny_run
from support.states import differences, read_state
from torch import Tensor, nn

from fastgn import attacks, checkpoint, distributed, errors, evaluate, setup, train
from fastgn.checkpoint import find_checkpoint
from fastgn.config.cli import parse_config
from fastgn.errors import UserError
from fastgn.metrics import read_rows
from fastgn.models import network
from fastgn.objectives import build_objective
from fastgn.setup import build
from fastgn.step.gradients import OneRank
from fastgn.step.options import Quirks, StepOptions
from fastgn.step.retry import RetryingStep
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step

OLD_CARDS = "install PyTorch 2.11 to 2.14 for CUDA 12.6 (pip install --force-reinstall --index-url "


@pytest.mark.parametrize(
    ("capability", "builds", "remedy"),
    [
        ((7, 0), "sm_75 sm_80 sm_90 compute_120", OLD_CARDS),
        ((6, 0), "sm_70 sm_75", OLD_CARDS),
        ((3, 7), "sm_75 sm_80", "use another GPU"),
        ((12, 0), "sm_80 sm_90a", "install a newer PyTorch"),
        ((8, 0), "sm_75 sm_86", "install a newer PyTorch"),
        ((7, 0), "sm_50 sm_60 sm_70 sm_75", None),
        ((8, 9), "sm_75 sm_80", None),
        ((12, 1), "sm_90 compute_120", None),
        ((9, 0), "gfx90a gfx942", None),
        ((7, 0), "", None),
    ],
)
def test_a_gpu_that_pytorch_has_no_code_for_is_one_line(
    capability: tuple[int, int], builds: str, remedy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_name": "Some GPU",
        "get_device_capability": capability,
        "get_arch_list": builds.split(),
        "set_device": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    if remedy is None:
        with distributed.session() as world:
            assert world.device == torch.device("cuda", 0)
        return
    with pytest.raises(UserError) as error, distributed.session():
        pass
    line = str(error.value)
    assert "Some GPU has compute capability {}.{}".format(*capability) in line
    assert remedy in line and "\n" not in line


def one_update(rank: int, ranks: int, case: dict[str, Any]) -> dict[str, Any]:
    """Gradients and losses of one update on a rank's share of a fixed global batch of 16 images,
    and the collectives that it took."""
    flags = ["--method", case["method"], "--clip-grad", "1"]
    cfg = parse_config([*TINY_SWIN, *flags, "--attack-select", "best"])
    torch.manual_seed(0)
    model, _ = network.build_model(cfg.architecture, 10, case.get("kernels", "reference"))
    model.to(case["dtype"])
    if case.get("compile"):
        for name in ("layer_norm", "window_attention"):  # stay ops in the graph, as on CUDA
            importlib.import_module(f"fastgn_kernels.{name}").is_compiling = lambda: False  # type: ignore
        # the traced graph is what counts here; Inductor's code takes a minute
        torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore
    # each rank's start is its own by design: without it, the attack is a function of the images
    attacks.draw_random_start = lambda images_BCHW, eps: images_BCHW  # type: ignore
    step = Step(
        model,
        build_objective(cfg.objective),
        StepOptions(
            schedule=Schedule(case.get("schedule", "exact")),
            compile=case.get("compile", False),
            quirks=Quirks(
                accumulation=case.get("accumulation", "mean"),
                attack_weight_grads=case.get("attack_weight_grads", False),
            ),
        ),
        ranks=case["world"],
    )
    compute = RetryingStep(step, report=lambda line: None)
    counts = {"all_reduce": 0}
    if ranks > 1:
        all_reduce = torch.distributed.all_reduce

        def counting_all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            counts["all_reduce"] += tensor.numel() > 1  # one number is an agreement of the hosts
            return all_reduce(tensor, *args, **kwargs)

        torch.distributed.all_reduce = counting_all_reduce
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(16, 3, 16, 16, generator=draw).to(case["dtype"])
    targets = torch.rand(16, 10, generator=draw).softmax(1).to(case["dtype"])
    # a micro-batch is one contiguous piece over all ranks, as the loaders cut it
    batches = [
        (images[start:][: 8 // ranks], targets[start:][: 8 // ranks])
        for start in (8 // ranks * rank, 8 + 8 // ranks * rank)
    ]
    if case.get("runs_out"):  # on the second rank alone, in its second micro-batch
        limit, seen = 2, []

        def run_out(module: nn.Module, inputs: tuple[Tensor]) -> None:
            seen.append(len(inputs[0]))
            if rank == 1 and seen[-1] > limit and len(seen) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        model.backbone.register_forward_pre_hook(run_out)  # type: ignore[operator]
    loss = compute(batches, torch.ones((), dtype=case["dtype"]))
    for _ in range(case.get("more_updates", 0)):
        model.zero_grad()
        loss = compute(batches, torch.ones((), dtype=case["dtype"]))
    return {
        "micro_batch": step.micro_batch,
        "losses": torch.stack([loss.total, loss.ce, loss.penalty]),
        "grads": {n: p.grad for n, p in model.named_parameters()},
        "counts": counts,
        "weights": sum(1 for _ in model.parameters()),
    }


def updates_on_a_rank(cases: list[dict[str, Any]], folder: str) -> int:
    originals = (torch.compile, attacks.draw_random_start, torch.distributed.all_reduce)
    with distributed.session("cpu") as world:
        for index, case in enumerate(cases):
            result = one_update(world.rank, 2, {**case, "world": world})
            torch.compile, attacks.draw_random_start, torch.distributed.all_reduce = originals
            torch.save(result, Path(folder) / f"{index}_{world.rank}.pt")
    return 0


CASES: dict[str, dict[str, Any]] = {
    "natural": {"method": "natural", "dtype": torch.float64},
    "gradnorm": {"method": "gradnorm", "dtype": torch.float64},
    "gradnorm_fp32": {"method": "gradnorm", "dtype": torch.float32},
    "gradnorm_sum": {"method": "gradnorm", "dtype": torch.float64, "accumulation": "sum"},
    "gradnorm_compiled": {"method": "gradnorm", "dtype": torch.float32, "compile": True},
    "gradnorm_kernels": {"method": "gradnorm", "dtype": torch.float64, "kernels": "triton"},
    "gradnorm_kernels_compiled": {
        **{"method": "gradnorm", "dtype": torch.float32, "compile": True, "kernels": "triton"},
    },
    "gradnorm_out_of_memory": {
        **{"method": "gradnorm", "dtype": torch.float64, "runs_out": True},
    },
    "pgd_at_out_of_memory": {
        **{"method": "pgd_at", "dtype": torch.float64, "runs_out": True, "more_updates": 2},
    },
    "finite_difference": {
        **{"method": "gradnorm", "dtype": torch.float64, "schedule": "finite-difference"},
    },
    "lazy": {"method": "gradnorm", "dtype": torch.float64, "schedule": "lazy"},
    "pgd_at": {"method": "pgd_at", "dtype": torch.float64},
    "pgd_at_paper": {"method": "pgd_at", "dtype": torch.float64, "attack_weight_grads": True},
    "pgd_at_paper_out_of_memory": {
        **{"method": "pgd_at", "dtype": torch.float64, "attack_weight_grads": True},
        "runs_out": True,
    },
}


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Case -> results of rank 0 and rank 1."""
    folder = tmp_path_factory.mktemp("updates")
    on_two_ranks(folder, updates_on_a_rank, list(CASES.values()), str(folder))
    return {
        name: [torch.load(folder / f"{i}_{rank}.pt") for rank in range(2)]
        for i, name in enumerate(CASES)
    }


@pytest.fixture
def restored_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes one_update's replacements in this process."""
    monkeypatch.setattr(attacks, "draw_random_start", attacks.draw_random_start)
    monkeypatch.setattr(torch, "compile", torch.compile)


def relative_error(mine: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    def flat(grads: dict[str, Tensor]) -> Tensor:
        return torch.cat([g.double().flatten() for g in grads.values()])

    return float((flat(mine) - flat(wanted)).norm() / flat(wanted).norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(
    name: str, updates: dict[str, list[dict[str, Any]]], restored_functions: None
) -> None:
    case = CASES[name]
    first, second = updates[name]
    # eager and PyTorch's in this process whatever the case: the compiled step and the kernels have
    # to agree with it as well
    plain = {"compile": False, "kernels": "reference", "runs_out": False, "more_updates": 0}
    plain["world"] = OneRank()
    alone = one_update(0, 1, {**case, **plain})
    bound = 1e-6 if case["dtype"] == torch.float32 else 1e-13
    assert relative_error(first["grads"], alone["grads"]) < bound
    assert differences(first["grads"], second["grads"]) == []
    mean = (first["losses"] + second["losses"]) / 2
    if "schedule" in case:
        bound *= 100  # a difference of two cross-entropies, over 0.01
    torch.testing.assert_close(mean, alone["losses"], rtol=bound, atol=0)
    assert differences(first["losses"], second["losses"])  # each saw its own images


@pytest.mark.slow
def test_the_penalty_reaches_the_gradients(updates: dict[str, list[dict[str, Any]]]) -> None:
    """Else gradnorm's cases above would show no more than natural's."""
    natural, gradnorm = updates["natural"][0], updates["gradnorm"][0]
    scaled = {n: 0.8 * g for n, g in natural["grads"].items()}
    assert relative_error(gradnorm["grads"], scaled) > 1e-3
    summed = {n: 2 * g for n, g in gradnorm["grads"].items()}
    assert relative_error(updates["gradnorm_sum"][0]["grads"], summed) < 1e-13
    assert relative_error(updates["pgd_at"][0]["grads"], natural["grads"]) > 1e-3


def test_an_update_sums_its_gradients_once(updates: dict[str, list[dict[str, Any]]]) -> None:
    """One all-reduce for all weights of these small networks. Two micro-batches and three steps of
    an attack add none, and neither does an update that had to be repeated."""
    for name, results in updates.items():
        case = CASES[name]
        if case.get("runs_out") and case.get("attack_weight_grads"):
            continue  # its attack has run in part before memory ran out
        for result in results:
            wasted = 2 * 3 * result["weights"] if case.get("attack_weight_grads", False) else 0
            wanted = (1 + case.get("more_updates", 0)) + wasted
            assert result["counts"] == {"all_reduce": wanted}, name


def test_ranks_halve_together(updates: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("gradnorm_out_of_memory", "pgd_at_out_of_memory", "pgd_at_paper_out_of_memory"):
        assert [result["micro_batch"] for result in updates[name]] == [2, 2], name


def train_on_a_rank(args: list[str]) -> int:
    if os.environ["RANK"] != "0":

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("only the first rank writes")

        checkpoint.atomic_open = refuse  # type: ignore[assignment]
        setup.Metrics = refuse  # type: ignore[misc,assignment]
    return train.main(args)


RUN = (
    *("--max-updates", "12", "--checkpoint-interval", "5", "--log-interval", "3"),
    *("--lr", "0.01", "--model-ema-decay", "0.5"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """The same run on one rank and on two, and what the two said."""
    folder = tmp_path_factory.mktemp("runs")
    one, two = folder / "one", folder / "two"
    assert train.main(tiny_run(one, *RUN)) == 0
    said = on_two_ranks(folder, train_on_a_rank, tiny_run(two, *RUN, "--batch-size", "24"))
    return one, two, said


def test_two_ranks_train_the_run_of_one(runs: tuple[Path, Path, list[str]]) -> None:
    one, two, _ = runs
    mine, theirs = (read_state(find_checkpoint(f))["model"] for f in (two, one))
    moved = relative_error(theirs, read_state(one / "checkpoints" / "update_00000010.pt")["model"])
    assert moved > 1e-2
    # gradients differ by their rounding, 1e-7, which Adam's division amplifies where they are
    # nearly 0: 4e-6 measured after these 12 updates
    assert relative_error(mine, theirs) < 1e-5
    exported = [load_file(f / "model.safetensors") for f in (two, one)]
    assert relative_error(*exported) < 1e-5
    rows, wanted = read_rows(two / "metrics.csv"), read_rows(one / "metrics.csv")
    assert [r["update"] for r in rows] == [r["update"] for r in wanted] == [3, 6, 9, 12]
    for row, want in zip(rows, wanted, strict=True):
        for key in ("epoch", "lr", "ramp", "clean_accuracy"):
            assert row.get(key) == want.get(key)
        for key in ("loss", "ce", "penalty", "grad_l1", "grad_norm"):
            assert row.get(key, 0.0) == pytest.approx(want.get(key, 0.0), rel=1e-4)


def test_only_the_first_rank_writes(runs: tuple[Path, Path, list[str]]) -> None:
    _, two, said = runs
    assert "1 x 24 images" not in said[0]
    assert "48" not in said[1] and said[1].count("update") == 0, said[1]
    assert said[0].count("finished:") == 1
    assert len(list((two / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize("more", [("--batch-size", "48"), ()])
def test_one_rank_resumes_what_two_began(
    more: tuple[str, ...], runs: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    """The checkpoint lies between two log rows: it carries the sums of both ranks' losses.

    With the same options, the one rank has two micro-batches in place of two ranks.
    """
    one, two, _ = runs
    folder = tmp_path / "run"
    shutil.copytree(two, folder)
    earlier = folder / "checkpoints" / "update_00000010.pt"
    assert read_state(earlier)["summed"] == 1
    assert train.main(["--resume", str(earlier), *more]) == 0
    weights = [read_state(find_checkpoint(f))["model"] for f in (folder, one)]
    assert relative_error(*weights) < 1e-5
    (row,), (want,) = (
        [r for r in read_rows(f / "metrics.csv") if r["update"] == 12 and "loss" in r]
        for f in (folder, one)
    )
    assert row["loss"] == pytest.approx(want["loss"], rel=1e-4)
    assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_evaluate_counts_the_same_on_two_ranks(
    runs: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    one, _, _ = runs
    names = ["clean", "fgsm", "pgd-3", "apgd-ce"]
    args = ["--checkpoint", str(one), "--attacks", *names, "--eps", "16/255"]
    args += ["--num-images", "51", "--batch-size", "10", "--picture", str(tmp_path / "e.png")]
    args += ["--output"]
    assert evaluate.main([*args, str(tmp_path / "one.json")]) == 0
    (tmp_path / "e.png").unlink()
    said = on_two_ranks(tmp_path, evaluate.main, [*args, str(tmp_path / "two.json")])
    results = [
        json.loads((tmp_path / f"{n}.json").read_text())["models"][0] for n in ("one", "two")
    ]
    for result in results:
        for row in result["results"]:
            row.pop("seconds", None)
    assert results[0] == results[1]
    clean, fgsm, pgd, apgd, worst = (row["accuracy"] for row in results[0]["results"])
    assert 0.1 < worst <= min(apgd, pgd) <= fgsm < clean < 1
    assert said[1] == ""
    assert (tmp_path / "e.png").is_file(), "drawn by the first rank alone, which waits for no other"


def fail_on_the_second_rank(args: list[str], mistake: str) -> int:
    def sleep(seconds: float) -> None:
        assert torch.distributed.is_initialized(), "left the others, whose collectives now fail"
        time.sleep(seconds / 10)

    errors.time = type("Clock", (), {"sleep": sleep})  # type: ignore[assignment]
    if os.environ["RANK"] == "1":

        def mistaken(*args: Any) -> Any:
            raise UserError(mistake)

        setup.load_dataset = mistaken
    return train.main(args)


def test_a_mistake_of_one_rank_is_said(tmp_path: Path) -> None:
    """By that rank, before its leaving breaks the others' collectives."""
    args = tiny_run(tmp_path / "run", "--max-updates", "2")
    ranks = start_two(tmp_path, fail_on_the_second_rank, args, "0815.png cannot be read")
    try:
        ranks[1].join(400)
        assert ranks[1].exitcode == 2
        line = "fastgn.train: error: 0815.png cannot be read\n"
        assert (tmp_path / "log1").read_text() == line
    finally:
        for process in ranks:
            process.kill()


def torchrun(log: Path, *args: str) -> subprocess.Popen:
    """Two ranks of fastgn.train."""
    command = [*TORCHRUN, "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), "-m", "fastgn.train", *args]
    with open(log, "w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)


# a scheduler ends the parent; a terminal's Ctrl-C reaches every process, and torchrun passes it on
@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False])
def test_a_signal_to_torchrun_saves(whole_group: bool, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    endless = ("--epochs", "1000", "--batch-size", "24", "--log-interval", "1")
    process = torchrun(log, *tiny_run(folder, *endless))
    try:
        deadline = time.monotonic() + 400
        while len(read_rows(folder / "metrics.csv")) < 3:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        if whole_group:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        process.wait(400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    last = read_state(find_checkpoint(folder))["update"]
    assert last == read_rows(folder / "metrics.csv")[-1]["update"]
    said = log.read_text()
    assert said.count(f"stopped at update {last}; continue with --resume {folder}") == 1
    assert "fastgn/train.py" not in said  # no traceback of ours


@pytest.mark.slow
def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    args = tiny_run(tmp_path / "run", "--batch-size", "2000")
    assert torchrun(log, *args).wait(400) != 0
    lines = [line for line in log.read_text().splitlines() if "fastgn.train: error:" in line]
    assert len(lines) == 1 and "there are only 1437 training images" in lines[0]
    assert not (tmp_path / "run").exists()


def average_statistics_on_a_rank(args: list[str], folder: str) -> int:
    cfg = parse_config([*args, "--no-model-ema"])
    with distributed.session("cpu") as world:
        run = build(cfg, world)
        run.step(next(run.updates_of(0)), run.ramp)
        buffers = dict(run.model.named_buffers())
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        run.step.sum_over_ranks(run.step.prepare_sums())
        torch.save((own, buffers), Path(folder) / f"buffers{world.rank}.pt")
    return 0


@pytest.mark.slow
def test_statistics_of_batch_norm_are_averaged_after_an_update(tmp_path: Path) -> None:
    """So that every rank evaluates, and the first one saves, the same network."""
    network = ("--model", "preact_resnet18", "--model-kwargs", "width=4", "--img-size", "16")
    args = tiny_run(tmp_path / "run", *network, "--activation", "gelu")
    on_two_ranks(tmp_path, average_statistics_on_a_rank, args, str(tmp_path))
    (own, first), (other, second) = (torch.load(tmp_path / f"buffers{r}.pt") for r in range(2))
    assert differences(first, second) == []
    names = [name for name in first if name.endswith(("running_mean", "running_var"))]
    assert names and any(differences(own[name], other[name]) for name in names)
    for name, value in first.items():
        wanted = (own[name] + other[name]) / 2 if name in names else own[name]
        torch.testing.assert_close(value, wanted)
