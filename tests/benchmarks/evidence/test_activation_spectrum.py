"""activations.py: the measures of smoothness against what is known of them, and the pipeline at
toy size."""

import json
from pathlib import Path

import pytest

from benchmarks.evidence import activations

CLOSED_FORMS = {
    # softplus: f'' = beta s (1 - s), of integral 1 and square integral beta / 6
    "softplus:1": (6.0, 0.25, 0.0),
    "softplus:10": (0.6, 2.5, 0.0),
    "softplus:100": (0.06, 25.0, 0.0),
    # e^x below 0: 1^2 / (1 / 2)
    "elu": (2.0, 1.0, 0.0),
    # 2 t (1 - t^2): 2^2 / (16 / 15); largest at t^2 = 1 / 3
    "tanh": (3.75, 4 / 3**1.5, 0.0),
    # phi (2 - x^2): largest 2 phi(0)
    "gelu": (None, 0.797885, 0.0),
    "silu": (None, 0.5, 0.0),
    "relu": (0.0, 0.0, 1.0),
    "leaky_relu:0.3": (0.0, 0.0, 1.0),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_properties_are_those_of_the_closed_form(name: str) -> None:
    width, largest, kink = CLOSED_FORMS[name]
    found = activations.properties(name)
    assert width is None or found["width"] == pytest.approx(width, rel=2e-3)
    assert found["largest"] == pytest.approx(largest, rel=2e-3)
    assert found["kink"] == pytest.approx(kink, abs=2e-3)


def test_rank_correlation() -> None:
    assert activations.rank_correlation([(1, 10), (2, 20), (3, 25)]) == pytest.approx(1)
    assert activations.rank_correlation([(1, 5), (2, 4), (8, 1)]) == pytest.approx(-1)
    # by hand: ranks 1.5 1.5 3 against 1 2 3
    assert activations.rank_correlation([(0, 1), (0, 2), (4, 3)]) == pytest.approx(0.866, abs=1e-3)


def run(folder: Path, *more: str) -> int:
    files = (
        "--output",
        str(folder / "activations_digits_cpu.json"),
        "--work",
        str(folder / "work"),
    )
    options = ("--smoke", "--processes", "1")
    return activations.main([*options, *files, *more])


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
    assert lines[0].startswith("| activation | width of the bend | largest f'' |")
    assert lines[2].startswith("| relu | 0 | 0 | 100% |")
    assert lines[3].startswith("| softplus:10 | 0.6 | 2.5 | 0% |")
    assert lines[-2].startswith("| piecewise linear (1) |") and "| smooth (1) |" in lines[-1]


def test_an_unknown_activation_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path, "--activations", "gleu") == 2
    assert "--activation 'gleu' is unknown: did you mean 'gelu'?" in capsys.readouterr().err
