"""A run that was interrupted, however, ends as the one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.images import image_folder
from support.marks import first_is_quick
from support.processes import exit_code, start_process
from support.runs import folder_run, tiny_run
from support.states import differences, last_state, read_state, small_state, trained_state

from fastgn import attacks, extras, metrics, setup, train
from fastgn.checkpoint import Checkpoints, find_checkpoint
from fastgn.config import Config
from fastgn.config.cli import parse_config
from fastgn.config.outputs import RUN_FILES, SPOILT
from fastgn.distributed import World
from fastgn.errors import UserError
from fastgn.files import atomic_open
from fastgn.interrupt import STOPPED, Interrupt
from fastgn.metrics import read_rows
from fastgn.run import Run
from fastgn.seeding import Stream, derive_seed
from fastgn.setup import build
from fastgn.trained import load_trained

REGULARISED = (
    *("--drop", "0.1", "--mixup", "0.8", "--cutmix", "1.0", "--smoothing", "0.1"),
    *("--reprob", "0.25"),
)
CLOCK = ("images_per_s", "data_wait_share", "seconds")
"""metrics.csv's columns that two runs of the same thing do not share."""


def timeless_rows(folder: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in row.items() if k not in CLOCK}
        for row in read_rows(folder / "metrics.csv")
    ]


def disturb_generators() -> None:
    """A process that resumes has drawn other random numbers than one that went on."""
    random.random()
    np.random.rand(3)
    torch.manual_seed(int(time.time_ns() % 2**31))


def cifar_npz(path: Path) -> Path:
    """Noise in CIFAR-10's shape, with ten classes."""
    draw = np.random.default_rng(0)
    parts = {}
    for name, count in (("train", 120), ("test", 20)):
        parts[f"{name}_images"] = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        parts[f"{name}_labels"] = np.arange(count) % 10
    np.savez(path, **parts)
    return path


def setting(name: str, folder: Path) -> list[str]:
    """Arguments of a run of ten updates in two epochs, each of two micro-batches, --output
    aside."""
    accumulated = ("--epochs", "2", "--grad-accum-steps", "2", "--eval-images", "0")
    swin = (*accumulated, *REGULARISED, "--batch-size", "140", "--drop-path", "0.2")
    match name:
        case "gradnorm":
            return tiny_run(folder, *swin, "--ramp-epochs", "1.5")
        case "pgd_at":
            return tiny_run(folder, *swin, "--method", "pgd_at", "--attack-select", "best")
        case _:
            data = cifar_npz(folder.with_suffix(".npz"))
            network = ("--model", "preact_resnet18", "--model-kwargs", "width=4")
            return [
                *(*network, "--activation", "gelu", "--data", "cifar10", "--data-dir", str(data)),
                *(*accumulated, *REGULARISED, "--batch-size", "12", "--warmup-epochs", "0"),
                *("--method", name.removesuffix("_batchnorm"), "--output", str(folder)),
            ]


# The first stops after every update, the others run on for some
@pytest.mark.parametrize(
    ("name", "stops"),
    first_is_quick(
        [
            ("gradnorm", range(1, 10)),
            ("pgd_at", (3, 5, 8)),
            ("gradnorm_batchnorm", (1, 3, 5, 8)),
            ("pgd_at_batchnorm", (2, 5, 6)),
            ("pag_batchnorm", (3,)),
            ("gradnorm+fgsm_batchnorm", (3, 6)),
        ]
    ),
)
def test_stopping_and_resuming_changes_no_bit(
    name: str, stops: tuple[int, ...], tmp_path: Path
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert train.main(setting(name, unbroken)) == 0
    assert train.main([*setting(name, broken), "--max-updates", str(stops[0])]) == 0
    for stop in (*stops[1:], 10):
        disturb_generators()
        before = trained_state(broken)
        assert train.main(["--resume", str(broken), "--max-updates", str(stop)]) == 0
        after = trained_state(broken)
        assert after["update"] == stop
        assert differences(before["model"], after["model"])
    assert differences(trained_state(broken), trained_state(unbroken)) == []
    assert trained_state(unbroken)["update"] == 10


def test_the_seed_matters(tmp_path: Path) -> None:
    """Else the test above would pass where nothing is random."""
    for seed in ("0", "1"):
        short = ("--max-updates", "1", "--seed", seed)
        assert train.main([*setting("gradnorm", tmp_path / seed), *short]) == 0
    states = [trained_state(tmp_path / seed)["model"] for seed in ("0", "1")]
    assert differences(*states)


def test_keys_of_different_length_give_different_seeds() -> None:
    keys = [(), (0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]
    seeds = {derive_seed(stream, *key) for stream in Stream for key in keys}
    assert len(seeds) == len(Stream) * len(keys)


LONG = ("--epochs", "3", "--batch-size", "96", "--log-interval", "4", "--checkpoint-interval", "3")
"""42 updates in epochs of 14: neither log rows, checkpoints nor epochs fall together."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "unbroken"
    assert train.main(tiny_run(folder, *LONG)) == 0
    return folder


def assert_same_run(folder: Path, unbroken: Path) -> None:
    """Weights, optimizer, position, best accuracy and every metrics row."""
    keys = ("update", "best", "accuracy", "sums", "summed", "model", "ema", "optimizer")
    mine, theirs = last_state(folder), last_state(unbroken)
    assert differences({k: mine[k] for k in keys}, {k: theirs[k] for k in keys}) == []
    assert (
        differences(
            load_file(folder / "model.safetensors"), load_file(unbroken / "model.safetensors")
        )
        == []
    )
    assert timeless_rows(folder) == timeless_rows(unbroken)
    best, their_best = (read_state(f / "checkpoints" / "best.pt") for f in (folder, unbroken))
    assert differences({k: best[k] for k in keys}, {k: their_best[k] for k in keys}) == []
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow
def test_metrics_hold_each_row_once(unbroken: Path) -> None:
    rows = timeless_rows(unbroken)
    logged = [r["update"] for r in rows if "loss" in r]
    assert logged == sorted({*range(4, 43, 4), 14, 28, 42})
    assert [r["update"] for r in rows if "clean_accuracy" in r] == [14, 28, 42]


def exit_with_main(args: list[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(train.main(args))


@pytest.mark.slow
def test_sigkill_at_random_moments(unbroken: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "killed", tmp_path / "log"
    args = tiny_run(folder, *LONG, "--resume", "auto")
    checkpoints, draw = Checkpoints(folder, 1), random.Random(0)

    killed_at = []
    for kill in range(6):
        process = start_process(exit_with_main, args, str(log))
        first = checkpoints.last()
        deadline = time.monotonic() + 400
        while kill and process.is_alive() and checkpoints.last() == first:  # the first kill: early
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.002)
        process.join(draw.uniform(0, 0.25))
        process.kill()
        process.join()
        if process.exitcode == 0:  # a fast machine was done before the last kills
            break
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        last = checkpoints.last()
        killed_at.append(int(last.stem.split("_")[1]) if last else 0)
    assert exit_code(start_process(exit_with_main, args, str(log))) == 0, log.read_text()
    assert len(set(killed_at)) >= 3, killed_at
    assert_same_run(folder, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_the_last_update(number: int, unbroken: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "stopped", tmp_path / "log"
    args = tiny_run(folder, *LONG)
    args[args.index("--log-interval") + 1] = "1"
    with open(log, "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastgn.train", *args], stderr=stderr, stdout=stderr
        )
        deadline = time.monotonic() + 400
        while len(read_rows(folder / "metrics.csv")) < 5:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(400) == STOPPED, log.read_text()
    last = last_state(folder)["update"]
    assert 5 <= last < 42
    assert last == read_rows(folder / "metrics.csv")[-1]["update"]
    said = log.read_text()
    assert "Traceback" not in said
    assert f"stopped at update {last}; continue with --resume {folder}" in said
    assert not (folder / "model.safetensors").exists()
    assert train.main(["--resume", str(folder)]) == 0
    mine, theirs = trained_state(folder), trained_state(unbroken)
    assert differences(mine, theirs) == []
    accuracies = [  # the losses are means since the last row, and the rows differ
        [
            (r["update"], r["clean_accuracy"], r["pgd10_accuracy"])
            for r in rows
            if "clean_accuracy" in r
        ]
        for rows in map(timeless_rows, (folder, unbroken))
    ]
    assert accuracies[0] == accuracies[1]


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_loaders_workers_working(tmp_path: Path) -> None:
    """A scheduler or a terminal's Ctrl-C signals the workers as well: the update under way still
    gets its images."""
    data = image_folder(tmp_path / "data", images=30)
    folder, log = tmp_path / "stopped", tmp_path / "log"
    more = ("--epochs", "8", "--workers", "2", "--eval-images", "0", "--log-interval", "1")
    more += ("--reprob", "0.25", "--mixup", "0.8")
    with open(log, "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastgn.train", *folder_run(data, folder), *more],
            stderr=stderr,
            stdout=stderr,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 400
            while len(read_rows(folder / "metrics.csv")) < 5:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(400) == STOPPED, log.read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said, last = log.read_text(), last_state(folder)["update"]
    assert "Traceback" not in said and "error" not in said, said
    assert 5 <= last < 120 and last == read_rows(folder / "metrics.csv")[-1]["update"]
    assert said.count(f"stopped at update {last}; continue with --resume {folder}") == 1
    assert not list(folder.rglob("*.tmp"))
    assert train.main(["--resume", str(folder)]) == 0
    unbroken = tmp_path / "unbroken"
    assert train.main([*folder_run(data, unbroken), *more]) == 0
    assert last_state(unbroken)["update"] == 120
    assert differences(trained_state(folder), trained_state(unbroken)) == []


def test_a_later_second_signal_ends_at_once() -> None:
    heard = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # passed on by torchrun
            assert interrupt.signal == signal.SIGTERM and not heard
            interrupt.noted_s -= 2 * extras.REPEAT_S
            signal.raise_signal(signal.SIGTERM)
            assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_resuming_a_finished_run_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "commit", lambda: "0123456789ab")  # work goes on beside the tests
    folder = tmp_path / "run"
    assert train.main(tiny_run(folder, "--max-updates", "4")) == 0

    def contents() -> dict[str, bytes]:
        # tensorboard opens a file of its own for each process
        files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name != "tensorboard"]
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}

    before = contents()
    assert {"model.safetensors", "summary.json", "metrics.csv", "config.toml"} <= before.keys()
    disturb_generators()
    capsys.readouterr()
    assert train.main(["--resume", str(folder)]) == 0
    assert "all updates of this run are done" in capsys.readouterr().err
    assert differences(contents(), before) == []
    assert train.main(tiny_run(folder, "--max-updates", "4", "--resume", "auto")) == 0
    assert differences(contents(), before) == []


def test_another_global_batch_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train.main(tiny_run(folder, "--max-updates", "2")) == 0
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()
    wrong = ["--resume", str(folder), "--max-updates", "4"]
    assert train.main([*wrong, "--batch-size", "24"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    assert "48 images per update, but this run has 24" in said
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    # the same global batch, cut in another way, is the same run
    assert train.main([*wrong, "--batch-size", "24", "--grad-accum-steps", "2"]) == 0


def test_an_output_with_a_run_is_refused(
    unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_run(unbroken)) == 2
    assert f"use --resume {unbroken} to continue this run, or" in capsys.readouterr().err


def test_an_earlier_checkpoint_takes_the_run_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    often = ("--checkpoint-interval", "2", "--checkpoint-hist", "9", "--eval-images", "0")
    assert train.main(tiny_run(folder, *often, "--max-updates", "8", "--log-interval", "1")) == 0
    earlier = folder / "checkpoints" / "update_00000002.pt"
    other = ["--resume", str(earlier), "--lr", "0.03", "--max-updates", "6"]
    assert train.main(other) == 0
    names = [p.name for p in Checkpoints(folder, 9).all()]
    assert names == [f"update_{n:08d}.pt" for n in (2, 4, 6)]
    rows = read_rows(folder / "metrics.csv")
    assert [r["update"] for r in rows] == list(range(1, 7))
    assert rows[1]["lr"] < 0.01 < rows[2]["lr"]
    assert last_state(folder)["update"] == 6


def test_weights_that_are_not_finite_are_neither_kept_nor_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An overflow in the last update is in no loss."""
    apply = Run.apply_gradients

    def overflow(run: Run, lr: float) -> torch.Tensor:
        norm = apply(run, lr)
        next(run.model.parameters()).data[0] = torch.inf
        return norm

    monkeypatch.setattr(Run, "apply_gradients", overflow)
    folder = tmp_path / "run"
    assert train.main(tiny_run(folder, "--max-updates", "1", "--no-model-ema")) == 2
    assert "a weight after update 1 is not finite" in capsys.readouterr().err
    assert not (folder / "model.safetensors").exists() and not Checkpoints(folder, 1).all()


def test_an_end_before_the_checkpoint_leaves_the_run_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train.main(tiny_run(folder, "--max-updates", "2")) == 0
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert train.main(["--resume", str(folder), "--max-updates", "1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nothing is left to do" in said
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), None),
        (("--eval-images", "24"), "--eval-images 48 is now 24"),
        (("--eval-eps", "0.1"), "accuracy at --eval-eps 0.01 is now at --eval-eps 0.1"),
    ],
)
def test_the_best_is_chosen_anew_if_accuracies_cannot_be_compared(
    more: tuple[str, ...],
    said: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    assert train.main(tiny_run(folder, "--max-updates", "1", "--eval-eps", "0.01")) == 0
    path = find_checkpoint(folder)
    state = read_state(path)
    torch.save(state | {"best": 2.0, "ranks": 2}, path)  # better than all that follow
    capsys.readouterr()
    assert train.main(["--resume", str(folder), "--max-updates", "2", *more]) == 0
    shown = capsys.readouterr().err
    assert "ranks: 1, not 2" in shown
    assert (said or "") in shown and ("best.pt is chosen anew" in shown) == (said is not None)
    assert (last_state(folder)["best"] == 2.0) == (said is None)


def images_of(**parts: Any) -> dict[str, Any]:
    return {"training": {"images": 9}, "validation": {"images": 3, "labels": "a", **parts}}


NATURAL = ("--method", "natural")
CHANGES: dict[str, tuple[tuple[str, ...], Any, tuple[str, ...], Any]] = {
    "accuracy at --eval-eps 0.01 is now clean": ((), images_of(), NATURAL, images_of()),
    "accuracy clean is now at --eval-eps 0.01": (NATURAL, images_of(), (), images_of()),
    "the validation images have changed": ((), images_of(sizes="b"), (), images_of(sizes="c")),
    "accuracy at --eval-eps 0.01 is now clean, the validation images have changed": (
        *((), images_of(), NATURAL, images_of() | {"validation": {"images": 4}}),
    ),
    "the validation images have changed, of an older version": ((), None, (), images_of()),
    "": ((), images_of(), (), images_of()),
    "the same in shards": ((), images_of(names="b"), (), images_of(content="c")),
    "other training images": (*((), images_of(), (), images_of() | {"training": {"images": 8}}),),
    "clean, whatever the radius": (
        *((*NATURAL, "--eval-eps", "0.02"), images_of(), NATURAL, images_of()),
    ),
}
"""What is said -> flags and images of the checkpoint, and of the run that goes on from it."""


@pytest.mark.parametrize("said", CHANGES)
def test_what_the_best_is_not_compared_with(said: str) -> None:
    before, its_images, now, images = CHANGES[said]
    eps = ("--eval-eps", "0.01")
    saved = parse_config([*eps, *before])
    state: Any = types.SimpleNamespace(saved_config=lambda: saved, data=its_images)
    run: Any = types.SimpleNamespace(
        subset=(),
        best=0.5,
        is_done=lambda: False,
        cfg=parse_config([*eps, *now]),
        data=images,
    )
    forgotten = said.startswith(("accuracy", "the validation"))
    words = said.removesuffix(", of an older version")
    expected = [f"best.pt is chosen anew from here on, because {words}"] if forgotten else []
    assert setup.forget_best(run, state) == expected
    assert run.best == (-1.0 if forgotten else 0.5)


def test_ranks_that_see_other_images_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written: each rank would take its part of another list."""

    def gather(world: World, items: list[str]) -> list[str]:
        other = json.loads(items[0])
        other["training"]["labels"] = "others"
        return [*items, *items, json.dumps(other)]

    monkeypatch.setattr(World, "gather", gather)
    assert train.main(tiny_run(tmp_path / "run", "--max-updates", "1")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "fastgn.train: error: rank 2 sees other images than rank 0: every machine needs the same "
        "--data-dir"
    )
    assert not (tmp_path / "run").exists()


def test_checkpoint_holds_everything(unbroken: Path) -> None:
    state = last_state(unbroken)
    assert state["update"] == 42 and state["global_batch"] == 96
    assert state["best"] == max(
        r["pgd10_accuracy"] for r in read_rows(unbroken / "metrics.csv") if "pgd10_accuracy" in r
    )
    assert state["accuracy"].keys() == {"clean_accuracy", "pgd10_accuracy"}
    names = set(state["model"])
    assert names == set(state["ema"]) and all(n.startswith("backbone.") for n in names)
    assert any(differences(state["model"][n], state["ema"][n]) for n in names)
    moments = state["optimizer"]["state"].values()
    assert moments and all({"step", "exp_avg", "exp_avg_sq"} <= m.keys() for m in moments)
    assert all(m["step"] == 42 for m in moments)
    assert Config.from_toml(state["config"]).run.checkpoint_interval == 3
    assert state["classes"] == [str(d) for d in range(10)]


def test_the_last_checkpoints_and_the_best_are_kept(unbroken: Path) -> None:
    names = sorted(p.name for p in (unbroken / "checkpoints").iterdir())
    assert names == ["best.pt", "update_00000039.pt", "update_00000042.pt"]
    best = read_state(unbroken / "checkpoints" / "best.pt")
    rows = [r for r in read_rows(unbroken / "metrics.csv") if "pgd10_accuracy" in r]
    reached = {int(r["update"]): round(r["pgd10_accuracy"], 5) for r in rows}
    first_best = next(u for u, a in reached.items() if a == max(reached.values()))
    assert best["update"] == first_best  # its weights are those that were evaluated
    assert not list(unbroken.rglob("*.tmp"))


def test_best_survives_all_later_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for update in range(1, 7):
        checkpoints.save(small_state(update), best=update in (1, 3))
    assert [p.name for p in checkpoints.all()] == ["update_00000005.pt", "update_00000006.pt"]
    assert read_state(tmp_path / "checkpoints" / "best.pt")["update"] == 3
    assert len(list(checkpoints.folder.iterdir())) == 3


def test_what_kills_have_left_goes_at_the_next_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.raises(KeyboardInterrupt), atomic_open(checkpoints.path(1)):
        raise KeyboardInterrupt
    assert list(checkpoints.folder.iterdir()) == []
    folder = tmp_path / "run"
    left = [folder / "checkpoints" / ".update_00000001.pt.12345.tmp"]
    left += [folder / "checkpoints" / ".best.pt.tmp", folder / ".metrics.csv.12345.tmp"]
    others = folder / ".evaluation.json.12345.tmp"  # of a program with a lock of its own
    (folder / "checkpoints").mkdir(parents=True)
    for path in (*left, others):
        path.write_bytes(b"half")
    assert Checkpoints(folder, 1).last() is None
    assert train.main(tiny_run(folder, "--max-updates", "1")) == 0
    assert not any(path.exists() for path in left) and others.exists()


def test_a_checkpoint_leaves_what_another_process_is_writing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.folder.mkdir()
    theirs = checkpoints.folder / ".update_00000001.pt.12345.tmp"
    theirs.write_bytes(b"half")
    written = checkpoints.save(small_state(2))
    assert set(checkpoints.folder.iterdir()) == {written, theirs}


def test_all_files_of_a_run_are_known(unbroken: Path) -> None:
    """Or what a kill has left of one would stay for ever."""
    there = {p.name for p in unbroken.iterdir() if p.is_file()}
    assert there == set(RUN_FILES) - {"wandb_id.txt", SPOILT}


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {os.environ['FASTGN_BOMB']}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_bomb_does_not_go_off(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGN_BOMB", str(tmp_path / "went_off"))
    path = tmp_path / "update_00000001.pt"
    torch.save({"format": 1, "bomb": Bomb()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="update_00000001.pt"):
        read_state(path)
    assert not (tmp_path / "went_off").exists()
    torch.load(path, weights_only=False)  # it would have
    assert (tmp_path / "went_off").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_checkpoint_is_refused(damage: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(small_state(1))
    path = checkpoints.save(small_state(2, model={"weight": torch.arange(4096)}))
    assert read_state(path)["model"]["weight"][-1] == 4095
    content = bytearray(path.read_bytes())
    match damage:
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "flipped":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "empty":
            path.write_bytes(b"")
        case "other":
            torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match="update_00000002.pt") as refusal:
        read_state(path)
    assert "\n" not in str(refusal.value)
    if damage != "other":
        assert "other checkpoints in its folder: update_00000001.pt" in str(refusal.value)


def test_the_export_is_the_averaged_model(unbroken: Path) -> None:
    export, state = unbroken / "model.safetensors", last_state(unbroken)
    average = {k.removeprefix("backbone."): v for k, v in state["ema"].items()}
    assert "patch_embed.proj.weight" in average
    assert differences(dict(sorted(load_file(export).items())), dict(sorted(average.items()))) == []
    with safe_open(str(export), framework="pt") as file:
        assert "embed_dim=8" in file.metadata()["fastgn"]

    from_export = load_trained(str(unbroken), torch.device("cpu"))
    from_checkpoint = load_trained(str(find_checkpoint(unbroken)), torch.device("cpu"))
    assert from_export.cfg.dataset.batch_size == 96
    assert from_export.cfg == from_checkpoint.cfg
    assert from_export.classes == tuple(str(d) for d in range(10))
    assert not from_export.model.training

    args = train.parse_config(["--resume", str(unbroken)])
    with train.session("cpu") as world:
        run = build(args, world)
    assert run.subset is not None and run.ema is not None
    images, labels = next(iter(run.subset))
    wanted = run.ema.module(images)
    assert differences(from_export.model(images), wanted) == []
    assert differences(from_checkpoint.model(images), wanted) == []
    assert differences(run.model.eval()(images), wanted)
    correct = attacks.count_correct(from_export.model, [(images, labels)], device=images.device)
    assert correct / len(labels) == pytest.approx(state["accuracy"]["clean_accuracy"], rel=1e-12)


def test_without_an_average_the_weights_are_exported(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train.main(tiny_run(folder, "--no-model-ema", "--max-updates", "2")) == 0
    state = last_state(folder)
    assert state["ema"] is None
    weights = {k.removeprefix("backbone."): v for k, v in state["model"].items()}
    exported = load_file(folder / "model.safetensors")
    assert differences(dict(sorted(exported.items())), dict(sorted(weights.items()))) == []
    assert train.main(["--resume", str(folder), "--model-ema", "--max-updates", "4"]) == 2
