"""Everything that needs a GPU, in one call: correctness, kernels, cost, memory, precision, loaders.

    export PYTHONPATH=.:kernels
    python3 -m benchmarks.gpu_report --output runs/card  # and again, to continue

A machine with torch, triton, timm and numpy runs this from the checkout, with nothing installed.
Each part is a process with a time limit: one that breaks or hangs does not stop the others. Parts
come in the order of their value, and begin while --budget-s lasts: 530 s keep a call below nine
minutes. The first parts fit into that, and the rest needs a second call. What is timed runs alone,
and so do its compilations, which take many times as long beside others. What needs no clock runs at
the same time.

After each part the folder holds what there is: report.json (commands, seconds, exit status, last
lines and files of each part), the records of the parts, and logs/. The records have the names of
benchmarks/results. Copy those that should be kept. A second call with the same folder, sources,
device and commands leaves out what has succeeded.

Packages that the trainer's command line and exports need, but no benchmark, are replaced by
stand-ins if they are missing. A part that lacks another package is skipped, and says so. Before
sm_80 (V100), fp32 replaces bf16 and tf32, and the report says so. --smoke runs every part at toy
size, also without a GPU, where its times mean nothing.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import ROOT, make_parser, slugify
from benchmarks.common.records import read_json, write_json

LAST_LINES = 15
"""Number of lines of a failed command's output that report.json keeps. logs/ has all lines."""
PROFILES_S = 45
"""Seconds that cost.py still needs when its --minutes are over, for the profiles of the update."""
LEAST_S = 20
"""If fewer seconds than this are left, no further part of the report begins.

Imports and compilation take about that long.
"""

STAND_INS = {
    "tyro": """
class _Missing:
    def __init__(self, name): self.name = name
    def __getattr__(self, name): return _Missing(f"{self.name}.{name}")
    def __getitem__(self, item): return item  # tyro.conf's markers: an annotation is what it marks
    def __call__(self, *args, **kwargs): return self  # the description of a flag
conf, constructors = _Missing("tyro.conf"), _Missing("tyro.constructors")
def cli(*args, **kwargs): raise RuntimeError("tyro is not installed")
""",
    "tomli_w": """
def dumps(*args, **kwargs): raise RuntimeError("tomli_w is not installed")
""",
    "tqdm": """
class tqdm:
    def __init__(self, *args, **kwargs): raise RuntimeError("tqdm is not installed")
""",
    "safetensors": """
import sys, types
class SafetensorError(Exception): pass
def _missing(*args, **kwargs): raise RuntimeError("safetensors is not installed")
torch = types.ModuleType("safetensors.torch")
torch.load_file = torch.load = torch.save = torch.save_file = _missing
sys.modules["safetensors.torch"] = torch
""",
}
"""Name of a package -> code that is imported in its place on a machine without that package.

The code lets fastgn import the package, and raises an error if it is used. The file with the code
comes last on the import path.
"""


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the report: a question, and the commands that answer it."""

    name: str
    what: str
    """Description of the question, for the summary."""
    commands: Sequence[Sequence[str]]
    """Command-line arguments for Python, one sequence per command. The commands run at the same
    time."""
    limit_s: float
    """Seconds after which the commands are ended."""
    needs: Sequence[str] = ()
    """Packages that the commands import. If one is not installed, the part is skipped."""
    files: Sequence[str] = ()
    """Names of the files that the commands write into the report's folder."""
    beside: bool = False
    """Whether this part runs at the same time as the part before. Neither of them measures time."""


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
        modern = self.capability is not None and self.capability >= (8, 0)
        return ["bf16", "fp32", "tf32", "bf16-pure"] if modern else ["fp32"]

    @property
    def notes(self) -> list[str]:
        """Warnings about this machine. They are printed at the beginning and end of the report."""
        if self.capability is None:
            return ["NO GPU: toy sizes on a CPU, these times mean nothing"]
        notes = ["toy sizes: these times mean nothing"] if self.smoke else []
        if self.capability < (8, 0):
            arch = "sm_{}{}".format(*self.capability)
            notes.append(f"{self.device} ({arch}) has neither bf16 nor tf32: fp32 in their place")
        return notes


def this_machine(smoke: bool) -> Machine:
    """Returns the properties of this machine."""
    if not torch.cuda.is_available():
        return Machine("cpu", None, smoke)
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return Machine(name, capability, smoke)


def parts_for(machine: Machine, folder: Path) -> list[Part]:
    """Returns all parts of the report, the most important first.

    folder: folder of the report. The time limits of the first parts add up to 530 s. A part that
    ends early leaves its time to the parts after it.
    """
    smoke = machine.smoke
    trainer = ("timm", "torchvision", "numpy")

    def script(name: str, *args: object, output: str) -> list[str]:
        return [str(x) for x in ("-m", f"benchmarks.{name}", *args, "--output", folder / output)]

    def tests(*args: str) -> list[str]:
        return ["-m", "pytest", "-q", "-p", "no:cacheprovider", *args]

    def cost(precision: str, output: str, *options: object) -> list[str]:
        size = ("--batch", 2, "--round-seconds", 0.01, "--schedules", "exact")
        if not smoke:
            size = ("--model", "swin_b", "--batch", 64)
        return script("step.cost", "--precision", precision, *size, *options, output=output)

    def timed_cost(precision: str, limit_s: float, *options: object, suffix: str = "") -> Part:
        """Returns a part that times the training step with cost.py.

        cost.py leaves out what does not fit into the time limit. suffix: end of the name of its
        record.
        """
        file = f"cost_{'toy' if smoke else 'swin_b'}_{machine.slug}_{precision}{suffix}.json"
        if not smoke:
            options = ("--minutes", round((limit_s - PROFILES_S) / 60, 2), *options)
        command = cost(precision, file, *options)
        what = f"the step's seconds, FLOPs and memory in {precision}{suffix.replace('_', ' ')}"
        return Part(f"cost_{precision}{suffix}", what, [command], limit_s, trainer, (file,))

    best, *others = machine.precisions
    few = ("--schedules", "exact", "--methods", "natural", "gradnorm", "pgd_at", "gradnorm-paper")

    options = ("--rounds", 2, "--methods", "natural", "gradnorm")
    timed = timed_cost(best, 290, *(options if smoke else (*few, "pgd_at-paper")))
    parts = [timed]

    # most of the time is Triton's compiler
    many = ("-n", min(12, os.cpu_count() or 1)) if importlib.util.find_spec("xdist") else ()
    correct = tests("tests/kernels", *map(str, many))
    if smoke:
        correct = tests("tests/kernels/test_checks.py")
    what = "every op against its twin"
    parts.append(Part("kernel_tests", what, [correct], 180, ("pytest", "numpy")))

    files = (f"kernels_{machine.slug}.json",)
    size = ("--ops", "cross_entropy_index", "--stages", 4, "--batch-size", 2, "--rounds", 2)
    options = size if smoke else ("--minutes", 0.6, "--rounds", 20)
    command = script("kernels.ops", *options, output=files[0])
    parts.append(Part("kernels", "each op's time and bandwidth", [command], 50, ("numpy",), files))

    # from here on for a second call

    if not smoke:
        # tyro reads the flags that the trainer's run is made of
        gpu = tests("-m", "gpu", "tests/step", "tests/benchmarks/step/test_cost.py")
        needs = ("pytest", "sklearn", *trainer)
        what = "CUDA graphs, and the cost suite on a GPU"
        parts.append(Part("gpu_tests", what, [[*gpu, "-k", "not synchronise"]], 90, needs))
        what = "no update waits for the device"
        parts.append(
            Part(
                "sync_tests",
                what,
                [[*gpu, "-k", "synchronise"]],
                90,
                (*needs, "tyro", "tomli_w"),
                beside=True,
            )
        )

    files = (f"attacks_{machine.slug}.json",)
    size = ("--smoke",) if smoke else ("--images", 1000, "--batch-size", 500, "--eps", "8/255")
    command = script("evidence.attacks", *size, output=files[0])
    what = "what an evaluation costs over its attacks"
    parts.append(Part("attacks", what, [command], 150, (*trainer, "pyautoattack"), files))

    if not smoke:
        parts += [timed_cost(p, 200, *few) for p in others if p == "fp32"]

    files = (f"small_data_{machine.slug}.json",)
    size = ("--images", 64, "--batch-size", 4, "--rounds", 1, "--calls", 1) if smoke else ()
    command = script("data.small_data", *size, output=files[0])
    what = "the share of small data in an update"
    parts.append(Part("small_data", what, [command], 150, (*trainer, "tyro", "tomli_w"), files))

    files = (f"memory_{'toy' if smoke else 'swin_b'}_{machine.slug}.json",)
    options = ("--smoke",) if smoke else ("--precision", best, "--minutes", 3.2, "--workers", 3)
    curve = script("step.memory", *options, output=files[0])
    what = "peak memory over the batch size"
    parts.append(Part("memory", what, [curve], 200, trainer, files))

    files = (f"precision_{machine.slug}.json",)
    size = ("--seeds", 2, "--fd-steps", 0.01)
    if smoke:
        size = (*("--seeds", 1, "--batches", 1, "--batch-size", 2), "--fd-steps", 0.01)
        size += ("--images", "random", "--networks", "tiny Swin")
    command = script("step.precision", *size, output=files[0])
    what = "the gradient's distance from float64"
    parts.append(Part("precision", what, [command], 90, trainer, files, beside=True))

    if not smoke:
        what = "saving memory by recomputing"
        budgets = (*("--methods", "natural", "gradnorm", "--schedules", "exact"), "--budgets")
        parts.append(timed_cost(best, 250, *budgets, 0.7, 0.5, suffix="_budgets"))
        parts += [timed_cost(p, 200, *few) for p in others if p == "tf32"]

    files = (f"loader_{machine.slug}.json",)
    options = ("--smoke",) if smoke else ("--cost", folder / timed.files[0])
    command = script("data.loader", *options, output=files[0])
    what = "images a second of the loaders"
    parts.append(Part("loader", what, [command], 60, (*trainer, "PIL"), files))

    if not smoke:
        graphs = ("--methods", "natural", "gradnorm", "--schedules", "exact", "--no-cuda-graphs")
        parts.append(timed_cost(best, 150, *graphs, suffix="_no_graphs"))
        parts += [timed_cost(p, 200, *few) for p in others if p not in ("fp32", "tf32")]
        rest = ("finite-difference", "central-difference", "lazy", "subset")
        every = ("--methods", "natural", "gradnorm", "fgsm_rs", "pgd_at", "--schedules", *rest)
        parts.append(timed_cost(best, 300, *every, suffix="_schedules"))
    # toys are not timed
    return [dataclasses.replace(p, beside=True, limit_s=300) for p in parts] if smoke else parts


def run(
    commands: Sequence[Sequence[str]], logs: Sequence[Path], limit_s: float, env: dict[str, str]
) -> list[tuple[int | None, float]]:
    """Runs Python with the arguments of each command, all at the same time.

    Returns an exit status and seconds for each command. The status is None if the time limit ended
    it. Processes that a command has started are ended, too. logs: one output file per command.
    """
    began = time.monotonic()
    processes: list[subprocess.Popen] = []
    ended: dict[int, tuple[int | None, float]] = {}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it in the background
        signal.signal(signal.SIGINT, lambda *_: None)  # the same here, but no child inherits it
    try:
        for command, log in zip(commands, logs, strict=True):
            with open(log, "wb") as out:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        cwd=ROOT,
                        env=env,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        while len(ended) < len(processes) and time.monotonic() < began + limit_s:
            for index, process in enumerate(processes):
                if index not in ended and process.poll() is not None:
                    ended[index] = process.returncode, time.monotonic() - began
            time.sleep(0.05)
    finally:
        # after SIGINT, pytest still prints what has failed
        stops = ((signal.SIGINT, 4.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 10.0))
        for number, patience_s in stops:
            for process in processes:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)  # also children of a process that has ended
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience_s)
    return [ended.get(index, (None, limit_s)) for index in range(len(processes))]


def last_lines(log: Path, number: int) -> list[str]:
    """Returns the last lines of a log as a terminal would show them.

    A progress bar, which rewrites its line, counts as one line.
    """
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in lines]
    return [line[:300] for line in lines if line][-number:]


def missing(names: Sequence[str]) -> list[str]:
    """Returns the packages that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def environment_of_parts(folder: Path) -> dict[str, str]:
    """Returns the environment variables for the commands of the report.

    The checkout comes first on the import path, and stand-ins for missing packages come last. The
    compiler's caches are in the folder, unless the environment says where they are.
    """
    stand_ins = folder / "stand_ins"
    for name in missing(list(STAND_INS)):
        stand_ins.mkdir(parents=True, exist_ok=True)
        (stand_ins / f"{name}.py").write_text(STAND_INS[name].lstrip())
    path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", ""), str(stand_ins)]
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache" / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "cache" / "triton"),
    }
    return {**caches, **os.environ} | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
    }


def digest_of_sources() -> str:
    """Returns a digest of all source files that the report can run. It does not need git."""
    digest = hashlib.sha256()
    for room in ("benchmarks", "fastgn", "kernels", "tests"):
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".toml"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit_of_checkout() -> str | None:
    """Returns the commit of the checkout, or None if git or its folder is missing."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


class Report:
    """Runs the parts of the report, and writes their results to report.json after each."""

    def __init__(
        self,
        folder: Path,
        machine: Machine,
        sources: str,
        commit: str | None,
    ):
        self.folder = folder
        self.key = {"sources": sources, "device": machine.device, "smoke": machine.smoke}
        self.commit = commit
        self.head = {
            "notes": machine.notes,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "cuda": torch.version.cuda,
        }
        before = read_json(folder / "report.json").get("parts", [])
        self.entries: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in before}

    def commands(self, part: Part) -> list[list[str]]:
        """Returns a part's commands, with FOLDER in place of the folder's path, which can
        change."""
        return [[x.replace(str(self.folder), "FOLDER") for x in c] for c in part.commands]

    def same(self, part: Part) -> dict[str, Any] | None:
        """Returns the earlier result of a part, or None if it has none.

        A result from other sources, another device or other commands does not count.
        """
        entry = self.entries.get(part.name)
        key = self.key | {"commands": self.commands(part)}
        if entry is None or any(entry.get(name) != value for name, value in key.items()):
            return None
        return entry

    def add(self, part: Part, status: str, **more: Any) -> dict[str, Any]:
        """Adds the result of a part to report.json and returns it.

        status: "ok", "failed", "timed out" or "skipped". more: further keys of the result.
        """
        entry = {"name": part.name, "what": part.what, "status": status, **more}
        entry |= self.key | {
            "commit": self.commit,
            "commands": self.commands(part),
            "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        # an interrupted call must not forget what an earlier one found out
        if status != "skipped" or self.entries.get(part.name, {}).get("status") in (None, status):
            self.entries[part.name] = entry
        write_json(self.folder / "report.json", self.head | {"parts": [*self.entries.values()]})
        return entry

    def run(self, parts: Sequence[Part], limit_s: float, env: dict[str, str]) -> list[dict]:
        """Runs several parts at the same time and returns their results."""
        logs: list[list[Path]] = []
        (self.folder / "logs").mkdir(exist_ok=True)
        for part in parts:
            if self.same(part) is None:  # left by other sources or another device
                for name in part.files:
                    (self.folder / name).unlink(missing_ok=True)
            names = [f"{part.name}_{i}" for i in range(len(part.commands))]
            if len(names) == 1:
                names = [part.name]
            logs.append([self.folder / "logs" / f"{name}.log" for name in names])
        commands = [command for part in parts for command in part.commands]
        ended = iter(run(commands, sum(logs, []), limit_s, env))
        entries = []
        for part, its_logs in zip(parts, logs, strict=True):
            codes, seconds = zip(*(next(ended) for _ in part.commands), strict=True)
            status = "timed out" if None in codes else "failed" if any(codes) else "ok"
            for name in part.files:
                self.name_commit(self.folder / name)
            kept = [1 if code == 0 else LAST_LINES for code in codes]
            entries.append(
                self.add(
                    part,
                    status,
                    seconds=round(max(seconds), 1),
                    limit_s=round(limit_s, 1),
                    exit_statuses=list(codes),
                    last_lines=[last_lines(*each) for each in zip(its_logs, kept, strict=True)],
                    files=[name for name in part.files if (self.folder / name).is_file()],
                )
            )
        return entries

    def name_commit(self, path: Path) -> None:
        """Writes the commit into a benchmark's JSON record if its program could not find it out."""
        record = read_json(path) if path.suffix == ".json" else {}
        if self.commit is not None and "commit" in record and record["commit"] is None:
            write_json(path, record | {"commit": self.commit})


def line_of(entry: dict[str, Any]) -> str:
    """Returns the result of a part as one line. It ends with the last line of the part's output."""
    if entry["status"] == "skipped":
        said = entry["reason"]
    else:
        last = [lines[-1] if lines else "no output" for lines in entry["last_lines"]]
        said = "; ".join(line.strip("= ").partition(" -> ")[0] for line in last)
    seconds = f"{entry['seconds']:.0f} s" if "seconds" in entry else ""
    return f"{entry['name']:16} {entry['status']:9} {seconds:>6}  {said}"


def main() -> int:
    """Parses the command line, runs the report, and returns the exit status.

    The status is 2 for a user's mistake, 1 if a part failed, and else 0.
    """
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", metavar="PART", help="default: all, in the order of their value")
    add("--budget-s", type=float, default=530, help="seconds of this call")
    add("--limit-s", type=float, help="seconds of a part; default: each has its own limit")
    add("--commit", help="commit to record if the checkout does not know its own")
    add("--smoke", action="store_true", help="use toy sizes, on any machine")
    args = parser.parse_args()

    began = time.monotonic()
    machine = this_machine(args.smoke)
    if machine.capability is None and not args.smoke:
        print("gpu_report.py: error: no GPU here; --smoke runs toy sizes", file=sys.stderr)
        return 2
    folder = (args.output or ROOT / "runs" / f"gpu_report_{machine.slug}").resolve()
    commit = commit_of_checkout() or args.commit
    parts = parts_for(machine, folder)
    names = [part.name for part in parts]
    for name in args.parts or ():
        if name not in names:
            print(f"gpu_report.py: error: --parts {name}: {', '.join(names)}", file=sys.stderr)
            return 2
    if not args.budget_s >= LEAST_S:
        print(f"gpu_report.py: error: --budget-s {args.budget_s:g}: no part begins with less than "
              f"{LEAST_S}", file=sys.stderr)  # fmt: skip
        return 2
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu_report.py: error: --output {folder}: {error.strerror}", file=sys.stderr)
        return 2
    report = Report(folder, machine, digest_of_sources(), commit)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return carry_out(
        report,
        [part for part in parts if not args.parts or part.name in args.parts],
        began=began,
        budget_s=args.budget_s,
        limit_s=args.limit_s,
    )


def carry_out(
    report: Report, parts: Sequence[Part], *, began: float, budget_s: float, limit_s: float | None
) -> int:
    """Runs the parts of the report in turn and prints a summary.

    Returns 1 if a part failed or reached its time limit, else 0. began: start of the program, as
    time.monotonic() gives. budget_s: seconds in which parts may begin. limit_s: limit that replaces
    the limits of the parts, if not None.
    """
    env = environment_of_parts(report.folder)
    for note in report.head["notes"]:
        print(note)
    entries: list[dict[str, Any]] = []
    groups: list[list[Part]] = []
    for part in parts:
        groups[-1].append(part) if part.beside and groups else groups.append([part])
    for group in groups:
        todo = []
        left_s = budget_s - (time.monotonic() - began)
        for part in group:
            before, lacking = report.same(part), missing(part.needs)
            if before is not None and before["status"] == "ok":
                entries.append(before | {"status": "ok before"})
            elif lacking:
                reason = f"not installed: {', '.join(lacking)}"
                entries.append(report.add(part, "skipped", reason=reason))
            elif left_s < LEAST_S:
                reason = f"no time left: {max(left_s, 0):.0f} of {budget_s:.0f} s"
                entries.append(report.add(part, "skipped", reason=reason))
            else:
                print(f"{part.name}: {part.what} ...", flush=True)
                todo.append(part)
        if todo:
            limits_s = [limit_s or part.limit_s for part in todo]
            entries += report.run(todo, min(max(limits_s), left_s), env)
        for entry in entries[-len(group) :]:
            if entry["status"] in ("failed", "timed out"):
                print(*[line for lines in entry["last_lines"] for line in lines], sep="\n")
            print(line_of(entry), flush=True)
    print(f"\n{report.key['device']}, commit {report.commit}, sources {report.key['sources']}")
    print(*map(line_of, entries), sep="\n")
    print(*report.head["notes"], sep="\n")
    print(f"{time.monotonic() - began:.0f} s -> {report.folder}")
    return int(any(entry["status"] in ("failed", "timed out") for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
