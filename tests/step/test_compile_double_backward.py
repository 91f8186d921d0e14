"""compile_double_backward for losses of other people: WGAN-GP and a physics-informed network."""

import pytest
import torch
from support.marks import first_is_quick
from support.networks import relative
from support.steps import gradients
from torch import Tensor, nn

from fastgn import compile_double_backward
from fastgn.step.double_backward import count_graphs


class GradientPenalty(nn.Module):
    """The critic's loss of WGAN-GP (Gulrajani et al. 2017): forward(real, fake, mix) with mix in
    0..1."""

    def __init__(self, critic: nn.Module):
        super().__init__()
        self.critic = critic

    def forward(self, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
        between = mix * real + (1 - mix) * fake
        (grad,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (grad.flatten(1).norm(dim=1) - 1).square().mean()
        return self.critic(fake).mean() - self.critic(real).mean() + 10 * penalty


class HeatResidual(nn.Module):
    """A physics-informed loss: the residual of u_t = u_xx at points (t, x), and u(0, x) = sin(pi
    x)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        u = self.net(torch.cat([t, x], 1))
        u_t, u_x = torch.autograd.grad(u.sum(), (t, x), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        start = self.net(torch.cat([torch.zeros_like(t), x], 1)) - torch.sin(torch.pi * x)
        return (u_t - u_xx).square().mean() + start.square().mean()


def wgan_gp() -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    critic = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 16),
        nn.Tanh(),
        nn.Linear(16, 1),
    )
    return GradientPenalty(critic), (
        torch.randn(6, 1, 8, 8),
        torch.randn(6, 1, 8, 8),
        torch.rand(6, 1, 1, 1),
    )


def heat() -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    return HeatResidual(net), (torch.rand(12, 1), torch.rand(12, 1))


@pytest.mark.parametrize("example", first_is_quick([heat, wgan_gp]))
def test_compile_double_backward_trains_as_eager(example) -> None:
    eager, inputs = example()
    compiled = compile_double_backward(example()[0])
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (eager, compiled)]
    losses: list[list[float]] = [[], []]
    for _ in range(4):
        for index, (module, optimizer) in enumerate(
            zip((eager, compiled), optimizers, strict=True)
        ):
            leaves = inputs if index else tuple(x.clone().requires_grad_() for x in inputs)
            loss = module(*leaves)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[index].append(loss.item())
        assert relative(gradients(compiled), gradients(eager)) < 1e-5
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][-1] < losses[1][0]
    assert count_graphs() == 1


def test_compile_double_backward_differentiates_only_what_is_asked_for() -> None:
    """A gradient to soft targets or weights of a loss would be work for nothing; a caller's own
    leaf stays the caller's."""

    class Penalty(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            (g,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
            return (scale * g).square().sum()

    scale, x = torch.ones(3), torch.arange(3.0).requires_grad_()
    module = compile_double_backward(Penalty(), differentiate=(0,))
    module(x, scale).backward()
    assert scale.grad is None and not scale.requires_grad
    assert torch.allclose(x.grad, 36 * x.detach() ** 3)


def test_compile_double_backward_of_a_tensor_given_twice(no_codegen) -> None:
    """One variable, as in eager, whether it requires grad already or not."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            y = self.scale * (a**3 * b**2).sum()
            return torch.autograd.grad(y, a, create_graph=True)[0].square().sum()

    x = torch.tensor([0.5, 1.5])
    found = []
    for leaf in (x, x.clone().requires_grad_()):
        module = Product()
        compile_double_backward(module)(leaf, leaf).backward()
        found.append(module.scale.grad)
    assert torch.allclose(found[0], found[1])
    assert torch.allclose(found[0], 2 * 2.0 * (5 * x**4).square().sum())


def test_compile_double_backward_holds_each_weight_once(no_codegen) -> None:
    """Under `module.`, before the first call and after it, and none under the compiled function's
    name."""
    module, inputs = wgan_gp()
    names = [f"module.{name}" for name in module.state_dict()]
    assert len(names) == 6
    compiled = compile_double_backward(module)
    assert list(compiled.state_dict()) == names
    compiled(*inputs).backward()
    assert list(compiled.state_dict()) == names
    assert [name for name, _ in compiled.named_parameters(remove_duplicate=False)] == names
    assert [id(p) for p in compiled.parameters()] == [id(p) for p in module.parameters()]


def test_compile_double_backward_raises_at_a_graph_break() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            (g,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
            print("a graph break")
            torch._dynamo.graph_break()
            return g.sum()

    with pytest.raises(Exception, match=r"(?i)graph.?break|unsupported"):
        compile_double_backward(Broken())(torch.ones(2))
