"""Tests whether gradnorm can train timm's networks, with a small network of each family.

    python -m benchmarks.evidence.families

A family is a module of timm.models. This program takes the smallest network of each family,
computes the gradient of one gradnorm update on two images, and checks whether all of it is finite.
It does so with and without fastgn's twins, which replace operators that cannot be differentiated
twice (fastgn/models/second_order.py). Each family has a process of its own, because some networks
crash. The same command continues an interrupted one with the next family.

Writes benchmarks/results/families_cpu.json.
"""

import argparse
import resource
import signal
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import timm
import torch

from benchmarks.common.arguments import finish, open_record, program
from benchmarks.common.records import taken_over, write_record
from benchmarks.common.tables import Record, make_table, with_notes
from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import UserError, first_line
from fastgn.models import network
from fastgn.objectives import gradnorm

CLASSES = 5
SIDES = (64, 96, None)
"""Sides of the images in pixels. The first one that the network takes is used. None means the
network's own size in timm."""
SHALLOW = ("deepseek_vit", "gemma4_vit")
"""Families of timm's networks without a small one. A large one is tried, with only two blocks."""
MEMORY_BYTES = 12 << 30
TIMEOUT_S = 600


def smallest_network(family: str) -> str:
    """Returns the name of the network with the fewest parameters in a family.

    Networks that cannot be made on the meta device are ignored. If no network can be made there,
    returns the first one of the family. family: name of a module of timm.models.
    """
    counts: dict[str, int] = {}
    names = timm.list_models(module=family)
    for name in names:
        try:
            with torch.device("meta"):
                candidate = timm.create_model(name, num_classes=CLASSES)
        except Exception:  # some networks read values in __init__, which fails on meta tensors
            continue
        counts[name] = sum(p.numel() for p in candidate.parameters())
    return min(counts or names, key=lambda name: counts.get(name, 0))


def build(family: str, name: str) -> tuple[network.Classifier, network.ModelReport]:
    """Returns a network with random weights, and a report on how it was built.

    Raises UserError if the network takes none of the image sizes in SIDES. family: name of a module
    of timm.models. name: timm's name of the network.
    """
    kwargs = ("depth=2",) if family in SHALLOW else ()
    for side in SIDES:
        torch.manual_seed(0)
        cfg = ArchitectureConfig(model=name, model_kwargs=kwargs, img_size=side)
        try:
            return network.build_model(cfg, CLASSES)
        except UserError as error:
            refusal = error
    raise refusal


def differentiate(model: network.Classifier) -> dict[str, Any]:
    """Computes the gradient of one gradnorm update, and returns a dict that says if it is finite.

    The value of "outcome" is "finite", "not finite", or "raises" if an operator has no second
    derivative. The other key is "penalty" (its value), "parameters" (names of those whose gradient
    is not finite), or "error" (the message).
    """
    torch.manual_seed(0)
    images_BCHW = torch.rand(2, 3, model.img_size, model.img_size)
    # make an area of one colour, where features may be 0 and the derivatives of norms may be NaN
    images_BCHW[0, :, :20] = 0.5
    targets_B = torch.tensor([0, 1])
    model.train()
    try:
        loss = gradnorm(model, images_BCHW.requires_grad_(), targets_B)
        loss.total.backward()
    except RuntimeError as error:  # an operator has no second derivative
        return {"outcome": "raises", "error": first_line(error)}
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, grad in grads.items() if not grad.isfinite().all()]
    if loss.total.isfinite() and not bad:
        return {"outcome": "finite", "penalty": float(loss.penalty)}
    return {"outcome": "not finite", "parameters": bad}


def scan(family: str) -> dict[str, Any]:
    """Tests gradnorm on one family of networks, and returns the outcome for the JSON record.

    This function must run in a process of its own, because some networks crash the process.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.alarm(TIMEOUT_S)  # after this time SIGALRM ends the process
    name = smallest_network(family)
    row: dict[str, Any] = {"family": family, "model": name}
    try:
        model, report = build(family, name)
        row |= {"replaced": report.replaced_operators, "with_twins": differentiate(model)}
        if report.replaced_operators:
            with patch.object(network, "replace_operators", lambda finder: {}):
                row["without_twins"] = differentiate(build(family, name)[0])
    except (UserError, MemoryError) as error:
        row["with_twins"] = {"outcome": "cannot be built", "error": first_line(error)}
    return row


def scan_apart(family: str) -> dict[str, Any]:
    """Calls `scan` for a family in a new process and returns the outcome.

    If the network crashes that process, the outcome is "killed".
    """
    with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
        try:
            return pool.submit(scan, family).result()
        except BrokenProcessPool:
            return {"family": family, "with_twins": {"outcome": "killed"}}


def table(record: Record) -> str:
    """Returns this benchmark's result as Markdown, made from its JSON record.

    It says how many of timm's families of networks gradnorm can train.
    """
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
        "gradient of one update": lambda r: r[0],
        "families": lambda r: str(len(r[1])),
        "which (operators replaced)": lambda r: "the others" if r[0] == most else ", ".join(r[1]),
    }
    return with_notes(
        make_table(list(kinds.items()), columns),
        record,
        f"One small network of each of timm's {len(record['rows'])} families, random weights, "
        f"{record['method']}, {record['images']} images, n = 1, fp32, CPU",
        f"timm {record['versions']['timm']}",
    )


@program()
def main(args: argparse.Namespace) -> int:
    """Tests gradnorm on each of timm's families that the JSON record lacks. Saves every result."""
    output, head = open_record(args, "families_cpu.json")
    head |= {"images": 2, "method": "gradnorm"}
    same = {"complete": False, "versions": head["versions"]}
    rows = taken_over(output, same).get("rows", [])
    done = {row["family"] for row in rows}
    for family in (family for family in timm.list_modules() if family not in done):
        row = scan_apart(family)
        rows.append(row)
        print(family, row.get("model"), row["with_twins"], row.get("replaced"), flush=True)
        write_record(output, head | {"complete": False, "rows": rows})
    return finish(output, head | {"rows": rows}, table)


if __name__ == "__main__":
    sys.exit(main())
