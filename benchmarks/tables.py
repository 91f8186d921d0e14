"""Writes the tables of README.md and docs/results.md from the records in benchmarks/results/.

python benchmarks/tables.py            # rewrites both pages between their markers
python benchmarks/tables.py --check    # fails if a page and the records differ
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


def plus_minus(value: dict | None, form: str) -> str:
    """Mean and deviation as benchmarks/step/cost.py records them."""
    return f"{value['mean']:{form}} ± {value['std']:{form}}" if value else ""


def markdown(columns: dict[str, list[str]]) -> list[str]:
    """A table's lines; columns with no cell filled are left out."""
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [f"| {' | '.join(filled)} |", f"| {' | '.join('---' for _ in filled)} |"]
    return lines + [f"| {' | '.join(cells)} |" for cells in zip(*filled.values(), strict=True)]


def over_paper(row: dict, other: str) -> str:
    """The paper's own ratio beside which ours stands."""
    return f"{row['paper']['time_over'][other]:.2f}" if row["paper"] else ""


COST_COLUMNS = {
    "arm": lambda r: r["arm"] + (", compiled" if r["compiled"] else ""),
    "precision": lambda r: r["precision"],
    "passes": lambda r: f"{r['passes']:g}",
    "GFLOP an image": lambda r: f"{r['flops_an_image'] / 1e9:.3g}",
    "in forwards": lambda r: f"{r['forwards_by_count']:.2f}",
    "s a batch": lambda r: plus_minus(r.get("seconds_a_batch"), ".4f"),
    "images/s": lambda r: f"{r['images_per_s']:.0f}" if r.get("images_per_s") else "",
    "time over natural": lambda r: plus_minus(r.get("time_over", {}).get("natural"), ".2f"),
    "over PGD-3": lambda r: plus_minus(r.get("time_over", {}).get("pgd_at"), ".2f"),
    "over the paper's PGD-3": lambda r: plus_minus(
        r.get("time_over", {}).get("pgd_at-paper"), ".2f"
    ),
    "speed over the paper's way, fp32": lambda r: plus_minus(
        r.get("times_as_fast_as", {}).get("gradnorm-paper, fp32"), ".2f"
    ),
    "FLOP utilisation": lambda r: (
        f"{100 * r['flop_utilisation']:.0f} %" if "flop_utilisation" in r else ""
    ),
    "peak GiB": lambda r: f"{r['peak_bytes']['total'] / 2**30:.1f}" if r.get("peak_bytes") else "",
    "J an image": lambda r: plus_minus(r.get("joules_an_image"), ".3f"),
    "launches": lambda r: (
        f"{r['launches']['count']:.0f}" if r.get("launches") and r["launches"]["count"] else ""
    ),
    "GPU busy": lambda r: (
        f"{100 * r['launches']['busy_s'] / r['seconds_a_batch']['mean']:.0f} %"
        if r.get("seconds_a_batch") and (r.get("launches") or {}).get("busy_s")
        else ""
    ),
    "paper: passes": lambda r: f"{r['paper']['passes']}" if r["paper"] else "",
    "paper: s a batch": lambda r: f"{r['paper']['seconds_a_batch']:.3f}" if r["paper"] else "",
    "paper: over natural": lambda r: over_paper(r, "natural"),
    "paper: over PGD-3": lambda r: over_paper(r, "pgd_at"),
}
"""Header -> an arm's cell; a column without any is left out."""


def cost_table(record: dict) -> str:
    """One run of benchmarks/step/cost.py."""
    failed = [row for row in record["not_timed"] if row["failed"]]
    rows = record["rows"] + [row for row in record["not_timed"] if row not in failed]
    columns = {name: [cell(row) for row in rows] for name, cell in COST_COLUMNS.items()}
    notes = [f"{record['model']}, {record['img_size']} px, batch {record['batch']}"]
    if len(set(columns.get("precision", ()))) == 1:
        notes[0] += f", {columns.pop('precision')[0]}"
    lines = markdown(columns)
    if record["rows"]:
        device, rounds = record["device"].replace("cpu", "CPU"), record["rounds"]
        notes.append(f"{device}, mean ± deviation over {rounds} interleaved rounds")
        if record["meaningful_times"]:
            graphs = "CUDA graphs" if record["cuda_graphs"] else "no CUDA graphs"
            notes.append(f"{graphs} in the compiled arms")
        launched = {row["launches"]["what"] for row in rows if row.get("launches")}
        notes += [f"launches: {what}" for what in sorted(launched)]
        if not record["meaningful_times"]:
            notes.append("on a CPU, ratios mean something within this run alone")
    else:
        notes.append("counted, nothing timed")
    for start in record.get("start_times", ()):
        if not start["failed"]:
            cold, warm = (start.get(k, start.get(f"meaningless_{k}")) for k in ("cold_s", "warm_s"))
            seconds = f" ({cold:.0f} and {warm:.0f} s)" if record["meaningful_times"] else ""
            notes.append(
                f"first update of {start['arm']}, {start['precision']}: {cold / warm:.1f} times as "
                f"long with an empty compiler's cache as with a full one{seconds}"
            )
    notes.append("paper: arXiv 2409.20139, Table 3, Swin-B at 224 px in fp32 on 8 V100")
    notes += [f"failed: {row['arm']}, {row['precision']}: {row['failed']}" for row in failed]
    torch_version = record["versions"]["torch"]
    source = f"torch {torch_version} (`benchmarks/results/{record['file']}`)."
    return "\n".join([*lines, "", "; ".join([*notes, source])])


def cost() -> str:
    """What every arm costs, a table a run; empty while there is none."""
    paths = sorted(RESULTS.glob("cost_*.json"))
    return "\n\n".join(cost_table(json.loads(path.read_text())) for path in paths)


def predict_table(record: dict, measured: list[dict]) -> str:
    """One run of predict.py, and beside it what cost.py measured on a card of the same name.
    measured: its records."""
    same = ("model", "img_size", "batch", "kernels")
    found = {
        (r["device"], *(r[k] for k in same), row["arm"], row["precision"]): row
        for r in measured
        for row in r["rows"]
        if row["compiled"]
    }
    columns = {
        "card": lambda r, m: r["card"],
        "arm": lambda r, m: r["arm"],
        "precision": lambda r, m: r["precision"],
        "kernels": lambda r, m: r["kernels"],
        "launches": lambda r, m: f"{sum(r['launches'].values()):.0f}",
        "measured launches": lambda r, m: (
            f"{m['launches']['count']:.0f}" if m.get("launches") and m["launches"]["count"] else ""
        ),
        "eager operators": lambda r, m: f"{r['eager']['operators']:.0f}",
        "MB an image": lambda r, m: f"{r['bytes_an_image'] / 1e6:.0f}",
        "eager MB an image": lambda r, m: f"{r['eager']['bytes_an_image'] / 1e6:.0f}",
        "eager over compiled: launches, bytes": lambda r, m: (
            f"{r['eager']['operators'] / sum(r['launches'].values()):.1f}, "
            f"{r['eager']['bytes_an_image'] / r['bytes_an_image']:.1f}"
        ),
        "over natural": lambda r, m: (
            f"{r['over_natural']['bytes_an_image']:.2f}" if r["over_natural"] else ""
        ),
        "GFLOP an image": lambda r, m: f"{r['flops_an_image'] / 1e9:.1f}",
        "kept MB an image": lambda r, m: f"{r['kept_bytes_an_image'] / 1e6:.0f}",
        "images/s at the roofline": lambda r, m: f"{r['images_per_s']:.0f}",
        "measured images/s": lambda r, m: (
            f"{m['images_per_s']:.0f}" if m.get("images_per_s") else ""
        ),
    }
    pairs = []
    for row in record["rows"]:
        card = record["gpus"][row["gpu"]]["name"]
        network = (record["model"], record["img_size"], record["batch"])
        key = (card, *network, row["kernels"], row["arm"], row["precision"])
        pairs.append((row | {"card": card}, found.get(key, {})))
    lines = markdown({name: [cell(*pair) for pair in pairs] for name, cell in columns.items()})
    notes = [
        "Predictions but for the columns named measured",
        f"{record['model']}, {record['img_size']} px, batch {record['batch']}",
        "over natural: bytes over those of natural with whichever kernels move fewer",
        "an operator of fastgn_kernels counts as one launch",
        "eager: PyTorch's operators one by one, counted",
        *(f"{gpu['name']}: {gpu['source']}" for gpu in record["gpus"].values()),
    ]
    notes += [f"tried: {setting}" for setting in record["tried"]]
    if any(row["extrapolated_from_depths"] for row in record["rows"]):
        notes.append("deep networks extrapolated from shallow ones, see the record")
    source = f"`benchmarks/results/{record['file']}`"
    notes.append(f"torch {record['versions']['torch']} ({source}).")
    return "\n".join([*lines, "", "; ".join(notes)])


def predict() -> str:
    """What arms would cost on cards that were not there; empty while there is no prediction."""
    measured = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("cost_*.json"))]
    measured.sort(key=lambda record: record["cuda_graphs"])  # where both are there, what trains
    paths = sorted(RESULTS.glob("predict_*.json"))
    return "\n\n".join(predict_table(json.loads(p.read_text()), measured) for p in paths)


def precision() -> str:
    """How far each arm's gradient is from float64, a table a device; empty while there is none."""
    tables = []
    for path in sorted(RESULTS.glob("precision_*.json")):
        record = json.loads(path.read_text())
        cases: dict[str, list[dict]] = {}
        for case in record["cases"]:
            state = f"after {case['trained_by']}" if case["trained_by"] else "untrained"
            cases.setdefault(f"{case['network']}, {state}", []).append(case)
        names = [row["arm"] for row in record["cases"][0]["arms"]]
        lines = [f"| step | {' | '.join(cases)} |", f"| --- |{' --- |' * len(cases)}"]
        for index, name in enumerate(names):
            cells = []
            for same in cases.values():
                values = [case["arms"][index]["whole"] for case in same]
                error, cosine = (
                    statistics.fmean(value[key]["mean"] for value in values)
                    for key in ("relative_error", "cosine")
                )
                cells.append(f"{error:.1e} ({cosine:.4f})")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        images = ", ".join(dict.fromkeys(case["images"] for case in record["cases"]))
        number = values[0]["relative_error"]["n"]
        lines.append("")
        lines.append(
            f"{record['device'].replace('cpu', 'CPU')}: relative L2 error (cosine) of all weights' "
            f"gradient against the exact one in float64, mean over {number} batches of "
            f"{record['batch_size']} for each kind of images ({images}); torch "
            f"{record['versions']['torch']} (`benchmarks/results/{path.name}`)."
        )
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def scaling() -> str:
    """Predicted runs on several GPUs, a table a card, and how near the prediction came on a CPU."""
    tables = []
    for path in sorted(RESULTS.glob("scaling_*.json")):
        record = json.loads(path.read_text())
        source = f"torch {record['versions']['torch']} (`benchmarks/results/{path.name}`)."
        if not record.get("prediction"):
            lines = [
                "| micro-batches | model | predicted : measured, two processes on a CPU |",
                "| --- | --- | --- |",
            ]
            for row in record["rows"]:
                ratio = row["predicted_over_measured"]
                lines.append(
                    f"| {row['grad_accum_steps']} | {row['model']} "
                    f"| {plus_minus(ratio, '.2f')} (n = {ratio['n']}) |"
                )
            lines += ["", f"{record['meaning']}; eager gradnorm; {source}"]
        else:
            lines = [
                "| GPUs | nodes | global batch | images/s | efficiency | days |",
                "| --- | --- | --- | --- | --- | --- |",
            ]
            lines += [
                f"| {r['gpus']} | {r['nodes']} | {r['global_batch']} | {r['images_per_s']:.0f} "
                f"| {100 * r['efficiency']:.0f} % | {r['days']:.2f} |"
                for r in record["rows"]
            ]
            links = record["links"]
            lines += [
                "",
                f"Prediction; one {record['card'].upper()}'s speed {record['source']}; "
                f"{record['model']}, {record['batch']} x {record['grad_accum_steps']} images a "
                f"GPU, {record['epochs']:g} epochs of ImageNet-1k; "
                f"{record['gradient_bytes'] / 1e6:.0f} MB of gradients over "
                f"{links['intra_bytes_per_s'] / 1e9:g} GB/s in a node and "
                f"{links['inter_bytes_per_s'] / 1e9:g} between nodes, overlap "
                f"{record['overlap']:g}; {source}",
            ]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def loader() -> str:
    """What each loader gives, a table a machine."""
    tables = []
    for path in sorted(RESULTS.glob("loader_*.json")):
        record = json.loads(path.read_text())
        ratios = record.get("ratios", {})
        gpu = record["meaningful_times"]
        columns = {
            "loader": lambda r: r["loader"],
            "images/s": lambda r, gpu=gpu: plus_minus(r["images_per_s"], ".0f") if gpu else "",
            "CPU ms an image": lambda r, gpu=gpu: (
                plus_minus(r["cpu_ms_an_image"], ".1f") if gpu else ""
            ),
            "waiting": lambda r: (
                f"{100 * r['wait_share']['mean']:.1f} %" if r["wait_share"] else ""
            ),
            "dali: times as fast": lambda r, q=ratios: plus_minus(
                q.get(f"dali over {r['loader']}", {}).get("images_per_s"), ".2f"
            ),
            "dali: times less CPU time": lambda r, q=ratios: plus_minus(
                q.get(f"dali over {r['loader']}", {}).get("cpu_ms_an_image"), ".2f"
            ),
        }
        # a CPU's times mean nothing alone
        rows = [r for r in record["rows"] if gpu or f"dali over {r['loader']}" in ratios]
        lines = markdown({n: [cell(r) for r in rows] for n, cell in columns.items()})
        row = record["rows"][-1]
        where = record["device"].replace("cpu", f"{record['hardware']['cpu_count']} CPU cores")
        lines.append("")
        lines.append(
            f"{where}: {row['images']}, {row['img_size']} px, the paper's augmentation, batch "
            f"{row['batch_size']}, {row['workers']} workers; mean ± deviation over "
            f"{row['images_per_s']['n']} interleaved rounds; timm: its create_loader; torch "
            f"{record['versions']['torch']} (`benchmarks/results/{path.name}`)."
        )
        tables.append("\n".join(lines))
    for path in sorted(RESULTS.glob("small_data_*.json")):
        record = json.loads(path.read_text())
        share, options = record["share"], " ".join(record["options"])
        where = record["device"].replace("cpu", f"{record['hardware']['cpu_count']} CPU cores")
        tables.append(
            f"`device`, {where}: a batch of {record['batch_size']} images as CIFAR-10's takes "
            f"{share['mean']:.2%} ± {share['std']:.2%} (n = {share['n']}) of PreActResNet-18's "
            f"gradnorm update on them, with {options}; torch {record['versions']['torch']} "
            f"(`benchmarks/results/{path.name}`)."
        )
    return "\n\n".join(tables)


def attacks() -> str:
    """What an evaluation costs over the attacks alone, a table a run; empty while there is none."""
    tables = []
    for path in sorted(RESULTS.glob("attacks_*.json")):
        record = json.loads(path.read_text())
        columns = {
            "attack": lambda r: r["attack"],
            "over the direct call": lambda r: (
                f"{100 * r['overhead']['mean']:+.1f} ± {100 * r['overhead']['std']:.1f} %"
            ),
            "images/s": lambda r: plus_minus(r.get("images_per_s"), ".0f"),
            "withstand": lambda r: f"{r['robust']:.1%}",
        }
        for way in ("bf16", "compiled"):
            columns[f"{way}: times as fast"] = lambda r, way=way: plus_minus(
                r.get(way, {}).get("times_as_fast"), ".2f"
            )
            columns[f"{way}: other verdicts"] = lambda r, way=way: (
                f"{r[way]['differing_verdicts']:.2%}" if way in r else ""
            )
        rows = record["rows"]
        lines = markdown({name: [cell(row) for row in rows] for name, cell in columns.items()})
        lines.append("")
        lines.append(
            f"{record['model']} on {record['device'].replace('cpu', 'a CPU')}: {record['number']} "
            f"images ({record['images']}) of {record['img_size']} px in batches of "
            f"{record['batch_size']}, Linf, eps {255 * record['eps']:g}/255; mean ± deviation over "
            f"{rows[0]['overhead']['n']} interleaved rounds; torch {record['versions']['torch']} "
            f"(`benchmarks/results/{path.name}`)."
        )
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def headline() -> str:
    """What it is for, in one measurement: the exact step against the paper's way of running it."""
    path = RESULTS / "cost_swin_b_nvidia_h200_bf16.json"
    if not path.exists():
        return ""
    record = json.loads(path.read_text())
    rows = {(row["arm"], row["precision"]): row for row in record["rows"]}
    ours, paper = rows["gradnorm exact", "bf16"], rows["gradnorm-paper", "fp32"]
    speed = ours["times_as_fast_as"]["gradnorm-paper, fp32"]
    energy = ours["joules_an_image"]["mean"] / paper["joules_an_image"]["mean"]
    eager = {p: rows["gradnorm-paper", p]["images_per_s"] for p in ("fp32", "bf16")}
    return (
        f"Measured on one {record['device']}: fastgn trains Swin-B ({record['img_size']} px, batch "
        f"{record['batch']}, bf16) with the exact penalty at {ours['images_per_s']:.0f} images/s. "
        f"An update takes {plus_minus(ours['time_over']['natural'], '.2f')} times as long as one "
        f"of natural training. The same update in eager PyTorch, as the paper runs it, reaches "
        f"{eager['bf16']:.0f} images/s in bf16 and {eager['fp32']:.0f} in fp32, the paper's "
        f"precision. Compared with the latter, fastgn is {plus_minus(speed, '.2f')} times as fast "
        f"and takes {energy:.2f} times the energy (n = {record['rounds']}, "
        f"`benchmarks/results/{path.name}`)."
    )


def percent(value: dict | None) -> str:
    """An accuracy's mean, and its deviation where there are several."""
    if value is None:
        return ""
    text = f"{100 * value['mean']:.1f}"
    return f"{text} ± {100 * value['std']:.1f}" if value["n"] > 1 else text


def accuracy_columns(rows: list[dict]) -> dict[str, list[str]]:
    """A column an attack and eps, clean and AutoAttack first."""
    order = {"clean": 0, "autoattack": 1}
    keys = {(order.get(a["attack"], 2), a["attack"], a["eps"]) for r in rows for a in r["accuracy"]}
    out = {}
    for _, attack, eps in sorted(keys):
        name = {"autoattack": "AutoAttack", "apgd-ce+t": "APGD-CE+T", "pgd-20": "PGD-20"}.get(
            attack, attack
        )
        out[f"{name} {eps:.4g}" if eps else f"{name}, %"] = [
            percent(
                next(
                    (
                        a["accuracy"]
                        for a in row["accuracy"]
                        if (a["attack"], a["eps"]) == (attack, eps)
                    ),
                    None,
                )
            )
            for row in rows
        ]
    return out


def over_seeds(record: dict) -> str:
    count = record["seeds"]
    return f"{count} seeds, mean ± deviation" if count > 1 else "1 seed"


def robustness() -> str:
    """Every arm at equal passes and at equal time, a table a run; empty while there is none."""
    tables = []
    for path in sorted(RESULTS.glob("robustness_*.json")):
        record = json.loads(path.read_text())
        old = record.get("superseded", {})
        rows = [row for row in record["rows"] if row["accuracy"] and row["arm"] not in old]
        several = len(record["networks"]) > 1
        both = {"passes", "time"}
        columns = {
            "network": [row["network"] if several else "" for row in rows],
            "arm": [row["arm"] for row in rows],
            "equal": ["both" if set(row["budgets"]) == both else row["budgets"][0] for row in rows],
            "epochs": [str(row["epochs"]) for row in rows],
            "operations an update": [f"{row['units']:.3g}" for row in rows],
            "time over natural": [f"{row['seconds_over']:.2f}" for row in rows],
            "s": [plus_minus(row.get("seconds"), ".0f") for row in rows],
            "kJ": [
                f"{row['joules']['mean'] / 1e3:.1f}" if row.get("joules") else "" for row in rows
            ],
        }
        lines = markdown(columns | accuracy_columns(rows))
        images = record["images"]
        notes = [
            f"{record['data']}, {', '.join(record['networks'])}; "
            f"{record['device'].replace('cpu', 'CPU')}, {record['precision']} where an arm does "
            f"not say otherwise; {over_seeds(record)}",
            f"all from one natural start a seed, for Linf eps {record['eps']:.4g}",
            "equal: to gradnorm's passes, or to its time",
            f"AutoAttack on {images['autoattack, each seed its own']} images a seed, each seed's "
            f"own, the rest on {images['pgd-20']}",
            f"time: {record['time']}",
        ]
        notes += [f"left out: {arm} ({why})" for arm, why in old.items()]
        notes += [] if record["complete"] else ["not all of it has run yet"]
        failed = [f"{r['arm']} (seed {f['seed']})" for r in record["rows"] for f in r["failed"]]
        notes += [f"failed: {', '.join(failed)}"] if failed else []
        source = f"torch {record['versions']['torch']} (`benchmarks/results/{path.name}`)."
        answers = [
            f"- {note['question']} {'; '.join(note['answers'])}." for note in record["notes"]
        ]
        tables.append("\n".join([*lines, "", "; ".join([*notes, source]), "", *answers]).rstrip())
    return "\n\n".join(tables)


def edge() -> str:
    """Edge regularisation beside natural training; empty while there is no record."""
    path = RESULTS / "edge_digits_cpu.json"
    if not path.exists():
        return ""
    record = json.loads(path.read_text())
    shown = ("clean", "pgd-20", "apgd-ce+t")
    rows = [
        row | {"accuracy": [a for a in row["accuracy"] if a["attack"] in shown]}
        for row in record["rows"]
    ]
    columns = {"arm": [row["arm"] for row in rows]} | accuracy_columns(rows)
    epochs, training = record["epochs"], record["training"]
    weight = 19  # --edge-weight, which the record does not name
    start = weight * training["ramp_start"]
    growth = (weight - start) / training["ramp_epochs"]
    notes = (
        f"{record['data']}, a Swin of 16 pixels, {over_seeds(record)}; {record['images']} held-out "
        f"images; {epochs['start']} natural epochs, then {epochs['arm']} of each arm; weight of "
        f"the edges: {start:.3g} + {growth:.3g} per epoch, or {weight} from the first epoch on; "
        "APGD-CE+T: images that are right after APGD-CE and after targeted APGD; torch "
        f"{record['versions']['torch']} (`benchmarks/results/{path.name}`)."
    )
    return "\n".join([*markdown(columns), "", notes])


def activations() -> str:
    """gradnorm by activation, a table a run; empty while there is none."""
    tables = []
    for path in sorted(RESULTS.glob("activations_*.json")):
        record = json.loads(path.read_text())
        rows = sorted(record["rows"], key=lambda r: (r["width"], r["activation"]))
        columns = {
            "activation": [row["activation"] for row in rows],
            "width of the bend": [f"{row['width']:.2g}" for row in rows],
            "largest f''": [f"{row['largest']:.2g}" for row in rows],
            "share in kinks": [f"{row['kink']:.0%}" for row in rows],
            **accuracy_columns(rows),
            "cross-entropy": [f"{row['ce_after']['mean']:.2f}" for row in rows],
            "penalty, of the start's": [f"{row['penalty_ratio']['mean']:.1%}" for row in rows],
            "objective, of the start's": [f"{row['objective_ratio']['mean']:.1%}" for row in rows],
        }
        images = record["images"]
        notes = [
            f"{record['network']}, {record['data']}, {record['device'].replace('cpu', 'CPU')}, "
            f"{record['precision']}, {over_seeds(record)}",
            f"{record['epochs']['natural']} natural epochs, then {record['epochs']['gradnorm']} of "
            f"gradnorm at eps {record['eps']:.4g}",
            f"AutoAttack on {images['autoattack']} images, the rest on {images['pgd']}",
            *record["notes"][0]["answers"],
        ]
        source = f"torch {record['versions']['torch']} (`benchmarks/results/{path.name}`)."
        tables.append("\n".join([*markdown(columns), "", "; ".join([*notes, source])]))
    return "\n\n".join(tables)


def cost_summary() -> str:
    """Returns the README's table of costs: six updates of Swin-B, counted and measured."""
    counted, graphs, eager = (
        json.loads((RESULTS / f"cost_swin_b_{name}.json").read_text())
        for name in ("counts", "nvidia_h200_bf16", "nvidia_h200_bf16_no_graphs")
    )
    counts = {row["arm"]: row for row in counted["not_timed"]}
    timed = [row for record in (graphs, eager) for row in record["rows"]]
    shown = (
        ("natural training", "natural", "bf16, compiled"),
        ("FGSM from a random start", "fgsm_rs", ""),
        ("**gradient norm, fastgn**", "gradnorm exact", "bf16, compiled"),
        ("gradient norm, as the paper runs it", "gradnorm-paper", "fp32, eager"),
        ("PGD-3, without needless work", "pgd_at", ""),
        ("PGD-3, as the paper runs it", "pgd_at-paper", "bf16, eager"),
    )
    columns: dict[str, list[str]] = {}
    for title, arm, computed in shown:
        count = counts[arm]
        paper = count["paper"] if arm == "natural" or arm.endswith("-paper") else None
        row = next(
            (
                row
                for row in timed
                if computed == f"{row['precision']}, {'compiled' if row['compiled'] else 'eager'}"
                and row["arm"] == arm
            ),
            None,
        )
        cells = {
            "one update of": title,
            "forwards": f"{count['forwards_by_count']:.1f}",
            "GFLOP per image": f"{count['flops_an_image'] / 1e9:.0f}",
            "measured in": computed if row else "not measured",
            "images/s": f"{row['images_per_s']:.0f}" if row else "",
            "J per image": f"{row['joules_an_image']['mean']:.2f}" if row else "",
            "paper: s per batch": f"{paper['seconds_a_batch']:.3f}" if paper else "",
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    files = ", ".join(f"`{r['file']}`" for r in (counted, graphs, eager))
    note = (
        f"Swin-B at {graphs['img_size']} px. Operations are counted; 1 forward is a forward pass. "
        f"Speed and energy: one {graphs['device']}, batch {graphs['batch']}, mean of "
        f"{graphs['rounds']} rounds. Paper: Table 3, fp32 on 8 V100 "
        f"({files} in `benchmarks/results/`)."
    )
    return "\n".join([*markdown(columns), "", note])


def robustness_summary() -> str:
    """Returns the README's table of robustness: each method after as many operations."""
    record = json.loads((RESULTS / "robustness_digits_cpu.json").read_text())
    arms = {
        "natural": "natural training",
        "gradnorm": "gradient norm",
        "gradnorm-fd": "gradient norm by finite difference",
        "fgsm_rs": "FGSM from a random start",
        "pgd_at": "PGD-3 adversarial training",
        "trades": "TRADES",
        "gradnorm+fgsm": "gradient norm and FGSM in turn",
    }
    rows = [
        next(r for r in record["rows"] if r["arm"] == arm and "passes" in r["budgets"])
        for arm in arms
    ]
    eps = record["eps"]

    def column(attack: str, eps: float) -> list[str]:
        return [
            percent(a["accuracy"])
            for row in rows
            for a in row["accuracy"]
            if (a["attack"], a["eps"]) == (attack, eps)
        ]

    columns = {
        "method": list(arms.values()),
        "forwards per update": [f"{row['units']:.3g}" for row in rows],
        "clean, %": column("clean", 0),
        "AutoAttack, %": column("autoattack", eps),
        "PGD-20, %": column("pgd-20", eps),
    }
    images = record["images"]
    note = (
        f"A small Swin on scikit-learn's digits, Linf eps {eps:g} of the pixels' range 0..1, "
        f"{over_seeds(record)}, equal numbers of operations in training; AutoAttack on "
        f"{images['autoattack, each seed its own']} images per seed, the rest on "
        f"{images['pgd-20']} (`benchmarks/results/{record['file']}`)."
    )
    return "\n".join([*markdown(columns), "", note])


def families() -> str:
    """How many of timm's families gradnorm can train; empty while nothing has been measured."""
    path = RESULTS / "families_cpu.json"
    if not path.is_file():
        return ""
    record = json.loads(path.read_text())
    kinds: dict[str, list[str]] = {}
    for row in record["rows"]:
        outcome = row["with_twins"]["outcome"]
        replaced = ", ".join(sorted(row.get("replaced", ())))
        if outcome == "finite" and replaced:
            alone = row["without_twins"]["outcome"] == "finite"
            outcome = f"finite, {'also' if alone else 'not'} without the twins"
        named = f"{row['family']} ({replaced})" if replaced else row["family"]
        kinds.setdefault(outcome, []).append(named)
    most = max(kinds, key=lambda kind: len(kinds[kind]))
    columns = {
        "gradient of one update": list(kinds),
        "families": [str(len(named)) for named in kinds.values()],
        "which (operators replaced)": [
            "the others" if kind == most else ", ".join(named) for kind, named in kinds.items()
        ],
    }
    source = (
        f"One small network of each of timm's {len(record['rows'])} families, random weights, "
        f"{record['method']}, {record['images']} images, n = 1, fp32, CPU; torch "
        f"{record['versions']['torch']}, timm {record['versions']['timm']} "
        f"(`benchmarks/results/{path.name}`)."
    )
    return "\n".join([*markdown(columns), "", source])


TABLES = {
    "headline": headline,
    "cost_summary": cost_summary,
    "robustness_summary": robustness_summary,
    "loader": loader,
    "attacks": attacks,
    "quickstart": quickstart,
    "compiled_step": compiled_step,
    "kernels": kernels,
    "cost": cost,
    "predict": predict,
    "precision": precision,
    "scaling": scaling,
    "robustness": robustness,
    "edge": edge,
    "activations": activations,
    "families": families,
}


README = ("headline", "cost_summary", "robustness_summary")
"""Names of the README's tables. All others are in docs/results.md."""
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def render(page: Path, text: str) -> str:
    """Returns the text of a page with every table between its markers made anew.

    Raises AssertionError if the page has no place for one of its tables.
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
