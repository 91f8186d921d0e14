"""Tests that swapped modules compute what the replaced ones did, and that nothing else changes."""

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from fastgn_kernels.modules import (
    FusedActivation,
    FusedBiasGELU,
    FusedGELU,
    FusedLayerNorm,
    FusedSiLU,
    FusedWindowAttention,
)
from fastgn_kernels.swap import FAMILIES, swap_modules
from support.checks import DEVICE, ops_called, random, recording_backend, relative
from timm.layers import LayerNorm2d, activations, set_fused_attn
from timm.layers.norm import LayerNorm as TimmLayerNorm
from timm.layers.norm import LayerNormFp32
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from fastgn.objectives import gradnorm
from fastgn.step.double_backward import compile_double_backward


@pytest.fixture(autouse=True)
def unfused_attention():
    """Makes timm use plain products, because SDPA has no second derivative to compare with."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


SWIN = {"depths": (2, 1), "num_heads": (1, 2), "embed_dim": 8, "patch_size": 2, "img_size": 16}


def swin(dtype: torch.dtype = torch.float64, **more: Any) -> nn.Module:
    """Returns a Swin with 5 classes, and three blocks on 8 x 8 and 4 x 4 tokens.

    The windows of the second block are shifted. The weights are large, so that attention is far
    from uniform and biases matter.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = SWIN | {"window_size": 4, "drop_path_rate": 0.0} | more
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(DEVICE, dtype)


def images(side: int = 16) -> Tensor:
    return random(2, 3, side, side)


# ------------------------------------------------------------------------------------------ modules


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "GELU": (nn.GELU, "gelu"),
    "GELU tanh": (lambda: nn.GELU("tanh"), "gelu_tanh"),
    "SiLU": (nn.SiLU, "silu"),
    "SiLU in place": (lambda: nn.SiLU(inplace=True), "silu"),
    "Mish": (nn.Mish, "mish"),
    "Softplus": (lambda: nn.Softplus(2.0), "softplus"),
    "ELU": (lambda: nn.ELU(0.7), "elu"),
    "Tanh": (nn.Tanh, "tanh"),
    "Sigmoid": (nn.Sigmoid, "sigmoid"),
    "ReLU": (nn.ReLU, "relu"),
    "ReLU in place": (lambda: nn.ReLU(inplace=True), "relu"),
    "LeakyReLU": (lambda: nn.LeakyReLU(0.3), "leaky_relu"),
    "timm GELU": (activations.GELU, "gelu"),
    "timm GELUTanh": (activations.GELUTanh, "gelu_tanh"),
    "timm QuickGELU": (activations.QuickGELU, "quick_gelu"),
    "timm Swish": (activations.Swish, "silu"),
    "timm Tanh": (activations.Tanh, "tanh"),
    "timm Sigmoid": (activations.Sigmoid, "sigmoid"),
}


def two_orders(module: Callable, x: Tensor) -> list[Tensor]:
    """Returns the value at x, its gradient, and the gradient of the squared gradient."""
    x = x.detach().requires_grad_()
    y = module(x * 1)  # a module that works in place must not meet the leaf
    (gx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((gx * gx).sum(), x)
    return [y, gx, second]


@pytest.mark.parametrize(("make", "kind"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_every_activation_is_replaced_by_its_own(make, kind):
    module = make()
    x = 2 * random(5, 7)
    theirs = two_orders(make(), x)
    assert swap_modules(module)[:2] == ({kind: 1}, {})
    assert isinstance(module, FusedActivation) and module.kind == kind
    assert "fastgn::activation" in ops_called(module, x)
    for ours, exact in zip(two_orders(module, x), theirs, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [make for make, _ in ACTIVATIONS.values()], ids=ACTIVATIONS)
def test_activations_give_autocasts_dtype(make):
    """That dtype is bfloat16, except for softplus on CUDA."""
    module, x = make(), random(5, 7).bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        exact = make()(x.clone())
        swap_modules(module)
        y = module(x)
    assert y.dtype == exact.dtype
    torch.testing.assert_close(y, exact)


def test_fused_gelu_and_silu():
    x = random(4, 6)
    torch.testing.assert_close(FusedGELU()(x), F.gelu(x))
    torch.testing.assert_close(FusedGELU("tanh")(x), F.gelu(x, approximate="tanh"))
    torch.testing.assert_close(FusedSiLU()(x), F.silu(x))
    assert repr(FusedActivation("leaky_relu", 0.3)) == "FusedActivation(leaky_relu, 0.3)"
    with pytest.raises(ValueError, match="'erf' should be 'none' or 'tanh'"):
        FusedGELU("erf")
    with pytest.raises(ValueError, match="'gleu' is not one of gelu, "):
        FusedActivation("gleu")


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_fused_bias_gelu(approximate):
    module = FusedBiasGELU(6, approximate, device=DEVICE, dtype=torch.float64)
    assert set(module.state_dict()) == {"bias"} and module.bias.shape == (6,)
    assert not module.bias.any()
    with torch.no_grad():
        module.bias.copy_(random(6, seed=1))
    bias = module.bias.detach().clone().requires_grad_()
    x, gy = random(5, 6), random(5, 6, seed=2)
    y, exact = module(x), F.gelu(x + bias, approximate=approximate)
    torch.testing.assert_close(y, exact)
    y.backward(gy)
    exact.backward(gy)
    torch.testing.assert_close(module.bias.grad, bias.grad)


@pytest.mark.parametrize("affine", [{}, {"bias": False}, {"elementwise_affine": False}])
def test_fused_layer_norm(affine):
    options = {"eps": 1e-3, "device": DEVICE, "dtype": torch.float64} | affine
    theirs, module = nn.LayerNorm(6, **options), FusedLayerNorm(6, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    module.load_state_dict(theirs.state_dict())
    x, residual = random(5, 6), random(5, 6, seed=1)
    for ours, exact in zip(two_orders(module, x), two_orders(theirs, x), strict=True):
        torch.testing.assert_close(ours, exact)
    y, total = module(x, residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, theirs(x + residual))
    with pytest.raises(ValueError, match=r"\(5, 7\), its last dimension should be 6"):
        module(random(5, 7))
    with pytest.raises(ValueError, match="should be one dimension"):
        FusedLayerNorm((3, 4))


# --------------------------------------------------------------------------------------------- Swin


def gradients(step: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Returns the parts of gradnorm's loss and the gradient of every parameter."""
    total, penalty = step(x.detach().requires_grad_())
    total.backward()
    named = {n.removeprefix("module."): p.grad for n, p in step.named_parameters()}
    return {"total": total.detach(), "penalty": penalty.detach()} | named


class Loss(nn.Module):
    """Computes gradnorm's loss on fixed targets, as the trainer compiles it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        targets = torch.arange(len(x), device=x.device) % 5
        loss = gradnorm(self.model, x, targets, gn_weight=20.0)
        return loss.total, loss.penalty


def check_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, exact in theirs.items():
        assert relative(ours[name], exact) < tolerance, f"{name}: {relative(ours[name], exact):.1e}"


@pytest.mark.parametrize("window", [2, 3, 4, 7])
def test_a_swapped_swin_has_the_loss_and_gradients_of_its_own(window):
    """Includes windows that do not divide the image, and Swin's size of 7."""
    plain = swin(window_size=window)
    swapped = copy.deepcopy(plain)
    norms = sum(isinstance(m, nn.LayerNorm) for m in plain.modules())
    assert swap_modules(swapped)[:2] == (
        {"layer_norm": norms, "window_attention": 3, "gelu": 3},
        {},
    )
    assert {"fastgn::activation", "fastgn::layer_norm", "fastgn::window_attention"} <= ops_called(
        swapped, images()
    )
    exact = gradients(Loss(plain), images())
    check_same(gradients(Loss(swapped), images()), exact, tolerance=1e-9)
    # and the penalty is in them
    without = copy.deepcopy(plain)
    without.zero_grad()
    F.cross_entropy(without(images()), torch.arange(2, device=DEVICE)).mul(0.8).backward()
    assert relative(without.norm.weight.grad, exact["model.norm.weight"]) > 1e-2


def test_dropout_after_the_attention_stays():
    plain = swin(proj_drop_rate=0.5)
    swapped = copy.deepcopy(plain)
    assert swap_modules(swapped).counts["window_attention"] == 3
    torch.manual_seed(1)
    exact = plain(images())
    torch.manual_seed(1)
    torch.testing.assert_close(swapped(images()), exact)
    assert not torch.allclose(swapped(images()), exact)
    torch.testing.assert_close(swapped.eval()(images()), plain.eval()(images()))


@pytest.fixture(
    params=[
        pytest.param(False, id="inlined", marks=pytest.mark.slow),
        pytest.param(True, id="as on CUDA"),
    ]
)
def as_on_cuda(request, monkeypatch) -> bool:
    """Whether compiled code keeps LayerNorm and window attention as custom ops."""
    if request.param:
        for name in ("layer_norm", "window_attention"):
            module = importlib.import_module(f"fastgn_kernels.{name}")
            monkeypatch.setattr(module, "is_compiling", lambda: False)
    return request.param


def test_a_swapped_swin_compiled(as_on_cuda):
    torch._dynamo.reset()
    plain = swin()
    swapped = copy.deepcopy(plain)
    swap_modules(swapped)
    backend, called = recording_backend()
    step = compile_double_backward(Loss(swapped), backend=backend)
    check_same(gradients(step, images()), gradients(Loss(plain), images()), tolerance=1e-9)
    # on CUDA in float64 LayerNorm has a kernel, window attention none
    kept = {"layer_norm": as_on_cuda or DEVICE == "cuda", "window_attention": as_on_cuda}
    for name, stays in kept.items():
        assert (f"fastgn.{name}_bwd_bwd.default" in called) == stays, name
    assert not any(name.startswith("fastgn.activation") for name in called)


@pytest.mark.slow
@pytest.mark.parametrize(
    "as_on_cuda", [pytest.param(False, marks=pytest.mark.slow), True], indirect=True
)
def test_a_swapped_swin_compiled_under_autocast(as_on_cuda):
    """The ops get mixed dtypes. The error is at most twice that of plain PyTorch."""
    torch._dynamo.reset()
    plain = swin(torch.float32)
    swapped = copy.deepcopy(plain)
    swap_modules(swapped)
    exact = gradients(Loss(swin()), images())
    errors = []
    for step in (
        Loss(plain),
        compile_double_backward(Loss(swapped), backend="aot_eager"),
    ):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found = gradients(step, images().float())
        errors.append(
            relative(*(torch.cat([g[k].double().flatten() for k in exact]) for g in (found, exact)))
        )
    assert 1e-4 < errors[0] and errors[1] < 2 * errors[0], errors


def test_a_swapped_swin_under_autocast():
    """Attention and activations return autocast's dtype.

    The error is at most twice that of plain PyTorch.
    """
    plain = swin(torch.float32)
    swapped = copy.deepcopy(plain)
    swap_modules(swapped)
    exact = gradients(Loss(swin()), images())
    errors: dict[str, float] = {}
    for name, model in (("plain", plain), ("swapped", swapped)):
        block, dtypes = model.layers[0].blocks[1], []
        block.attn.proj.register_forward_pre_hook(lambda m, x, to=dtypes: to.append(x[0].dtype))
        block.mlp.act.register_forward_hook(lambda m, x, y, to=dtypes: to.append(y.dtype))
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found = gradients(Loss(model), images().float())
        vectors = [torch.cat([g[k].double().flatten() for k in exact]) for g in (found, exact)]
        errors[name] = relative(*vectors)
        assert dtypes == [torch.bfloat16] * 2, name
    assert 1e-4 < errors["plain"] and errors["swapped"] < 2 * errors["plain"], errors


def before_linear(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if getattr(m, "before_linear", False)]


def test_layer_norms_before_a_linear_layer_round_to_its_dtype_and_change_no_bit():
    narrow = swin(torch.float32)
    swap_modules(narrow)
    blocks = ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0")
    norms = {f"{block}.norm{i}" for block in blocks for i in (1, 2)}
    assert set(before_linear(narrow)) == {*norms, "layers.1.downsample.norm"}
    wide = copy.deepcopy(narrow)
    for module in wide.modules():
        if isinstance(module, FusedLayerNorm):
            module.before_linear = False
    dtypes: dict[str, list[torch.dtype]] = {"narrow": [], "wide": []}
    found = {}
    for name, model in (("narrow", narrow), ("wide", wide)):
        # as on CUDA, the blocks' sums are in float32
        model.patch_embed.norm.register_forward_hook(lambda m, x, y: y.float())
        for norm in (model.layers[0].blocks[0].norm1, model.layers[1].downsample.norm):
            norm.register_forward_hook(lambda m, x, y, to=dtypes[name]: to.append(y.dtype))
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found[name] = gradients(Loss(model), images().float())
    assert dtypes == {"narrow": [torch.bfloat16] * 2, "wide": [torch.float32] * 2}
    for key, exact in found["wide"].items():
        # a kernel's sums over rows are in another order for another dtype
        assert relative(found["narrow"][key], exact) <= (1e-6 if DEVICE == "cuda" else 0), key


def test_layer_norms_that_something_else_reads_keep_their_dtype():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, qk_norm=True)
    vit.blocks[0].norm1.register_forward_hook(lambda *_: None)
    vit.blocks[1].mlp.fc1 = nn.Identity()
    swap_modules(vit)
    assert before_linear(vit) == ["blocks.0.norm2", "blocks.1.norm1"]


def test_state_dicts_fit_both_ways():
    plain, swapped = swin(), swin()
    swap_modules(swapped)
    assert list(swapped.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in swapped.named_buffers()] == [n for n, _ in plain.named_buffers()]
    for source, target in ((plain, swapped), (swapped, plain)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.mul_(1.1)
        assert not torch.allclose(source(images()), target(images()))
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(source(images()), target(images()))


def test_the_modules_are_the_ones_that_were_there():
    """Weights, hooks and flags stay, and so does what an optimizer holds."""
    model = swin()
    block = model.layers[0].blocks[1]
    block.mlp.act.eval()
    calls = []
    block.attn.register_forward_hook(lambda *_: calls.append("attention"))
    block.norm1.weight.requires_grad_(False)
    modules, tensors = list(model.modules()), [*model.parameters(), *model.buffers()]
    swap_modules(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    after = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(after, tensors, strict=True))
    assert not block.mlp.act.training and block.attn.training
    assert not block.norm1.weight.requires_grad and block.norm1.bias.requires_grad
    model(images())
    assert calls == ["attention"]


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_swapped_swin_can_be_copied(copied):
    model = swin()
    swap_modules(model)
    other = copied(model)
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in other.modules()] == kinds
    assert any(issubclass(kind, FusedLayerNorm) for kind in kinds)
    assert torch.equal(other(images()), model(images()))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(other(images()), model(images()))


@pytest.mark.skipif(DEVICE == "cuda", reason="timm's set_input_size mixes devices")
def test_timms_methods_stay():
    plain = swin(window_size=2)
    swapped = copy.deepcopy(plain)
    swap_modules(swapped)
    attention = swapped.layers[0].blocks[1].attn
    assert isinstance(attention, FusedWindowAttention) and isinstance(attention, WindowAttention)
    attention.relative_position_index.zero_()
    attention.init_non_persistent_buffers()
    torch.testing.assert_close(swapped(images()), plain(images()))
    for model in (plain, swapped):
        model.set_input_size((24, 24), window_size=3)
    assert attention.window_area == 9
    torch.testing.assert_close(swapped(images(24)), plain(images(24)))
    with pytest.raises(ValueError, match="a window of 9 x 9 has more than 64 tokens"):
        attention.set_window_size((9, 9))
    attention.set_window_size(3)
    torch.testing.assert_close(swapped(images(24)), plain(images(24)))


# ------------------------------------------------------------------------------------ swap_modules


@pytest.mark.parametrize(
    ("only", "counts"),
    [
        (("activation",), {"gelu": 3}),
        ("window_attention", {"window_attention": 3}),
        (("layer_norm", "activation"), {"layer_norm": 9, "gelu": 3}),
        ((), {}),
    ],
)
def test_only_what_is_asked_for_is_replaced(only, counts):
    model = swin()
    assert swap_modules(model, only).counts == counts
    rest = {"gelu": 3, "layer_norm": 9, "window_attention": 3}
    assert swap_modules(model).counts == {k: v for k, v in rest.items() if k not in counts}
    assert swap_modules(model)[:2] == ({}, {})


@pytest.mark.parametrize("only", ["layernorm", ("activation", "attention")])
def test_an_unknown_family_is_refused_before_anything_is_replaced(only):
    model = nn.Sequential(nn.GELU())
    with pytest.raises(ValueError, match="is not one of activation, layer_norm, window_attention"):
        swap_modules(model, only)
    assert type(model[0]) is nn.GELU
    assert FAMILIES == ("activation", "layer_norm", "window_attention")


def test_a_module_in_two_places_stays_one():
    shared = nn.GELU()
    model = nn.Sequential(shared, nn.Linear(3, 3), shared)
    assert swap_modules(model).counts == {"gelu": 1}
    assert model[0] is model[2] is shared and isinstance(shared, FusedActivation)


class MyGELU(nn.GELU):
    """A user's subclass, which might compute something else."""


def attention(**options: Any) -> WindowAttention:
    return WindowAttention(**{"dim": 8, "num_heads": 2, "window_size": 4} | options)


def hooked() -> WindowAttention:
    module = attention()
    module.softmax.register_forward_hook(lambda *_: None)
    return module


def changed(module: nn.Module, name: str, value: Any) -> nn.Module:
    setattr(module, name, value)
    return module


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softplus' threshold": (lambda: nn.Softplus(1.0, 5.0), "its threshold is 5, not PyTorch's 20"),
    "two dimensions": (lambda: nn.LayerNorm((3, 4)), "it normalises 2 dimensions at once"),
    "NCHW": (lambda: LayerNorm2d(4), "timm.layers.norm.LayerNorm2d is a subclass of torch."),
    "fp32": (lambda: LayerNormFp32(4), "LayerNormFp32 is a subclass of torch.nn.modules.norm"),
    "fast norm": (lambda: changed(TimmLayerNorm(4), "_fast_norm", True), "timm's fast norm"),
    "a subclass": (MyGELU, "test_modules.MyGELU is a subclass of torch.nn.modules.activation.GELU"),
    "another forward": (
        lambda: changed(nn.GELU(), "forward", F.relu),
        "its forward method was replaced",
    ),
    "a large window": (lambda: attention(window_size=9), "its 81 tokens per window or 4"),
    "wide heads": (lambda: attention(head_dim=65), "its 16 tokens per window or 65 channels"),
    "dropout": (lambda: attention(attn_drop=0.1), "it uses dropout on attention weights"),
    "a hook within": (hooked, "its softmax has hooks"),
    "no linear layer": (
        lambda: changed(attention(), "qkv", nn.Identity()),
        "its qkv is a Identity",
    ),
}


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT)
def test_what_cannot_be_replaced_faithfully_is_left_and_named(make, reason):
    module = make()
    before = type(module)
    counts, left, *_ = swap_modules(nn.ModuleDict({"it": module, "other": nn.Tanh()}))
    assert type(module) is before
    assert counts == {"tanh": 1} and set(left) == {"it"}
    assert reason in left["it"]
    assert list(swap_modules(module).left) == [before.__name__]


def test_what_has_no_op_is_not_touched():
    model = nn.Sequential(
        nn.CELU(), activations.Mish(), nn.BatchNorm1d(3), nn.GroupNorm(1, 3), nn.Linear(3, 3)
    )
    kinds = [type(m) for m in model.modules()]
    assert swap_modules(model)[:2] == ({}, {})
    assert [type(m) for m in model.modules()] == kinds


def test_timms_layer_norm_is_replaced():
    module = TimmLayerNorm(6).to(DEVICE, torch.float64)
    nn.init.normal_(module.weight)
    x = random(5, 6)
    exact = module(x)
    assert swap_modules(module).counts == {"layer_norm": 1}
    torch.testing.assert_close(module(x), exact)
    assert module.eps == 1e-6
