"""Writes the tables of README.md and docs/results.md from the records in benchmarks/results/.

    python benchmarks/tables.py            # rewrites both pages between their markers
    python benchmarks/tables.py --check    # fails if a page and the records differ

Each benchmark makes the tables of its own records. A record that has no table yet needs a row of
`TABLES` and a pair of markers, <!-- table:NAME --> and <!-- /table -->, on a page.
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


def read(name: str) -> dict:
    """Returns the content of a JSON file in benchmarks/results, with its name under the key
    "file"."""
    return {"file": name} | json.loads((RESULTS / name).read_text())


def make(module: str, pattern: str) -> str:
    """Returns the Markdown tables of all JSON records of a benchmark, or "" if there are none.

    module: name of the benchmark's module. pattern: glob pattern of the records' names.
    """
    paths = sorted(RESULTS.glob(pattern))
    if not paths:
        return ""
    table = importlib.import_module(f"benchmarks.{module}").table
    return "\n\n".join(table(read(path.name)) for path in paths)


def make_short(function: str, *names: str) -> str:
    """Returns a short Markdown table for README.

    function: name of the function that makes it. names: JSON records that it takes.
    """
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(f"benchmarks.{module}"), name)(*map(read, names))


SWIN = "cost_swin_b_nvidia_h200_bf16"
README = {
    "headline": functools.partial(make_short, "step.cost.headline", f"{SWIN}.json"),
    "cost_summary": functools.partial(
        make_short, "step.cost.summary",
        *("cost_swin_b_counts.json", f"{SWIN}.json", f"{SWIN}_no_graphs.json"),
    ),
    "robustness_summary": functools.partial(
        make_short, "evidence.robustness.summary_table", "robustness_digits_cpu.json"
    ),
}  # fmt: skip
"""Name of each table in README.md -> function that makes the table."""
TABLES = README | {
    name: functools.partial(make, module, pattern)
    for name, module, pattern in (
        ("loader", "data.loader", "loader_*.json"),
        ("small_data", "data.small_data", "small_data_*.json"),
        ("attacks", "evidence.attacks", "attacks_*.json"),
        ("quickstart", "evidence.quickstart", "quickstart_*.json"),
        ("kills", "evidence.kills", "kills_*.json"),
        ("families", "evidence.families", "families_*.json"),
        ("robustness", "evidence.robustness", "robustness_*.json"),
        ("edge", "evidence.edge", "edge_*.json"),
        ("activations", "evidence.activations", "activations_*.json"),
        ("kernels", "kernels.ops", "kernels_*.json"),
        ("kernel_builds", "kernels.builds", "kernel_builds.json"),
        ("cost", "step.cost", "cost_*.json"),
        ("memory_budget", "step.memory_budget", "memory_budget.json"),
        ("precision", "step.precision", "precision_*.json"),
        ("predict", "step.predict", "predict_*.json"),
        ("scaling", "step.scaling", "scaling_*.json"),
    )
}
"""Name of each table -> function that makes it. All tables but README's are in docs/results.md."""


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
            continue  # nothing has been measured yet
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
