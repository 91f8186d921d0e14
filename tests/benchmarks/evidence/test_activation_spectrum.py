"""activations.py at toy size."""

import json
from pathlib import Path

import pytest

from benchmarks.evidence import activations


def run(folder: Path, *more: str) -> int:
    files = (
        "--output",
        str(folder / "activations_digits_cpu.json"),
        "--work",
        str(folder / "work"),
    )
    options = ("--smoke", "--processes", "1")
    return activations.main([*options, *files, *more])


@pytest.mark.slow
def test_two_activations_from_training_to_table(tmp_path: Path) -> None:
    assert run(tmp_path, "--activations", "relu", "softplus:10") == 0
    record = json.loads((tmp_path / "activations_digits_cpu.json").read_text())
    assert record["complete"] and not any(row["failed"] for row in record["rows"])
    relu, softplus = record["rows"]
    assert (relu["activation"], softplus["activation"]) == ("relu", "softplus:10")
    for row in record["rows"]:
        before, after = row["seeds"][0]["before"], row["seeds"][0]["after"]
        assert row["penalty_ratio"]["mean"] == pytest.approx(after["penalty"] / before["penalty"])
        assert before["objective"] == pytest.approx(
            0.8 * before["ce"] + 1.2 * before["penalty"], rel=1e-5
        )
    lines = activations.table(record).splitlines()
    assert lines[0].startswith("| activation | clean, % |")
    assert lines[2].startswith("| relu |") and lines[3].startswith("| softplus:10 |")
    assert lines[-2].startswith("| piecewise linear (1) |") and "| smooth (1) |" in lines[-1]


def test_an_unknown_activation_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path, "--activations", "gleu") == 2
    assert "--activation 'gleu' is unknown: did you mean 'gelu'?" in capsys.readouterr().err
