"""Runs all tests and benchmarks that need a GPU in one call, and writes a report.

    export PYTHONPATH=.:kernels
    python3 -m benchmarks.gpu_report --output runs/card  # the same command continues

Needs torch, triton, timm, numpy, tyro and tomli_w. fastgn need not be installed, only checked out.
`pip install --target FOLDER tyro tomli_w` makes a folder for PYTHONPATH on a machine without them.

A part of the report is one benchmark or one group of tests. Each part is a process with a time
limit, so one that breaks or hangs does not stop the others. The parts run one after the other, the
most important ones first, and a part begins only within --budget-s. The default of 530 s keeps a
call below nine minutes: the first three parts fit into it, and the rest needs more calls.

After each part, the folder --output holds report.json (command, seconds, exit status, last lines
and file of each part), the JSON records of all parts until then, and logs/. The records have the
same names as in benchmarks/results, so those that should be kept can be copied there. A second call
with the same folder, sources, device and commands runs only parts that have not succeeded.

On GPUs before sm_80, such as a V100, fp16 replaces bf16 and tf32. --smoke runs every part at toy
size. It needs no GPU, and its times mean nothing.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common.arguments import ON_GPU, ROOT, device_name, option, program, slugify
from benchmarks.common.records import read_json, write_json
from fastgn import metrics
from fastgn.errors import UserError, check

LAST_LINES = 15
"""Number of lines of a failed command's output that report.json keeps. logs/ has all lines."""
PROFILES_S = 45
"""Seconds that cost.py still needs when its --minutes are over, for the profiles of the update."""
LEAST_S = 20
"""If fewer seconds are left, no further part begins. Imports and compilation take about so long."""


class Part(NamedTuple):
    """One part of the report: a benchmark or a group of tests, and the command that runs it."""

    name: str
    command: Sequence[str]
    """Command-line arguments for Python, without --output."""
    limit_s: float
    """Seconds after which the command is ended."""
    file: str | None = None
    """Name of the JSON record that the command writes into the report's folder."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Properties of a machine on which the parts of the report depend."""

    device: str
    capability: tuple[int, int] | None
    """Compute capability of the GPU, None without a GPU."""
    smoke: bool

    @property
    def slug(self) -> str:
        """Name of the GPU in a form for file names, such as nvidia_h200."""
        return slugify(self.device)

    @property
    def precisions(self) -> list[str]:
        """Precisions in which the training step is measured, in the order of measurement."""
        if self.capability is None:
            return ["fp32"]
        modern = self.capability >= (8, 0)
        return ["bf16", "fp32", "tf32", "bf16-pure"] if modern else ["fp16", "fp32"]

    @property
    def notes(self) -> list[str]:
        """Warnings about this machine. They are printed at the beginning and end of the report."""
        if self.capability is None:
            return ["NO GPU: toy sizes on a CPU, these times mean nothing"]
        notes = ["toy sizes: these times mean nothing"] if self.smoke else []
        if self.capability < (8, 0):
            arch = "sm_{}{}".format(*self.capability)
            notes.append(f"{self.device} ({arch}) has neither bf16 nor tf32: fp16 in their place")
        return notes


def parts_for(machine: Machine) -> list[Part]:
    """Returns all parts of the report, the most important first.

    The first three parts fit into the default of --budget-s. A part that ends early leaves its time
    to the parts after it.
    """
    best, *others = machine.precisions
    exact = "--schedules exact --methods natural gradnorm"
    few = f"{exact} pgd_at gradnorm-paper"
    rest = "--schedules finite-difference central-difference lazy subset"

    def measure(name: str, module: str, limit_s: float, full: str, toy: str) -> Part:
        """Returns a part that runs a benchmark with the options `full`, or `toy` with --smoke."""
        file = f"{name}_{machine.slug}.json"
        if module == "step.cost":  # so that the records of all precisions begin with cost_<model>
            model = "toy" if machine.smoke else "swin_b"
            file = f"cost_{model}_{machine.slug}_{name.removeprefix('cost_')}.json"
        options = shlex.split(toy if machine.smoke else full)
        command = ["-m", f"benchmarks.{module}", *options]
        return Part(name, command, 300 if machine.smoke else limit_s, file)

    def cost(precision: str, limit_s: float, options: str, suffix: str = "") -> Part:
        """Returns a part that times the training step in one precision.

        cost.py leaves out what does not fit into the time limit. suffix: end of the part's name.
        """
        minutes = round((limit_s - PROFILES_S) / 60, 2)
        full = f"--precision {precision} --model swin_b --batch 64 --minutes {minutes} {options}"
        toy = f"--precision {precision} --batch 2 --round-seconds 0.01 --rounds 2 {exact}"
        return measure(f"cost_{precision}{suffix}", "step.cost", limit_s, full, toy)

    def test(name: str, limit_s: float, *options: str) -> Part:
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        return Part(name, command, 300 if machine.smoke else limit_s)

    # runs tests in several processes, because most of the time goes to Triton's compiler
    many = ("-n", str(min(12, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    ops = ("tests/kernels/test_checks.py",) if machine.smoke else ("tests/kernels", *many)
    toy = "--rounds 2 --ops cross_entropy_index --stage 4 --batch-size 2"
    first = [
        cost(best, 290, f"{few} pgd_at-paper"),
        test("kernel_tests", 180, *ops),
        measure("kernels", "kernels.ops", 50, "--rounds 20", toy),
    ]
    cards = torch.cuda.device_count()
    toy = "--check --processes 2 --rounds 1 --batch 2"
    ranks = measure("scaling_check", "step.scaling", 500, f"--check --processes {cards}", toy)
    toy = "--seeds 1 --fd-steps 0.01 --batches 1 --batch-size 2 --images random "
    toy += "--networks 'tiny Swin'"
    full = "--seeds 2 --fd-steps 0.01 --images random digits fitted"  # confident takes minutes
    precision = measure("precision", "step.precision", 90, full, toy)
    loader = measure("loader", "data.loader", 60, "", "--smoke")
    if machine.smoke:
        return [*first, ranks, precision, loader]
    on_gpu = ("-m", "gpu", "tests/step", "tests/benchmarks/step/test_cost.py", "-k")
    return [
        *first,
        # these parts need a second call of this program, because `first` uses up --budget-s
        test("gpu_tests", 180, *on_gpu, "not synchronise"),
        test("sync_tests", 90, *on_gpu, "synchronise"),
        *([ranks] if cards > 1 else []),
        *(cost(name, 200, few) for name in others if name == "fp32"),
        precision,
        loader,
        cost(best, 150, f"{exact} --no-cuda-graphs", "_no_graphs"),
        *(cost(name, 200, few) for name in others if name != "fp32"),
        cost(best, 300, f"{rest} --methods natural gradnorm fgsm_rs pgd_at", "_schedules"),
    ]


def run(command: Sequence[str], log: Path, limit_s: float, env: dict[str, str]) -> int | None:
    """Runs Python with some arguments, and returns its exit status, or None after limit_s seconds.

    Ends all processes that the command has started. log: file for the output of the command. env:
    environment variables of the command.
    """
    # A background job ignores Ctrl-C because of SIG_IGN, which its children would inherit.
    # With a function as the handler, this process ignores Ctrl-C, but its children do not.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=env, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # SIGINT comes first, because pytest then still prints which tests have failed
        for number, patience_s in ((signal.SIGINT, 4), (signal.SIGTERM, 2), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)  # children of the process may outlive it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience_s)


def last_lines(log: Path, number: int) -> list[str]:
    """Returns the last lines of a log as a terminal shows them, with one line per progress bar."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in lines]
    return [line[:300] for line in lines if line][-number:]


def digest_of_sources() -> str:
    """Returns a digest of all source files that the report can run. It does not need git."""
    digest = hashlib.sha256()
    for room in ("benchmarks", "fastgn", "kernels", "tests"):
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".toml"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Report:
    """Runs the parts of the report. Writes the results to report.json after each part."""

    def __init__(self, folder: Path, machine: Machine, sources: str, commit: str | None):
        self.folder = folder
        path = filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")))
        # the compiler's caches are in the folder, unless the environment says where they are
        self.env = {
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache" / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "cache" / "triton"),
            **os.environ,
            **{"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"},
        }
        self.key = {"sources": sources, "device": machine.device, "smoke": machine.smoke}
        self.commit = commit
        self.head = {"notes": machine.notes} | metrics.environment()
        before = read_json(folder / "report.json").get("parts", [])
        self.entries: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in before}

    def key_of(self, part: Part) -> dict[str, Any]:
        """Returns the values that must be unchanged if an earlier result of a part is to count."""
        return self.key | {"command": list(part.command)}

    def same(self, part: Part) -> dict[str, Any] | None:
        """Returns the earlier result of a part, or None if it has none.

        A result from other sources, another device or another command does not count.
        """
        entry = self.entries.get(part.name, {})
        same = all(entry.get(name) == value for name, value in self.key_of(part).items())
        return entry if same else None

    def run(self, part: Part, limit_s: float) -> dict[str, Any]:
        """Runs a part for at most limit_s seconds, and adds its result to report.json.

        Returns the result.
        """
        log = self.folder / "logs" / f"{part.name}.log"
        log.parent.mkdir(exist_ok=True)
        path = self.folder / part.file if part.file else None
        # a JSON record that other sources or another device made must not count as this result
        if path and self.same(part) is None:
            path.unlink(missing_ok=True)
        began = time.monotonic()
        code = run(
            [*part.command, *(("--output", str(path)) if path else ())], log, limit_s, self.env
        )
        seconds = min(time.monotonic() - began, limit_s)
        record = read_json(path) if path else {}
        if path and self.commit is not None and record.get("commit", "") is None:
            write_json(path, record | {"commit": self.commit})  # the benchmark found no commit
        entry = {
            "name": part.name,
            "status": "timed out" if code is None else "failed" if code else "ok",
            "seconds": round(seconds, 1),
            "limit_s": round(limit_s, 1),
            "exit_status": code,
            "last_lines": last_lines(log, 1 if code == 0 else LAST_LINES),
            "file": part.file if path and path.is_file() else None,
            "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        self.entries[part.name] = entry | self.key_of(part) | {"commit": self.commit}
        write_json(self.folder / "report.json", self.head | {"parts": [*self.entries.values()]})
        return entry


def line_of(entry: dict[str, Any]) -> str:
    """Returns the result of a part as one line. It ends with the last line of the part's output."""
    said = (entry["last_lines"] or ["no output"])[-1].strip("= ").partition(" -> ")[0]
    seconds = f"{entry['seconds']:.0f} s" if "seconds" in entry else ""
    return f"{entry['name']:16} {entry['status']:9} {seconds:>6}  {said}"


def carry_out(report: Report, parts: Sequence[Part], *, began: float, budget_s: float) -> int:
    """Runs the parts of the report in turn, and prints a line for each.

    Returns 1 if a part failed or reached its time limit, else 0. began: time.monotonic() at the
    start of the program. budget_s: seconds after which no part begins.
    """
    notes = report.head["notes"]
    for note in notes:
        print(note)
    bad = 0
    for part in parts:
        left_s = budget_s - (time.monotonic() - began)
        before = report.same(part)
        if before is not None and before["status"] == "ok":
            entry = before | {"status": "ok before"}
        elif left_s < LEAST_S:
            reason = f"no time left: {max(left_s, 0):.0f} of {budget_s:.0f} s"
            entry = {"name": part.name, "status": "not begun", "last_lines": [reason]}
        else:
            print(f"{part.name} ...", flush=True)
            entry = report.run(part, min(part.limit_s, left_s))
        if entry["status"] in ("failed", "timed out"):
            bad = 1
            print(*entry["last_lines"], sep="\n")
        print(line_of(entry), flush=True)
    print(f"\n{report.key['device']}, commit {report.commit}, sources {report.key['sources']}")
    print(*notes, f"{time.monotonic() - began:.0f} s -> {report.folder}", sep="\n")
    return bad


@program(
    option("--parts", nargs="+", metavar="PART", help="default: all, in the order of their value"),
    option("--budget-s", default=530.0, help="seconds of this call"),
    option("--commit", help="commit to record if the checkout does not know its own"),
    option("--smoke", action="store_true", help="use toy sizes, on any machine"),
)
def main(args: argparse.Namespace) -> int:
    """Runs the parts of the report. Returns 1 if one failed or reached its time limit, else 0."""
    began = time.monotonic()
    check(ON_GPU or args.smoke, "no GPU here; --smoke runs toy sizes")
    capability = torch.cuda.get_device_capability() if ON_GPU else None
    machine = Machine(device_name(), capability, args.smoke)
    folder = (args.output or ROOT / "runs" / f"gpu_report_{machine.slug}").resolve()
    parts = {part.name: part for part in parts_for(machine)}
    for name in args.parts or ():
        check(name in parts, f"--parts {name} must be one of {', '.join(parts)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}") from None
    report = Report(folder, machine, digest_of_sources(), metrics.commit() or args.commit)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = [part for name, part in parts.items() if not args.parts or name in args.parts]
    return carry_out(report, chosen, began=began, budget_s=args.budget_s)


if __name__ == "__main__":
    sys.exit(main())
