"""Runs the examples of kernels/README.md and docs/kernel_details.md, and checks their claims.

Every example must have the gradients of plain PyTorch.
"""

import contextlib
import copy
import functools
import importlib
import importlib.metadata
import inspect
import io
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import fastgn_kernels
import pytest
import torch
from fastgn_kernels import (
    ACTIVATIONS,
    cross_entropy,
    dispatch,
    layer_norm,
    reference,
    window_attention,
)
from support import ROOT, checks
from support.checks import ops_called, random, relative
from torch import Tensor, nn

README = ROOT / "kernels" / "README.md"
PAGES = (README, ROOT / "docs" / "kernel_details.md")

# Triton's interpreter, in rows beyond the last one
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:fastgn_kernels.* has kernels for two:UserWarning"),
]


def blocks() -> dict[str, str]:
    """Returns each heading that has a python block -> that block. A heading has at most one."""
    found: dict[str, str] = {}
    sections = [s for page in PAGES for s in re.split(r"(?m)^##+ ", page.read_text())[1:]]
    for section in sections:
        heading = section.partition("\n")[0]
        code = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
        assert len(code) <= 1, f"{heading}: a heading for each block"
        if code:
            found[heading] = code[0]
    return found


def run(heading: str) -> dict[str, Any]:
    """Runs the block of a heading, and returns its names.

    "ops called" and "printed" are two more names, for the operators it ran and the text it printed.
    """
    torch.manual_seed(0)
    # a block that defines a class needs a module's name
    names: dict[str, Any] = {"__name__": "readme"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        names["ops called"] = ops_called(lambda: exec(blocks()[heading], names))
    names["printed"] = out.getvalue()
    return names


@pytest.fixture(params=[torch.float32, torch.float64], ids=["as written", "float64"])
def tolerance(request: pytest.FixtureRequest) -> Iterator[float]:
    """Sets the default dtype, and returns the largest error relative to plain PyTorch."""
    torch.set_default_dtype(request.param)
    yield 1e-4 if request.param == torch.float32 else 1e-10
    torch.set_default_dtype(torch.float32)


# --------------------------------------------------------------------------- uses, by plain PyTorch


def twin(net: nn.Module, *layers: nn.Module) -> nn.Module:
    """Returns PyTorch's own layers with the weights of `net`."""
    plain = nn.Sequential(*layers)
    plain.load_state_dict(net.state_dict())
    return plain


def wgan_gp(n: dict[str, Any]) -> tuple[nn.Module, nn.Module, Tensor]:
    plain = twin(n["critic"], nn.Linear(16, 64), nn.LayerNorm(64), nn.SiLU(), nn.Linear(64, 1))
    share = (n["between"] - n["fake"]) / (n["real"] - n["fake"])
    assert torch.allclose(share, share[:, :1], atol=1e-3) and 0 < share.min() < share.max() < 1
    x = n["between"].detach().requires_grad_()
    (grad,) = torch.autograd.grad(plain(x).sum(), x, create_graph=True)
    return n["critic"], plain, 10 * ((grad.square().sum(1).sqrt() - 1) ** 2).mean()


def r1(n: dict[str, Any]) -> tuple[nn.Module, nn.Module, Tensor]:
    layers = (nn.Conv2d(3, 8, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(128, 1))
    plain = twin(n["discriminator"], *layers)
    # a sample at a time
    penalties = []
    for image in n["real"].detach():
        image.requires_grad_()
        (grad,) = torch.autograd.grad(plain(image[None]).sum(), image, create_graph=True)
        penalties.append((grad * grad).sum())
    return n["discriminator"], plain, 5 * torch.stack(penalties).mean()


def forces(n: dict[str, Any]) -> tuple[nn.Module, nn.Module, Tensor]:
    plain = twin(n["model"], nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 1))
    squares = []
    for atoms, known in zip(n["positions"].detach(), n["known_forces"], strict=True):
        atoms.requires_grad_()
        energy = sum(
            plain((atoms[i] - atoms[j]).square().sum().sqrt()[None])[0]
            for i in range(5)
            for j in range(i)
        )
        (grad,) = torch.autograd.grad(energy, atoms, create_graph=True)
        squares.append((known + grad).square())
    return n["model"], plain, torch.stack(squares).mean()


def first_order(n: dict[str, Any]) -> tuple[nn.Module, nn.Module, Tensor]:
    plain = twin(n["net"], nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))
    x = n["x"].detach()
    q = plain(x)[:, 1]
    u_x, q_x = torch.func.vmap(torch.func.jacfwd(plain))(x)[..., 0].unbind(1)
    return n["net"], plain, ((u_x - q) ** 2 + (q_x + torch.sin(x[:, 0])) ** 2).mean()


def second_order(n: dict[str, Any]) -> tuple[nn.Module, nn.Module, Tensor]:
    plain = twin(n["net"], nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.arange(64) * (torch.pi / 63)
    u_xx = torch.func.vmap(torch.func.hessian(lambda x: plain(x[None])[0]))(x)
    # eager mode warns of the third derivative, so the example did run compiled
    assert not dispatch.warn_of_third_derivative.cache_info().currsize
    with pytest.warns(UserWarning, match="kernels for two derivatives"):
        n["Residual"](copy.deepcopy(n["net"]))(x[:, None].requires_grad_()).backward()
    return n["net"], plain, ((u_xx + torch.sin(x)) ** 2).mean()


D2 = "A physics-informed network with d2u/dx2"
REPLACE = "Replace modules of an existing network"
CHECK = "Check a loss of your own"

USES: dict[str, tuple[Callable, set[str]]] = {
    "WGAN-GP": (wgan_gp, {"activation_bwd_bwd", "layer_norm_bwd_bwd", "gradient_norm_bwd"}),
    "R1": (r1, {"activation_bwd_bwd", "gradient_norm_bwd"}),
    "Forces from an energy": (forces, {"activation_bwd_bwd"}),
    "A physics-informed network of first order": (first_order, {"activation_bwd_bwd"}),
}
"""Heading of an example -> its loss in plain PyTorch, and the fused ops that it must call."""


def check_gradients(names: dict[str, Any], by_pytorch: Callable, tolerance: float) -> None:
    """Checks the gradients that an example left in its network against plain PyTorch."""
    net, plain, loss = by_pytorch(names)
    assert relative(names["loss"], loss) < tolerance
    gradients = torch.autograd.grad(loss, list(plain.parameters()), materialize_grads=True)
    assert gradients[0].norm() > 1e-3, "a first layer that learns nothing of the penalty"
    for (name, parameter), exact in zip(net.named_parameters(), gradients, strict=True):
        # the last bias is in no derivative
        ours = torch.zeros_like(exact) if parameter.grad is None else parameter.grad
        # relative to the largest gradient, because one that cancels to 0 has no right digits
        scale = max(float(g.norm()) for g in gradients)
        assert float((ours - exact).norm()) < tolerance * scale, name


@pytest.mark.parametrize("heading", USES)
def test_a_use_has_the_gradients_of_plain_pytorch(heading: str, tolerance: float) -> None:
    by_pytorch, ops = USES[heading]
    names = run(heading)
    assert {f"fastgn::{op}" for op in ops} <= names["ops called"]
    check_gradients(names, by_pytorch, tolerance)


def test_the_compiled_use_has_the_gradients_of_plain_pytorch(
    monkeypatch: pytest.MonkeyPatch, tolerance: float
) -> None:
    """Compiles without generating code, which would take longer than all other tests here."""
    backend = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", backend)
    torch._dynamo.reset()
    module = types.ModuleType("readme")  # which Dynamo imports by its name
    monkeypatch.setitem(sys.modules, "readme", module)
    names = module.__dict__
    torch.manual_seed(0)
    dispatch.warn_of_third_derivative.cache_clear()
    exec(blocks()[D2], names)
    check_gradients(names, second_order, tolerance)


def test_swap_modules_prints_what_the_readme_says() -> None:
    promised = re.findall(r"^print\(.*\)  # (.*)$", blocks()[REPLACE], re.MULTILINE)
    assert len(promised) == 3
    assert run(REPLACE)["printed"].splitlines() == promised


def test_the_check_of_a_loss_is_of_second_order() -> None:
    called = run(CHECK)["ops called"]
    assert {"fastgn::activation_bwd_bwd", "fastgn::layer_norm_bwd_bwd"} <= called


def test_every_block_is_tested() -> None:
    assert blocks().keys() == USES.keys() | {D2, REPLACE, CHECK}


# ----------------------------------------------------------------------------- what the README says


def test_the_ops_and_their_arguments() -> None:
    table = re.search(r"^## The ops\n\n(.*?)\n\n", README.read_text(), re.DOTALL | re.MULTILINE)
    named = dict(re.findall(r"`(\w+)\((.*?)\)`", table[1]))
    functions = set(fastgn_kernels.__all__) - {"ACTIVATIONS", "reference", "gelu", "silu"}
    assert named.keys() == functions
    for name, arguments in named.items():
        assert arguments.split(", ") == list(
            inspect.signature(getattr(fastgn_kernels, name)).parameters
        ), name


def test_the_kinds_and_the_limits() -> None:
    text = " ".join(README.read_text().split())
    kinds = re.search(r"Kinds of activation: (.*?)\.", text)[1]
    assert re.findall(r"\w+", kinds) == list(ACTIVATIONS)
    modules = {f: sys.modules[f.__module__] for f in (layer_norm, window_attention, cross_entropy)}
    row = modules[cross_entropy].LARGEST_ROW
    assert f"C above {modules[layer_norm].LARGEST}: " in text
    assert f"N and D at most {modules[window_attention].LARGEST}" in text
    assert f"K above {row // 4} ({row // 8} in float64): " in text


OPS: dict[str, tuple[Callable, Callable, tuple[int, ...]]] = {
    "activation": (
        lambda x: fastgn_kernels.gelu(x),
        lambda x: reference.activation(x, "gelu"),
        (4, 8),
    ),
    "layer_norm": (
        lambda x: fastgn_kernels.layer_norm(x),
        lambda x: reference.layer_norm(x),
        (4, 8),
    ),
    "cross_entropy": (
        lambda x: fastgn_kernels.cross_entropy(x, torch.arange(4), "none"),
        lambda x: reference.cross_entropy(x, torch.arange(4), "none"),
        (4, 8),
    ),
    "gradient_norm": (
        lambda x: fastgn_kernels.gradient_norm(x, 2),
        lambda x: reference.gradient_norm(x, 2),
        (4, 8),
    ),
    "window_attention": (
        lambda x: fastgn_kernels.window_attention_qkvpacked(x),
        lambda x: reference.window_attention(*x),
        (3, 2, 1, 3, 2),
    ),
}
"""Name -> op and reference as functions of one tensor on a CPU, and the shape of that tensor."""

every_op = pytest.mark.parametrize("name", OPS)


def random_on_cpu(*shape: int) -> Tensor:
    return random(*shape).cpu()


class ThirdOrder(nn.Module):
    """A loss that contains a second derivative."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(x)
        (g,) = torch.autograd.grad((y * y * y).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad((g * g * g).sum(), x, create_graph=True)
        return (h * h).sum()


@every_op
@pytest.mark.filterwarnings("ignore:(?s).*Traceback of forward call:UserWarning")  # anomaly mode
def test_third_order_in_a_compiled_region(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("layer_norm", "window_attention"):  # compiled code keeps these where a kernel runs
        module = importlib.import_module(f"fastgn_kernels.{name}")
        monkeypatch.setattr(module, "is_compiling", lambda: False)
    op, twin_of_op, shape = OPS[name]
    torch._dynamo.reset()
    x = random_on_cpu(*shape).requires_grad_()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        step = torch.compile(ThirdOrder(op), fullgraph=True, dynamic=False, backend="aot_eager")
        step(x).backward()
    (exact,) = torch.autograd.grad(ThirdOrder(twin_of_op)(x), x)
    assert exact.norm() > 1e-3
    assert relative(x.grad, exact) < 1e-10


@every_op
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_and_batched_gradients(name: str) -> None:
    op, twin_of_op, shape = OPS[name]

    def orders(f: Callable) -> list[Tensor]:
        x = random_on_cpu(2, *shape).requires_grad_()
        y = torch.func.vmap(f)(x)
        (g,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        batch = torch.stack([torch.ones_like(g), g.detach()])
        return [y, g, *torch.autograd.grad(g, x, batch, is_grads_batched=True)]

    for ours, exact in zip(orders(op), orders(twin_of_op), strict=True):
        torch.testing.assert_close(ours, exact)


@every_op
def test_autograd_functional(name: str) -> None:
    op, twin_of_op, shape = OPS[name]
    x, v = random_on_cpu(*shape), torch.ones(shape, dtype=torch.float64)
    ours, exact = (lambda x, f=f: (f(x) ** 3).sum() for f in (op, twin_of_op))
    functional = torch.autograd.functional
    torch.testing.assert_close(functional.vhp(ours, x, v), functional.vhp(exact, x, v))
    torch.testing.assert_close(functional.hvp(ours, x, v), functional.hvp(exact, x, v))
    torch.testing.assert_close(functional.hessian(ours, x), functional.hessian(exact, x))
    torch.testing.assert_close(functional.jvp(ours, x, v), functional.jvp(exact, x, v))


def test_dtensor_is_refused() -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for op, _, shape in OPS.values():
            with pytest.raises(RuntimeError, match="sharding strategy|DTensor"):
                op(distribute_tensor(random_on_cpu(*shape), mesh, [Replicate()]))
    finally:
        destroy_process_group()


def wrapped(decorator: Callable) -> Callable:
    """Returns sin in the usual wrapping of a kernel, whose cosine comes from another kernel."""

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.sin(x)

        @staticmethod
        @decorator
        def backward(ctx: Any, gy: Tensor) -> Tensor:
            return gy * ctx.saved_tensors[0].detach().cos()

    return Sine.apply


@pytest.mark.parametrize("decorator", [lambda f: f, torch.autograd.function.once_differentiable])
def test_the_usual_wrapping_loses_the_second_order_in_silence(decorator: Callable) -> None:
    """docs/kernel_details.md says so, and it is the reason for this package."""

    def penalty(sine: Callable) -> Tensor:
        weight, x = checks.leaves([random_on_cpu(4), random_on_cpu(4) + 1])
        (g,) = torch.autograd.grad(sine(weight * x).sum(), x, create_graph=True)
        return torch.autograd.grad((g * g).sum(), weight)[0]

    assert relative(penalty(wrapped(decorator)), penalty(torch.sin)) > 0.1
