"""The gradients of an update, in one process and in several."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from support.processes import on_ranks
from support.runs import TINY_SWIN
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgn import attacks, distributed
from fastgn.config.cli import parse_config
from fastgn.models import network
from fastgn.objectives import build_objective
from fastgn.step import overlap
from fastgn.step.double_backward import compile_double_backward
from fastgn.step.gradients import (
    ALIGNMENT,
    GradientBuffer,
    OneRank,
    Ranks,
    prepare_means,
    sum_prepared,
)
from fastgn.step.options import StepOptions
from fastgn.step.retry import RetryingStep
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step

UPDATES, IMAGES = 20, 16


def small_weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = ((3, 5), (7,), (2, 2))
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    return [*weights, nn.Parameter(torch.randn(4, dtype=torch.float64))]


def test_a_buffer_holds_all_gradients() -> None:
    weights = small_weights()
    buffer = GradientBuffer(weights)
    assert [flat.dtype for flat in buffer.flats] == [torch.float32, torch.float64]
    first, second = ([torch.randn_like(w) for w in weights] for _ in range(2))
    buffer.add(first)
    buffer.add(second)
    for weight, a, b in zip(weights, first, second, strict=True):
        assert weight.grad is not None and torch.equal(weight.grad, a + b)
        inside = [f for f in buffer.flats if f.dtype == weight.dtype][0]
        offset = weight.grad.storage_offset()
        assert weight.grad.untyped_storage().data_ptr() == inside.untyped_storage().data_ptr()
        assert offset % ALIGNMENT == 0
    buffer.clear()
    buffer.add(first)
    assert all(torch.equal(w.grad, a) for w, a in zip(weights, first, strict=True))  # type: ignore


def test_a_weight_without_gradient_keeps_none() -> None:
    """So that the optimizer leaves the weight alone, its decay included."""
    weights = small_weights()
    buffer = GradientBuffer(weights)
    buffer.add([torch.ones_like(weights[0]), None, torch.ones_like(weights[2]), None])
    assert [w.grad is None for w in weights] == [False, True, False, True]


def test_a_gradient_of_the_callers_is_added_to() -> None:
    (weight, *_) = small_weights()
    weight.grad = torch.ones_like(weight)
    GradientBuffer([weight]).add([torch.full_like(weight, 2)])
    assert torch.equal(weight.grad, torch.full_like(weight, 3))


class Allocations(TorchDispatchMode):
    """Records the operators whose results are not in the memory of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def storages(tree: Any) -> set[int]:
            leaves = [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
            return {x.untyped_storage()._cdata for x in leaves}

        result = func(*args, **(kwargs or {}))
        if storages(result) - storages((args, kwargs)):
            self.found.append(str(func))
        return result


def test_sums_allocate_only_before_the_processes_agree() -> None:
    """Else a process without memory would keep the others waiting in an all-reduce."""
    weights = small_weights()
    buffer = GradientBuffer(weights, torch.bfloat16)
    buffer.add([torch.ones_like(w) for w in weights])
    statistics = [torch.full((3,), 4.0), torch.ones(2), torch.tensor(5)]
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with Allocations() as preparing:
            sums = buffer.prepare_sums() + prepare_means(statistics, 2)
        with Allocations() as summing:
            sum_prepared(sums)
    finally:
        torch.distributed.destroy_process_group()
    assert preparing.found and summing.found == []
    assert statistics[0].tolist() == [2, 2, 2] and statistics[2] == 5  # the other process sent 0
    assert all(torch.equal(w.grad, torch.ones_like(w)) for w in weights)  # type: ignore[arg-type]


def run_out_in_a_cast(folder: str) -> int:
    """One rank runs out of memory when its gradients are cast to bf16, and once more after that."""
    model, _ = network.build_model(parse_config(TINY_SWIN).architecture, 10, "reference")
    objective = build_objective(parse_config(["--method", "gradnorm"]).objective)
    said: list[str] = []
    with distributed.session("cpu") as world:
        options = StepOptions(compile=False, grad_dtype="bf16")
        step = RetryingStep(Step(model, objective, options, ranks=world), said.append)
        cast, left = Tensor.to, [2 * world.rank]

        def run_out(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args == (torch.bfloat16,) and left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return cast(tensor, *args, **kwargs)

        Tensor.to = run_out  # type: ignore[method-assign,assignment]
        images, targets = global_batch(0, torch.float32)
        mine = slice(8 * world.rank, 8 * world.rank + 8)
        step([(images[mine], targets[mine])], torch.ones(()))
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore
        result = {"micro_batch": step.step.micro_batch, "said": len(said), "grads": grads}
        torch.save(result, Path(folder) / f"{world.rank}.pt")
    return 0


def test_ranks_halve_together_after_a_cast_without_memory(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, run_out_in_a_cast, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [(r["micro_batch"], r["said"]) for r in ranks] == [(2, 2), (2, 2)]
    assert torch.equal(ranks[0]["grads"], ranks[1]["grads"])


def test_buckets_begin_with_the_last_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "BUCKET", 10)
    weights = [torch.empty(n) for n in (4, 9, 1, 3, 6, 20)] + [torch.empty(1).double()]
    buckets = overlap.make_buckets(weights, None)
    assert [(b.start, b.stop, len(b.slot)) for b in buckets] == [
        (6, 7, 1),
        (5, 6, 20),
        (2, 5, 10),
        (0, 2, 13),
    ]
    assert [b.slot.dtype for b in buckets] == [torch.float64] + [torch.float32] * 3
    assert all(b.slot.requires_grad for b in buckets)
    assert {b.slot.dtype for b in overlap.make_buckets(weights, torch.bfloat16)} == {torch.bfloat16}
    assert overlap.split_sums([None] * 4, buckets, weights) == [None] * 7


class PenaltyOfMlp(nn.Module):
    """A small loss with a gradient penalty. One of its layers is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(8, 16), nn.Softplus(), nn.Linear(16, 8), nn.Softplus(), nn.Linear(8, 3))
        self.net = nn.Sequential(*layers).double()
        self.unused = nn.LayerNorm(3).double()

    def forward(self, images: Tensor, targets: Tensor, ramp: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(images), targets)
        (grad,) = torch.autograd.grad(loss, images, create_graph=True)
        return loss + ramp * grad.abs().sum()


def sum_by_inductor(folder: str) -> int:
    """Saves the sums that code from Inductor computes, and the gradients of this rank alone."""
    overlap.BUCKET = 100
    with distributed.session("cpu") as world:
        loss = PenaltyOfMlp()
        weights = list(loss.parameters())
        buckets = overlap.make_buckets(weights, None)
        summed = overlap.SummedInBackward(loss, buckets, overlap.find_default_group())
        compiled = compile_double_backward(
            summed, differentiate=(0,), options=overlap.COMPILE_OPTIONS
        )
        slots, results = [bucket.slot for bucket in buckets], []
        for update in range(3):
            torch.manual_seed(10 * update + world.rank)
            batch = torch.rand(4, 8).double(), torch.tensor([0, 1, 2, 0]), torch.ones(()).double()
            sums = torch.autograd.grad(compiled(*batch, *slots), slots)
            batch[0].requires_grad_()
            own = torch.autograd.grad(loss(*batch), weights, allow_unused=True)
            results.append((overlap.split_sums(sums, buckets, weights), own))
        torch.save(results, Path(folder) / f"{world.rank}.pt")
    return 0


@pytest.mark.slow
def test_inductor_sums_in_the_backward(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, sum_by_inductor, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for one, other in zip(*ranks, strict=True):
        for sums, also, a, b in zip(one[0], other[0], one[1], other[1], strict=True):
            expected = torch.zeros_like(sums) if a is None else a + b
            assert torch.equal(sums, also)
            torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-15)


class TwoRanks(OneRank):
    """Two processes of which this one is the only real one."""

    size = 2


class RanksWithoutMemory(TwoRanks):
    """The other process says once that it has run out of memory."""

    failures = 1

    def any(self, flag: bool) -> bool:
        self.failures -= 1
        return flag or self.failures >= 0


def test_a_forward_without_memory_elsewhere_is_repeated_flat() -> None:
    """This process must not begin a sum in its backward, in which it would wait for the other."""
    model, _ = network.build_model(parse_config(TINY_SWIN).architecture, 10, "reference")
    objective = build_objective(parse_config(["--method", "gradnorm"]).objective)
    batch = global_batch(0, torch.float32)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        options = StepOptions(grad_sync="overlap", compile=False)
        said: list[str] = []
        step = RetryingStep(
            Step(model, objective, options, ranks=RanksWithoutMemory()), said.append
        )
        step([batch], torch.ones(()))
        grads = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
        in_halves = StepOptions(compile=False, micro_batch=IMAGES // 2)
        halves = RetryingStep(Step(model, objective, in_halves))
        model.zero_grad()
        halves([batch], torch.ones(()))
    finally:
        torch.distributed.destroy_process_group()
    assert len(said) == 1 and f"going on with {IMAGES // 2}" in said[0]
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(2 * grad, parameter.grad)  # each process has half of the mean


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["plain", "graphs"])
@pytest.mark.parametrize("grad_dtype", ["fp32", "bf16"])
def test_a_gpu_sums_in_the_backward(
    grad_dtype: str, cuda_graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of one process, so that the sums are the gradients of --grad-sync flat."""
    monkeypatch.setattr(overlap, "BUCKET", 1000)  # so that all-reduces come between kernels
    model, _ = network.build_model(parse_config(TINY_SWIN).architecture, 10, "triton")
    model.cuda()
    batches = [tuple(x.cuda() for x in global_batch(u, torch.float32)) for u in range(6)]
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("nccl", rank=0, world_size=1, init_method=store)
    try:
        grads: dict[str, list[Tensor]] = {}
        for sync in ("flat", "overlap"):
            options = StepOptions(
                compile=True, grad_sync=sync, grad_dtype=grad_dtype, cuda_graphs=cuda_graphs
            )
            objective = build_objective(parse_config(["--method", "gradnorm"]).objective)
            step = RetryingStep(Step(model, objective, options, ranks=TwoRanks()))
            grads[sync] = []
            for batch in batches:
                model.zero_grad()
                step([batch], torch.ones((), device="cuda"))
                grads[sync].append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore
    finally:
        torch.distributed.destroy_process_group()
    assert len(step.step._buckets) > 2
    tolerance = (
        {"rtol": 2e-2, "atol": 1e-4} if grad_dtype == "bf16" else {"rtol": 1e-4, "atol": 1e-6}
    )
    torch.testing.assert_close(grads["overlap"], grads["flat"], **tolerance)


# -------------------------------------------------------------------- several processes against one


def drop_by_position(rank: int) -> Callable[..., Tensor]:
    """Returns a dropout that drops elements by the position of their image in the global batch.

    torch's own draws differ between processes by design.
    """

    def forward(self: nn.Dropout, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        row = torch.arange(len(x)).view(-1, *[1] * (x.dim() - 1)) + rank * len(x)
        column = torch.arange(x[0].numel()).view(1, *x.shape[1:])
        keep = (row * 13 + column * 7) % 10 != 0
        return x * keep.to(x.dtype) / 0.9

    return forward


def global_batch(update: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns mixed images and their targets, the same in each process."""
    draw = torch.Generator().manual_seed(update)
    images = torch.rand(IMAGES, 3, 16, 16, generator=draw)
    targets = torch.nn.functional.one_hot(torch.arange(IMAGES) % 10, 10).float()
    images, targets = (0.7 * x + 0.3 * x.flip(0) for x in (images, targets))
    return images.to(dtype), targets.to(dtype)


def train(world: Ranks, rank: int, count: int, case: dict[str, Any]) -> dict[str, Any]:
    """Returns the weights after UPDATES updates of a rank, and the hashes of its compiled graphs.

    count: number of ranks whose order of images is used, so that one process can have the order
    of several.
    """
    dtype = case.get("dtype", torch.float64)
    swin = [*TINY_SWIN]
    if case.get("dropout"):
        at = swin.index("window_size=2") + 1
        swin[at:at] = ["drop_rate=0.1", "proj_drop_rate=0.1", "attn_drop_rate=0.1"]
    cfg = parse_config([*swin, "--method", case.get("method", "gradnorm")])
    torch.manual_seed(0)
    model, _ = network.build_model(cfg.architecture, 10, "reference")
    model.to(dtype)
    nn.Dropout.forward = drop_by_position(rank)  # type: ignore[method-assign]
    attacks.draw_random_start = lambda images_BCHW, eps: images_BCHW  # type: ignore
    hashes: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        text = graph.print_readable(print_output=False)
        hashes.append(hashlib.sha256(text.encode()).hexdigest())
        assert "c10d" not in text or case.get("sync") == "overlap"
        return make_boxed_func(graph.forward)

    original = torch.compile
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.compile = functools.partial(original, backend=backend)  # type: ignore
    torch._dynamo.reset()
    try:
        options = StepOptions(
            schedule=Schedule(case.get("schedule", "exact"), lazy_interval=2),
            compile=case.get("compile", False),
            grad_sync=case.get("sync", "flat"),
            grad_dtype=case.get("grad_dtype", "fp32"),
        )
        step = RetryingStep(Step(model, build_objective(cfg.objective), options, ranks=world))
        # AdamW divides by the size of the gradients, and so makes the rounding of the smallest ones
        # as large as a step. At twice this learning rate, fp32's error is 1.2e-5.
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
        accumulated = case.get("accumulated", 1)
        size = IMAGES // accumulated  # of a micro-batch over all ranks
        for update in range(UPDATES):
            images, targets = global_batch(update, dtype)
            batches = []
            for start in range(0, IMAGES, size):
                order = start + torch.arange(size).view(count, -1)
                if case.get("schedule") == "subset" and world.size == 1:
                    # the subset is the first half of each rank's images
                    order = order.view(count, 2, -1).transpose(0, 1)
                all_images = world.size == 1 and not case.get("one_share")
                mine = order.flatten() if all_images else order[rank]
                batches.append((images[mine], targets[mine]))
            step(batches, torch.ones((), dtype=dtype), update)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.compile = original
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"weights": weights, "hashes": sorted(hashes)}


FP32 = {"dtype": torch.float32, "compile": True}
CASES: dict[str, dict[str, Any]] = {
    "exact": {},
    "accumulated": {"accumulated": 2},
    "dropout": {"dropout": True},
    "lazy": {"schedule": "lazy"},
    "subset": {"schedule": "subset"},
    "attack": {"method": "pgd_at"},
    "overlap, eager": {"sync": "overlap"},
    "overlap, lazy": {"sync": "overlap", "schedule": "lazy", "dropout": True},
    "overlap, subset": {"sync": "overlap", "schedule": "subset"},
    "overlap, attack": {"sync": "overlap", "method": "pgd_at"},
    "overlap, accumulated": {"sync": "overlap", "accumulated": 2},
    "compiled": FP32,
    "overlap": {**FP32, "sync": "overlap"},
    "bf16 gradients": {"dtype": torch.float32, "grad_dtype": "bf16"},
    "overlap, bf16 gradients": {"dtype": torch.float32, "grad_dtype": "bf16", "sync": "overlap"},
}


SLOW_CASES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "fp32, accumulated": {"dtype": torch.float32, "accumulated": 2},
    "compiled, float64": {"compile": True},
    "compiled, accumulated": {**FP32, "accumulated": 2},
    "compiled, dropout": {**FP32, "dropout": True},
    "compiled, lazy": {**FP32, "schedule": "lazy"},
    "compiled, subset": {**FP32, "schedule": "subset"},
    "compiled, attack": {**FP32, "method": "pgd_at"},
    "compiled, four": {**FP32, "ranks": 4},
}


def train_on_a_rank(cases: dict[str, dict[str, Any]], folder: str) -> int:
    overlap.BUCKET = 1000  # so that a small network has several buckets
    with distributed.session("cpu") as world:
        results = {n: train(world, world.rank, world.size, case) for n, case in cases.items()}
        torch.save(results, Path(folder) / f"{world.rank}.pt")
    return 0


@pytest.fixture(scope="module", params=[2, 4])
def several(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, list[dict[str, Any]]]:
    """Number of ranks, and what each of them has computed: case -> result."""
    count = request.param
    folder = tmp_path_factory.mktemp(f"ranks{count}")
    # four compile no other graph than two, and take twice as long
    cases = {n: c for n, c in CASES.items() if count == 2 or not c.get("compile")}
    on_ranks(folder, count, train_on_a_rank, cases, str(folder))
    return count, [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes the replacements of `train` in this process."""
    monkeypatch.setattr(attacks, "draw_random_start", attacks.draw_random_start)
    monkeypatch.setattr(nn.Dropout, "forward", nn.Dropout.forward)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_several_processes_train_the_weights_of_one(
    name: str, several: tuple[int, list[dict[str, Any]]], restored: None
) -> None:
    count, ranks = several
    if name not in ranks[0]:
        pytest.skip("compiled with two ranks only")
    case = CASES[name]
    alone = train(OneRank(), 0, count, case | {"sync": "flat", "grad_dtype": "fp32"})
    for rank in ranks[1:]:
        assert torch.equal(rank[name]["weights"], ranks[0][name]["weights"])
    error = (ranks[0][name]["weights"] - alone["weights"]).norm() / alone["weights"].norm()
    in_bf16 = case.get("grad_dtype") == "bf16"
    assert error < (1e-2 if in_bf16 else 1e-5 if "dtype" in case else 1e-12)
    if in_bf16:
        assert error > 1e-6, "gradients in bf16 are rounded"


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_compiled_and_fp32_processes_train_the_weights_of_one(
    name: str, tmp_path: Path, restored: None
) -> None:
    case = SLOW_CASES[name]
    count = case.get("ranks", 2)
    on_ranks(tmp_path, count, train_on_a_rank, {name: case}, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt")[name] for rank in range(count)]
    alone = train(OneRank(), 0, count, case)
    for rank in ranks:
        assert torch.equal(rank["weights"], ranks[0]["weights"])
        assert bool(rank["hashes"]) == case.get("compile", False)
    error = (ranks[0]["weights"] - alone["weights"]).norm() / alone["weights"].norm()
    assert error < (1e-5 if "dtype" in case else 1e-12)


@pytest.mark.slow
def test_the_compiled_graphs_are_those_of_one_process(
    several: tuple[int, list[dict[str, Any]]], restored: None
) -> None:
    """Forward and backward have no collective in them, which `train` checks too."""
    count, ranks = several
    if "compiled" not in ranks[0]:
        pytest.skip("compiled with two ranks only")
    alone = train(OneRank(), 0, count, CASES["compiled"] | {"one_share": True})
    assert len(alone["hashes"]) == 2
    assert [rank["compiled"]["hashes"] for rank in ranks] == [alone["hashes"]] * count
    assert ranks[0]["overlap"]["hashes"] != alone["hashes"]


@pytest.mark.slow
def test_the_cases_differ(several: tuple[int, list[dict[str, Any]]]) -> None:
    """Else one case would show no more than another."""
    _, ranks = several
    weights = [r["weights"] for n, r in ranks[0].items() if n in ("exact", "lazy", "dropout")]
    weights += [ranks[0][n]["weights"] for n in ("subset", "attack")]
    for index, one in enumerate(weights):
        assert all((one - other).norm() / one.norm() > 1e-6 for other in weights[:index])
