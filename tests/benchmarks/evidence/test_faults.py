"""A training survives faults: three of each here, twenty in the record."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.evidence import faults


@pytest.mark.slow
@pytest.mark.parametrize("arm", faults.ARMS)
def test_trainings_survive_faults(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "ARMS", {arm: faults.ARMS[arm]})
    record: dict[str, Any] = {"trials": []}
    saved: list[int] = []
    faults.study(tmp_path, 3, 1, record, lambda: saved.append(len(record["trials"])))
    assert saved == [1, 2, 3]
    for row in record["trials"]:
        logs = sorted(tmp_path.glob(f"{arm}{row['trial']}_*.log*"))
        said = [log.read_text() for log in logs]
        assert faults.is_sound(row), "\n".join([str(row), *(text[-2000:] for text in said)])
        if arm == "memory":  # in the trial and in the run with which it is compared
            halved = "out of memory with 24 images at a time: going on with 12"
            assert [text.count(halved) for text in said] == [1, 1]


def row(arm: str, trial: int, **values: Any) -> dict[str, Any]:
    fixed = {"arm": arm, "trial": trial, "ended": "done", "places": ["training"]}
    return fixed | {"different": [], "weights": 2e-6 * (arm == "shrink")} | values


def test_the_table_counts_what_went_wrong() -> None:
    trials = [row("kill", 0), row("kill", 1, ended="lost"), row("kill", 2, different=["/model"])]
    trials += [row("shrink", 0), row("shrink", 1, weights=0.01), row("stop", 0, ended="hung")]
    trials += [row("alone", 0, places=["training", "starting", "training"])]
    trials += [row("memory", 0, places=["backward: aten.mm.default"])]
    sound = [faults.is_sound(r) for r in trials]
    assert sound == [True, False, False, True, False, False, True, True]
    assert not faults.is_sound(row("kill", 0, places=[]))
    record = {"trials": trials, "versions": {"torch": "2.0"}, "file": "faults_cpu.json"}
    lines = [line.split("|")[1:-1] for line in faults.table(record).splitlines()[2:7]]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["kill", "3", "3", "1", "0", "1", "0", "training 3"],
        ["shrink", "2", "2", "0", "0", "1", "0.01", "training 2"],
        ["stop", "1", "1", "0", "1", "0", "0", "training 1"],
        ["alone", "1", "3", "0", "0", "0", "0", "training 2, starting 1"],
        ["memory", "1", "1", "0", "0", "0", "0", "backward 1"],
    ]


def test_finished_trials_are_not_repeated(tmp_path: Path) -> None:
    trials = [row(arm, n) for arm in faults.ARMS for n in range(2)]
    record: dict[str, Any] = {"trials": list(trials)}
    faults.study(tmp_path, 2, 0, record, lambda: pytest.fail("nothing is missing"))
    assert record["trials"] == trials


def test_a_single_bit_is_a_difference() -> None:
    here = {"best": {"model": {"w": torch.zeros(2)}}, "metrics": [{"loss": 1.0}, {"loss": 2.0}]}
    there = {"best": {"model": {"w": torch.zeros(2)}}, "metrics": [{"loss": 1.0}, {"loss": 2.0}]}
    flat = faults.flatten(here)
    assert flat.keys() == {"/best/model/w", "/metrics/0/loss", "/metrics/1/loss"}
    assert faults.differences(flat, faults.flatten(there)) == []
    there["best"]["model"]["w"][1] = -0.0  # type: ignore[call-overload,index]
    there["metrics"].pop()  # type: ignore[attr-defined]
    assert faults.differences(flat, faults.flatten(there)) == ["/best/model/w", "/metrics/1/loss"]
