"""An evaluation during training that a signal ends, and how the continued run makes it again."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import first_is_quick
from support.processes import on_two_ranks
from support.runs import tiny_run
from support.states import differences, last_state, trained_state
from torch import Tensor, nn

from fastgn import attacks, train
from fastgn.data.datasets import Arrays
from fastgn.data.subset import Subset
from fastgn.distributed import session
from fastgn.interrupt import STOPPED
from fastgn.metrics import read_rows
from fastgn.run import Run
from fastgn.validation import count_correct

LONG = ("--batch-size", "96", "--epochs", "2", "--eval-images", "240")
"""Arguments of a run of 28 updates with two evaluations. Each evaluation has three batches without
an attack and three batches under PGD-10."""
UPDATES_PER_EPOCH = 14
SPEED = ("seconds", "images_per_s", "data_wait_share")
"""Columns of metrics.csv that differ from run to run."""


class Signalling:
    """Stands for attacks.count_correct. A signal arrives during one of its calls."""

    def __init__(self, at: int):
        """at: number of the call, from 1. 0 means that no signal arrives."""
        self.at, self.calls, self.original = at, 0, attacks.count_correct

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(signal.SIGTERM)
        return self.original(*args, **options)


def rows_without_speed(folder: Path) -> list[dict[str, float]]:
    rows = read_rows(folder / "metrics.csv")
    return [{k: v for k, v in row.items() if k not in SPEED} for row in rows]


def everything_trained(folder: Path) -> dict[str, Any]:
    state = last_state(folder)
    judged = {k: state[k] for k in ("best", "accuracy", "evaluation_pending")}
    return trained_state(folder) | judged | {"rows": rows_without_speed(folder)}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        counting = Signalling(0)
        patch.setattr(attacks, "count_correct", counting)
        assert train.main(tiny_run(folder, *LONG)) == 0
    assert counting.calls == 12
    return folder


@pytest.mark.parametrize("at", first_is_quick([4, 1, 3, 5, 7, 8, 11]))
def test_a_signal_ends_an_evaluation_after_its_batch_and_it_is_made_again(
    at: int,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, update = tmp_path / "run", UPDATES_PER_EPOCH * (1 if at <= 6 else 2)
    with monkeypatch.context() as patch:
        signalling = Signalling(at)
        patch.setattr(attacks, "count_correct", signalling)
        assert train.main(tiny_run(folder, *LONG)) == STOPPED
    assert signalling.calls == at
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped at update {update}, before its evaluation; continue with --resume {folder}"
    )
    state = last_state(folder)
    assert state["update"] == update and state["evaluation_pending"]
    assert (state["accuracy"] == {}) == (at <= 6)
    assert not (folder / "summary.json").exists()
    assert train.main(tiny_run(folder, *LONG, "--resume", "auto")) == 0
    assert differences(everything_trained(folder), everything_trained(unbroken)) == []
    assert (folder / "summary.json").is_file()


@pytest.mark.parametrize(("at", "status"), first_is_quick([(6, STOPPED), (12, 0)]))
def test_a_signal_in_the_last_batch_leaves_the_evaluation_complete(
    at: int, status: int, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose last evaluation is complete is finished at once."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(attacks, "count_correct", Signalling(at))
        assert train.main(tiny_run(folder, *LONG)) == status
    state = last_state(folder)
    assert not state["evaluation_pending"] and state["accuracy"]
    if status == STOPPED:
        assert state["update"] == UPDATES_PER_EPOCH
        assert train.main(tiny_run(folder, *LONG, "--resume", "auto")) == 0
    assert differences(everything_trained(folder), everything_trained(unbroken)) == []


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 2])
def test_no_batch_is_evaluated_after_a_signal_that_came_during_the_update(
    epoch: int, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = tmp_path / "run", Run.log

    def signalled(run: Run, *args: float) -> None:
        if run.update == epoch * UPDATES_PER_EPOCH:
            signal.raise_signal(signal.SIGTERM)
        log(run, *args)

    with monkeypatch.context() as patch:
        counting = Signalling(0)
        patch.setattr(attacks, "count_correct", counting)
        patch.setattr(Run, "log", signalled)
        assert train.main(tiny_run(folder, *LONG)) == STOPPED
    assert counting.calls == 6 * (epoch - 1)
    assert train.main(tiny_run(folder, *LONG, "--resume", "auto")) == 0
    assert differences(everything_trained(folder), everything_trained(unbroken)) == []


@pytest.mark.slow
def test_an_evaluation_may_be_ended_again_and_again(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    for at in (9, 2, 5):
        with monkeypatch.context() as patch:
            patch.setattr(attacks, "count_correct", Signalling(at))
            assert train.main(tiny_run(folder, *LONG, "--resume", "auto")) == STOPPED
        assert last_state(folder)["update"] == 2 * UPDATES_PER_EPOCH
    assert train.main(tiny_run(folder, *LONG, "--resume", "auto")) == 0
    assert differences(everything_trained(folder), everything_trained(unbroken)) == []


def test_a_pending_evaluation_is_dropped_if_the_run_no_longer_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(attacks, "count_correct", Signalling(1))
        assert train.main(tiny_run(folder, "--max-updates", "2")) == STOPPED
    assert train.main(["--resume", str(folder), "--eval-images", "0"]) == 0
    assert (folder / "summary.json").is_file()


def five_images(rank: int) -> Subset:
    """Returns five black and white images in batches of two. Rank 0 has three, rank 1 has two."""
    images = torch.tensor([0, 255, 255, 0, 255], dtype=torch.uint8)
    split = Arrays(images[:, None, None, None].expand(5, 3, 8, 8), torch.tensor([0, 1, 0, 1, 1]))
    return Subset(
        split,
        None,
        img_size=8,
        crop_pct=1.0,
        batch_size=2,
        workers=0,
        device=torch.device("cpu"),
        rank=rank,
        ranks=2,
    )


class Brightness(nn.Module):
    """Classifies white images as 1 and black ones as 0, and notes how many it has seen at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self.seen.append(len(x_BCHW))
        mean_B = x_BCHW.mean((1, 2, 3))
        return torch.stack([1 - mean_B, mean_B], 1)


def count_on_a_rank(signalled: list[tuple[int, int]], lacking: list[int]) -> int:
    """Counts twice over five images, and prints what was counted.

    signalled: the (rank, number of batches) after which a signal is there. lacking: ranks whose
    device has memory for one image at once.
    """
    rank = int(os.environ["RANK"])
    model, subset = Brightness(), five_images(rank)

    def lack(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if rank in lacking and len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("out of memory")

    def is_signalled() -> bool:
        return any(r == rank and len(model.seen) >= number for r, number in signalled)

    model.register_forward_pre_hook(lack)
    with session("cpu") as world:
        counts = count_correct(model, subset, [None, None], 0, world, is_signalled)
    found = None if counts is None else counts.tolist()
    print(f"counted {found}, batch size {subset.batch_size}, seen {model.seen}")
    return 0


def said_by_two(folder: Path, *args: Any) -> list[str]:
    texts = on_two_ranks(folder, count_on_a_rank, *args)
    return [text.partition("counted ")[2].strip() for text in texts]


def test_ranks_with_unequal_numbers_of_batches_count_all_images(tmp_path: Path) -> None:
    assert said_by_two(tmp_path, [], []) == [
        "[2, 2], batch size 2, seen [2, 1, 2, 1]",
        "[1, 1], batch size 2, seen [2, 2]",
    ]


def test_a_signal_on_one_rank_ends_the_evaluation_on_both(tmp_path: Path) -> None:
    """Rank 0 is signalled in its third batch, and rank 1 has had its second one by then."""
    assert said_by_two(tmp_path, [(0, 3)], []) == [
        "None, batch size 2, seen [2, 1, 2]",
        "None, batch size 2, seen [2, 2]",
    ]


def test_a_rank_without_memory_makes_both_begin_again_with_smaller_batches(tmp_path: Path) -> None:
    assert said_by_two(tmp_path, [], [1]) == [
        "[2, 2], batch size 1, seen [2, 1, 1, 1, 1, 1, 1]",
        "[1, 1], batch size 1, seen [1, 1, 1, 1]",
    ]
