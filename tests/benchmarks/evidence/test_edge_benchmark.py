"""benchmarks/evidence/edge.py: the record, what is made once, and the table from it."""

import json
from pathlib import Path

import pytest

from benchmarks.evidence import edge, trials


def run(folder: Path) -> int:
    files = ["--output", str(folder / "edge_digits_cpu.json"), "--work", str(folder / "work")]
    return edge.main(["--smoke", "--seeds", "1", "--processes", "1", *files])


@pytest.mark.slow
def test_the_record_holds_every_arm_and_is_not_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path) == 0
    record = json.loads((tmp_path / "edge_digits_cpu.json").read_text())
    assert record["complete"] and record["versions"]["torch"] and record["hardware"]
    assert [row["arm"] for row in record["rows"]] == list(edge.ARMS)
    for row in record["rows"]:
        found = {a["attack"]: a["accuracy"]["mean"] for a in row["accuracy"]}
        assert found.keys() == {"clean", "pgd-20", "apgd-ce", "apgd-t", "apgd-ce+t"}
        assert found["apgd-ce+t"] <= min(found["apgd-ce"], found["apgd-t"])
        assert all(a["images"] == 8 for a in row["accuracy"])

    def never(*args: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(trials.train, "main", never)
    monkeypatch.setattr(trials.evaluate, "main", never)
    assert run(tmp_path) == 0
    assert json.loads((tmp_path / "edge_digits_cpu.json").read_text())["rows"] == record["rows"]
    lines = edge.table(record).splitlines()
    assert lines[0].startswith("| arm | clean, % | APGD-CE 0.025 | APGD-CE+T 0.025 |")
    assert [line.split(" | ")[0] for line in lines[2:6]] == [f"| {arm}" for arm in edge.ARMS]
    assert "8 held-out images" in lines[-1] and "1 seed" in lines[-1]
