"""Runs benchmarks/step/cost.py: `python benchmarks/cost.py --help` says what it measures."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the checkout, in which `benchmarks` is a package

from benchmarks.step.cost import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
