"""Tests the report of swap_modules, and swapped modules in other tools such as torch.fx."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from fastgn_kernels.swap import swap_modules
from support.checks import DEVICE, random
from torch import Tensor, nn
from torch.nn.functional import silu


class Functional(nn.Module):
    def __init__(self, function: Any = None) -> None:
        super().__init__()
        self.activation = function
        self.inner = nn.Linear(3, 3)


class CallsGelu(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.inner(x))


class CallsSilu(Functional):
    """Calls silu by an imported name, in a method that forward calls."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)

    def act(self, x: Tensor) -> Tensor:
        return silu(x)


def shifted_softplus(x: Tensor) -> Tensor:
    return F.softplus(x) - 0.7


class CallsHelper(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return shifted_softplus(self.inner(x))


class CallsAttention(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class GELUActivation(Functional):
    """Has the name of a class of transformers."""


class ViTSelfAttention(Functional):
    """Has the name of a class of transformers."""


class CallsNothing(Functional):
    """Its attributes have names of functions but are modules. F.linear has no fused op."""

    def __init__(self) -> None:
        super().__init__()
        self.gelu, self.softplus = nn.Linear(3, 3), 3.0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.gelu(x), self.inner.weight) + self.softplus


MISSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "functional": (CallsGelu, "it calls gelu as a function"),
    "an imported function": (CallsSilu, "it calls silu as a function"),
    "a helper": (CallsHelper, "it calls softplus as a function"),
    "a function held": (lambda: Functional(F.relu), "it holds relu as a function"),
    "a builtin held": (lambda: Functional(torch.tanh), "it holds tanh as a function"),
    "another's function": (
        lambda: Functional(shifted_softplus),
        "it holds shifted_softplus as a function",
    ),
    "a list": (lambda: Functional([3, F.silu]), "it holds silu as a function"),
    "a partial": (
        lambda: Functional(functools.partial(F.leaky_relu, negative_slope=0.2)),
        "it holds leaky_relu as a function",
    ),
    "SDPA": (CallsAttention, "it calls scaled_dot_product_attention as a function, which has no"),
    "multi-head": (lambda: nn.MultiheadAttention(4, 2), "its attention is a function, which has"),
    "transformers' GELU": (GELUActivation, f"swap_modules does not know {__name__}.GELUActivation"),
    "transformers' attention": (
        ViTSelfAttention,
        f"swap_modules does not know {__name__}.ViTSelfAttention",
    ),
    "torchvision's attention": (
        lambda: torchvision.models.swin_transformer.ShiftedWindowAttention(4, [2, 2], [0, 0], 2),
        "swap_modules does not know torchvision.models.swin_transformer.ShiftedWindowAttention",
    ),
    "torch's CELU": (nn.CELU, "swap_modules does not know torch.nn.modules.activation.CELU"),
}


@pytest.mark.parametrize(("make", "reason"), MISSED.values(), ids=MISSED)
def test_what_no_swap_reaches_is_named(make, reason):
    swapped = swap_modules(nn.ModuleDict({"it": make(), "other": nn.Tanh()}))
    assert swapped.counts == {"tanh": 1} and swapped.left == {}
    assert swapped.missed["it"].startswith(reason)
    assert f"cannot be replaced: it: {reason}" in str(swapped)


def test_no_more_is_named_than_is_there():
    swapped = swap_modules(nn.Sequential(CallsNothing(), nn.BatchNorm1d(3), nn.GroupNorm(1, 3)))
    assert swapped.missed == {} and swapped.modules == 6
    assert str(swapped) == "6 modules, replaced: none, the network is unchanged"
    assert str(swap_modules(nn.Sequential(nn.GELU(), nn.ReLU(), nn.GELU()))) == (
        "4 modules, replaced: 2 gelu, 1 relu"
    )


def test_a_familys_report_is_of_that_family():
    model = nn.ModuleList([CallsGelu(), nn.MultiheadAttention(4, 2)])
    assert list(swap_modules(model, "activation").missed) == ["0"]
    assert list(swap_modules(model, "window_attention").missed) == ["1"]
    assert list(swap_modules(model, "layer_norm").missed) == []


def test_the_report_counts_what_repeats():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 3)
    lines = str(swap_modules(model)).splitlines()
    assert lines[0] == "32 modules, replaced: 6 layer_norm"
    assert lines[1] == "cannot be replaced: layers.0 and 2 more: it holds relu as a function"
    assert lines[2].startswith(
        "cannot be replaced: layers.0.self_attn and 2 more: its attention is"
    )
    assert "sdpa_kernel(SDPBackend.MATH)" in lines[2] and len(lines) == 3


@pytest.mark.parametrize(("fused", "count"), [(True, 1), (False, 0)])
def test_timms_switch_decides_whether_its_attention_is_fused(fused, count):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    model.blocks[0].attn.fused_attn = fused
    missed = swap_modules(model).missed
    assert list(missed) == ["blocks.0.attn"]
    assert ("scaled_dot_product_attention" in missed["blocks.0.attn"]) == bool(count)


def test_the_remedy_for_attention_is_one():
    """SDPA has a second derivative if it computes plain products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        y = F.scaled_dot_product_attention(q, q, q)
    (grad,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    grad.square().sum().backward()
    assert q.grad is not None and q.grad.abs().sum() > 0


# ------------------------------------------------------------------------------ other tools


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(4),
    "GELU": nn.GELU,
    "GELU tanh": lambda: nn.GELU("tanh"),
    "SiLU": nn.SiLU,
    "Mish": nn.Mish,
    "Softplus": nn.Softplus,
    "ELU": lambda: nn.ELU(0.7),
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "ReLU": nn.ReLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "timm GELU": timm.layers.activations.GELU,
    "timm QuickGELU": timm.layers.activations.QuickGELU,
    "timm Swish": timm.layers.activations.Swish,
    "timm LayerNorm": lambda: timm.layers.LayerNorm(4),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Returns a network and its swapped copy."""
    plain, swapped = (nn.Sequential(nn.Linear(4, 4), PLAIN[name]()) for _ in range(2))
    swapped.load_state_dict(plain.state_dict())
    assert sum(swap_modules(swapped).counts.values()) == 1
    return plain.to(DEVICE, torch.float64), swapped.to(DEVICE, torch.float64)


def jagged() -> Tensor:
    rows = [random(2, 4), random(3, 4, seed=1)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


TOOLS: dict[str, Callable[[nn.Module], Tensor]] = {
    "fx": lambda m: torch.fx.symbolic_trace(m)(random(5, 4)),
    "jit.script": lambda m: torch.jit.script(m)(random(5, 4)),
    "jit.trace": lambda m: torch.jit.trace(m, random(5, 4), check_trace=False)(random(5, 4)),
    "export": lambda m: torch.export.export(m, (random(5, 4),)).module()(random(5, 4)),
    "jagged": lambda m: m(jagged()).values(),
    "strided": lambda m: torch.cat(
        m(torch.nested.nested_tensor([random(2, 4), random(3, 4, seed=1)])).unbind()
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
@pytest.mark.parametrize("name", PLAIN)
def test_where_the_plain_module_passes_its_replacement_does(name, tool):
    plain, swapped = pair(name)
    try:
        exact = tool(plain)
    except Exception as error:
        pytest.skip(f"the plain module does not pass: {type(error).__name__}")
    torch.testing.assert_close(tool(swapped), exact)
    # the original stays swapped
    assert type(swapped[1]).__name__.startswith("Fused")


@pytest.mark.parametrize("name", PLAIN)
def test_isinstance_still_finds_the_class_that_was_there(name):
    plain, swapped = pair(name)
    assert isinstance(swapped[1], type(plain[1]))
    assert vars(swapped[1]).keys() >= vars(plain[1]).keys()


def test_fx_keeps_the_op_of_what_it_keeps_whole():
    """torch.fx does not trace into nn.Modules, so a swapped one stays."""
    _, swapped = pair("GELU")
    graph = torch.fx.symbolic_trace(swapped)
    assert [node.op for node in graph.graph.nodes].count("call_module") == 2
    assert graph.get_submodule("1") is swapped[1]


def test_a_whole_swin_can_be_scripted_and_traced():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=16, patch_size=2, embed_dim=8, window_size=4,
        depths=(2,), num_heads=(2,), num_classes=3,
    ).eval().to(DEVICE)  # fmt: skip
    x = random(1, 3, 16, 16, dtype=torch.float32)
    exact = model(x)
    assert swap_modules(model).counts["window_attention"] == 2
    torch.testing.assert_close(torch.jit.script(model)(x), exact)
    torch.testing.assert_close(model(x), exact)
