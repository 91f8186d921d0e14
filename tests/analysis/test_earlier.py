"""Results of an earlier evaluation outlast the next evaluation into the same file."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastgn.analysis.earlier import keep_earlier
from fastgn.analysis.outcomes import make_row
from fastgn.analysis.tables import WORST, format_accuracies
from fastgn.files import write_json

EPS = 4 / 255


def entry_of(inputs: str, **outcomes: str) -> dict[str, Any]:
    """A network's entry. outcomes: attack -> its outcomes at EPS, or without an attack."""
    rows = [make_row(k, 0.0 if k == "clean" else EPS, bits) for k, bits in outcomes.items()]
    images = len(next(iter(outcomes.values())))
    entry = {"name": inputs, "inputs_sha256": inputs, "images": images}
    return entry | {"warnings": [], "results": rows}


def record_of(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    conditions = {"ranks": 1, "batch_size": 8, "precision": "fp32", "compile": False}
    conditions |= {"versions": {"torch": "2.11.0"}, "commit": None, "hardware": {}}
    return conditions | changes | {"models": list(entries)}


def kept(tmp_path: Path, old: Any, new: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The new record after the old one was kept, and the lines about this."""
    output = tmp_path / "evaluation.json"
    write_json(output, old)
    lines = keep_earlier(output, new)
    write_json(output, new)  # as the program does, so that it must be ready for JSON
    return json.loads(output.read_text()), [line.replace(f"{tmp_path}/", "") for line in lines]


def bits_of(entry: dict[str, Any]) -> dict[str, str]:
    return {row["attack"]: row["correct"] for row in entry["results"]}


def test_attacks_that_are_not_measured_again_are_kept(tmp_path: Path) -> None:
    old = entry_of("a", clean="1111", fgsm="1110", square="1011")
    old |= {"warnings": ["old"], "sanity": [{"name": "x"}]}
    new = entry_of("a", fgsm="0110")
    record, lines = kept(tmp_path, record_of(old), record_of(new))
    (entry,) = record["models"]
    assert bits_of(entry) == {"clean": "1111", "fgsm": "0110", "square": "1011", WORST: "0010"}
    assert [row["attack"] for row in entry["results"]] == ["clean", "fgsm", "square", WORST]
    assert entry["warnings"] == ["old"] and entry["sanity"] == [{"name": "x"}]
    assert lines == ["a: kept from evaluation.json: clean, square at 4/255, sanity"]
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_a_radius_is_a_part_of_an_attack(tmp_path: Path) -> None:
    old, new = entry_of("a", fgsm="11"), entry_of("a", fgsm="10")
    new["results"][0]["eps"] = 8 / 255
    record, _ = kept(tmp_path, record_of(old), record_of(new))
    assert {row["eps"]: row["correct"] for row in record["models"][0]["results"]} == {
        EPS: "11",
        8 / 255: "10",
    }


def test_a_kept_outcome_says_how_it_was_measured(tmp_path: Path) -> None:
    """Also if it is kept a second time, after an evaluation in a third way."""
    old = record_of(entry_of("a", square="10"), precision="bf16", commit="0123")
    second, _ = kept(tmp_path, old, record_of(entry_of("a", fgsm="11"), commit="4567"))
    third, _ = kept(tmp_path, second, record_of(entry_of("a", clean="11"), precision="bf16"))
    clean, fgsm, square, _ = third["models"][0]["results"]
    assert square["precision"] == "bf16" and square["commit"] == "0123"
    assert fgsm["precision"] == "fp32" and fgsm["commit"] == "4567"
    assert "precision" not in clean and "batch_size" not in square


def test_other_results_get_a_file_of_their_own(tmp_path: Path) -> None:
    """Results of other networks or images are moved, each time to a new name."""
    for number, inputs in enumerate("bcd"):
        old = record_of(entry_of("a", square="11"), entry_of(inputs, square="10"))
        record, lines = kept(tmp_path, old, record_of(entry_of("a", fgsm="11")))
        assert [entry["name"] for entry in record["models"]] == ["a"]
        assert bits_of(record["models"][0])["square"] == "11"
        aside = f"evaluation.{number + 1}.json"
        assert json.loads((tmp_path / aside).read_text()) == old
        assert lines[-1] == f"evaluation.json held other results: they are in {aside} now"


SPOILT: list[Any] = [
    *({"not": "an evaluation"}, [], {"models": [7]}),
    *(record_of(entry_of("a", square=bits)) for bits in ("1", "12")),
    record_of(entry_of("a", square="11") | {"warnings": [7]}),
    record_of(entry_of("a", square="11") | {"statistics": []}),
    record_of({k: v for k, v in entry_of("a", square="11").items() if k != "inputs_sha256"}),
]


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_file_that_is_not_understood_is_not_lost(tmp_path: Path, spoilt: Any) -> None:
    """Such as one of an older version, which does not say what was measured."""
    record, _ = kept(tmp_path, spoilt, record_of(entry_of("a", fgsm="11")))
    assert bits_of(record["models"][0]) == {"fgsm": "11"}
    assert json.loads((tmp_path / "evaluation.1.json").read_text()) == spoilt


def test_no_json_and_no_file_are_no_obstacle(tmp_path: Path) -> None:
    output = tmp_path / "evaluation.json"
    record = record_of(entry_of("a", fgsm="11"))
    assert keep_earlier(output, record) == []
    output.touch()
    assert keep_earlier(output, record) == []
    output.write_text("{")
    (line,) = keep_earlier(output, record)
    assert line.endswith("evaluation.1.json now") and not output.exists()


def test_the_worst_case_is_the_same_attacks_for_all_networks(tmp_path: Path) -> None:
    """Or else a network that was attacked more often would look less robust."""
    old = record_of(entry_of("a", clean="1111", square="0001"))
    a, b = (entry_of(name, fgsm="1110", apgd="0111") for name in "ab")
    record, _ = kept(tmp_path, old, record_of(a, b))
    assert [bits_of(entry)[WORST] for entry in record["models"]] == ["0110", "0110"]
    rows = [line.split() for line in format_accuracies(record["models"]).splitlines()[2:]]
    assert rows == [
        ["clean", "100.0%", "-"],
        ["fgsm", "4/255", "75.0%", "75.0%"],
        ["apgd", "4/255", "75.0%", "75.0%"],
        ["square", "4/255", "25.0%", "-"],
        ["worst", "case", "4/255", "50.0%", "50.0%"],
    ]
