"""The GPU's report: parts fail alone, stop in time and are not repeated; a toy run of every part;
what loader.py and precision.py count."""

import argparse
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT

from benchmarks import gpu_report, tables
from benchmarks.data import loader
from benchmarks.gpu_report import Machine, Part
from benchmarks.step import precision

H200 = Machine("NVIDIA H200", (9, 0), smoke=False)
V100 = Machine("Tesla V100", (7, 0), smoke=False)


def part(name: str, code: str, limit_s: float = 30, **more: Any) -> Part:
    return Part(name, ["-c", code], limit_s, **more)


def carry_out(folder: Path, *parts: Part, sources: str = "a", **options: Any) -> dict[str, dict]:
    """report.json's parts by name, after one call."""
    folder.mkdir(exist_ok=True)
    report = gpu_report.Report(folder, H200, sources, commit=None)
    options = {"began": time.monotonic(), "budget_s": 300} | options
    status = gpu_report.carry_out(report, parts, **options)
    entries = {e["name"]: e for e in json.loads((folder / "report.json").read_text())["parts"]}
    statuses = [entries[p.name]["status"] for p in parts if p.name in entries]
    bad = [status for status in statuses if status in ("failed", "timed out")]
    assert status == bool(bad)
    return entries


@pytest.mark.slow
def test_a_part_that_breaks_or_hangs_leaves_the_others(tmp_path: Path, capsys) -> None:
    child = tmp_path / "child"
    hang = (
        "import signal, subprocess, sys, time\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(p.pid))\n"
        "print('begun', flush=True)\n"
        "time.sleep(600)"
    )
    report = tmp_path / "r" / "report.json"
    seen = f"import json; print([p['name'] for p in json.load(open('{report}'))['parts']])"
    entries = carry_out(
        tmp_path / "r",
        part("breaks", "print('working')\nraise OSError('the disk is gone')"),
        part("dies", "import os; os.kill(os.getpid(), 9)"),
        part("hangs", hang, limit_s=3),
        part("works", f"open('{tmp_path}/r/file', 'w').write('x')\n{seen}", file="file"),
    )
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "breaks": "failed",
        "dies": "failed",
        "hangs": "timed out",
        "works": "ok",
    }
    assert entries["breaks"]["exit_status"] == 1 and entries["breaks"]["file"] is None
    lines = entries["breaks"]["last_lines"]
    assert lines[0] == "working" and lines[-1] == "OSError: the disk is gone"
    assert entries["dies"]["exit_status"] == -signal.SIGKILL
    assert entries["hangs"]["exit_status"] is None
    assert entries["hangs"]["last_lines"] == ["begun"] and 3 <= entries["hangs"]["seconds"] < 15
    stat = Path("/proc") / child.read_text() / "stat"  # its own child's
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    assert entries["works"]["file"] == "file"
    # on disk when the next part began
    assert entries["works"]["last_lines"] == ["['breaks', 'dies', 'hangs']"]
    printed = capsys.readouterr().out
    assert "OSError: the disk is gone" in printed


def test_what_succeeded_is_not_done_again(tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    once = part("once", f"open('{counts}', 'a').write('1')")
    again = part("again", f"open('{counts}', 'a').write('2'); raise SystemExit(1)")
    carry_out(tmp_path / "r", once, again)
    entries = carry_out(tmp_path / "r", once, again)
    assert counts.read_text() == "122" and entries["once"]["status"] == "ok"
    carry_out(tmp_path / "r", once, sources="b")
    assert counts.read_text() == "1221"
    other = part("once", f"open('{counts}', 'a').write('3')")
    assert list(carry_out(tmp_path / "r", other, sources="b")) == ["once", "again"]
    assert counts.read_text() == "12213"


def test_a_folder_that_was_moved_goes_on(tmp_path: Path) -> None:
    code = f"import sys; open(sys.argv[2], 'w').close(); open('{tmp_path}/counts', 'a').write('1')"
    writes = part("writes", code, file="file")
    carry_out(tmp_path / "r", writes)
    there = tmp_path / "elsewhere" / "r"
    shutil.copytree(tmp_path / "r", there)
    carry_out(there, writes)
    assert (tmp_path / "counts").read_text() == "1"


def test_a_record_is_told_its_commit(tmp_path: Path) -> None:
    code = f"open('{tmp_path}/r/x.json', 'w').write('{{\"commit\": null}}')"
    report = gpu_report.Report(tmp_path / "r", H200, "a", "abc")
    (tmp_path / "r").mkdir()
    report.run(part("writes", code, file="x.json"), 30)
    assert json.loads((tmp_path / "r" / "x.json").read_text()) == {"commit": "abc"}


@pytest.mark.slow
def test_what_failed_before_a_limit_is_said(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import time\ndef test_bad():\n    assert 1 == 2\ndef test_slow():\n    time.sleep(600)\n"
    )
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command.append(str(tmp_path / "test_x.py"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    try:
        entries = carry_out(tmp_path / "r", Part("tests", command, 20))
        signal.raise_signal(signal.SIGINT)  # which it still ignores itself
    finally:
        signal.signal(signal.SIGINT, before)
    assert entries["tests"]["status"] == "timed out"
    assert any("assert 1 == 2" in line for line in entries["tests"]["last_lines"])


def test_a_file_of_other_sources_is_no_result(tmp_path: Path) -> None:
    code = (
        f"import os, pathlib; p = pathlib.Path('{tmp_path}/r/file'); print(p.exists()); p.touch()"
    )
    writes = part("writes", code + "; raise SystemExit(1)", file="file")
    said = [
        carry_out(tmp_path / "r", writes, sources=sources)["writes"]["last_lines"][0]
        for sources in ("a", "a", "b")
    ]
    assert said == ["False", "True", "False"]  # the second call goes on with what the first left


def test_no_part_begins_when_the_budget_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu_report, "LEAST_S", 1)
    slow = part("slow", "import time; time.sleep(600)", limit_s=60)
    late = part("late", "")
    began = time.monotonic()
    entries = carry_out(tmp_path / "r", slow, late, budget_s=3)
    # cut short by the budget and not by its own limit
    assert entries["slow"]["status"] == "timed out" and time.monotonic() - began < 30
    assert "late" not in entries and "no time left: 0 of 3 s" in capsys.readouterr().out
    entries = carry_out(tmp_path / "r", late)
    assert entries["late"]["status"] == "ok"
    entries = carry_out(tmp_path / "r", late, sources="b", budget_s=0.5)
    assert entries["late"]["status"] == "ok", "a call without time forgets nothing"


# ----------------------------------------------------------------------------------------- machines


@pytest.mark.parametrize("machine", [H200, V100], ids=["h200", "v100"])
def test_the_parts_ask_for_what_the_scripts_have(machine: Machine) -> None:
    parts = gpu_report.parts_for(machine)
    names = [p.name for p in parts]
    assert len(set(names)) == len(names)
    assert {"kernel_tests", "kernels", "precision", "loader", "gpu_tests"} < set(names)
    for command in (p.command for p in parts):
        assert command[0] == "-m"
        if command[1] == "pytest":
            assert all((ROOT / x).exists() for x in command if x.startswith("tests/"))
            continue
        source = (ROOT / f"{command[1].replace('.', '/')}.py").read_text()
        source += (ROOT / "benchmarks/common/arguments.py").read_text()  # --output
        for option in (x for x in command if x.startswith("--")):
            names = option, option.replace("--no-", "--")
            assert any(f'"{n}"' in source for n in names), f"{command[1]} has no {option}"
    files = [p.file for p in parts if p.file]
    assert len(set(files)) == len(files)


def precisions(machine: Machine) -> set[str]:
    """Those that a machine's commands name."""
    parts = gpu_report.parts_for(machine)
    commands = [p.command for p in parts]
    return {c[c.index("--precision") + 1] for c in commands if "--precision" in c}


def test_before_sm_80_float16_takes_the_place_of_bfloat16_and_says_so() -> None:
    assert precisions(H200) == {"fp32", "tf32", "bf16", "bf16-pure"} and not H200.notes
    assert precisions(V100) == {"fp16", "fp32"}
    (note,) = V100.notes
    assert "sm_70" in note and "neither bf16 nor tf32" in note


def test_the_first_parts_fit_nine_minutes() -> None:
    parts = gpu_report.parts_for(H200)
    least = parts[: [p.name for p in parts].index("kernels") + 1]
    assert [p.name for p in least] == ["cost_bf16", "kernel_tests", "kernels"]
    assert sum(p.limit_s for p in least) <= 530


def test_what_is_judged_is_asked_for() -> None:
    """The arms that the targets compare have room in the first bf16 part, by what a step took to
    prepare on a slow machine."""
    parts = {p.name: p for p in gpu_report.parts_for(H200)}
    command = parts["cost_bf16"].command
    assert {"natural", "gradnorm", "pgd_at", "gradnorm-paper", "pgd_at-paper"} < set(command)
    assert float(command[command.index("--minutes") + 1]) > 2.3
    assert "--no-cuda-graphs" in parts["cost_bf16_no_graphs"].command
    assert "fgsm_rs" in parts["cost_bf16_schedules"].command


def refusal(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys, *options: str) -> str:
    """The one line of a call that begins nothing."""
    arguments = ["gpu_report.py", "--output", str(folder / "r"), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_report.main() == 2 and not (folder / "r").exists()
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says without a GPU")
def test_refusals_are_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    line = refusal(tmp_path, monkeypatch, capsys)
    assert line == "gpu_report.py: error: no GPU here; --smoke runs toy sizes"
    line = refusal(tmp_path, monkeypatch, capsys, "--smoke", "--parts", "cots_fp32")
    assert line.startswith("gpu_report.py: error: --parts cots_fp32 must be one of cost_fp32, ")
    (tmp_path / "r").touch()
    arguments = ["gpu_report.py", "--smoke", "--output", str(tmp_path / "r" / "x")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_report.main() == 2
    assert capsys.readouterr().err.endswith("/r/x: Not a directory\n")


def report(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_report", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=850,
    )


# -------------------------------------------------------------------------------------- a toy run


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole --smoke run."""
    folder = tmp_path_factory.mktemp("toy")
    done = report("--smoke", "--output", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def one(folder: Path, pattern: str) -> dict[str, Any]:
    (path,) = folder.glob(pattern)
    return json.loads(path.read_text())


@pytest.mark.slow
def test_smoke_runs_every_part(toy: Path) -> None:
    entries = one(toy, "report.json")["parts"]
    names = {p.name for p in gpu_report.parts_for(Machine("cpu", None, True))}
    assert {entry["name"] for entry in entries} == names
    timed = {"cost_fp32", "kernels", "scaling_check", "precision", "loader"}
    assert names == {"kernel_tests", *timed}
    for entry in entries:
        assert entry["status"] == "ok", entry
        assert (entry["file"] is None) == (entry["name"] == "kernel_tests"), entry


@pytest.mark.slow
def test_precision_of_the_step(toy: Path) -> None:
    """float32 is near float64, bfloat16 as far as its 8 bits make it, a difference nearer for both
    points than for one."""
    (case,) = one(toy, "precision_*.json")["cases"]
    assert case["network"] == "tiny Swin" and case["images"] == "random"
    arms = {row["arm"]: row for row in case["arms"]}
    fd, central = ("finite-difference 0.01", "central-difference 0.01")
    names = {f"{kind}, {p}" for kind in ("exact", fd, central) for p in ("fp32", "bf16")}
    assert names <= arms.keys()

    def error(name: str) -> float:
        spread = arms[name]["whole"]["relative_error"]
        assert spread["n"] == 1 and spread["min"] == spread["mean"] == spread["max"]
        return spread["mean"]

    assert 1e-9 < error("exact, fp32") < 1e-5
    for name in ("exact, fp16", "exact, fp16-pure"):
        assert 1e-4 < error(name) < 0.4 * error(name.replace("fp16", "bf16"))
    for name in ("exact, bf16", "exact, bf16-pure"):
        assert 1e-3 < error(name) < 0.1
        assert 0.99 < arms[name]["whole"]["cosine"]["mean"] < 1
    assert error("exact, fp32") < error(f"{central}, fp32")
    assert error(f"{central}, fp32") < 0.3 * error(f"{fd}, fp32") < 0.03
    assert error("exact, bf16") < error(f"{fd}, bf16")


@pytest.mark.slow
def test_the_loaders_toy_record(toy: Path) -> None:
    record = one(toy, "loader_*.json")
    assert [row["loader"] for row in record["rows"]] == loader.installed()
    assert "torch" in loader.installed()
    assert record["meaningful_times"] is False
    for row in record["rows"]:
        assert row["images_per_s"]["n"] == 2 and row["images_per_s"]["min"] > 0


# ------------------------------------------------------------------------------ loader, precision


def test_the_torch_loaders_row(tmp_path: Path) -> None:
    paths = loader.jpeg_folder(tmp_path, 2)
    split = loader.repeated(paths, 60)
    assert len(split) == 60 and len(set(split.paths)) == 2
    args = argparse.Namespace(batch_size=2, batches=3, rounds=2)
    found = loader.measure(["torch"], paths, args, workers=0)["torch"]
    assert len(found["images_per_s"]) == len(found["cpu_ms_an_image"]) == 2
    assert min(found["images_per_s"]) > 0 and min(found["cpu_ms_an_image"]) >= 0


def test_jpegs_are_of_imagenets_size() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = [len(loader.jpeg(size, draw)) / 1024 for size in loader.SIZES]
    assert 80 < sum(sizes) / len(sizes) < 140


def test_distance_of_vectors() -> None:
    def distance(value: list[float], reference: list[float]) -> dict[str, float]:
        return precision.distance(
            *(torch.tensor(x, dtype=torch.float64) for x in (value, reference))
        )

    assert distance([3, 4], [3, 4]) == {"cosine": 1.0, "relative_error": 0.0}
    assert distance([6, 8], [3, 4]) == {"cosine": 1.0, "relative_error": 1.0}
    assert distance([-4, 3], [3, 4])["cosine"] == 0
    assert distance([0, 5.5], [0, 5])["relative_error"] == pytest.approx(0.1)


def test_the_gradient_is_of_all_weights_and_leaves_the_network_alone() -> None:
    config = precision.NETWORKS["PreActResNet-18, GELU"]
    torch.manual_seed(0)
    model, report_ = precision.build_model(
        dataclasses.replace(config, model_kwargs=("width=2",)), 10
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (batch,) = precision.batches(None, 1, 2, 0, 0)
    whole, natural = (
        precision.gradient(model, precision.Arm(method), batch)
        for method in ("gradnorm", "natural")
    )
    assert whole.dtype == torch.float64 and len(whole) == report_.parameters
    assert (whole - 0.8 * natural).norm() > 1e-3 * natural.norm(), "it has the penalty's part"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_interrupted_runs_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """precision.py makes the cases that it lacks."""
    seen: list[Any] = []

    def case(network: str, *_: Any) -> dict[str, Any]:
        seen.append(network)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return {"network": network, "trained_by": None}

    monkeypatch.setattr(precision, "measure", case)
    monkeypatch.setattr(precision, "table", lambda record: "")
    argv = ["--images", "random", "--output", str(tmp_path / "precision.json")]
    with pytest.raises(KeyboardInterrupt):
        precision.main(argv)
    first, second, *rest = precision.NETWORKS
    assert precision.main(argv) == 0 and seen == [first, second, second, *rest]
    assert precision.main(argv) == 0 and seen[3 + len(rest) :] == [first, second, *rest]


# ------------------------------------------------------------------------------- what is recorded


@pytest.mark.slow
def test_the_table_is_of_the_record(toy: Path) -> None:
    (case,) = one(toy, "precision_*.json")["cases"]
    record = one(toy, "precision_*.json") | {"file": "x.json"}
    record = one(toy, "precision_*.json") | {"file": "x.json"}
    header, _, *rows, _, note = precision.table(record).split("\n")
    assert header == "| step | tiny Swin, untrained |" and len(rows) == len(case["arms"])
    whole = case["arms"][1]["whole"]
    cell = f"{whole['relative_error']['mean']:.1e} ({whole['cosine']['mean']:.4f})"
    assert rows[1] == f"| {case['arms'][1]['arm']} | {cell} |"
    assert "mean over 1 batches of 2" in note


def records() -> list[Path]:
    return sorted(tables.RESULTS.glob("precision_*.json"))


@pytest.mark.parametrize("path", records(), ids=lambda p: p.stem)
def test_the_recorded_precisions(path: Path) -> None:
    record = json.loads(path.read_text())
    assert record["complete"] and len(record["cases"]) >= 6
    for case in record["cases"]:
        arms = {row["arm"]: row["whole"] for row in case["arms"]}
        for row in arms.values():
            assert row["relative_error"]["n"] == record["seeds"] * record["batches"] >= 3
        fitted = case["trained_by"] == "fitting"
        # rounding alone decides over a fitted network's gradient in 16 bits, and in part in fp32
        if fitted:
            assert max(case["last_cross_entropy"]) < 1e-3
        else:
            assert arms["exact, fp32"]["relative_error"]["max"] < 1e-4
        # BatchNorm over few small images amplifies what rounding does
        least = 0.99 if case["network"] == "tiny Swin" else 0.9
        for name in arms.keys() - {"exact, fp32"} if not fitted else ():
            if name.startswith("exact, "):
                assert arms[name]["cosine"]["min"] > least
        for name in {"exact, fp16", "exact, fp16-pure"} & arms.keys():
            bf16 = arms[name.replace("fp16", "bf16")]["relative_error"]["mean"]
            assert arms[name]["relative_error"]["mean"] < (bf16 if fitted else bf16 / 2)
