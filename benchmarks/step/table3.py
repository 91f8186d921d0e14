"""Repeats Table 3 of arXiv 2409.20139, on one GPU or with torchrun on several GPUs of a machine.

    python benchmarks/cost.py --table3
    torchrun --nproc-per-node 8 benchmarks/cost.py --table3

The first rows are the paper's. Natural training, gradnorm and PGD-3 run in eager PyTorch and fp32,
and wait for the device after every micro-batch. As in the paper, gradnorm takes its images in two
halves, and the attack of PGD-3 computes weight gradients that nothing uses. The fourth row is PGD-3
without these weight gradients. The other rows are fastgn's updates in each --precision.

Each of --rounds runs starts new processes for each row. They build the network, warm up, and time
some updates of --batch images each. The slowest process counts. An error in one row leaves the
others. Several processes sum the gradients of gradnorm once per update, but the paper's code sums
them in each half. The loader, clipping and the average of the weights are left out. --counts-only,
--methods, --schedules, --minutes and --round-seconds have no effect.

Writes benchmarks/results/table3_<processes>_<device>.json after each run.
"""

import argparse
from typing import Any

from benchmarks.common.arguments import DEVICE, ON_GPU, finish, open_record
from benchmarks.common.ranks import call_in_ranks
from benchmarks.common.records import write_record
from benchmarks.common.timing import once
from benchmarks.step import cost
from benchmarks.step.arms import Arm
from benchmarks.step.cost import PAPER, Measurement, table
from fastgn import distributed
from fastgn.step.precision import explain_unsupported
from fastgn.step.retry import RetryingStep
from fastgn.step.step import Step

UPDATES = 20 if ON_GPU else 3
"""Number of updates that a run times."""
WARM_UP = 4
"""Number of updates before them, in which code is compiled and CUDA graphs are recorded."""
MICRO_BATCHES = {"gradnorm-paper": 2}
"""Method -> number of parts in which the paper takes the images of an update, if not 1."""
FAIR = Arm("pgd_at", kernels="reference")
"""PGD-3 in eager PyTorch and fp32, without weight gradients in its attack."""


def time_rank(world: distributed.World, args: argparse.Namespace, arm: Arm) -> dict[str, Any]:
    """Times updates as one of several processes. args: options of cost.py."""
    record, network = cost.build_network(args)
    kernels = arm.kernels or record["kernels"]
    bench = cost.UpdateBench(network.to(world.device), record["classes"], args.batch, kernels)
    options = arm.options(cuda_graphs=args.cuda_graphs and arm.compile)
    model = bench.plain if arm.paper else bench.network
    notes: list[str] = []
    step = RetryingStep(Step(model, arm.objective(), options, ranks=world), notes.append)
    parts = MICRO_BATCHES.get(arm.method, 1)
    batches = list(zip(bench.images.chunk(parts), bench.targets.chunk(parts), strict=True))

    def updates(count: int) -> None:
        for _ in range(count):
            step(batches, bench.ramp)
            bench.apply_gradients(step)

    updates(WARM_UP)
    world.barrier()
    seconds = once(lambda: updates(UPDATES)) / UPDATES
    micro_batch = step.step.micro_batch or args.batch // parts
    return {"seconds": seconds, "micro_batch": micro_batch, "notes": notes}


def measure(args: argparse.Namespace, found: Measurement, processes: int) -> None:
    """Makes one run of a kind of update, unless one has failed. Adds its result to `found`."""
    found.why_not = found.why_not or explain_unsupported(found.arm.precision, DEVICE)
    if found.why_not:
        return
    try:
        ranks = call_in_ranks(time_rank, processes, args, found.arm)
    except Exception as error:  # its text ends with the error of a process
        found.why_not = str(error).strip().splitlines()[-1]
        return
    found.rounds.append(max(rank["seconds"] for rank in ranks))
    found.micro_batch = ranks[0]["micro_batch"]
    found.notes = ranks[0]["notes"]


def run(args: argparse.Namespace) -> int:
    """Makes all runs of all kinds of update, and writes the JSON record. Returns the exit status.

    With torchrun, the first process does this, and the others end at once.
    """
    if distributed.read_ranks()[0] > 0:
        return 0
    processes = distributed.count_local_ranks()
    if ON_GPU:  # before the record of an earlier run is replaced
        distributed.check_has_device(processes - 1, processes)
        distributed.check_has_code(DEVICE)
    output, head = open_record(args, f"table3_{processes}_{{device}}.json", ("table3",))
    record, network = cost.build_network(args)
    record |= head | {"script": "benchmarks/step/table3.py", "processes": processes}
    record["runs"] = f"{args.rounds} separate runs of {UPDATES} updates on {processes} devices"
    record["forward_flops_an_image"] = cost.forward_flops(network, args.batch)
    arms = [*(Arm(f"{method}-paper") for method in PAPER), FAIR]
    arms += [Arm(m, p, compile=args.compile == "on") for p in args.precision for m in PAPER]
    size = args.batch, record["classes"]
    flops = [cost.update_flops(network, arm.method, arm.schedule, *size) for arm in arms]
    found = [Measurement(*pair) for pair in zip(arms, flops, strict=True)]
    natural, gradnorm, wasteful, fair, *ours = found
    paper = {f"pgd_at-paper, {precision}": wasteful for precision in ("fp32", *args.precision)}
    paper |= {"gradnorm-paper, fp32": gradnorm, "natural, fp32": natural, "pgd_at, fp32": fair}
    others = paper | {measured.arm.key: measured for measured in ours}
    for number in range(args.rounds):
        for measured in found:
            measure(args, measured, processes)
            said = measured.why_not or f"{measured.rounds[-1]:.3f} s a batch"
            print(f"run {number + 1}, {measured.arm.key}: {said}", flush=True)
        rows = [cost.row_of(m, others if m in ours else paper, record) for m in found]
        rows[3]["arm"] = "pgd_at, PyTorch's operators"
        record["rows"] = [row for row in rows if "time_over" in row]
        record["not_timed"] = [row for row in rows if "time_over" not in row]
        write_record(output, record | {"complete": False})
    finish(output, record, table)
    return int(not record["rows"])
