"""benchmarks/step/calibration.py: the paper's seconds explained, and those of others predicted."""

import json
from typing import Any

import pytest

pytest.importorskip("triton")  # Linux alone

from benchmarks.common.arguments import RESULTS  # noqa: E402
from benchmarks.step import calibration  # noqa: E402


def row(operations_s: float, bytes_s: float, paper_s: float) -> dict[str, Any]:
    return {"operations_s": operations_s, "bytes_s": bytes_s, "paper_s": paper_s}


def test_a_fit_finds_the_numbers_that_made_the_seconds() -> None:
    counts = [(0.4, 0.1), (0.7, 0.6), (1.6, 0.5)]
    one = [row(a, b, (a + b) / 0.8 + 0.1) for a, b in counts]
    assert calibration.fit("one efficiency, a constant", one) == pytest.approx([1 / 0.8, 0.1])
    two = [row(a, b, a / 0.6 + b / 0.7) for a, b in counts]
    assert calibration.fit("two efficiencies", two) == pytest.approx([1 / 0.6, 1 / 0.7])


def test_an_update_takes_its_work_over_the_rates_of_the_data_sheet() -> None:
    found = calibration.row_of("gradnorm-paper", "fp32", 15.7e12, 1.8e12)
    assert (found["operations_s"], found["bytes_s"]) == pytest.approx((1, 2))
    assert found["paper_s"] == 1.848
    assert calibration.row_of("pgd_at", "fp16", 125e12, 0)["operations_s"] == pytest.approx(1)


def test_the_record_explains_the_papers_seconds() -> None:
    record = json.loads((RESULTS / "calibration_v100.json").read_text())
    paper, ours = record["rows"][:3], record["rows"][3:]
    for model, tolerance in (("two efficiencies", 0.06), ("one efficiency, a constant", 0.015)):
        assert [row[model]["over_paper"] for row in paper] == pytest.approx([1] * 3, abs=tolerance)
        assert all(row[model]["one_s"] < row[model]["eight_s"] for row in ours)
    assert record["prediction"] and {row["precision"] for row in ours} == {"fp32", "fp16"}
    assert "Predictions" in calibration.table(record)
