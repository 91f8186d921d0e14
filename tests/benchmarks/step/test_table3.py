"""benchmarks/step/table3.py: the paper's Table 3 on this machine, in separate runs."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import pretend_card

from benchmarks.common.arguments import DEVICE, RESULTS
from benchmarks.common.ranks import call_in_ranks
from benchmarks.step import cost, table3
from benchmarks.step.arms import Arm
from benchmarks.step.cost import Measurement
from fastgn import distributed

TINY = (
    *("--table3", "--model", "vit_tiny_patch16_224", "--img-size", "16", "--classes", "5"),
    *("--batch", "4", "--model-kwargs", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=2"),
    *("--compile", "off", "--precision", "fp32", "--rounds", "2"),
)


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    return cost.main.parse([*TINY, "--output", str(tmp_path / "table3_x.json")])


@pytest.mark.parametrize(
    "arm, sizes", [(Arm("gradnorm-paper"), [2, 2]), (table3.FAIR, [4])], ids=lambda x: str(x)[:20]
)
def test_a_process_times_updates(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, arm: Arm, sizes: list[int]
) -> None:
    """The paper's gradnorm takes the images in two halves."""
    seen: list[list[int]] = []
    call = table3.RetryingStep.__call__

    def note(step: Any, batches: Any, *rest: Any) -> None:
        seen.append([len(images) for images, _ in batches])
        call(step, batches, *rest)

    monkeypatch.setattr(table3.RetryingStep, "__call__", note)
    found = table3.time_rank(distributed.World(0, 1, DEVICE), args, arm)
    assert found["seconds"] > 0 and found["micro_batch"] == sizes[0]
    assert seen == [sizes] * (table3.WARM_UP + table3.UPDATES)


def record_of(
    args: argparse.Namespace,
    monkeypatch: pytest.MonkeyPatch,
    seconds: dict[str, float],
    *options: str,
) -> tuple[dict[str, Any], list[tuple[Arm, int]]]:
    """Runs the program with given seconds for each arm, which double in the second run.

    Also returns the arms and numbers of processes that it has measured. A negative number of
    seconds stands for a run that fails.
    """
    calls: list[tuple[Arm, int]] = []

    def call(function: Any, processes: int, args: Any, arm: Arm) -> list[dict[str, float]]:
        runs = sum(other == arm for other, _ in calls)
        calls.append((arm, processes))
        own = seconds.get(arm.name, 5.0) * (1 + runs)
        if own < 0:
            raise RuntimeError("Traceback ...\n  in line 1\nOutOfMemoryError: no memory\n")
        notes = ["half a batch"] if arm.name == "pgd_at" else []
        return [{"seconds": part * own, "micro_batch": 4, "notes": notes} for part in (0.5, 1)]

    monkeypatch.setattr(table3, "call_in_ranks", call)
    monkeypatch.setattr(table3, "explain_unsupported", lambda *_: None)
    assert cost.main([*TINY, *options, "--output", str(args.output)]) == 0
    return json.loads(args.output.read_text()), calls


def test_the_papers_rows_come_first_and_are_eager_in_fp32(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each run, as many processes as torchrun has started measure each row."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    options = ("--precision", "fp32", "fp16", "--compile", "on")
    record, calls = record_of(args, monkeypatch, {}, *options)
    methods = ("natural", "gradnorm", "pgd_at")
    theirs = [*(Arm(f"{method}-paper") for method in methods), table3.FAIR]
    ours = [Arm(m, p, compile=True) for p in ("fp32", "fp16") for m in methods]
    assert calls == [(arm, 2) for arm in theirs + ours] * 2
    assert record["processes"] == 2 and record["complete"] and len(record["rows"]) == 10
    assert all("pgd_at-paper" in row["time_over"] for row in record["rows"])


@pytest.mark.slow
def test_a_row_that_fails_leaves_the_others(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seconds = {"natural-paper": 1.0, "gradnorm-paper": 3.0, "pgd_at-paper": 6.0}
    record, calls = record_of(args, monkeypatch, seconds | {"gradnorm exact": -1.0})
    assert [arm.name for arm, _ in calls].count("gradnorm exact") == 1
    (failed,) = record["not_timed"]
    assert (failed["arm"], failed["failed"]) == ("gradnorm exact", "OutOfMemoryError: no memory")
    rows = {row["arm"]: row for row in record["rows"]}
    gradnorm = rows["gradnorm-paper"]
    # the slowest process counts, and a run in which the machine is half as fast has the same ratios
    ratios = {name: (ratio["mean"], ratio["std"]) for name, ratio in gradnorm["time_over"].items()}
    assert ratios == {"natural": (3, 0), "pgd_at": (0.6, 0), "pgd_at-paper": (0.5, 0)}
    assert gradnorm["meaningless_seconds_a_batch"]["rounds"] == [3, 6]
    assert gradnorm["paper"]["seconds_a_batch"] == 1.848 and rows["pgd_at-paper"]["passes"] == 9
    assert rows["pgd_at, PyTorch's operators"]["time_over"]["natural"]["mean"] == 5
    assert rows["pgd_at"]["time_over"]["natural"]["mean"] == 1
    printed = capsys.readouterr().out
    assert "pgd_at, fp32: half a batch" in printed
    assert "run 2, natural-paper, fp32: 2.000 s a batch" in printed
    assert "mean ± deviation over 2 separate runs of" in printed
    assert "failed: gradnorm exact, fp32: OutOfMemoryError: no memory" in printed


def test_other_processes_of_torchrun_end_at_once(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert table3.run(args) == 0 and not args.output.exists()


def test_a_mistake_of_all_processes_replaces_no_record(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    args.output.write_text("{}")
    monkeypatch.setattr(table3, "ON_GPU", True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cost.main([*TINY, "--output", str(args.output)]) == 2
    assert "torchrun started 2 processes for 1 CUDA devices" in capsys.readouterr().err
    card = pretend_card(monkeypatch, "Tesla V100", (7, 0))
    monkeypatch.setattr(table3, "DEVICE", card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    assert cost.main([*TINY, "--output", str(args.output)]) == 2
    assert "Tesla V100 has compute capability 7.0" in capsys.readouterr().err
    assert args.output.read_text() == "{}"


def test_the_rehearsal_was_made_by_two_processes() -> None:
    record = json.loads((RESULTS / "table3_2_cpu.json").read_text())
    assert record["complete"] and not record["meaningful_times"] and record["processes"] == 2
    assert len(record["rows"]) == 7 and not record["not_timed"]
    assert all(row["meaningless_seconds_a_batch"]["n"] == 3 for row in record["rows"])
    assert [row["micro_batch"] for row in record["rows"]] == [8, 4, 8, 8, 8, 8, 8]
    assert "| s a batch |" not in table3.table(record), "seconds of a CPU mean nothing"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="takes two processes of a CPU")
def test_two_processes(args: argparse.Namespace) -> None:
    ranks = call_in_ranks(table3.time_rank, 2, args, Arm("natural-paper"))
    assert [rank["micro_batch"] for rank in ranks] == [4, 4]
    found = Measurement(Arm("natural"), 0.0)
    args.model = "swim_b"
    table3.measure(args, found, 2)
    assert (found.why_not or "").startswith("fastgn.errors.UserError: --model 'swim_b' is unknown")
    assert not found.rounds
