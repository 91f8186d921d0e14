"""robustness.py: budgets, what is made once, the record and the table from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import ROOT

from benchmarks.common.arguments import RESULTS
from benchmarks.evidence import digests, robustness, study, trials
from fastgn.objectives import METHODS

SETTING = robustness.digits()


def run(folder: Path, *more: str) -> int:
    files = ("--output", str(folder / "out.json"), "--work", str(folder / "work"))
    size = ("--smoke", "--seeds", "1", "--processes", "1")
    return robustness.main([*size, *files, *more])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robustness")
    assert run(folder, "--methods", "natural", "gradnorm") == 0
    return folder


def test_budgets_and_costs_are_those_counted_by_hand() -> None:
    """A whole budget is 60 epochs of 3, 6, 9 or 5 forwards. Eight seeds have it, three the others,
    and four budgets only gradnorm and pgd_at."""
    names = ("natural", "gradnorm", "pgd_at", "n_fgsm")
    arms = robustness.arms_of("Swin", names, SETTING, 8)
    found = {(a.head["arm"], a.head["budget"]): a for a in arms}
    assert [*found] == [
        *((name, budget) for budget in (1, 0.5, 2) for name in names),
        *(("gradnorm", 4), ("pgd_at", 4)),
    ]
    assert [found[name, 1].head["units"] for name in names] == [3, 6, 9, 5]
    for (_, budget), arm in found.items():
        assert arm.head["epochs"] == 60 * budget
        assert arm.head["total_units"] == 60 * budget * arm.head["units"]
        assert len(arm.trials) == (8 if budget == 1 else 3)
        for trial in arm.trials:
            assert trial.cfg.flat()["epochs"] == arm.head["epochs"]
            assert trial.start == found["natural", 1].trials[trial.seed].start
            assert trial.cfg.flat()["smoothing"] == 0.1
    order = sorted((t for a in arms for t in a.trials), key=lambda t: (t.wave, t.seed))
    epochs = [trial.cfg.flat()["epochs"] for trial in order]
    assert epochs[:12] == [60] * 12 and [t.seed for t in order[:12:4]] == [0, 1, 2]
    assert set(epochs[12:42]) == {30, 120, 240} and {t.seed for t in order[12:42]} == {0, 1, 2}
    assert epochs[42:] == [60] * 20 and order[42].seed == 3
    with_all = [t for t in order if any("autoattack" in flags for flags in t.evaluations)]
    assert with_all == order[:4], "of one seed"


def test_each_arm_is_a_line_that_config_accepts() -> None:
    assert set(SETTING.arms) < set(robustness.ARMS)
    for arm in robustness.ARMS:
        cfg = robustness.arm_config(SETTING, "Swin", arm, "fp32")
        objective = robustness.for_epochs(cfg, 1).objective
        assert objective.method in METHODS
        eps = 12 / 255 if arm.endswith("-12") else 0.025
        assert objective.gradnorm.eps == objective.attack.attack_eps == cfg.eval_eps == eps


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "--methods", "gradnrom")
    assert "--methods: invalid choice: 'gradnrom'" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_the_record_holds_every_arm_with_accuracy_cost_and_history(done: Path) -> None:
    record = json.loads((done / "out.json").read_text())
    assert record["complete"]
    arms = [(row["arm"], row["budget"]) for row in record["rows"]]
    assert arms == [("natural", 1), ("gradnorm", 1), ("gradnorm", 2)]
    natural, _, longer = record["rows"]
    assert natural["epochs"] == 2 and natural["units"] == 3 and natural["total_units"] == 6
    history = longer["seeds"][0]["history"]
    assert [h["epoch"] for h in history] == [1, 2, 3, 4]
    assert all(h["ce"] > 0 and h["penalty"] > 0 for h in history)
    attacks = [(a["attack"], a["eps"], a["images"]) for a in natural["accuracy"]]
    assert attacks == [
        *(("clean", 0.0, 8), ("pgd-20", 0.025, 8), ("apgd-ce", 0.025, 8)),
        *(("pgd-20", 0.05, 8), ("fgsm", 0.025, 8)),
    ]
    for row in record["rows"]:
        for a in row["accuracy"]:
            assert 0 <= a["accuracy"]["mean"] <= 1 and a["accuracy"]["n"] == 1


@pytest.mark.slow
def test_what_is_finished_is_not_run_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("run again")

    before = json.loads((done / "out.json").read_text())["rows"]
    monkeypatch.setattr(trials.train, "main", never)
    monkeypatch.setattr(trials.evaluate, "main", never)
    assert run(done, "--methods", "natural", "gradnorm") == 0
    assert json.loads((done / "out.json").read_text())["rows"] == before


@pytest.mark.slow
def test_another_machine_goes_on_with_the_record(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the record and no trainings. It makes the missing cells and keeps the others as they
    are, unless the code of their objective has changed."""
    record = json.loads((done / "out.json").read_text())
    lost = record["rows"].pop()
    (tmp_path / "out.json").write_text(json.dumps(record | {"complete": False}))
    methods = ("--methods", "natural", "gradnorm")

    with monkeypatch.context() as patch:
        changed = {"natural": ["1"], "gradnorm": ["2"]}
        patch.setattr(digests, "objective_code", changed.get)
        assert run(tmp_path, *methods) == 2
    said = capsys.readouterr().err
    assert "is of another objective and training: remove the file" in said
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == record["rows"]

    made = []
    train = trials.train.main
    monkeypatch.setattr(trials.train, "main", lambda flags: made.append(flags) or train(flags))
    assert run(tmp_path, *methods) == 0
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["complete"]
    assert again["rows"][:-1] == record["rows"]
    assert again["rows"][-1]["budget"] == lost["budget"] and len(again["rows"][-1]["seeds"]) == 1
    assert len(made) == 2  # the start, and the missing one


@pytest.mark.slow
def test_when_the_time_is_over_it_stops_and_later_goes_on(tmp_path: Path) -> None:
    """Killed by --minutes in a training or evaluation, or between them."""
    arm = ("--methods", "natural")
    assert run(tmp_path, *arm, "--minutes", "1e-6") == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert not record["complete"] and record["rows"] == []
    assert run(tmp_path, *arm) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["complete"] and len(record["rows"]) == 1


LOCKED = """
import sys
from pathlib import Path
from fastgn.lock import lock_folder
with lock_folder(Path(sys.argv[1]), "--work"):
    print("begun", flush=True)
    sys.stdin.read()
"""


def test_two_starts_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One goes on undisturbed, the other leaves with a line before it measures or writes anything.

    They would train in the same folders, and each would take the other's failure for an arm's.
    """
    arguments = [sys.executable, "-c", LOCKED, str(tmp_path / "work")]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "begun\n"
        before = sorted((tmp_path / "work").iterdir())
        line = f"--work {tmp_path / 'work'} is in use by process {first.pid} on host "
        assert run(tmp_path, "--methods", "natural") == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert line in said and "wait until it has ended, or give another path" in said
        assert sorted((tmp_path / "work").iterdir()) == before and first.poll() is None
        assert not (tmp_path / "out.json").exists()
        first.communicate("", timeout=400)
    assert first.returncode == 0 and not (tmp_path / "work").exists()


def test_a_training_interrupted_by_the_deadline_has_saved(tmp_path: Path) -> None:
    cfg = SETTING.base.replace(epochs=500, warmup_epochs=0.0, eval_images=0)
    trial = trials.Trial("long", cfg)
    with pytest.raises(trials.Stopped):
        trials.run_trial(trial, tmp_path, trials.time.time() + 2)
    folder = tmp_path / trial.key
    assert list((folder / "checkpoints").glob("update_*.pt"))
    assert not (folder / "model.safetensors").exists() and trials.result(trial, tmp_path) is None


def test_a_trial_that_fails_is_recorded_and_not_tried_again(tmp_path: Path) -> None:
    trial = trials.Trial("bad", SETTING.base.replace(model="swin_x"))
    failure = trials.run_trial(trial, tmp_path, float("inf"))
    assert failure is not None and "swin_x" in failure
    assert not trials.missing(trial, tmp_path)
    assert trials.result(trial, tmp_path) == {"failed": failure}


def test_what_the_compiler_raises_is_one_arms_end_and_a_full_disk_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = trials.Trial("odd", SETTING.base)

    def raises(error: Exception):
        def train(*_):
            raise error

        monkeypatch.setattr(trials.train, "main", train)

    raises(OSError("no space left"))
    with pytest.raises(OSError, match="no space"):
        trials.run_trial(trial, tmp_path, float("inf"))
    assert trials.missing(trial, tmp_path)
    raises(RuntimeError("no such\nlowering"))
    assert trials.run_trial(trial, tmp_path, float("inf")) == "no such lowering"
    assert not trials.missing(trial, tmp_path)


def fake_record() -> dict:
    """Two seeds of two arms; gradnorm 10 points above FGSM's on both."""

    def row(arm: str, robust: list[float], **more: object) -> dict:
        seeds = [
            {
                "seed": s,
                "history": [],
                "accuracy": [
                    {"attack": "clean", "eps": 0.0, "images": 100, "accuracy": 0.9},
                    {"attack": "autoattack", "eps": 0.1, "images": 50, "accuracy": value},
                ],
            }
            for s, value in enumerate(robust)
        ]
        shared = {"network": "Net", "epochs": 3, "units": 6.0, **more}
        return shared | {
            **{"arm": arm, "seeds": seeds, "failed": []},
            "accuracy": study.statistics_of(seeds),
        }

    record = {
        "rows": [
            row("gradnorm", [0.6, 0.7]),
            row("fgsm_rs", [0.5, 0.6]),
            row("fgsm_rs", [0.8, 0.8], budgets=["time"]),  # of an earlier version
        ],
        **{"networks": ["Net"], "eps": 0.1, "eval_eps": [0.1], "seeds": 2},
        **{
            "data": "digits",
            "device": "cpu",
            "precision": "fp32",
            "complete": True,
        },
        "images": {"autoattack": 50, "pgd-20": 100},
        "reference": "gradnorm",
        "versions": {"torch": "2"},
        "file": "robustness_digits_cpu.json",
    }
    return record


def test_arms_are_compared_on_the_same_seeds() -> None:
    """10 points apart with every seed is significant, and 0 is not."""
    (row,) = robustness.compare(fake_record())
    assert (row["arm"], row["against"]) == ("gradnorm", "fgsm_rs")
    assert row["clean"] == "+0.0 ± 0.0" and row["AutoAttack 0.1"] == "+10.0 ± 0.0 *"
    assert row["PGD-20 0.1"] == "" and row["operations"] == "1.00"


def test_three_seeds_show_less_than_two_standard_errors_suggest() -> None:
    """Differences of 2, 4 and 9 points: mean 5, standard error 2.08, t 2.40 of the 4.30 needed."""

    def row(*values: float) -> dict:
        accuracy = [[{"attack": "clean", "eps": 0.0, "accuracy": value}] for value in values]
        return {"seeds": [{"seed": s, "accuracy": a} for s, a in enumerate(accuracy)]}

    def difference(ours: dict, theirs: dict, attack: str, eps: float) -> str:
        return study.mean_difference(study.differences(ours, theirs, attack, eps))

    a, b = row(0.52, 0.54, 0.59), row(0.5, 0.5, 0.5)
    assert difference(a, b, "clean", 0.0) == "+5.0 ± 9.0"
    # the 95 % interval is the mean ± 8.957
    assert difference(a, row(*3 * [0.46]), "clean", 0.0) == "+9.0 ± 9.0 *"
    assert difference(a, row(*3 * [0.461]), "clean", 0.0) == "+8.9 ± 9.0"
    assert difference(a, b, "pgd-20", 0.1) == ""
    b["seeds"] = b["seeds"][2:]
    assert difference(a, b, "clean", 0.0) == "+9.0"  # of the one seed of both


def test_the_table_is_made_from_the_record() -> None:
    lines = robustness.table(fake_record()).splitlines()
    assert lines[0] == ("| arm | epochs | operations an update | clean, % | AutoAttack 0.1 |")
    assert lines[2] == "| gradnorm | 3 | 6 | 90.0 ± 0.0 | 65.0 ± 7.1 |"
    assert lines[3] == "| fgsm_rs | 3 | 6 | 90.0 ± 0.0 | 55.0 ± 7.1 |"
    assert lines[-3].startswith("| gradnorm | fgsm_rs | 2 | +0.0 ± 0.0 | +10.0 ± 0.0 * |")


def test_the_table_keeps_budgets_apart() -> None:
    record = fake_record() | {"budgets": [], "images": 100, "attack": "apgd-ce+t"}
    record["rows"] = [row | {"budget": b} for b in (1, 0.5) for row in record["rows"][:2]]
    text = robustness.table(record)
    assert "| fgsm_rs | 0.5 | 3 | 2 | 6 |" in text and "100 images, APGD-CE+T on those" in text
    assert "| 0.5 | gradnorm | fgsm_rs | 2 | +0.0 ± 0.0 | +10.0 ± 0.0 * |" in text
    assert "| 1 | gradnorm | fgsm_rs |" in text
    del record["reference"]
    assert "gradnorm's operations" in text
    assert "gradnorm's operations" not in robustness.table(record)


def test_a_record_of_edge_alone_has_its_table() -> None:
    """Its rows hold neither costs nor the network, and all attacks were on all images."""
    record = json.loads((RESULTS / "edge_digits_cpu.json").read_text())
    lines = robustness.table({"file": "edge_digits_cpu.json", **record}).splitlines()
    assert lines[0].startswith("| arm | clean, % | APGD-CE 0.025 | APGD-CE+T 0.025 |")
    assert lines[3].startswith("| edge | 86.4 ± 1.7 |")
    assert any(line.startswith("| edge | natural | 3 | -10.3 ± ") for line in lines)
    (note,) = [line for line in lines if line.startswith("digits, Swin; CPU")]
    assert "; 360 images; torch" in note and "PGD-20 leaves" not in note


@pytest.mark.slow
def test_cifar10_at_toy_size_by_the_script_itself(tmp_path: Path) -> None:
    """--data cifar10 --smoke on noise, the two processes of a CPU; --methods of what there is."""
    data = tmp_path / "noise.npz"
    splits = {"train": 512, "test": 10}
    content, draw = {}, np.random.default_rng(0)
    for name, n in splits.items():
        content[f"{name}_images"] = draw.integers(0, 256, (n, 32, 32, 3), np.uint8)
        content[f"{name}_labels"] = np.arange(n) % 10
    np.savez(data, **content)
    script = [sys.executable, "-m", "benchmarks.evidence.robustness", "--smoke", "--seeds", "1"]
    options = ["--data", "cifar10", "--data-dir", str(data), "--methods", "fgsm_rs"]
    files = ["--output", str(tmp_path / "out.json"), "--work", str(tmp_path / "work")]
    done = subprocess.run(
        [*script, *options, *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["complete"]
    networks = ["PreActResNet-18, GELU, width 8", "Swin"]
    assert [(r["network"], r["arm"]) for r in record["rows"]] == [(n, "fgsm_rs") for n in networks]
    assert record["eval_eps"] == [4 / 255]
