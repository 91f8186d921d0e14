"""An update never makes the host wait for the device, and CUDA graphs leave its gradient alone."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import classifier, objective, relative, vit
from support.runs import tiny_run
from support.steps import batches_for, gradients
from torch.utils._python_dispatch import TorchDispatchMode

from fastgn.config.cli import parse_config
from fastgn.distributed import World
from fastgn.objectives import METHODS as ALL_METHODS
from fastgn.optim import build_optimizer
from fastgn.run import Run
from fastgn.setup import build
from fastgn.step.options import StepOptions
from fastgn.step.schedule import SCHEDULES, Schedule
from fastgn.step.step import Step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", ["pgd_at", *(s for s in SCHEDULES if s != "exact-eager")])
def test_cuda_graphs_leave_the_gradient_alone(kind: str, count: int) -> None:
    """Over three updates of one or two micro-batches: a replayed graph writes where it wrote
    before, and neither gradients nor losses must live there."""
    found = []
    skipped = torch._dynamo.utils.counters["inductor"]
    before = skipped["cudagraph_skips"]
    schedule = Schedule() if kind == "pgd_at" else Schedule(kind, lazy_interval=2)
    method = "pgd_at" if kind == "pgd_at" else "gradnorm"
    for cuda_graphs in (False, True):
        model = classifier(vit).cuda()
        own = objective(method=method, attack_select="best")
        step = Step(model, own, StepOptions(schedule=schedule, cuda_graphs=cuda_graphs))
        losses = []
        for update in range(3):
            model.zero_grad()
            torch.manual_seed(update)
            batches = [tuple(x.cuda() for x in batch) for batch in batches_for(vit, count)]
            losses += step(batches, torch.tensor(1.0, device="cuda"), update)
        found.append((gradients(model), torch.stack(losses).nan_to_num()))
    for ours, plain in zip(*found, strict=True):
        assert relative(ours, plain) < 1e-4
    assert skipped["cudagraph_skips"] == before


class NoSync(TorchDispatchMode):
    """Raises at what would make the host wait for a device: reading a number, or a shape that
    depends on one."""

    aten = torch.ops.aten
    WAITS = (
        *(aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default),
        *(aten.equal.default, aten.masked_select.default, aten.unique_consecutive.default),
        *(aten._unique2.default,),
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func in self.WAITS:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def everything_on(folder: Path, method: str, *more: str) -> Run:
    """A run with all that an update can be asked to do, and torch's fused AdamW as on CUDA."""
    args = tiny_run(folder, "--method", method, "--attack-select", "best", "--clip-grad", "1")
    args += ["--mixup", "0.8", "--cutmix", "1.0", "--reprob", "0.5", "--precision", "bf16", *more]
    cfg = parse_config([*args, "--grad-accum-steps", "2"])
    device = torch.device("cuda" if cfg.run.device == "cuda" else "cpu")
    world = World(0, 1, device)
    run = build(cfg, world)
    world.held.close()  # one test builds the same run again
    groups = [{k: g[k] for k in ("params", "weight_decay")} for g in run.optimizer.param_groups]
    run.optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    return run


def update(run: Run, batches: list) -> None:
    """As the loop does it."""
    loss = run.compute_gradients(batches, run.ramp.fill_(0.5), run.update)
    grad_norm = run.apply_gradients(1e-3)
    run.update += 1
    run.accumulate(torch.stack([*loss, grad_norm]))


KINDS = [m for m in ALL_METHODS if m != "gradnorm"] + [*SCHEDULES]


def flags_of(kind: str) -> tuple[str, ...]:
    """Of a method, or of a schedule of gradnorm."""
    return ("gradnorm", "--schedule", kind) if kind in SCHEDULES else (kind,)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_reads_nothing_on_the_host(kind: str, tmp_path: Path) -> None:
    run = everything_on(tmp_path / "run", *flags_of(kind), "--compile", "off")
    with NoSync():
        for batches in islice(run.updates_of(0), 3):  # the device loader's work included
            update(run, batches)
        assert run.update == 3
        with pytest.raises(AssertionError, match="waits for the device"):
            run.check_finite()  # what a log row or a checkpoint may do
    run.check_finite()


@pytest.mark.parametrize("opt", ["fused", "lion"])
@pytest.mark.parametrize("kind", ["gradnorm+fgsm", "lazy"])
def test_an_update_in_fp16_reads_nothing_on_the_host(kind: str, opt: str, tmp_path: Path) -> None:
    """After the first update that is not skipped. A skipped one reads nothing either."""
    more = ("--compile", "off", "--precision", "fp16")
    run = everything_on(tmp_path / "run", *flags_of(kind), *more)
    if opt == "lion":
        run.optimizer = build_optimizer(parse_config(["--opt", "lion"]).optimizer, run.model, 1e-3)
    batches = list(islice(run.updates_of(0), 4))
    update(run, batches[0])
    loss_scale = run.step.loss_scale
    assert loss_scale is not None and run.updater.has_moved
    with NoSync():
        update(run, batches[1])
        loss_scale.scale.fill_(2.0**60)  # every product overflows
        update(run, batches[2])
        loss_scale.scale.fill_(2.0**10)
        update(run, batches[3])
    run.check_finite()
    assert loss_scale.state().tolist() == [2.0**10, 1.0]
    assert float(run.sums[1, 0]) == 3 and run.summed == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("natural", "fgsm_rs")])
@pytest.mark.parametrize("compile", ["on", "off"])
def test_an_update_does_not_synchronise_with_cuda(kind: str, compile: str, tmp_path: Path) -> None:
    does_not_synchronise(kind, compile, "bf16", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["exact", "pgd_at"])
@pytest.mark.parametrize("compile", ["on", "off"])
def test_an_update_in_fp16_does_not_synchronise_with_cuda(
    kind: str, compile: str, tmp_path: Path
) -> None:
    does_not_synchronise(kind, compile, "fp16", tmp_path)


def does_not_synchronise(kind: str, compile: str, precision: str, tmp_path: Path) -> None:
    options: tuple[str, ...] = ("--compile", compile) if kind != "exact-eager" else ()
    options += ("--precision", precision)
    run = everything_on(tmp_path / "run", *flags_of(kind), *options, "--device", "cuda")
    batches = list(islice(run.updates_of(0), 5))
    for group in batches[:2]:  # compiling may wait
        update(run, group)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for group in batches[2:]:
            update(run, group)
        with pytest.raises(RuntimeError, match="synchroniz"):
            run.check_finite()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.update == 5
    run.check_finite()
