"""An evaluation that is killed loses nothing, and what it writes first is what took longest."""

import functools
import json
import os
import random
import re
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import exit_code, start_process
from support.runs import tiny_run

from fastgn import evaluate, progress
from fastgn.analysis import outcomes, pictures, selection
from fastgn.analysis.attacker import Attacker
from fastgn.analysis.parts import Parts
from fastgn.data.subset import choose_batch_size
from fastgn.train import main as train_main
from fastgn.trained import load_trained

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KILLS = int(os.environ.get("FASTGN_KILLS", "3"))
"""How often the evaluation is killed."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("evaluate") / "tiny"
    more = ("--epochs", "2", "--method", "natural", "--no-model-ema", "--eval-images", "0")
    assert train_main(tiny_run(folder, *more)) == 0
    return folder


SHORT_REPORT = functools.partial(evaluate.make_sanity_report, square_images=0, apgd_images=2)
"""Without Square, whose 5,000 queries an image take longer than all else together."""


@pytest.fixture(autouse=True)
def fewer_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "make_sanity_report", SHORT_REPORT)


def arguments(run: Path, output: Path, *more: str) -> list[str]:
    args = ["--checkpoint", str(run), "--num-images", "24", "--batch-size", "8", "--eps", "0.02"]
    args += ["--attacks", "clean", "pgd-3", "--statistics", "--sanity", "--analysis-images", "6"]
    return [*args, "--output", str(output), *more]


def results(output: Path) -> list[dict[str, Any]]:
    """The record's models, without the seconds of their attacks."""
    models = json.loads(output.read_text())["models"]
    for model in models:
        for row in model["results"]:
            row.pop("seconds", None)
    return models


def note_parts(args: list[str], log: Path) -> None:
    """Runs an evaluation that notes each part that it has made in a log file."""
    put = Parts.put

    def note(parts: Parts, part: dict[str, Any], *key: object) -> None:
        put(parts, part, *key)
        with open(log, "a") as file:
            file.write(f"{parts.path(*key).name}\n")

    Parts.put = note  # type: ignore[method-assign]
    evaluate.make_sanity_report = SHORT_REPORT  # type: ignore[assignment]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(evaluate.main(args))


@pytest.mark.slow
def test_a_killed_evaluation_makes_every_part_once(run: Path, tmp_path: Path) -> None:
    """By SIGKILL, at random moments of the attacks and of the analyses."""

    def start() -> BaseProcess:
        return start_process(note_parts, arguments(run, output), log)

    output, log = tmp_path / "whole.json", tmp_path / "log"
    began = time.monotonic()
    assert exit_code(start()) == 0
    seconds, whole = time.monotonic() - began, results(output)
    parts = log.read_text().split("\n")
    log.unlink()
    assert len(set(parts)) == len(parts) > 6 + 3 + 10, "attacks, statistics, sanity"

    output, draw, killed = tmp_path / "e.json", random.Random(0), 0
    while killed < KILLS:
        child = start()
        time.sleep(draw.uniform(0.1, 1) * seconds / KILLS)
        child.kill()
        killed += exit_code(child) == -signal.SIGKILL
        assert killed or not output.exists(), "ended before it could be killed"
        if output.exists() and "sanity" in results(output)[0]:
            break
    assert exit_code(start()) == 0
    made = log.read_text().split("\n")
    assert len(set(made)) == len(made) and killed == KILLS
    assert set(made) <= set(parts) and len(set(parts) - set(made)) <= KILLS, "noted after it is put"
    assert results(output) == whole
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_the_table_and_the_record_come_before_the_analyses(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "e.json"

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "gradient_statistics", stop)
        assert evaluate.main(arguments(run, output)) == 130
    said = capsys.readouterr()
    assert "accuracy on first 24 of 360 validation images" in said.out
    assert "run the same command again to continue" in said.err
    (model,) = results(output)
    assert len(model["results"]) == 2 and "statistics" not in model
    monkeypatch.setattr(Attacker, "find_correct", stop)
    assert evaluate.main(arguments(run, output)) == 0, "the attacks are not made again"
    assert {"statistics", "norm_by_epoch", "sanity"} < results(output)[0].keys()


def test_parts_of_abandoned_evaluations_are_cleared(run: Path, tmp_path: Path) -> None:
    """Those of the same output that nobody has added to for a week, and no others."""
    week = time.time() - Parts.KEPT_S
    folders = {
        ".e.0123456789abcdef.parts": week - 60,
        ".e.fedcba9876543210.parts": week + 3600,
        ".other.0123456789abcdef.parts": week - 60,
        ".e.notes.parts": week - 60,
    }
    for name, changed in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "clean.json").touch()
        os.utime(tmp_path / name, (changed, changed))
    args = ["--checkpoint", str(run), "--num-images", "8", "--attacks", "clean"]
    assert evaluate.main([*args, "--output", str(tmp_path / "e.json")]) == 0
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"e.json", *list(folders)[1:]}


def test_a_log_file_shows_each_attack_when_it_is_finished(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without a terminal, and in between what is attacked, but not too often."""
    args = ["--checkpoint", str(run), "--num-images", "16", "--batch-size", "8", "--eps", "0.02"]
    args += ["--output", str(tmp_path / "e.json"), "--attacks", "clean", "pgd-3", "fgsm"]
    said: list[str] = []
    real = Attacker.find_correct

    def find_correct(self: Attacker, *more: Any) -> list[bool]:
        said.append(capsys.readouterr().err)
        return real(self, *more)

    monkeypatch.setattr(Attacker, "find_correct", find_correct)
    assert evaluate.main(args) == 0
    heads = [[re.sub(r" [\d.]+%$", "", line) for line in text.splitlines()] for text in said]
    assert heads[:4] == [[]] * 4, "the first batch, and clean on the second one"
    assert heads[4:] == [["tiny: clean"], ["tiny: pgd-3 at 0.02"]]
    last = capsys.readouterr().err.splitlines()
    assert last[0].startswith("tiny: fgsm at 0.02 ") and last[1].startswith("tiny: worst case at ")

    said.clear()
    monkeypatch.setattr(progress.ProgressLines, "PERIOD_S", 0.0)
    assert evaluate.main([*args, "--seed", "1", "--statistics", "--analysis-images", "4"]) == 0
    lines = "".join(said).splitlines()
    assert lines[:2] == ["tiny: batch 1 of 2: clean", "tiny: batch 1 of 2: pgd-3 at 0.02"]
    (second,) = [line for line in lines if line.startswith("tiny: batch 2 of 2: pgd-3 at 0.02")]
    assert re.fullmatch(r".*, accuracy \d+\.\d% so far", second)
    last = capsys.readouterr().err.splitlines()
    assert "tiny: analysis 1 of 3: statistics" in last
    assert any(line.startswith("tiny: analysis 3 of 3: norm update_0") for line in last)


def test_a_terminal_has_its_bar_and_no_lines_in_between(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with progress.open_bar(total=1, disable=False) as bar:
        lines = progress.ProgressLines(bar)
        monkeypatch.setattr(progress.ProgressLines, "PERIOD_S", 0.0)
        lines.print_sometimes("in between")
        lines.print("an attack")
    said = capsys.readouterr().err
    assert "an attack" in said and "in between" not in said


def test_a_later_evaluation_loses_nothing_of_an_earlier_one(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    args = ["--checkpoint", str(run), "--eps", "0.02", "--output", str(output), "--attacks"]
    few = ("--num-images", "8")
    assert evaluate.main([*args, "clean", "pgd-3", *few]) == 0
    (first,) = results(output)
    assert evaluate.main([*args, "fgsm", *few, "--batch-size", "4"]) == 0
    (second,) = results(output)
    rows = {row["attack"]: row for row in second["results"]}
    assert [*rows] == ["clean", "fgsm", "pgd-3", "worst case"]
    assert rows["pgd-3"] == first["results"][1] | {"batch_size": 8}
    for more in (("--num-images", "9"), (*few, "--seed", "1"), (*few, "--norm", "L2")):
        before = output.read_bytes()
        assert evaluate.main([*args, "clean", *more]) == 0
        assert len(results(output)[0]["results"]) == 1
        assert before in [path.read_bytes() for path in tmp_path.glob("e.*.json")]
    assert len(list(tmp_path.iterdir())) == 4


def test_an_unfinished_attack_outlasts_another_evaluation(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved results that an evaluation does not need are left to the command that needs them."""
    args = ["--checkpoint", str(run), "--num-images", "16", "--batch-size", "8", "--eps", "0.02"]
    args += ["--output", str(tmp_path / "e.json"), "--attacks"]
    real, calls = Attacker.find_correct, []

    def stop_at(limit: int) -> None:
        def find_correct(self: Attacker, *more: Any) -> list[bool]:
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(more[-3])
            return real(self, *more)

        monkeypatch.setattr(Attacker, "find_correct", find_correct)

    stop_at(3)
    assert evaluate.main([*args, "clean", "pgd-3"]) == 130
    stop_at(100)
    assert evaluate.main([*args, "clean", "fgsm"]) == 0
    assert calls == ["clean", "pgd-3", "clean", "fgsm", "fgsm"]
    assert evaluate.main([*args, "pgd-3"]) == 0
    assert calls[5:] == ["clean", "clean", "pgd-3"], "of pgd-3 the second batch alone"
    assert [row["attack"] for row in results(tmp_path / "e.json")[0]["results"]] == [
        *("clean", "pgd-3", "fgsm", "worst case")
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


WHOLE = '"correct": "11111111", "seconds": 1.0, "batch": 0'
SPOILT = (
    *("[]", '{"correct": "11"}', '{"correct": 7, "seconds": ""}'),
    *(f'{{{WHOLE}, "warnings": 5}}', f'{{{WHOLE}, "warnings": [[]]}}'),
)


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_spoilt_part_is_made_again(run: Path, tmp_path: Path, spoilt: str) -> None:
    args = ["--checkpoint", str(run), "--num-images", "8", "--attacks", "clean"]
    cfg = evaluate.EvaluateConfig(checkpoint=(str(run),), num_images=8)
    trained = load_trained(str(run), CPU)
    subset = selection.select_images(trained, cfg, CPU)
    output = tmp_path / "e.json"
    parts = Parts(output, outcomes.describe_inputs(trained, subset, cfg, "cpu"))
    parts.folder.mkdir()
    parts.path("clean", "0.0", 0).write_text(spoilt)
    assert evaluate.main([*args, "--output", str(output)]) == 0
    assert len(results(output)[0]["results"][0]["correct"]) == 8


def test_two_close_radii_have_parts_of_their_own(run: Path, tmp_path: Path) -> None:
    made: list[tuple[str, float]] = []

    class Counting(Attacker):
        def find_correct(
            self, model: Any, x: Any, y: Any, ids: Any, name: str, eps: float, clean: Any
        ):
            made.append((name, eps))
            return super().find_correct(model, x, y, ids, name, eps, clean)

    args = ["--checkpoint", str(run), "--num-images", "8", "--attacks", "fgsm"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcomes, "Attacker", Counting)
        patch.setattr(Parts, "remove", lambda parts: None)
        for eps in ("0.01", "0.010000001"):
            output = ["--output", str(tmp_path / "e.json")]
            assert evaluate.main([*args, "--eps", eps, *output]) == 0
    assert made == [("clean", 0.0), ("fgsm", 0.01), ("fgsm", 0.010000001)]


@pytest.mark.parametrize(
    ("images", "ranks", "img_size", "device", "size"),
    [
        (360, 1, 16, CPU, 360),
        (360, 2, 16, CPU, 180),  # as many images as the quickstart has
        (360, 7, 16, CPU, 52),
        (5000, 8, 224, CUDA, 313),
        (5000, 1, 224, CPU, 29),
        (3, 8, 224, CUDA, 1),
        (1, 1, 4096, CPU, 1),
    ],
)
def test_batches_follow_images_and_ranks(
    images: int, ranks: int, img_size: int, device: torch.device, size: int
) -> None:
    assert choose_batch_size(images, ranks, img_size, device) == size
    shares = [-(-images // size) // ranks + (r < -(-images // size) % ranks) for r in range(ranks)]
    assert max(shares) - min(shares) <= 1


def test_the_record_says_which_batch_was_used(run: Path, tmp_path: Path) -> None:
    args = ["--checkpoint", str(run), "--num-images", "20", "--attacks", "clean"]
    for more, size in (((), 20), (("--batch-size", "7"), 7)):
        assert evaluate.main([*args, *more, "--output", str(tmp_path / "e.json")]) == 0
        assert json.loads((tmp_path / "e.json").read_text())["batch_size"] == size


def test_an_unfinished_run_says_its_update(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """And an export says that its run has gone on."""
    first = run / "checkpoints" / "update_00000029.pt"
    args = ["--num-images", "8", "--attacks", "clean", "--output", str(tmp_path / "e.json")]
    for where, update, warning in (
        (first, 29, "these are the weights of update 29 (epoch 1 of 2), before the run's end"),
        (run, 58, None),
    ):
        assert evaluate.main(["--checkpoint", str(where), *args]) == 0
        (model,) = results(tmp_path / "e.json")
        assert model["update"] == update and model["warnings"] == ([warning] if warning else [])
        assert (f"warning: {model['name']}: {warning}" in capsys.readouterr().out) == bool(warning)
    later = run / "checkpoints" / "update_00000087.pt"
    later.write_bytes(first.read_bytes())
    try:
        assert evaluate.main(["--checkpoint", str(run), *args]) == 0
        (line,) = results(tmp_path / "e.json")[0]["warnings"]
        assert line == f"these are the weights of update 58; the run has gone on to {later}"
    finally:
        later.unlink()


def test_a_picture_that_fails_is_passed_over(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The curve of two radii is in the page all the same."""

    def fail(*_: object) -> bytes:
        raise ValueError("no such font")

    monkeypatch.setattr(pictures, "draw_pictures", fail)
    picture, report = tmp_path / "picture.png", tmp_path / "report.html"
    args = ["--checkpoint", str(run), "--num-images", "8", "--attacks", "clean", "pgd-2"]
    args += ["--eps", "0.01", "0.02", "--picture", str(picture), "--report", str(report)]
    assert evaluate.main([*args, "--output", str(tmp_path / "e.json")]) == 0
    said = capsys.readouterr()
    assert f"warning: {picture} failed and is left out: ValueError: no such font" in said.err
    assert not picture.exists() and f"written: {picture}" not in said.out
    assert "Accuracy against eps under pgd-2" in report.read_text()
    assert report.read_text().count("data:image/png") == 1


def test_out_of_memory_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Attacker, "find_correct", full)
    args = ["--checkpoint", str(run), "--num-images", "8", "--attacks", "clean"]
    assert evaluate.main([*args, "--output", str(tmp_path / "e.json")]) == 2
    line = "fastgn.evaluate: error: out of memory with 8 images at once: use a lower --batch-size"
    assert capsys.readouterr().err.splitlines()[-1] == line
