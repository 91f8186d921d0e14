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
    options = ("--smoke", "--processes", "1", "--seeds", "1")
    return activations.main([*options, *files, *more])


@pytest.mark.slow
def test_two_activations_from_training_to_table(tmp_path: Path) -> None:
    assert run(tmp_path, "--activations", "relu", "gelu") == 0
    record = json.loads((tmp_path / "activations_digits_cpu.json").read_text())
    assert record["complete"] and not any(row["failed"] for row in record["rows"])
    assert [(row["network"], row["arm"], row["budget"]) for row in record["rows"]] == [
        *(("relu", "gradnorm", 1), ("relu", "pgd_at", 1), ("relu", "gradnorm", 2)),
        *(("gelu", "gradnorm", 1), ("gelu", "pgd_at", 1), ("gelu", "gradnorm", 2)),
    ]
    starts = [path.name for path in (tmp_path / "work").glob("start_n*_s0_*")]
    assert len(starts) == 2, "one natural start for each activation"
    lines = activations.table(record).splitlines()
    assert lines[0].startswith("| method | activation | clean, % |")
    assert "| cross-entropy | penalty |" in lines[0]
    assert lines[2].startswith("| gradnorm | relu |") and lines[5].startswith("| pgd_at | gelu |")
    assert lines[5].endswith(" |  |"), "PGD-3 has no penalty"
    assert lines[-3].startswith("| gelu - relu | gradnorm - pgd_at |")


def test_differences_of_activations_are_paired_by_seed() -> None:
    """Smooth activations gain 10 and 12 points under gradnorm and 2 and 2 under PGD-3."""

    def row(method: str, name: str, *values: float) -> dict:
        attacked = {"attack": "pgd-20", "eps": 0.1, "images": 100}
        seeds = [
            {"seed": s, "accuracy": [attacked | {"accuracy": v}]} for s, v in enumerate(values)
        ]
        return {"arm": method, "network": name, "seeds": seeds, "accuracy": [attacked]}

    rows = [
        row("gradnorm", "relu", 0.50, 0.60),
        row("gradnorm", "gelu", 0.55, 0.65),
        row("gradnorm", "silu", 0.65, 0.79),
        row("pgd_at", "relu", 0.70, 0.80),
        row("pgd_at", "gelu", 0.72, 0.82),
        row("pgd_at", "silu", 0.72, 0.82),
    ]
    found = {(d["activations"], d["method"]): d["PGD-20 0.1"] for d in activations.compare(rows)}
    assert found["smooth - piecewise linear", "gradnorm"] == "+11.0 ± 12.7"
    assert found["smooth - piecewise linear", "pgd_at"] == "+2.0 ± 0.0 *"
    assert found["smooth - piecewise linear", "gradnorm - pgd_at"] == "+9.0 ± 12.7"
    assert found["gelu - relu", "gradnorm"] == "+5.0 ± 0.0 *"


def test_an_unknown_activation_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path, "--activations", "gleu") == 2
    assert "--activation 'gleu' is unknown: did you mean 'gelu'?" in capsys.readouterr().err
