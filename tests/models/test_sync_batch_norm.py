"""BatchNorm over the images of two processes is that of one process, to second order."""

import copy
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import pretend_card
from support.processes import free_port, on_two_ranks
from timm.layers import BatchNormAct2d, ConvNormAct, FrozenBatchNormAct2d
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import Tensor, nn

from fastgn import distributed, setup, train
from fastgn.config.cli import parse_config
from fastgn.distributed import World
from fastgn.errors import UserError
from fastgn.models import sync_batch_norm
from fastgn.models.activations import swap_activations
from fastgn.models.network import Classifier
from fastgn.models.preact_resnet import PreActResNet18
from fastgn.models.sync_batch_norm import has_collectives, sum_over_ranks, sync_batch_norms
from fastgn.objectives import build_objective
from fastgn.resolved import has_cuda_graphs
from fastgn.step.options import StepOptions
from fastgn.step.step import Step

# ------------------------------------------------------------------ updates on one and two ranks


def preact() -> nn.Module:
    network = PreActResNet18(width=4)
    swap_activations(network, "gelu")
    return network


def short_preact() -> nn.Module:
    """Returns the same network with two blocks in place of eight, which compiles sooner."""
    network = PreActResNet18(width=4)
    network.blocks = network.blocks[1:3]
    network.norm, network.fc = nn.BatchNorm2d(8), nn.Linear(8, 10)
    swap_activations(network, "gelu")
    return network


def timm_layers() -> nn.Module:
    """Returns a network with BatchNormAct2d and BatchNorm1d."""
    layer = functools.partial(ConvNormAct, kernel_size=3, stride=2, act_layer=nn.SiLU)
    convolutions = layer(3, 6), layer(6, 8)
    head = nn.Linear(8, 7), nn.BatchNorm1d(7, momentum=None), nn.GELU(), nn.Linear(7, 10)
    network = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)
    assert any(isinstance(m, BatchNormAct2d) for m in network.modules())
    return network


def compute_locally(x: Tensor, count: int, group_name: str) -> tuple[Tensor, Tensor]:
    """Returns the means of the ranks' own statistics, which is wrong for the variance."""
    rest = [d for d in range(x.ndim) if d != 1]
    local = torch.stack([x.mean(rest), x.var(rest, correction=0)])
    mean_C, var_C = sum_over_ranks(local, group_name) / 2
    return mean_C, var_C


def sum_without_derivative(x: Tensor, group_name: str) -> Tensor:
    """Returns the right sum, whose derivative ignores the losses of the other ranks."""
    return x + (sum_over_ranks(x.detach(), group_name) - x.detach())


FAULTS: dict[str, dict[str, Callable[..., Any]]] = {
    "local statistics": {"compute_statistics": compute_locally},
    "local derivative": {"sum_over_ranks": sum_without_derivative},
}
"""Fault -> functions that replace those of sync_batch_norm."""


def five_updates(rank: int, ranks: int, case: dict[str, Any]) -> dict[str, Any]:
    """Trains on a rank's share of a fixed global batch of 16 images in two micro-batches."""
    torch.manual_seed(0)
    model = Classifier(case["network"](), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 16)
    model.to(torch.float64)
    if ranks > 1:
        assert sync_batch_norms(model, ranks) == sum(
            hasattr(m, "running_mean") for m in model.modules()
        )
        for name, function in FAULTS.get(case.get("fault", ""), {}).items():
            setattr(sync_batch_norm, name, function)
    cfg = parse_config(["--method", case["method"]])
    step = Step(
        model, build_objective(cfg.objective), StepOptions(compile=case.get("compile", False))
    )
    draw = torch.Generator().manual_seed(1)
    losses, first = [], None
    for update in range(5):
        images = torch.rand(16, 3, 16, 16, generator=draw, dtype=torch.float64)
        targets = torch.rand(16, 10, generator=draw, dtype=torch.float64).softmax(1)
        part = 8 // ranks
        batches = [
            (images[start:][:part], targets[start:][:part])
            for start in (part * rank, 8 + part * rank)
        ]
        model.zero_grad()
        loss = step(batches, torch.ones((), dtype=torch.float64), update)
        grads = {n: p.grad for n, p in model.named_parameters()}
        row = torch.stack([loss.total, loss.ce, loss.penalty])
        if ranks > 1:
            for value in (row, *grads.values()):
                torch.distributed.all_reduce(value)
                value /= ranks
        first = first or {n: g.clone() for n, g in grads.items()}
        losses.append(row)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    return {
        "losses": {"all": torch.stack(losses)},
        "grads": first,
        "weights": {n: p.detach() for n, p in model.named_parameters()},
        "statistics": {
            n: b.double() for n, b in model.named_buffers() if "running" in n or "num_b" in n
        },
    }


def updates_on_a_rank(cases: list[dict[str, Any]], folder: str) -> int:
    # what is compared is the traced graph, because Inductor's code takes a minute
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore
    right = dict(vars(sync_batch_norm))
    with distributed.session("cpu") as world:
        for index, case in enumerate(cases):
            result = five_updates(world.rank, 2, case)
            vars(sync_batch_norm).update(right)
            torch.save(result, Path(folder) / f"{index}_{world.rank}.pt")
    return 0


CASES: dict[str, dict[str, Any]] = {
    f"{method} {network.__name__}{' compiled' * compiled}": {
        "method": method,
        "network": network,
        "compile": compiled,
    }
    for network, ways in ((preact, (False,)), (short_preact, (True,)), (timm_layers, (False, True)))
    for method in ("natural", "gradnorm")
    for compiled in ways
}
WRONG: dict[str, dict[str, Any]] = {
    f"{method}, {fault}": {"method": method, "network": timm_layers, "fault": fault}
    for method in ("natural", "gradnorm")
    for fault in FAULTS
}


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Case -> results of rank 0 and rank 1."""
    folder = tmp_path_factory.mktemp("updates")
    cases = CASES | WRONG
    on_two_ranks(folder, updates_on_a_rank, list(cases.values()), str(folder))
    return {
        name: [torch.load(folder / f"{i}_{rank}.pt") for rank in range(2)]
        for i, name in enumerate(cases)
    }


@functools.cache
def update_alone(method: str, network: Callable[[], nn.Module]) -> dict[str, Any]:
    """Returns the results of one process, eager and with PyTorch's layers."""
    return five_updates(0, 1, {"method": method, "network": network})


def relative_error(mine: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Returns the norm of the difference, relative to the norm of what is wanted."""
    assert mine.keys() == wanted.keys()
    error, size = (
        torch.cat([x.flatten() for x in values])
        for values in ([mine[n] - wanted[n] for n in wanted], wanted.values())
    )
    return float(error.norm() / size.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(name: str, updates: dict[str, list[dict[str, Any]]]) -> None:
    case = CASES[name]
    alone = update_alone(case["method"], case["network"])
    for result in updates[name]:
        for kind, wanted in alone.items():
            assert relative_error(result[kind], wanted) < 1e-12, kind


def test_the_updates_have_what_could_differ() -> None:
    """Else the comparison above would show less than it says."""
    natural, gradnorm = (update_alone(method, preact) for method in ("natural", "gradnorm"))
    scaled = {n: 0.8 * g for n, g in natural["grads"].items()}
    assert relative_error(gradnorm["grads"], scaled) > 1e-3
    assert relative_error(gradnorm["weights"], natural["weights"]) > 1e-3
    assert natural["statistics"]["backbone.norm.num_batches_tracked"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_fault_is_found(name: str, updates: dict[str, list[dict[str, Any]]]) -> None:
    case = WRONG[name]
    alone = update_alone(case["method"], case["network"])
    for result in updates[name]:
        assert relative_error(result["grads"], alone["grads"]) > 1e-3


# --------------------------------------------------------------------------- a group of one process


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yields the name of a process group with this process alone."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1
    )
    assert torch.distributed.group.WORLD is not None
    yield torch.distributed.group.WORLD.group_name
    torch.distributed.destroy_process_group()


def test_derivatives_of_the_sum(group: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def square(x: Tensor) -> Tensor:
        return sum_over_ranks(x * x, group) * x

    assert torch.autograd.gradcheck(square, x)
    assert torch.autograd.gradgradcheck(square, x)
    torch.library.opcheck(sum_over_ranks, (x, group))
    expanded = torch.ones((), dtype=torch.float64).expand(3, 4)
    assert torch.equal(sum_over_ranks(expanded, group), expanded)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(3), (5, 3)),
    "1d of sequences": (lambda: nn.BatchNorm1d(3, affine=False), (4, 3, 2)),
    "2d": (lambda: nn.BatchNorm2d(3, momentum=0.3), (4, 3, 2, 3)),
    "2d without momentum": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 3)),
    "2d without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 2)),
    "3d": (lambda: nn.BatchNorm3d(3, eps=0.1), (2, 3, 2, 2, 2)),
    "with activation": (lambda: BatchNormAct2d(3, act_layer=nn.SiLU), (4, 3, 2, 2)),
    "with ReLU in place": (lambda: BatchNormAct2d(3), (4, 3, 2, 2)),
}


@pytest.fixture
def convert(group: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], nn.Module]:
    """Returns a function that makes layers communicate, although there is one process."""

    def converted(module: nn.Module) -> nn.Module:
        sync_batch_norms(module, 2)
        for layer in module.modules():
            if isinstance(layer, sync_batch_norm.SyncBatchNorm):
                layer.ranks = 1
        return module

    return converted


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_that_of_pytorch(kind: str, convert: Callable[[nn.Module], nn.Module]) -> None:
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    theirs = nn.Sequential(build()).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    mine = convert(copy.deepcopy(theirs))
    names = list(theirs.state_dict())
    for training in (True, True, False):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(mine.train(training)(x), theirs.train(training)(x))
        assert mine.state_dict().keys() == theirs.state_dict().keys()
        assert list(mine.state_dict()) == names
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict())
        if training:
            assert torch.autograd.gradgradcheck(mine, x)
            theirs.load_state_dict(mine.state_dict())  # gradgradcheck calls it often
    theirs.load_state_dict(mine.state_dict())
    mine.load_state_dict(theirs.state_dict())


def test_what_the_layers_refuse(convert: Callable[[nn.Module], nn.Module]) -> None:
    layer = convert(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.rand(2, 3))
    with pytest.raises(ValueError, match="one value per channel, which has no variance"):
        layer(torch.rand(1, 3, 1, 1))
    layer.eval()(torch.rand(1, 3, 1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_short_numbers_are_fp32(
    dtype: torch.dtype, convert: Callable[[nn.Module], nn.Module]
) -> None:
    x = torch.randn(64, 3, 4, 4).mul(0.1).add(8).to(dtype)  # a mean square loses the variance
    theirs = nn.Sequential(nn.BatchNorm2d(3))
    mine = convert(copy.deepcopy(theirs))
    y = mine(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), theirs(x.float()), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-5, atol=0)


def test_which_layers_communicate(group: str) -> None:
    frozen = FrozenBatchNormAct2d(3)
    network = nn.Sequential(nn.BatchNorm2d(3), frozen, nn.GroupNorm(1, 3))
    assert sync_batch_norms(network, 1) == 1 and not has_collectives(network)
    assert type(network[0]) is nn.BatchNorm2d
    assert sync_batch_norms(network, 2) == 1 and has_collectives(network)
    assert network[1] is frozen and type(frozen) is FrozenBatchNormAct2d
    assert has_collectives(copy.deepcopy(network))
    assert sync_batch_norms(nn.Sequential(frozen), 2) == 0
    line = "--sync-bn: layer 0 is a SplitBatchNorm2d, which is not supported: leave --sync-bn out"
    with pytest.raises(UserError, match=re.escape(line)):
        sync_batch_norms(nn.Sequential(SplitBatchNorm2d(3)), 2)


# -------------------------------------------------------------------------------- whole runs


NETWORK = ("--model", "resnet18", "--model-kwargs", "channels=(4, 8, 8, 8)", "--img-size", "32")
RUN = (*NETWORK, "--data", "digits", "--epochs", "1", "--warmup-epochs", "0", "--eval-images", "8")
RUN += ("--max-updates", "4", "--log-interval", "2", "--activation", "gelu", "--opt", "sgd")


def test_one_process_needs_nothing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    args = [*RUN, "--batch-size", "8", "--sync-bn"]
    with distributed.session("cpu") as world:
        run = setup.build(parse_config([*args, "--output", str(tmp_path / "one")]), world)
    assert not has_collectives(run.model)
    assert "--sync-bn does nothing" not in capfd.readouterr().err
    args += ["--train-in-eval-mode", "--output", str(tmp_path / "eval")]
    with distributed.session("cpu") as world:
        run = setup.build(parse_config(args), world)
    line = "warning: --sync-bn does nothing with --train-in-eval-mode, because BatchNorm then uses "
    assert line in capfd.readouterr().err
    args = ["--model", "swin_t", "--img-size", "32", "--sync-bn", "--output", str(tmp_path / "no")]
    assert train.main(args) == 2
    line = "fastgn.train: error: --sync-bn: --model swin_t has no BatchNorm: leave --sync-bn out\n"
    assert capfd.readouterr().err == line


def test_no_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    device = pretend_card(monkeypatch, "Tesla V100", (7, 0))
    both = parse_config(["--sync-bn"]).step, parse_config([]).step
    assert [has_cuda_graphs(step, World(0, 1, device), 1) for step in both] == [True, True]
    assert not has_cuda_graphs(both[0], World(0, 2, device), 1)
