"""attacks.py at toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

from benchmarks.evidence import attacks


@pytest.mark.slow
def test_attacks_runs_at_toy_size(tmp_path: Path) -> None:
    output = tmp_path / "attacks_card.json"
    script = [sys.executable, "-m", "benchmarks.evidence.attacks"]
    options = ["--smoke", "--attacks", "clean", "pgd-20", "--output", str(output)]
    out = subprocess.run([*script, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stdout + out.stderr
    record = json.loads(output.read_text())
    assert record["meaningful_times"] is torch.cuda.is_available()
    clean, pgd = record["rows"]
    assert clean["robust"] == 1 and 0 <= pgd["bf16"]["differing_verdicts"] <= 1
    assert all(r["images_per_s"]["n"] == 2 and r["images_per_s"]["min"] > 0 for r in (clean, pgd))
    assert "| pgd-20 |" in attacks.table(record) and "attacks_card.json" in attacks.table(record)
    out = subprocess.run(
        [*script, "--eps", "7"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 2 and "--eps 7 must be above 0" in out.stderr
