"""The README's tables, generated from benchmarks/results/.

python benchmarks/tables.py            # rewrites README.md between its markers
python benchmarks/tables.py --check    # fails where README.md and the results differ
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def spread(values: list[float], form: str) -> str:
    """Mean, and the standard deviation where there are several."""
    text = format(statistics.fmean(values), form)
    return f"{text} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else text


def quickstart() -> str:
    """Accuracy of the quickstart's two models."""
    record = json.loads((RESULTS / "quickstart_cpu.json").read_text())
    seeds = record["seeds"]
    count = seeds[0]["models"][0]["images"]
    lines = ["| attack | eps | natural | gradnorm |", "| --- | --- | --- | --- |"]
    for index, row in enumerate(seeds[0]["models"][0]["results"]):
        cells = []
        for model in range(2):
            values = [100 * s["models"][model]["results"][index]["accuracy"] for s in seeds]
            cells.append(f"{spread(values, '.1f')} %")
        eps = "" if row["attack"] == "clean" else f"{row['eps']:g}"
        lines.append(f"| {row['attack']} | {eps} | {cells[0]} | {cells[1]} |")
    lines.append("")
    lines.append(
        f"{count} held-out digits, Linf, pixels in 0..1; {len(seeds)} seed"
        f"{'s, mean ± deviation' if len(seeds) > 1 else ''}; torch "
        f"{record['versions']['torch']}, {record['hardware']['cpu_count']} CPU cores "
        f"(`benchmarks/results/quickstart_cpu.json`)."
    )
    return "\n".join(lines)


def compiled_step() -> str:
    """The compiled step against eager, every file there is."""
    lines = [
        "| step | device | precision | batch | compiled : eager speed (min to max) "
        "| graphs | gradient error | cold compile |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(RESULTS.glob("compiled_step_*.json")):
        r = json.loads(path.read_text())
        device = r["hardware"].get("gpus", ["CPU"])[0]
        lines.append(
            f"| {r['recipe']}, {r['img_size']} px | {device} | {r['precision']} "
            f"| {r['batch_size']} "
            f"| {r['speedup_median']:.2f} ({r['speedup_min']:.2f} to {r['speedup_max']:.2f}, "
            f"n = {r['rounds']}) | {r['graphs']} | {r['relative_gradient_error']:.0e} "
            f"| {r['first_compiled_step_s']:.0f} s |"
        )
    return "\n".join(lines)


def kernels() -> str:
    """Each op at its first shape, in bfloat16, a table a card; empty while no GPU was at hand."""
    tables = []
    for path in sorted(RESULTS.glob("kernels_*.json")):
        record = json.loads(path.read_text())
        lines = [
            "| op | shape | share of copy bandwidth: forward, backward, second "
            "| second: eager / fused, time (memory) | all: compiled / fused, time | targets |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        ops: dict[str, dict] = {}
        for row in record["rows"]:
            orders = ops.setdefault(row["op"], {"shape": row["shape"], "dtype": row["dtype"]})
            if (row["shape"], row["dtype"]) == (orders["shape"], orders["dtype"]):
                orders[row["order"]] = row
        for op, orders in ops.items():
            if not {"forward", "backward", "second"} <= orders.keys():
                continue  # it failed, and the record says so
            shares = [
                f"{100 * orders[order]['share_of_copy']:.0f} %"
                for order in ("forward", "backward", "second")
            ]
            second = orders["second"]
            compiled = orders.get("all", {}).get("times_as_fast_as", {}).get("compile")
            judged = [t["met"] for row in record["rows"] if row["op"] == op for t in row["targets"]]
            lines.append(
                f"| {op} | {orders['shape']} | {', '.join(shares)} "
                f"| {second['times_as_fast_as']['eager']:.2f} "
                f"({second['times_less_memory_than']['eager']:.2f}) "
                f"| {'' if compiled is None else f'{compiled:.2f}'} "
                f"| {sum(judged)} of {len(judged)} |"
            )
        lines.append("")
        lines.append(
            f"{record['device']}, batch {record['batch_size']}, {second['dtype']}, medians of "
            f"{record['rounds']} calls with a cold cache; targets over all shapes, dtypes and "
            f"orders; torch {record['versions']['torch']}, triton {record['versions']['triton']} "
            f"(`benchmarks/results/{path.name}`)."
        )
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


TABLES = {"quickstart": quickstart, "compiled_step": compiled_step, "kernels": kernels}


def render(text: str) -> str:
    """README's text with every table between its markers made anew."""
    for name, table in TABLES.items():
        start, end = f"<!-- table:{name} -->", "<!-- /table -->"
        pattern = re.compile(f"{re.escape(start)}\n.*?{re.escape(end)}", re.S)
        made = table()
        if not made and start not in text:
            continue  # nothing has been measured yet
        assert pattern.search(text), f"README.md lacks {start}"
        block = f"{start}\n{made}\n{end}"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    made = render(text)
    if args.check:
        if made != text:
            print("README.md differs from benchmarks/results: python benchmarks/tables.py")
        return int(made != text)
    readme.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
