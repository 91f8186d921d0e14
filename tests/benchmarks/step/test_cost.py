"""The cost suite: what it counts is exact, what it times is what it says, one arm's failure is its
own."""

import contextlib
import io
import json
import math
import statistics
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from support.networks import made, swin

from benchmarks.common import arguments, energy
from benchmarks.common.arguments import RESULTS
from benchmarks.common.timing import interleaved
from benchmarks.step import cost
from fastgn.config.groups import ArchitectureConfig
from fastgn.loss_scale import FIRST
from fastgn.models.network import Classifier, build_model, use_kernels
from fastgn.step.retry import RetryingStep
from fastgn.step.schedule import Schedule

TINY = (
    *("--model", "vit_tiny_patch16_224", "--img-size", "16", "--classes", "5", "--batch", "4"),
    *("--model-kwargs", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=2"),
    *("--rounds", "2", "--round-seconds", "0.001"),
)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what the script does on a CPU")


def run(folder: Path, *options: str) -> dict:
    files = ["--output", str(folder / "cost_x.json")]
    assert cost.main([*files, *options]) == 0
    return json.loads((folder / "cost_x.json").read_text())


def by_arm(record: dict) -> dict[str, dict]:
    return {row["arm"]: row for row in record["rows"] + record["not_timed"]}


def network() -> Classifier:
    return Classifier(made(swin, torch.float32), (0.5,) * 3, (0.25,) * 3, 16)


# ------------------------------------------------------------------------------------ without a GPU


@pytest.fixture(scope="module")
def every_arm(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, Path]:
    """A run of them all: record, what was printed, folder."""
    folder = tmp_path_factory.mktemp("cost")
    with contextlib.redirect_stdout(io.StringIO()) as lines:
        record = run(folder, *TINY, "--rounds", "3")
    return record, lines.getvalue(), folder


@without_gpu
def test_a_run_on_a_cpu(every_arm: tuple[dict, str, Path]) -> None:
    record, printed, folder = every_arm
    assert printed.startswith(cost.NO_MEANING)
    assert record["complete"] and not record["meaningful_times"] and record["meaning"]
    assert record["not_timed"] == record["skipped"] == []
    assert {"versions", "commit", "hardware", "device", "script"} <= record.keys()
    for row in record["rows"]:
        assert not row["compiled"] and row["micro_batch"] == record["batch"]
        assert "seconds_a_batch" not in row, "seconds of a CPU have no name"
        seconds = row["meaningless_seconds_a_batch"]
        assert len(seconds["rounds"]) == record["rounds"] == 3 and min(seconds["rounds"]) > 0
        assert row["peak_bytes"] is row["joules_an_image"] is row["images_per_s"] is None
        assert row["launches"]["what"] == "operators without views"
        assert row["flop_utilisation"] > 0


UNITS = {
    "natural": (2, 3),
    "gradnorm exact": (5, 6),
    "pgd_at": (8, 9),
    "pgd_at-paper": (9, 13),
    "gradnorm finite-difference 0.01": (4, 6),
    "gradnorm central-difference 0.01": (6, 9),
    "gradnorm lazy 4": (2.75, 3.75),
    "gradnorm subset 0.5": (3.5, 4.5),
    "gradnorm-paper": (5, 6),
    "fgsm_rs": (4, 5),
}
"""Arm -> passes as the paper counts them, and operations in forwards."""


@pytest.mark.slow
def test_operations_of_an_update() -> None:
    """Of the network that a bare command line takes: natural : exact gradnorm : fair PGD-3 : the
    paper's PGD-3 : finite difference = 3 : 6 : 9 : 13 : 6."""
    kwargs = ArchitectureConfig(model="swin_t", model_kwargs=cost.SMALL_SWIN, img_size=32)
    model, _ = build_model(kwargs, 10)
    forward = cost.forward_flops(model, 2)
    difference = Schedule("finite-difference")
    arms = [cost.Arm(name, "fp32") for name in ("natural", "gradnorm", "pgd_at", "pgd_at-paper")]
    for spec in [*arms, cost.Arm("gradnorm", "fp32", difference)]:
        forwards = UNITS[spec.name][1]
        flops = cost.update_flops(model, spec.method, spec.schedule, 2, 10)
        assert flops / forward == pytest.approx(forwards, rel=0.02)


@without_gpu
def test_passes_beside_the_papers(every_arm: tuple[dict, str, Path]) -> None:
    rows = by_arm(every_arm[0])
    assert rows.keys() == UNITS.keys()
    for name, (passes, forwards) in UNITS.items():
        assert rows[name]["passes"] == passes, name
        assert rows[name]["forwards_by_schedule"] == forwards, name
        # a network so small that the patch embedding and the products of the attention weigh more
        assert rows[name]["forwards_by_count"] == pytest.approx(forwards, rel=0.2), name
    assert rows["pgd_at"]["paper"] == rows["pgd_at-paper"]["paper"]
    assert rows["gradnorm exact"]["paper"]["time_over"]["pgd_at"] == pytest.approx(0.628, abs=1e-3)
    assert rows["gradnorm lazy 4"]["paper"] is rows["fgsm_rs"]["paper"] is None


def test_the_recorded_operations_of_swin_b() -> None:
    """Within 2 %, at the size that the README speaks of."""
    record = json.loads((RESULTS / "cost_swin_b_counts.json").read_text())
    assert (record["model"], record["img_size"]) == ("swin_b", 224)
    rows = by_arm(record)
    for name, (_, forwards) in UNITS.items():
        assert rows[name]["forwards_by_count"] == pytest.approx(forwards, rel=0.02)
    assert record["forward_flops_an_image"] == pytest.approx(30.86e9, rel=1e-3)


@without_gpu
def test_ratios_are_those_of_the_rounds(every_arm: tuple[dict, str, Path]) -> None:
    rows = by_arm(every_arm[0])

    def rounds(name: str) -> list[float]:
        return rows[name]["meaningless_seconds_a_batch"]["rounds"]

    for name, row in rows.items():
        for other, recorded in row["time_over"].items():
            pairs = zip(rounds(name), rounds(other), strict=True)
            ratios = [mine / theirs for mine, theirs in pairs]
            assert recorded["mean"] == pytest.approx(statistics.fmean(ratios))
            assert recorded["std"] == pytest.approx(statistics.stdev(ratios), abs=1e-12)
        assert row["time_over"].keys() == {"natural", "pgd_at", "pgd_at-paper"}
    speed = rows["gradnorm exact"]["times_as_fast_as"]["gradnorm-paper, fp32"]["mean"]
    pairs = zip(rounds("gradnorm-paper"), rounds("gradnorm exact"), strict=True)
    assert speed == pytest.approx(statistics.fmean(theirs / mine for theirs, mine in pairs))
    itself = {"mean": 1, "median": 1, "std": 0, "min": 1, "max": 1, "n": 3}
    assert rows["natural"]["time_over"]["natural"] == itself
    used = rows["pgd_at"]["flops_an_image"] * 4 / statistics.fmean(rounds("pgd_at"))
    rate = every_arm[0]["gemm"]["fp32"]["flops_per_s"]
    assert rows["pgd_at"]["flop_utilisation"] == pytest.approx(used / rate)


@without_gpu
def test_the_table_of_the_results_is_printed(every_arm: tuple[dict, str, Path]) -> None:
    record, printed, _ = every_arm
    table = cost.table(record)
    assert table in printed
    lines = table.splitlines()
    assert lines[0].startswith("| arm | passes | GFLOP an image | in forwards | time over natural")
    assert not any(word in lines[0] for word in ("| s a batch", "images/s", "GiB", "J an image"))
    exact = next(line for line in lines if line.startswith("| gradnorm exact |"))
    ratio = by_arm(record)["gradnorm exact"]["time_over"]["natural"]
    assert f"| {ratio['mean']:.2f} ± {ratio['std']:.2f} |" in exact
    assert "| 5 | 1.848 | 2.47 | 0.63 |" in exact, "the paper's column"
    assert "CPU" in lines[-1] and "fp32" in lines[-1]


@pytest.mark.slow
@without_gpu
def test_an_arm_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Once where it is built, once in the middle of a round."""
    step, updates = cost.Arm.step, []

    def broken(spec: cost.Arm, model: Classifier, **options) -> RetryingStep:
        made_step = step(spec, model, **options)
        if spec.method == "fgsm_rs":
            raise RuntimeError("no such luck\nand a second line")
        if spec.method == "pgd_at":
            call = made_step.__call__

            def late(*args):
                updates.append(1)
                if len(updates) > 6:  # first, warm, timed, dispatched, then the rounds
                    raise torch.OutOfMemoryError("out of memory")
                return call(*args)

            return LateStep(made_step, late)
        return made_step

    monkeypatch.setattr(cost.Arm, "step", broken)
    methods = ("--methods", "natural", "gradnorm", "pgd_at", "fgsm_rs", "--schedules", "exact")
    record = run(tmp_path, *TINY, *methods, "--rounds", "4")
    rows = {row["arm"]: row for row in record["rows"]}
    failed = {row["arm"]: row["failed"] for row in record["not_timed"]}
    assert rows.keys() == {"natural", "gradnorm exact"} and record["complete"]
    assert all(len(r["meaningless_seconds_a_batch"]["rounds"]) == 4 for r in rows.values())
    assert failed == {
        "fgsm_rs": "first step: RuntimeError: no such luck",
        "pgd_at": "timed step: OutOfMemoryError: out of memory",
    }
    assert "pgd_at" not in rows["gradnorm exact"]["time_over"]
    failure = "failed: fgsm_rs, fp32: first step: RuntimeError: no such luck"
    assert failure in cost.table(record) and failure in capsys.readouterr().out


@without_gpu
def test_what_a_cpu_cannot_compute_in_is_not_timed(tmp_path: Path) -> None:
    """Counted all the same, and the arms of another precision are timed."""
    record = run(tmp_path, *TINY, "--methods", "natural", "--precision", "fp32", "tf32")
    assert [row["precision"] for row in record["rows"]] == ["fp32"]
    (row,) = record["not_timed"]
    assert row["precision"] == "tf32" and row["forwards_by_count"] == pytest.approx(3, rel=0.2)
    assert row["failed"] == "tf32 needs a CUDA device, not cpu"
    assert record["gemm"].keys() == {"fp32"}


@without_gpu
def test_no_arm_that_can_be_timed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = ["--output", str(tmp_path / "x.json")]
    options = [*files, *TINY, "--methods", "natural", "--precision", "tf32"]
    assert cost.main(options) == 2
    said = capsys.readouterr()
    assert said.err == (
        "cost.py: error: --precision leaves nothing to measure: tf32 needs a CUDA device, not cpu\n"
    )
    assert said.out == "" and list(tmp_path.iterdir()) == []
    assert cost.main([*options, "--counts-only"]) == 0, "counts need no device"


class LateStep:
    """A step whose calls are another's."""

    def __init__(self, step: RetryingStep, call):
        self.__dict__.update(step.__dict__)
        self.call = call

    def __call__(self, *args):
        return self.call(*args)


@without_gpu
def test_results_are_on_disk_after_every_arm_and_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def write(path: Path, record: dict) -> None:
        seen.append((len(record["rows"]), len(record["not_timed"]), record["complete"]))

    monkeypatch.setattr(cost, "write_record", write)
    files = ("--output", str(tmp_path / "x.json"))
    assert cost.main([*files, *TINY, "--methods", "natural", "fgsm_rs"]) == 0
    assert seen[:4] == [(0, 1, False), (0, 2, False), (2, 0, False), (2, 0, False)]
    assert seen[-1] == (2, 0, True)


@pytest.mark.slow
@without_gpu
def test_a_run_that_is_ended_early_leaves_a_complete_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "x.json"
    args = ["--output", str(kept), *TINY, "--rounds", "1"]
    assert cost.main([*args, "--methods", "natural"]) == 0
    before = kept.read_bytes()

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cost.UpdateBench, "time", end)
        cost.main([*args, "--methods", "natural", "fgsm_rs"])
    assert kept.read_bytes() == before
    assert json.loads((tmp_path / "x.json.incomplete").read_text())["complete"] is False
    assert cost.main([*args, "--methods", "natural", "fgsm_rs"]) == 0
    assert len(json.loads(kept.read_text())["rows"]) == 2
    assert not (tmp_path / "x.json.incomplete").exists()


@pytest.mark.slow
@without_gpu
def test_only_a_run_with_the_default_options_replaces_a_kept_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cost, "METHODS", ("natural",))
    folders = {"ROOT": tmp_path, "RESULTS": tmp_path / "results"}
    for name, folder in folders.items():
        monkeypatch.setattr(arguments, name, folder)
    kept = tmp_path / "results" / "cost_small_swin_counts.json"
    kept.parent.mkdir()
    kept.write_text("kept")
    assert cost.main(["--batch", "2", "--counts-only"]) == 0
    partial = tmp_path / "runs" / kept.name
    assert json.loads(partial.read_text())["batch"] == 2
    assert kept.read_text() == "kept"
    assert "no run with other --batch: written to runs/" in capsys.readouterr().out
    assert cost.main(["--counts-only"]) == 0
    record = json.loads(kept.read_text())
    assert record["architecture"]["model"] == "swin_t" and by_arm(record).keys() == {"natural"}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--batch", "0"], "--batch: 0 must be positive and finite"),
        (["--round-seconds", "inf"], "--round-seconds: inf must be positive and finite"),
        (["--model", "swim_b"], "--model 'swim_b' is unknown"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str], line: str, capsys: pytest.CaptureFixture
) -> None:
    try:
        assert cost.main(options) == 2
    except SystemExit as end:
        assert end.code == 2
    said = capsys.readouterr().err.strip()
    assert line in said and len(said.splitlines()) == 1


# --------------------------------------------------------------------------------------------- arms


def names(*options: str) -> list[str]:
    arms = cost.choose_arms(cost.main.parse(options))
    return [f"{arm.key}{', compiled' * arm.compile}" for arm in arms]


def test_which_arms_there_are() -> None:
    """The most telling first; the paper's way uncompiled, and in fp32 whatever was asked for."""
    chosen = ("--methods", *cost.METHODS, "--schedules", "lazy", "exact-eager", "exact")
    assert names("--compile", "on", "--precision", "bf16", *chosen) == [
        "natural, bf16, compiled",
        "gradnorm exact, bf16, compiled",
        "pgd_at, bf16, compiled",
        "gradnorm-paper, bf16",
        "gradnorm-paper, fp32",
        "pgd_at-paper, bf16",
        "fgsm_rs, bf16, compiled",
        "gradnorm exact-eager, bf16",
        "gradnorm lazy 4, bf16, compiled",
    ]
    eager = names("--compile", "off", "--precision", "fp32", *chosen)
    assert "gradnorm exact-eager, fp32" not in eager and eager.count("gradnorm-paper, fp32") == 1
    assert not any("compiled" in name for name in eager)


def test_the_papers_way() -> None:
    model = network()
    step = cost.Arm("pgd_at-paper", "fp32").step(model).step
    quirks = step.options.quirks
    assert quirks.train_in_eval_mode and quirks.sync_micro_batches and quirks.attack_weight_grads
    assert quirks.accumulation == "sum" and step.objective.attack_forwards == 1
    fair = cost.Arm("pgd_at", "fp32").step(model).step
    quirks = fair.options.quirks
    wasteful = (quirks.train_in_eval_mode, quirks.sync_micro_batches, quirks.attack_weight_grads)
    assert not any(wasteful)
    assert fair.objective.attack_forwards == 0 and fair.objective.attack_steps == 3


def test_arms_share_weights_and_leave_them_alone() -> None:
    """Also where their modules are the kernels': and the paper's way keeps PyTorch's."""
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    bench = cost.UpdateBench(model, 5, 4, "triton")
    shared = {id(p) for p in model.parameters()}
    assert {id(p) for p in bench.network.parameters()} == shared
    kinds = [
        {kind.__module__ for m in n.modules() for kind in type(m).__mro__}
        for n in (bench.plain, bench.network)
    ]
    assert "fastgn_kernels.modules" not in kinds[0] and "fastgn_kernels.modules" in kinds[1]
    trained = network()
    use_kernels(trained.backbone)
    assert [type(m) for m in bench.network.modules()] == [type(m) for m in trained.modules()]
    assert "fastgn.models.network" in {type(m).__module__ for m in bench.network.backbone.modules()}
    assert bench.step(cost.Arm("gradnorm", "fp32")).step.model is bench.network
    assert bench.step(cost.Arm("gradnorm-paper", "fp32")).step.model is bench.plain
    bench.update(bench.step(cost.Arm("gradnorm", "fp32")))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    state = bench.optimizer.state[next(model.parameters())]
    assert state["step"] == 2 and state["exp_avg"].abs().sum() > 0, "AdamW did its work"


def test_an_overflow_in_fp16_spoils_no_shared_weights() -> None:
    """The update is skipped, as in training."""
    bench = cost.UpdateBench(network(), 5, 4, "reference")
    step = bench.step(cost.Arm("gradnorm", "fp16"))
    before = [p.detach().clone() for p in bench.network.parameters()]
    bench.images[0] = math.inf
    bench.update(step)
    after = bench.network.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert step.step.loss_scale is not None and float(step.step.loss_scale.scale) == FIRST / 2


@pytest.mark.slow
def test_counting_takes_no_memory_of_a_batch() -> None:
    """4096 images, whose activations would not fit: and an image's operations do not depend on
    how many there are."""
    model = network()
    lazy = Schedule("lazy")
    many, few = (cost.update_flops(model, "gradnorm", lazy, batch, 5) for batch in (4096, 4))
    assert many == pytest.approx(few, rel=1e-3)
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------------- the clock


def test_each_arm_has_its_own_calls_and_watchers() -> None:
    order: list[str] = []

    @contextlib.contextmanager
    def watch(name: str):
        order.append(f"<{name}")
        yield
        order.append(f"{name}>")

    arms = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    calls = {"a": 1, "b": 2}
    timings = interleaved(arms, rounds=2, calls=calls, warmup=0, during=watch)
    assert order == 2 * ["<a", "a", "a>", "<b", "b", "b", "b>"]
    assert len(timings["b"]) == 2


@without_gpu
def test_dispatches_are_those_of_the_call() -> None:
    x = torch.rand(64, 64)
    product = lambda: (x @ x).sum()  # noqa: E731
    assert cost.launches(product, compiled=False)[1] == 2
    assert cost.launches(product, compiled=True)[1] is None


def test_only_kernels_count_as_launches() -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name: str, where=cuda, **more):
        return types.SimpleNamespace(name=name, device_type=where, **more)

    assert cost.is_kernel(event("triton_poi_fused_0"))
    assert not cost.is_kernel(event("aten::mm", cpu))
    assert not cost.is_kernel(event("Memcpy DtoD (Device -> Device)"))
    assert not cost.is_kernel(event("Torch-Compiled Region", is_user_annotation=True))


# ----------------------------------------------------------------------------------------- compiled


@pytest.mark.slow
@without_gpu
def test_compiled_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for code generation, as on a GPU: more losses than torch.compile takes of one function
    left to itself, their two graphs' times, and the eager arm beside them."""
    backend = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", backend)
    torch._dynamo.reset()
    try:
        methods = ("--methods", "natural", "gradnorm", "pgd_at", "--schedules", "exact")
        record = run(tmp_path, *TINY, "--compile", "on", *methods, "exact-eager")
    finally:
        torch._dynamo.reset()
    rows = by_arm(record)
    assert record["not_timed"] == []
    compiled = {name for name, row in rows.items() if row["compiled"]}
    assert compiled == rows.keys() - {"gradnorm exact-eager"}
    assert rows["gradnorm exact"]["launches"]["count"] is None
    assert rows["gradnorm exact"]["times_as_fast_as"].keys() == {"gradnorm exact-eager, fp32"}
    units = [rows[f"gradnorm {kind}"]["flops_an_image"] for kind in ("exact", "exact-eager")]
    assert units[0] == units[1]


# ------------------------------------------------------------------------------------------- energy


class FakeNvml(types.ModuleType):
    """A card whose counter the test moves."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.millijoules = 0
        self.asked: list[str] = []

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return "card"

    def nvmlDeviceGetTotalEnergyConsumption(self, card: str) -> int:  # noqa: N802
        return self.millijoules


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    properties = {3: types.SimpleNamespace(uuid="abc")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)


def test_joules(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    read, how = energy.energy_counter()
    assert read is not None and nvml.asked == ["GPU-abc"] and "counter" in how
    before = read()
    nvml.millijoules += 45_000
    assert read() - before == 45


def test_no_meter_says_why(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    why = "not measured: pynvml is not installed: pip install nvidia-ml-py"
    assert energy.energy_counter() == (None, why)
    broken = FakeNvml()
    broken.nvmlInit = lambda: (_ for _ in ()).throw(broken.NVMLError("Driver Not Loaded"))
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert energy.energy_counter() == (None, "not measured: NVML: Driver Not Loaded")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert energy.energy_counter() == (None, "not measured: no GPU")


# ------------------------------------------------------------------------------------------- a card


def on_a_card(folder: Path) -> dict:
    """A record as of an H200: a CPU's, its numbers replaced."""
    record = run(folder, *TINY, "--methods", "natural", "gradnorm", "--schedules", "exact")
    record |= {"meaningful_times": True, "device": "NVIDIA H200", "kernels": "triton"}
    record["gemm"] = {"bf16": {"side": 8192, "flops_per_s": 7e14}}
    for index, row in enumerate(record["rows"], 1):
        row["seconds_a_batch"] = {"mean": 0.01 * index, "std": 0.001, "rounds": [0.01 * index]}
        row["images_per_s"] = 4 / (0.01 * index)
        row["peak_bytes"] = {"total": index << 30}
        row["joules_an_image"] = {"mean": 0.5 * index, "std": 0.01}
        row |= {"precision": "bf16", "compiled": True}
    return record


@without_gpu
def test_a_table_of_a_card(tmp_path: Path) -> None:
    record = on_a_card(tmp_path)
    table = cost.table(record).splitlines()
    assert "| s a batch | images/s |" in table[0] and "| peak GiB | J an image |" in table[0]
    assert table[3].startswith("| gradnorm exact, compiled | 5 |")
    assert "| 0.0200 ± 0.0010 | 200 |" in table[3] and "| 2.0 | 1.000 ± 0.010 |" in table[3]
    assert "NVIDIA H200" in table[-1] and "bf16" in table[-1] and "CPU" not in table[-1]


@without_gpu
def test_what_minutes_have_no_room_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = ["--output", str(tmp_path / "x.json")]
    assert cost.main([*files, *TINY, "--methods", "natural", "--minutes", "1e-6"]) == 1
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["skipped"] == ["natural, fp32: --minutes 1e-06 had no room for it"]
    assert record["rows"] == record["not_timed"] == [] and record["complete"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cost_on_a_gpu(tmp_path: Path) -> None:
    methods = ("--methods", "natural", "gradnorm", "gradnorm-paper", "--schedules", "exact")
    record = run(tmp_path, *TINY, *methods, "--precision", "fp32", "--kernels", "reference")
    assert record["meaningful_times"] and not record["not_timed"]
    for row in record["rows"]:
        assert row["images_per_s"] > 0 and row["launches"]["count"] > 10
        assert row["peak_bytes"]["total"] > 0
    rows = by_arm(record)
    assert math.isclose(rows["natural"]["time_over"]["natural"]["mean"], 1)
