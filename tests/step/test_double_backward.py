"""Copies of a compiled loss, and inputs that are not a list of tensors."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastgn.objectives import ObjectiveConfig, build_objective
from fastgn.step.double_backward import compile_double_backward
from fastgn.step.losses import LossModule

# traced and differentiated as for Inductor, but no code is generated
compiled = functools.partial(compile_double_backward, backend="aot_eager")


class Penalty(nn.Module):
    """(d sum(net(x)) / dx)^2, which depends on the weights by a second derivative alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return grad.square().sum()


def images() -> Tensor:
    return torch.linspace(-1, 1, 12).reshape(4, 3)


def eager(module: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of every parameter, by PyTorch's eager engine."""
    loss = module(x.clone().requires_grad_())
    grads = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    return loss.detach(), [torch.zeros(()) if g is None else g for g in grads]


def check_its_own(step: nn.Module, original: nn.Module | None = None) -> None:
    """The loss and the gradients are those of the weights that `step` holds; no others get one."""
    inner = next(m for m in step.modules() if isinstance(m, Penalty))
    exact, grads = eager(inner, images())
    for module in (step, *([] if original is None else [original])):
        module.zero_grad()
    loss = step(images())
    torch.testing.assert_close(loss, exact)
    loss.backward()
    for parameter, grad in zip(step.parameters(), grads, strict=True):
        mine = torch.zeros(()) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(mine, grad)
    assert any(p.grad is not None for p in step.parameters())
    if original is not None:
        assert all(p.grad is None for p in original.parameters())


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved,
    "AveragedModel": lambda module: AveragedModel(module),
}


@pytest.mark.parametrize("warm", [False, True], ids=["before the first call", "after it"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_has_weights_of_its_own(copied, warm):
    torch._dynamo.reset()
    original = compiled(Penalty())
    if warm:
        original(images()).backward()
    other = copied(original)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    check_its_own(other, original)
    check_its_own(original, other)


def test_a_shallow_copy_takes_the_weights_that_it_is_given():
    """copy.copy shares submodules until one is replaced."""
    torch._dynamo.reset()
    original = compiled(Penalty())
    original(images()).backward()
    other = copy.copy(original)
    other._modules = dict(other._modules)
    other.module = Penalty()
    with torch.no_grad():
        other.module.net[0].weight.mul_(2)
    check_its_own(other, original)


def test_a_state_dict_moves_between_copies():
    torch._dynamo.reset()
    original = compiled(Penalty())
    other = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(other(images()), original(images()))
    other.load_state_dict(original.state_dict())
    assert torch.equal(other(images()), original(images()))
    assert list(other.state_dict()) == [f"module.{k}" for k in Penalty().state_dict()]


def test_an_average_of_a_compiled_loss_follows_its_weights():
    torch._dynamo.reset()
    step = compiled(Penalty())
    average = AveragedModel(step, avg_fn=lambda mine, theirs, count: (mine + theirs) / 2)
    average.update_parameters(step)
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.mul_(3)
    average.update_parameters(step)
    (weight,) = [p for n, p in average.named_parameters() if n.endswith("net.0.weight")]
    torch.testing.assert_close(weight, Penalty().net[0].weight * 2)
    check_its_own(average)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3))

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.backbone(images_BCHW)


def test_copies_of_a_schedules_losses():
    torch._dynamo.reset()
    methods = {"penalty": "gradnorm", "plain": "natural"}
    losses = nn.ModuleDict(
        {
            name: compiled(LossModule(Network(), build_objective(ObjectiveConfig(method)), "fp32"))
            for name, method in methods.items()
        }
    )
    batch = torch.rand(2, 3, 2, 2), torch.tensor([0, 2]), torch.ones(())
    before = {name: losses[name](*batch).total for name in losses}
    other = copy.deepcopy(losses)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    for name, total in before.items():
        assert not torch.allclose(other[name](*batch).total, total)
        torch.testing.assert_close(losses[name](*batch).total, total)
        other[name](*batch).total.backward()
    assert all(p.grad is None for p in losses.parameters())


def test_what_cannot_be_pickled_is_named():
    step = compile_double_backward(Penalty(), backend=lambda graph, inputs: graph)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(step)
    check_its_own(copy.deepcopy(compiled(Penalty())))


# ------------------------------------------------------------------------------------------- inputs


class Forces(nn.Module):
    """Differentiates by one tensor of a dictionary, and scales by others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(
        self, batch: dict[str, Any], *, factors: list[Tensor], power: int = 2, mask: Any = None
    ) -> Tensor:
        x = batch["atoms"]["positions"]
        energy = self.net(x).sum() * factors[0] * batch["count"].float()
        (grad,) = torch.autograd.grad(energy, x, create_graph=True)
        return (grad - factors[1]).pow(power).sum()


def batch(**positions: Any) -> dict[str, Any]:
    return {"count": torch.tensor(2), "atoms": {"positions": images(), "name": "water"}}


def test_inputs_may_be_nested_and_named():
    torch._dynamo.reset()
    step = compiled(Forces())
    factors = [torch.tensor(0.5), torch.full((4, 3), 0.1)]
    there = batch()
    there["atoms"]["positions"].requires_grad_()
    exact = Forces()(there, factors=factors)
    exact.backward()
    given = batch()
    loss = step(given, factors=factors, power=2)
    torch.testing.assert_close(loss, exact)
    loss.backward()
    module = Forces()
    module(there, factors=factors).backward()
    for mine, theirs in zip(step.parameters(), module.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)
    # the caller's own tensors stay as they were
    assert not given["atoms"]["positions"].requires_grad and factors[0].grad is None


class ByName(nn.Module):
    """Differentiates by `x`, wherever it stands, and says whether `y` could be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = torch.autograd.grad((x.square() * self.weight).sum(), x, create_graph=True)
        return grad.square().sum(), torch.tensor(float(y.requires_grad))


@pytest.mark.parametrize(
    ("differentiate", "expected"), [(None, 1.0), (("x",), 0.0), (("x", "y"), 1.0)]
)
def test_keywords_can_be_chosen(differentiate, expected):
    torch._dynamo.reset()
    step = compiled(ByName(), differentiate=differentiate)
    x, y = torch.tensor([1.0, 3.0]), torch.ones(2)
    loss, other = step(x=x, y=y)
    assert float(loss) == 4 * 1 + (2 * 2 * 3) ** 2 and float(other) == expected


def test_a_tensor_given_twice_is_one_variable_however_it_is_given():
    torch._dynamo.reset()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, pair: list[Tensor], *, third: Tensor) -> Tensor:
            energy = (pair[0] * pair[1] * third).sum() * self.weight
            (grad,) = torch.autograd.grad(energy, pair[0], create_graph=True)
            return grad.sum()

    x = torch.tensor([1.0, 3.0])
    assert float(compiled(Twice())([x, x], third=x)) == 2 * (3 * 1 + 3 * 9)
