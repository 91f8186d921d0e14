"""Networks: normalisation, fused attention, kernels, and patch embeddings as products."""

import copy
import json
import math

import pytest
import timm
import torch
from fastgn_kernels import modules as fused
from support.marks import pretend_card
from support.models import TINY, tiny
from support.runs import tiny_run
from support.states import differences, read_state
from torch import Tensor, nn

from fastgn import evaluate, train
from fastgn.checkpoint import find_checkpoint
from fastgn.config.groups import ArchitectureConfig
from fastgn.models import network
from fastgn.models.network import build_model, multiply_patches
from fastgn.objectives import gradnorm


@pytest.mark.parametrize("name", TINY)
def test_the_report_counts_the_parameters(name):
    model, report = tiny(name)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert model(torch.rand(2, 3, model.img_size, model.img_size)).shape == (2, 5)


def test_normalisation_inside_is_that_outside():
    model, _ = tiny("resnet18", mean=(0.1, 0.2, 0.3), std=(0.2, 0.4, 0.5))
    images = torch.rand(3, 3, 32, 32)
    outside = torch.stack(
        [(images[:, c] - m) / s for c, (m, s) in enumerate(((0.1, 0.2), (0.2, 0.4), (0.3, 0.5)))],
        dim=1,
    )
    assert torch.equal(model.normalize(images), outside)
    model.eval()
    assert torch.equal(model(images), model.backbone(outside))


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("swin_t", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("vit_tiny_patch16_224", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("preact_resnet18", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ],
)
def test_the_normalisation_is_the_models_own(name, mean, std):
    model, _ = tiny(name)
    assert model.mean.flatten().tolist() == pytest.approx(mean)
    assert model.std.flatten().tolist() == pytest.approx(std)


def test_the_image_size_is_the_models_own():
    keys = {"model_kwargs": TINY["preact_resnet18"]["model_kwargs"]}
    model, _ = build_model(ArchitectureConfig(model="preact_resnet18", **keys), 5)
    assert model.img_size == 32


def test_checkpoints_hold_timms_keys_alone():
    model, _ = tiny("swin_t")
    assert {k.removeprefix("backbone.") for k in model.state_dict()} == set(
        model.backbone.state_dict()
    )
    assert all(k.startswith("backbone.") for k in model.state_dict())


@pytest.mark.parametrize(
    ("name", "side", "fewest"),
    [("resnet18", 32, 2), ("resnet18", 64, 1), ("preact_resnet18", 32, 1), ("swin_t", 16, 1)],
)
def test_how_few_images_can_be_trained_on(name: str, side: int, fewest: int) -> None:
    """ResNet-18 divides the side by 32: of one pixel BatchNorm has one value. What is there stays
    as it was."""
    cfg = ArchitectureConfig(model=name, **(TINY[name] | {"img_size": side, "drop": 0.5}))
    model, _ = build_model(cfg, 5)
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert network.find_smallest_batch(model, cfg, 5) == fewest
    assert network.find_smallest_batch(model, cfg, 5, ranks=2) == 1
    assert differences(model.state_dict(), before) == []
    assert torch.equal(torch.get_rng_state(), drawn) and model.training


def second_derivative(model: nn.Module, images: Tensor) -> Tensor:
    """The L1 norm of every weight gradient of gradnorm's penalty alone."""
    loss = gradnorm(model, images, torch.arange(len(images)) % 5, ce_weight=0.0)
    return torch.stack(
        [
            torch.zeros(()) if g is None else g.abs().sum()
            for g in torch.autograd.grad(loss.total, list(model.parameters()), allow_unused=True)
        ]
    )


@pytest.mark.parametrize(("name", "attentions"), [("vit_tiny_patch16_224", 2), ("swin_t", 4)])
def test_fused_attention_is_switched_off_and_a_second_derivative_exists(name, attentions):
    model, report = tiny(name)
    assert report.unfused_attentions == attentions
    assert not any(getattr(m, "fused_attn", False) for m in model.modules())
    lines = report.format_lines(ArchitectureConfig(model=name))
    assert any("double backward" in line for line in lines)
    images = torch.rand(2, 3, model.img_size, model.img_size)
    assert float(second_derivative(model, images).sum()) > 0


def test_fused_attention_changes_no_logit():
    name, keys = "vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 12, "depth": 2}
    torch.manual_seed(0)
    fused = timm.create_model(name, num_classes=5, img_size=8, num_heads=2, **keys).eval()
    assert any(getattr(m, "fused_attn", False) for m in fused.modules())
    images = torch.rand(2, 3, 8, 8)
    plain, _ = tiny(name)
    plain.backbone.load_state_dict(fused.state_dict())
    torch.testing.assert_close(plain.eval()(images), fused(plain.normalize(images)))


@pytest.mark.parametrize(
    ("choice", "device", "kernels"),
    [
        ("auto", "cuda", "triton"),
        ("auto", "cpu", "reference"),
        ("triton", "cuda", "triton"),
        ("reference", "cuda", "reference"),
        ("reference", "cpu", "reference"),
    ],
)
def test_which_kernels_run(choice, device, kernels, monkeypatch):
    pretend_card(monkeypatch, "Tesla V100", (7, 0))
    assert network.choose_kernels(choice, torch.device(device)) == kernels


def fused_kinds(model: nn.Module) -> list[str]:
    kinds = (fused.FusedActivation, fused.FusedLayerNorm, fused.FusedWindowAttention)
    return [type(m).__name__ for m in model.modules() if isinstance(m, kinds)]


@pytest.mark.parametrize(
    ("name", "keys", "counts"),
    [
        ("swin_t", {}, {"layer_norm": 11, "window_attention": 4, "gelu": 4}),
        ("vit_tiny_patch16_224", {"activation": "silu"}, {"layer_norm": 5, "silu": 2}),
        ("resnet18", {}, {"relu": 17}),
        ("preact_resnet18", {"activation": "celu"}, {}),
    ],
)
def test_the_kernels_are_put_in_and_counted(name, keys, counts):
    plain, untouched = tiny(name, **keys)
    torch.manual_seed(0)
    cfg = ArchitectureConfig(model=name, **(TINY[name] | keys))
    model, report = build_model(cfg, 5, kernels="triton")
    assert fused_kinds(plain) == [] and len(fused_kinds(model)) == sum(counts.values())
    assert report.fused == counts and report.not_fused == {} and untouched.fused is None
    (line,) = [line for line in report.format_lines(cfg) if line.startswith("kernels: ")]
    expected = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "no module has a fused one"
    assert line == f"kernels: {expected}"
    assert not any(line.startswith("kernels") for line in untouched.format_lines(cfg))
    assert differences(model.state_dict(), plain.state_dict()) == []
    images = torch.rand(2, 3, model.img_size, model.img_size)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images))


def test_piecewise_linear_activations_are_found_under_the_kernels():
    cfg = ArchitectureConfig(model="resnet18", **TINY["resnet18"])
    _, report = build_model(cfg, 5, kernels="triton")
    assert report.fused == {"relu": 17} and report.piecewise_linear == {"ReLU": 17}


def test_what_has_no_kernel_is_named():
    keys = TINY["swin_t"] | {
        "model_kwargs": (*TINY["swin_t"]["model_kwargs"], "attn_drop_rate=0.1")
    }
    cfg = ArchitectureConfig(model="swin_t", **keys)
    _, report = build_model(cfg, 5, kernels="triton")
    assert report.fused == {"layer_norm": 11, "gelu": 4}
    assert report.format_lines(cfg)[-1] == (
        "kernels: 4 not replaced, such as layers.0.blocks.0.attn: it uses dropout on attention "
        "weights"
    )


def test_a_run_with_kernels_is_the_run_without(tmp_path, monkeypatch, capsys):
    """The trainer's choice for CUDA, made on a CPU, where the ops have plain bodies: recorded,
    said, trained, averaged, resumed, exported, evaluated; and the weights are the other run's."""
    plain, swapped = tmp_path / "plain", tmp_path / "swapped"
    assert train.main(tiny_run(plain, "--max-updates", "3")) == 0
    assert "kernels: " not in capsys.readouterr().err
    monkeypatch.setattr(network, "choose_kernels", lambda choice, device: "triton")
    assert train.main(tiny_run(swapped, "--max-updates", "2")) == 0
    assert "kernels: 7 layer_norm, 2 window_attention, 2 gelu\n" in capsys.readouterr().err
    assert train.main(["--resume", str(swapped), "--max-updates", "3"]) == 0
    for folder, kernels in ((plain, "reference"), (swapped, "triton")):
        resolved = json.loads((folder / "environment.json").read_text())["resolved"]
        assert resolved["kernels"] == kernels
    mine, theirs = (read_state(find_checkpoint(folder)) for folder in (swapped, plain))
    assert mine["update"] == theirs["update"] == 3
    for part in ("model", "ema"):
        assert differences(mine[part], theirs[part]) != [], "the kernels did not run"
        torch.testing.assert_close(mine[part], theirs[part], rtol=1e-4, atol=1e-5)
    assert evaluate.main(["--checkpoint", str(swapped), "--attacks", "clean"]) == 0


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 16, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_patch_embedding_as_a_product_is_the_convolution(shape: tuple, bias: bool) -> None:
    """Values and first and second derivatives, in float64; the weights keep their place."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 5, 4, 4, bias=bias)).double()
    keys = list(module.state_dict())
    results = []
    for product in (False, True):
        if product:
            assert multiply_patches(module) == 1
        x = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape)
        x.requires_grad_()
        y = module(x)
        (grad,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        module.zero_grad()
        grad.square().sum().backward()
        results.append([y, grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert list(module.state_dict()) == keys
    assert len(results[0]) == len(results[1]) == 3 + bias
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_which_convolutions_are_patch_embeddings() -> None:
    """Windows that overlap, leave gaps or are padded are not; a size that does not divide takes the
    convolution, which leaves out the rest."""
    others = [
        nn.Conv2d(3, 4, 4, 2),
        nn.Conv2d(3, 4, 2, 4),
        nn.Conv2d(3, 4, 4, 4, padding=1),
        nn.Conv2d(4, 4, 4, 4, groups=2),
        nn.Conv2d(3, 4, 2, 2, dilation=2),
        nn.Conv2d(3, 4, 1, 1),
    ]
    assert multiply_patches(nn.ModuleList(others)) == 0
    patches = nn.Conv2d(3, 4, (4, 2), (4, 2))
    x = torch.rand(2, 3, 17, 9)
    expected = patches(x)
    assert multiply_patches(nn.ModuleList([patches])) == 1
    assert expected.shape == (2, 4, 4, 4) and torch.equal(patches(x), expected)
    torch.testing.assert_close(patches(x[:, :, :16, :8]), expected)
