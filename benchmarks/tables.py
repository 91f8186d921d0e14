"""Writes the tables of README.md and docs/results.md from the records in benchmarks/results/.

    python benchmarks/tables.py            # rewrites both pages between their markers
    python benchmarks/tables.py --check    # fails if a page and the records differ

Each benchmark makes the tables of its own records, whose names begin with its own name. A new
benchmark needs a pair of markers, <!-- table:NAME --> and <!-- /table -->, in docs/results.md.
"""

import argparse
import functools
import importlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # the checkout, in which `benchmarks` is a package
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def make(function: str, *patterns: str, together: bool = False) -> str:
    """Returns the Markdown tables of some JSON records, or "" if there are none.

    function: name of the function that makes a table. patterns: glob patterns of the records'
    names. together: whether all records make one table. If False, each record makes its own.
    """
    paths = [path for pattern in patterns for path in sorted(RESULTS.glob(pattern))]
    records = [{"file": path.name} | json.loads(path.read_text()) for path in paths]
    if not records:
        return ""
    module, _, name = function.rpartition(".")
    table = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    return table(*records) if together else "\n\n".join(map(table, records))


SWIN = "cost_swin_b_nvidia_h200_bf16"
README = {
    "cost_summary": (
        *("step.cost.summary_table", "cost_swin_b_counts.json"),
        *(f"{SWIN}.json", f"{SWIN}_no_graphs.json"),
    ),
    "robustness_summary": (
        "evidence.robustness.summary_table",
        "robustness_digits_cpu_15_epochs.json",
    ),
}
"""Name of each table in README.md -> function that makes it, and the JSON records that it takes."""
RESULTS_PAGE = {
    path.stem: f"{path.parent.name}.{path.stem}"
    for path in sorted((ROOT / "benchmarks").glob("*/*.py"))
} | {"kernels": "kernels.ops", "kernel_builds": "kernels.builds", "edge": "evidence.robustness"}
"""Name of each table in docs/results.md -> module of the benchmark that makes it. The names of the
JSON records for a table begin with the table's name."""
TABLES = {
    **{name: functools.partial(make, *row, together=True) for name, row in README.items()},
    **{
        name: functools.partial(make, f"{module}.table", f"{name}.json", f"{name}_*.json")
        for name, module in RESULTS_PAGE.items()
    },
}
"""Name of each table -> function that makes it."""


def render(page: Path, text: str) -> str:
    """Returns the text of a page in which each table between its markers is made again.

    Raises AssertionError if the page has no markers for one of its tables.
    """
    for name, table in TABLES.items():
        if (page.name == "README.md") != (name in README):
            continue
        start, end = f"<!-- table:{name} -->", "<!-- /table -->"
        pattern = re.compile(f"{re.escape(start)}\n.*?{re.escape(end)}", re.S)
        made = table()
        if not made and start not in text:
            continue  # the table's benchmark has no records yet
        assert pattern.search(text), f"{page.name} lacks {start}"
        block = f"{start}\n{made}\n{end}"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    args = parser.parse_args()
    status = 0
    for page in PAGES:
        text = page.read_text()
        made = render(page, text)
        if not args.check:
            page.write_text(made)
        elif made != text:
            name = page.relative_to(ROOT)
            print(f"{name} differs from benchmarks/results: run python benchmarks/tables.py")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
