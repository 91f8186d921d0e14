"""A job survives faults: three of each here, twenty in the record."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import faults


@pytest.mark.slow
@pytest.mark.parametrize("arm", faults.ARMS)
def test_jobs_survive_faults(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "ARMS", (arm,))
    record: dict[str, Any] = {"trials": []}
    saved: list[int] = []
    faults.study(tmp_path, 3, 1, record, lambda: saved.append(len(record["trials"])))
    assert saved == [1, 2, 3]
    for row in record["trials"]:
        said = [p.read_text()[-2000:] for p in tmp_path.glob(f"{arm}{row['trial']}_*.log*")]
        assert faults.is_sound(row), "\n".join([str(row), *said])


def row(arm: str, trial: int, **values: Any) -> dict[str, Any]:
    fixed = {"arm": arm, "trial": trial, "ended": "done", "happened": True}
    return fixed | ({"weights": 2e-6} if arm == "shrink" else {"different": []}) | values


def test_the_table_counts_what_went_wrong() -> None:
    trials = [row("kill", 0), row("kill", 1, ended="lost"), row("kill", 2, different=["/model"])]
    trials += [row("shrink", 0), row("shrink", 1, weights=0.01), row("stop", 0, ended="hung")]
    assert [faults.is_sound(r) for r in trials] == [True, False, False, True, False, False]
    assert not faults.is_sound(row("kill", 0, happened=False))
    record = {"trials": trials, "versions": {"torch": "2.0"}, "file": "faults_cpu.json"}
    lines = [line.split("|")[1:-1] for line in faults.table(record).splitlines()[2:5]]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["kill", "3", "1", "0", "1", "0"],
        ["stop", "1", "0", "1", "0", "0"],
        ["shrink", "2", "0", "0", "1", "0.01"],
    ]


def test_finished_trials_are_not_repeated(tmp_path: Path) -> None:
    trials = [row(arm, n) for arm in faults.ARMS for n in range(2)]
    record: dict[str, Any] = {"trials": list(trials)}
    faults.study(tmp_path, 2, 0, record, lambda: pytest.fail("nothing is missing"))
    assert record["trials"] == trials
