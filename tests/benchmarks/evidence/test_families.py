"""The scan of timm's families sees a missing derivative, its twin, and a process that ends."""

import os
from typing import Any

import pytest

from benchmarks.evidence import families


def end_process(family: str) -> dict[str, Any]:
    """Stands for a network that ends its process."""
    os._exit(1)


@pytest.mark.slow
def test_an_operator_without_a_second_derivative_is_replaced() -> None:
    row = families.scan_apart("mobilenetv3")
    assert row["with_twins"]["outcome"] == "finite" and row["with_twins"]["penalty"] > 0
    assert set(row["replaced"]) == {"hardswish", "hardsigmoid"}
    assert row["without_twins"]["outcome"] == "raises"
    assert "hardsigmoid_backward is not implemented" in row["without_twins"]["error"]


@pytest.mark.slow
def test_a_network_that_ends_its_process_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "scan", end_process)
    row = families.scan_apart("beit")
    assert row == {"family": "beit", "with_twins": {"outcome": "killed"}}


def test_the_table_counts_every_family() -> None:
    finite, raises = {"outcome": "finite"}, {"outcome": "raises"}
    rows = [
        {"family": "a", "with_twins": finite, "replaced": {}},
        {"family": "b", "with_twins": finite, "replaced": {}},
        {"family": "c", "with_twins": finite, "without_twins": raises, "replaced": {"norm": 2}},
        {"family": "d", "with_twins": finite, "without_twins": finite, "replaced": {"norm": 1}},
        {"family": "e", "with_twins": {"outcome": "killed"}},
    ]
    head = {"method": "gradnorm", "images": 2, "versions": {"torch": "2", "timm": "1"}}
    lines = families.table({"file": "x.json", "rows": rows, **head}).splitlines()
    assert lines[2:6] == [
        "| finite | 2 | the others |",
        "| finite, not without the twins | 1 | c (norm) |",
        "| finite, also without the twins | 1 | d (norm) |",
        "| killed | 1 | e |",
    ]
    assert "each of timm's 5 families" in lines[-1]
