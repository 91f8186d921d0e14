"""The README's tables are those of benchmarks/results, and the clock measures what it says."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402
from timing import interleaved  # noqa: E402


def test_readme_tables_are_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert tables.render(text) == text, "python benchmarks/tables.py rewrites them"


def test_a_changed_result_changes_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.TABLES, "quickstart", lambda: "| other |")
    text = (ROOT / "README.md").read_text()
    assert tables.render(text) != text


def test_the_recorded_quickstart_keeps_its_promise() -> None:
    """95 % clean and 65 % under AutoAttack at eps 0.025 on the 360 held-out digits, every seed."""
    record = json.loads((tables.RESULTS / "quickstart_cpu.json").read_text())
    for seed in record["seeds"]:
        natural, gradnorm = (
            {row["attack"]: row["accuracy"] for row in model["results"]} for model in seed["models"]
        )
        assert gradnorm["clean"] >= 0.95 and gradnorm["autoattack"] >= 0.65
        assert natural["clean"] >= 0.95 and natural["autoattack"] < 0.05


def test_the_clock_interleaves_and_counts_calls() -> None:
    order: list[str] = []
    arms = {
        "short": lambda: (order.append("short"), time.sleep(0.002)),
        "long": lambda: (order.append("long"), time.sleep(0.02)),
    }
    timings = interleaved(arms, rounds=3, calls=2, warmup=1)
    assert order == ["short", "long"] + 3 * (2 * ["short"] + 2 * ["long"])
    assert 0.002 <= timings["short"].mean < timings["long"].mean
    assert len(timings["long"].rounds) == 3 and timings["long"].median >= 0.02


@pytest.mark.parametrize("script", ["compiled_step.py", "quickstart.py", "tables.py"])
def test_scripts_say_what_they_do(script: str) -> None:
    out = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), "--help"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0 and "usage" in out.stdout
