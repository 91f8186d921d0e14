"""Operators without a finite second derivative, the twins that replace them, and networks that use
them."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support.marks import first_is_quick
from torch import Tensor, nn

from fastgn import train
from fastgn.config import ArchitectureConfig
from fastgn.models import second_order
from fastgn.models.network import build_model
from fastgn.models.preact_resnet import PreActResNet18
from fastgn.models.second_order import find_operators, replace_operators
from fastgn.objectives import gradnorm
from fastgn.step.double_backward import compile_double_backward

OPERATORS: dict[str, tuple[Callable, Callable]] = {
    "hardsigmoid": (F.hardsigmoid, second_order.hardsigmoid),
    "hardswish": (F.hardswish, second_order.hardswish),
    "mish": (F.mish, second_order.mish),
    "normalize": (lambda x: F.normalize(x, dim=-1), lambda x: second_order.normalize(x, dim=-1)),
    "normalize l1": (
        lambda x: F.normalize(x, p=1.0, dim=0),
        lambda x: second_order.normalize(x, p=1.0, dim=0),
    ),
    "vector_norm": (torch.linalg.vector_norm, second_order.vector_norm),
    "vector_norm dim": (
        lambda x: torch.linalg.vector_norm(x, dim=1),
        lambda x: second_order.vector_norm(x, dim=1),
    ),
    "norm": (
        lambda x: x.norm(p=2, dim=(0, 1), keepdim=True),
        lambda x: second_order.norm(x, p=2, dim=(0, 1), keepdim=True),
    ),
    "norm p": (lambda x: x.norm(3, -1), lambda x: second_order.norm(x, 3, -1)),
}


@pytest.mark.parametrize(("plain", "twin"), OPERATORS.values(), ids=OPERATORS)
def test_a_twin_has_the_values_and_both_derivatives_of_its_operator(plain, twin):
    """PyTorch's hard activations have no second derivative to compare with."""
    x = torch.linspace(-7.1, 6.9, 35, dtype=torch.float64).reshape(5, 7).requires_grad_()
    y, exact = twin(x), plain(x)
    torch.testing.assert_close(y, exact, rtol=1e-14, atol=1e-15)
    (gx,) = torch.autograd.grad((y * y).sum(), x)
    torch.testing.assert_close(gx, torch.autograd.grad((exact * exact).sum(), x)[0])
    assert torch.autograd.gradgradcheck(twin, (x,))
    for dtype in (torch.float32, torch.bfloat16):
        low = x.detach().to(dtype)
        torch.testing.assert_close(twin(low), plain(low))
        assert twin(low).dtype == plain(low).dtype


def second(function: Callable, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (gx,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(gx.square().sum() + gx.sum(), x)[0]


@pytest.mark.parametrize("name", ["normalize", "vector_norm dim", "norm"])
@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-30])
def test_norms_of_tiny_vectors_have_finite_second_derivatives(name, value):
    plain, twin = OPERATORS[name]
    x = torch.randn(3, 4)
    x[1] = value
    if name == "norm":
        x[:] = value
    torch.testing.assert_close(twin(x), plain(x), rtol=0, atol=0)
    assert second(twin, x).isfinite().all()
    if value == 0:
        assert second(plain, x).isnan().any()  # or the twin would not be needed


def test_mish_has_its_second_derivative_at_large_values():
    x = torch.tensor([-200.0, 88.0, 90.0, 1e4])
    assert second(F.mish, x)[2:].isnan().all()
    # of x squared, of which `second` takes (gx * gx + gx)' = 8 x + 2
    torch.testing.assert_close(second(second_order.mish, x), (8 * x + 2).where(x > 0, 0))


# ----------------------------------------------------------------------------------------- networks


NETWORKS: dict[str, dict[str, Any]] = {
    # 18 tokens a side: windows of 8 are padded with zeros
    "swinv2_tiny_window8_256": {
        "img_size": 72,
        "model_kwargs": ("depths=(1, 1)", "embed_dim=8", "num_heads=(1, 2)"),
    },
    "swinv2_cr_tiny_224": {
        "img_size": 56,
        "model_kwargs": ("depths=(1, 1)", "embed_dim=8", "num_heads=(1, 2)", "window_size=7"),
    },
    "xcit_nano_12_p8_224": {
        "img_size": 32,
        "model_kwargs": ("depth=1", "embed_dim=16", "num_heads=2"),
    },
    "edgenext_xx_small": {"img_size": 64},
    "convnextv2_atto": {
        "img_size": 32,
        "activation": "relu",
        "model_kwargs": ("depths=(1, 1, 1, 1)", "dims=(8, 8, 8, 8)"),
    },
    "mobilenetv3_small_050": {"img_size": 32, "activation": "gelu"},
    "lcnet_035": {"img_size": 32},
    "ghostnet_050": {"img_size": 32},
    "hardcorenas_a": {"img_size": 32},
    "preact_resnet18": {"activation": "mish", "model_kwargs": ("width=4",)},
}
REPLACED = {
    "swinv2_tiny_window8_256": {"normalize": 4},
    "swinv2_cr_tiny_224": {"normalize": 4},
    "xcit_nano_12_p8_224": {"normalize": 2},
    "edgenext_xx_small": {"normalize": 6},
    "convnextv2_atto": {"norm": 4},
    "mobilenetv3_small_050": {"hardsigmoid": 9},
    "lcnet_035": {"hardswish": 28, "hardsigmoid": 2},
    "ghostnet_050": {"hardsigmoid": 7},
    "hardcorenas_a": {"hardswish": 15, "hardsigmoid": 8},
    "preact_resnet18": {"mish": 17},
}


def build(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return build_model(ArchitectureConfig(model=name, **NETWORKS[name]), 5)


def update(model: Any, images: Tensor) -> list[Tensor]:
    """Returns the loss and the gradients of one update with the penalty."""
    model.train().zero_grad()
    loss = gradnorm(model, images.detach().requires_grad_(), torch.arange(len(images)) % 5)
    loss.total.backward()
    return [loss.total.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train_under_the_penalty(name):
    model, report = build(name)
    assert report.replaced_operators == REPLACED[name]
    (line,) = [x for x in report.format_lines(ArchitectureConfig(name)) if "second derivative" in x]
    assert line.startswith("replaced because their second derivative is missing or NaN: ")
    images = torch.rand(4, 3, model.img_size, model.img_size)
    images[0] = 0.5
    found = update(model, images)
    assert all(x.isfinite().all() for x in found) and len(found) > 10
    assert any(x.abs().sum() > 0 for x in found[1:])


@pytest.mark.parametrize("name", NETWORKS)
def test_replacing_operators_changes_no_value(name):
    model, _ = build(name)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module.__class__ = getattr(module, "plain", None) or {
            second_order.Hardsigmoid: nn.Hardsigmoid,
            second_order.Hardswish: nn.Hardswish,
        }.get(type(module), type(module))
    with find_operators(plain) as finder, torch.no_grad():
        images = torch.rand(2, 3, model.img_size, model.img_size)
        exact = plain.eval()(images)
    assert finder.found, "the plain network was not restored"
    torch.testing.assert_close(model.eval()(images), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "lcnet_035"])
def test_a_copy_calls_the_twins_too(name, copied):
    model, _ = build(name)
    other = copied(model)
    assert list(other.state_dict()) == list(model.state_dict())
    images = torch.rand(2, 3, model.img_size, model.img_size)
    for mine, theirs in zip(update(other, images), update(model, images), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.isfinite().all()


def test_a_module_keeps_its_name_and_its_class():
    model, _ = build("swinv2_tiny_window8_256")
    attention = model.backbone.layers[0].blocks[0].attn
    plain = timm.models.swin_transformer_v2.WindowAttention
    assert isinstance(attention, plain) and type(attention) is not plain
    assert type(attention).__name__ == "WindowAttention"
    with find_operators(model) as finder, torch.no_grad():
        model(torch.rand(1, 3, 72, 72))
    before = [type(m) for m in model.modules()]
    replace_operators(finder)
    assert [type(m) for m in model.modules()] == before, "replaced twice"


class Penalty(nn.Module):
    """gradnorm on fixed targets, as the trainer would compile it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        targets = torch.arange(len(images), device=images.device) % 5
        return gradnorm(self.model, images, targets).total


@pytest.mark.parametrize("operator", ["hardsigmoid", "hardswish", "mish", "normalize", "norm"])
def test_twins_run_in_a_compiled_step(operator):
    """As aot_eager: traced and differentiated as for Inductor, no code is generated."""
    torch._dynamo.reset()

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(12, 12)
            kinds = {"hardsigmoid": nn.Hardsigmoid, "hardswish": nn.Hardswish, "mish": nn.Mish}
            self.act = kinds.get(operator, nn.Identity)()

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.inner(x))
            if operator == "normalize":
                x = F.normalize(x, dim=-1)
            if operator == "norm":
                x = x * x.norm(p=2, dim=-1, keepdim=True)
            return x

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Body(), nn.Linear(12, 5)
            nn.init.zeros_(self.body.inner.bias)

        def normalize(self, images: Tensor) -> Tensor:
            return images - 0.5

        def backbone(self, images: Tensor) -> Tensor:
            return self.head(self.body(images.flatten(1)))

        def forward(self, images: Tensor) -> Tensor:
            return self.backbone(self.normalize(images))

    torch.manual_seed(0)
    model = Network()
    images = torch.rand(3, 3, 2, 2) * (400 if operator == "mish" else 1)
    images[1] = 0.5  # the norm is that of 0
    with find_operators(model) as finder, torch.no_grad():
        model(images)
    assert replace_operators(finder) == {operator: 1}
    eager = Penalty(model)(images.clone().requires_grad_())
    exact = torch.autograd.grad(eager, list(model.parameters()))
    step = compile_double_backward(Penalty(model), backend="aot_eager")
    compiled = step(images)
    torch.testing.assert_close(compiled, eager)
    compiled.backward()
    for parameter, grad in zip(model.parameters(), exact, strict=True):
        assert parameter.grad is not None and grad.isfinite().all()
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("how", first_is_quick(["eager", "compiled"]))
def test_any_other_operator_without_a_second_derivative_is_one_line(
    how, tmp_path, monkeypatch, capsys
):
    """On a CPU PyTorch's fused attention is one."""
    torch._dynamo.reset()
    plain = PreActResNet18.forward

    def forward(self: PreActResNet18, x: Tensor) -> Tensor:
        return plain(self, F.scaled_dot_product_attention(x, x, x))

    monkeypatch.setattr(PreActResNet18, "forward", forward)
    if how == "compiled":
        compiled = functools.partial(compile_double_backward, backend="aot_eager")
        monkeypatch.setattr("fastgn.step.step.compile_double_backward", compiled)
    run = ["--model", "preact_resnet18", "--model-kwargs", "width=4", "--img-size", "8"]
    run += ["--data", "digits", "--batch-size", "4", "--max-updates", "1", "--eval-images", "0"]
    run += ["--compile", "on" if how == "compiled" else "off", "--output", str(tmp_path / "run")]
    assert train.main(run) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert line == (
        "fastgn.train: error: --model preact_resnet18 calls "
        "_scaled_dot_product_flash_attention_for_cpu, which has no second derivative, but "
        "--method gradnorm with --schedule exact needs one: try --schedule finite-difference or "
        "another --model"
    )
    difference = ["--schedule", "finite-difference", "--output", str(tmp_path / "difference")]
    assert train.main([*run, *difference]) == 0
