"""benchmarks/step/calibration.py: the paper's seconds explained, and those of others predicted."""

from typing import Any

import pytest

pytest.importorskip("triton")  # Linux alone

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
