"""fastgn.sweep: what it refuses, what it keeps, prunes and goes on with."""

import contextlib
import importlib.util
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import TINY_SWIN, tiny_run
from torch import Tensor, nn

pytest.importorskip("optuna")

import signal

from fastgn import setup, sweep, train
from fastgn.analysis.pareto import find_front
from fastgn.config import Config, load_recipe
from fastgn.config.cli import parse_config
from fastgn.data.subset import Subset
from fastgn.distributed import session
from fastgn.errors import UserError, check
from fastgn.lock import lock_folder
from fastgn.run import Run

SPACE = ("--space", "gn_weight=0.1:10:log", "attack_it=1:4", "smoothing=0,0.1")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of 29 updates, judged after each."""
    run = ("--batch-size", "48", "--epochs", "2", "--warmup-epochs", "0", "--eval-images", "48")
    cfg: Config = parse_config([*TINY_SWIN, *run, "--lr", "0.003", "--log-interval", "29"])
    path = tmp_path_factory.mktemp("sweep") / "tiny.toml"
    path.write_text(cfg.to_toml())
    return path


def command(recipe: Path, study: Path, *more: str) -> list[str]:
    return ["--recipe", str(recipe), "--study", str(study), *more]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--space", "gn_wieght=1:2"), "unknown field 'gn_wieght', did you mean 'gn_weight'?"),
        (("--space", "gn_weight=2:1"), "2 must be below 1"),
        (("--space", "gn_weight=0:1:log"), "a logarithmic range must begin above 0, not at 0"),
        (("--space", "gn_weight=-1:1"), "--gn-weight -1 is out of range"),
        (("--space", "gn_weight=1:x"), "'x' is not a number"),
        (("--space", "gn_weight=1:2:lin"), "write FIELD=LOW:HIGH or FIELD=LOW:HIGH:log"),
        (("--space", "attack_it=1:2.5"), "attack_it takes only whole numbers"),
        (("--space", "method=gradnorm,gradnrom"), "did you mean 'gradnorm'?"),
        (("--space", "output=a,b"), "output is not a field that can be tuned"),
        (("--space", "eval_images=1:9"), "trials can only be compared if"),
        (("--space", "eps=0.01:0.03"), "changes the radius eps at which"),
        (("--space", "lr=1e-3:1e-2", "--set", "eval_images=0"), "the recipe has --eval-images 0"),
        (("--space", "lr=1e-3:1e-2", "--trials", "0"), "--trials 0 is out of range"),
        ((), "--space is empty"),
        (("--space", "lr=1e-3:1e-2", "--study", "a.json"), "--study a.json must end in .db"),
        (("--space", "lr=1e-3:1e-2", "--study", "a.sqlite"), "a.sqlite must end in .db"),
        (("--space", "lr=1e-3:1e-2", "--study", "a?b.db"), "must not have ?, # or %"),
        (("--space", "lr=1e-3:1e-2", "--seed", "-1"), "--seed -1 is out of range"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    more: tuple[str, ...],
    line: str,
) -> None:
    assert sweep.main(command(recipe, tmp_path / "s.db", *more)) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said and not list(tmp_path.iterdir())


def test_without_optuna_it_says_what_to_install(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "optuna" else find(n))
    assert sweep.main(command(recipe, tmp_path / "s.db", "--space", "lr=1e-3:1e-2")) == 2
    assert "needs the package optuna: run pip install 'fastgn[sweep]'" in capsys.readouterr().err


def test_a_study_goes_on_and_writes_its_best_recipe(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    args = command(recipe, tmp_path / "s.db", "--trials", "2", *SPACE, "--set", "epochs=1")
    assert sweep.main(args) == 0
    first = json.loads((tmp_path / "s.json").read_text())
    assert [t["state"] for t in first["trials"]] == ["complete"] * 2
    values = [t["values"] for t in first["trials"]]
    assert all(0.1 <= v["gn_weight"] <= 10 and v["attack_it"] in (1, 2, 3, 4) for v in values)
    best = first["trials"][first["best"]]
    assert best["robust"] == max(t["robust"] for t in first["trials"])
    written = load_recipe(str(tmp_path / "s_best.toml"))
    assert written.objective.gradnorm.gn_weight == best["values"]["gn_weight"]
    assert written.optimizer.epochs == 1 and written.run.output is None
    assert (tmp_path / "s.png").stat().st_size > 5_000

    monkeypatch.setattr(sweep, "build", lambda *a: pytest.fail("trained again"))
    assert sweep.main(args) == 0  # it has its two trials
    assert json.loads((tmp_path / "s.json").read_text())["trials"] == first["trials"]
    capsys.readouterr()
    assert sweep.main([*args, "--objective", "pareto"]) == 2
    assert sweep.main([*args, "--clean-floor", "0.5"]) == 2
    assert "was started with another objective" in capsys.readouterr().err
    assert sweep.main([*args[:-1], "epochs=3"]) == 2
    assert "another recipe (epochs: 3, not 1): name another file" in capsys.readouterr().err


def test_a_recipe_may_name_the_data_that_was_implied(tmp_path: Path) -> None:
    cfg = sweep.parse_cli(
        sweep.SweepConfig, command(tmp_path, tmp_path / "s.db", *SPACE), "fastgn.sweep"
    )
    implied = Config().replace(data_dir="images")
    for base in (implied, implied.replace(data="imagefolder"), implied):
        sweep.open_study(cfg, base, sweep.find_optuna())
    with pytest.raises(sweep.UserError, match="data: 'cifar10', not 'imagefolder'"):
        sweep.open_study(cfg, implied.replace(data="cifar10"), sweep.find_optuna())


@pytest.mark.slow
def test_an_interrupted_trial_is_tried_again_and_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = command(recipe, tmp_path / "s.db", "--trials", "1", "--space", "lr=1e-3:1e-2:log")
    save, starts = Run.save, []

    def save_and_interrupt(run: Run) -> None:
        save(run)
        if not starts:
            starts.append(run.update)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "save", save_and_interrupt)
    assert sweep.main([*args]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["trials"] == []
    build = sweep.build

    def build_and_note(*args: object) -> Run:
        run = build(*args)
        starts.append(run.update)
        return run

    monkeypatch.setattr(sweep, "build", build_and_note)
    assert sweep.main([*args]) == 0
    (trial,) = json.loads((tmp_path / "s.json").read_text())["trials"]
    assert trial["state"] == "complete" and trial["number"] == 1
    assert starts[0] < 58 and starts[1] >= starts[0]  # from its checkpoint, not from scratch
    assert len(list((tmp_path / "s").iterdir())) == 1


def test_a_trial_waits_for_another_process_with_the_same_values(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on with what that one has left. Two of a study may draw the same choices."""
    flags = tiny_run(tmp_path / "run", "--max-updates", "3", "--checkpoint-interval", "1")
    cfg: Config = parse_config([*flags, "--resume", "auto"])
    held, waited = contextlib.ExitStack(), []
    held.enter_context(lock_folder(tmp_path / "run", "the other's"))

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:  # the other one is interrupted
            held.close()
            assert train.main([*flags, "--max-updates", "2"]) == 0

    monkeypatch.setattr(sweep, "time", types.SimpleNamespace(sleep=wait))
    with session("cpu") as world:
        run = sweep.build_when_free(cfg, world, None)
        assert waited == [1, 1, 1] and run.update == 2
        train.train(run)
    monkeypatch.setattr(setup, "load_dataset", lambda _: check(False, "no such data"))
    with session("cpu") as world, pytest.raises(UserError, match="no such data"):
        sweep.build_when_free(cfg, world, None)  # what waiting does not mend
    assert len(waited) == 3


@pytest.mark.slow
def test_a_poor_trial_is_pruned_and_not_trained_to_its_end(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two: its accuracies are made lower than the first one's."""
    runs: list[Run] = []

    evaluate = Run.evaluate

    def noted(run: Run, is_signalled: Callable[[], bool]) -> None:
        if run not in runs:
            runs.append(run)
        evaluate(run, is_signalled)

    def pretended(model: nn.Module, subset: Subset, *_: Any) -> Tensor:
        return subset.size * torch.tensor([0.75, 0.5 / len(runs)])

    monkeypatch.setattr(Run, "evaluate", noted)
    monkeypatch.setattr("fastgn.run.count_correct", pretended)
    more = ("--trials", "2", "--startup-trials", "1", "--space", "lr=1e-3:1e-2:log")
    assert sweep.main(command(recipe, tmp_path / "s.db", *more)) == 0
    first, second = json.loads((tmp_path / "s.json").read_text())["trials"]
    assert (first["state"], second["state"]) == ("complete", "pruned")
    assert runs[0].update == 58 and runs[1].update == 29
    assert second["robust"] == 0.25


@pytest.mark.slow
def test_two_objectives_are_not_pruned_and_have_a_front(recipe: Path, tmp_path: Path) -> None:
    more = ("--objective", "pareto", "--trials", "2", "--space", "gn_weight=0.1:10:log")
    more += ("--set", "epochs=1", "--startup-trials", "1")
    assert sweep.main(command(recipe, tmp_path / "s.db", *more)) == 0
    record = json.loads((tmp_path / "s.json").read_text())
    assert [t["state"] for t in record["trials"]] == ["complete", "complete"]
    assert find_front([(0.9, 0.1), (0.8, 0.3), (0.8, 0.2), (0.7, 0.3)]) == [1, 0]


def test_a_trial_that_diverges_counts_and_does_not_end_the_study(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgn.optim.compute_peak_lr", lambda *_: 1e30)  # above what --lr takes
    more = ("--trials", "1", "--space", "lr=1e-3:1e-2:log")
    assert sweep.main(command(recipe, tmp_path / "s.db", *more)) == 0
    record = json.loads((tmp_path / "s.json").read_text())
    (trial,) = record["trials"]
    assert trial["state"] == "fail" and "not finite" in trial["failed"] and record["best"] is None


def test_a_file_that_is_no_study_is_one_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "s.db").write_text("no database at all, but long enough to be looked at" * 50)
    assert sweep.main(command(recipe, tmp_path / "s.db", "--space", "lr=1e-3:1e-2")) == 2
    assert "cannot be opened" in capsys.readouterr().err


def test_a_study_without_an_ending_does_not_meet_its_own_files(
    recipe: Path, tmp_path: Path
) -> None:
    """And Optuna's seed may be as large as every other one."""
    more = ("--trials", "1", "--space", "lr=1e-3:1e-2", "--set", "epochs=1", "--seed", str(2**62))
    for _ in range(2):
        assert sweep.main(command(recipe, tmp_path / "mysweep", *more)) == 0
    names = ("mysweep", "mysweep.db", "mysweep.json", "mysweep.png", "mysweep_best.toml")
    assert sorted(path.name for path in tmp_path.iterdir()) == list(names)
    assert (tmp_path / "mysweep").is_dir() and (tmp_path / "mysweep.db").is_file()


def test_score_puts_the_floor_first() -> None:
    assert sweep.score(0.8, 0.5, 0.7) == 0.5
    assert sweep.score(0.6, 0.9, 0.7) == pytest.approx(-0.1)
    assert sweep.score(0.7, 0.0, 0.7) == 0
