"""A bad image is replaced by the next one, counted and named, or stops the run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loaders import CPU
from support.processes import on_two_ranks
from support.runs import TINY_SWIN
from support.sources import CLASSES, batches, dataset_at, tree, write_lists
from support.states import differences, read_state

from fastgn import train
from fastgn.data.batch import draw_epoch_order
from fastgn.data.datasets import BadImageError, Dataset, Files
from fastgn.data.images import SKIPPED_IN_A_ROW, load_or_next
from fastgn.data.subset import Subset
from fastgn.data.torch import map_in_workers
from fastgn.errors import UserError
from fastgn.metrics import read_rows


def spoil(root: Path) -> dict[int, str]:
    """Makes four of the 18 training images bad: truncated, empty, text, and gone once listed; a
    function of the images alone. Returns index -> name."""
    names = {4: "ant/pic.4.jpg", 5: "ant/pic.5.jpg", 11: "bee/pic.5.jpg", 17: "cat/pic.5.jpg"}
    paths = {i: root / "train" / name for i, name in names.items()}
    paths[4].write_bytes(paths[4].read_bytes()[:300])
    paths[5].write_bytes(b"")
    paths[11].write_text("text")
    return {i: str(path) for i, path in paths.items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_replaced_by_the_next(workers, tmp_path):
    """The same in every run, with that one's label, and each named as often as it was met."""
    root = tree(tmp_path / "images")
    names, dataset = spoil(root), dataset_at(root)
    Path(names[17]).unlink()  # while training
    keys = {"on_bad_image": "skip", "workers": workers}
    whole, bad = batches(dataset, **keys)
    order = draw_epoch_order(18, 0, 1)[:16].tolist()
    met = {names[i] for i in order if i in names}
    met |= {names[5]} if 4 in order else set()  # whose replacement is bad as well
    assert {line.partition(" cannot")[0] for line in bad} == met
    part, _ = batches(dataset, first=2, **keys)
    assert differences(whole[2:], part) == []
    # as if the next images had stood there
    stand_in = {4: 6, 5: 6, 11: 12, 17: 0}
    plain = dataset_at(tree(tmp_path / "plain"))
    assert isinstance(plain.train, Files)
    where = [stand_in.get(i, i) for i in range(18)]
    mended = Files([plain.train.paths[i] for i in where], plain.train.labels_N[where])
    expected, _ = batches(Dataset("mended", mended, plain.val, CLASSES))
    assert differences(expected, whole) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_a_run_unless_it_is_to_be_replaced(workers, tmp_path):
    root = tree(tmp_path / "images")
    names, dataset = spoil(root), dataset_at(root)
    for path in names.values():
        Path(path).unlink(missing_ok=True)
    with pytest.raises(UserError) as caught:
        batches(dataset, workers=workers)
    assert str(caught.value).partition(" cannot be read as an image: No such")[0] in names.values()


def test_a_folder_that_is_gone_is_no_accident():
    def load(index: int) -> int:
        tried.append(index)
        raise BadImageError(f"{index} is bad")

    for total in (7, 1000):
        tried: list[int] = []
        with pytest.raises(BadImageError, match="images in a row are bad, the last one: "):
            load_or_next(load, 5, total, skip=True)
        assert len(tried) == min(total, SKIPPED_IN_A_ROW) and tried[-1] == (4 + len(tried)) % total


def test_a_subset_replaces_and_counts(tmp_path):
    root = tree(tmp_path / "images")
    (root / "val" / "bee" / "pic.0.jpg").write_bytes(b"")
    split = dataset_at(root).val
    options: dict[str, Any] = {"img_size": 8, "crop_pct": 1.0, "batch_size": 4, "workers": 0}
    with pytest.raises(UserError, match="it is empty"):
        list(Subset(split, None, device=CPU, **options))
    subset = Subset(split, None, device=CPU, skip=True, **options)
    images, labels = (torch.cat(parts) for parts in zip(*subset, strict=True))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2] and torch.equal(images[2], images[3])
    assert len(subset.bad_images) == 1 and "bee/pic.0.jpg" in subset.bad_images[0]


def die(index: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return index


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match=r"^DataLoader worker \(pid.*, lower --workers$") as caught:
        list(map_in_workers(die, range(3), 1, 60.0))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_whose_worker_dies_ends_with_a_line(source, tmp_path):
    """Wherever it is; and the other worker, which ignores signals, ends as well."""
    data = write_lists(tmp_path / "data", source, str)
    (data / "train.txt").write_text(200 * (data / "train.txt").read_text())  # one epoch will do
    args = run_args(data, tmp_path / "run", "--workers", "2", "--lr", "1e-4")
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, "-m", "fastgn.train", *args], stderr=file)
    try:
        wait_until(lambda: "update 6/" in log.read_text())
        listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = listing.read_text().split()
        os.kill(int(workers[0]), signal.SIGKILL)
        assert process.wait(400) == 2
    finally:
        process.kill()
    said = log.read_text()
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("fastgn.train: error: DataLoader worker (pid")
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def wait_until(there: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


def run_args(data: Path, output: Path, *more: str) -> list[str]:
    tiny = TINY_SWIN[: TINY_SWIN.index("--data")]
    fixed = ("--data-dir", str(data), "--workers", "0", "--batch-size", "4", "--epochs", "2")
    fixed += ("--warmup-epochs", "0", "--output", str(output), "--log-interval", "3")
    return [*tiny, *fixed, *more]


def test_a_run_counts_and_names_what_it_replaces(tmp_path, capsys):
    """Unbroken, and stopped between two rows and resumed: the same counts."""
    root = tree(tmp_path / "images")
    names = spoil(root)
    Path(names[17]).write_bytes(b"")
    (root / "val" / "ant" / "pic.0.jpg").write_bytes(b"")
    runs = tmp_path / "whole", tmp_path / "broken"
    assert train.main(run_args(root, runs[0], "--on-bad-image", "skip")) == 0
    said = capsys.readouterr().err
    skip = ("--on-bad-image", "skip", "--checkpoint-interval", "1", "--checkpoint-hist", "9")
    assert train.main(run_args(root, runs[1], *skip, "--max-updates", "2")) == 0
    assert len(read_state(runs[1] / "checkpoints" / "update_00000001.pt")["bad_images"]) > 0
    assert train.main(["--resume", str(runs[1] / "checkpoints" / "update_00000001.pt")]) == 0
    assert train.main(["--resume", str(runs[1]), "--max-updates", "8"]) == 0

    rows = [
        [(r["update"], r.get("bad_images")) for r in read_rows(run / "metrics.csv") if "loss" in r]
        for run in runs
    ]
    assert [u for u, _ in rows[0]] == [3, 4, 6, 8]
    counts = dict(rows[0])
    assert sum(n or 0 for n in counts.values()) >= 6
    assert {u: n for u, n in rows[1] if u in (6, 8)} == {u: counts[u] for u in (6, 8)}
    named = [said.count(f"{name} cannot be read as an image") for name in names.values()]
    assert sorted(named) == [0, 1, 1, 1] and "; 1 more, see fastgn.data.check\n" in said
    assert said.count("bad validation images, replaced ") == 1


@pytest.mark.slow
def test_two_ranks_count_together(tmp_path):
    """Each meets its own half of the bad images; the row and the line have all of them."""
    root = tree(tmp_path / "images")
    names = spoil(root)
    Path(names[17]).write_bytes(b"")
    more = ("--on-bad-image", "skip", "--epochs", "1", "--eval-images", "0")
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main(run_args(root, one, *more, "--batch-size", "8")) == 0
    args = run_args(root, two, *more, "--log-interval", "3", "--checkpoint-interval", "1")
    said = on_two_ranks(tmp_path, train.main, args)
    counts = [[r["bad_images"] for r in read_rows(run / "metrics.csv")] for run in (one, two)]
    assert counts[0] == counts[1] and sum(counts[0]) >= 4
    assert "bad training images, replaced" in said[0] and "bad training" not in said[1]
    assert said[0].count("cannot be read as an image") == 3
