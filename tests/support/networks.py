"""Small networks, their inputs and targets."""

import contextlib

import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from fastgn.config import Config
from fastgn.models.activations import swap_activations
from fastgn.models.network import Classifier, switch_off_fused_attention
from fastgn.objectives import Objective, Representatives, build_objective


def swin() -> nn.Module:
    """Returns a Swin with one stage, for 16 pixels and 5 classes."""
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=16,
        patch_size=2,
        embed_dim=8,
        depths=(2,),
        num_heads=(2,),
        window_size=4,
        num_classes=5,
        drop_path_rate=0.0,
    )


def vit() -> nn.Module:
    """Returns a ViT with two blocks, for 16 pixels and 5 classes."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=5,
    )


def resnet() -> nn.Module:
    """Returns a small ResNet with GELU, for 5 classes."""
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(8, 8, 16, 16))
    swap_activations(model, "gelu")
    return model


def made(build, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Builds a network with fixed random weights, in training mode."""
    torch.manual_seed(0)
    model = build().to(dtype).train()
    switch_off_fused_attention(model)
    for parameter in model.parameters():  # so that no gradient is zero by the initialisation
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model


def soft_targets(num: int, classes: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns random target distributions, (B, K)."""
    return torch.rand(num, classes, dtype=dtype).softmax(1)


def relative(value: Tensor, reference: Tensor) -> float:
    """Returns the norm of the difference, divided by the norm of the reference."""
    return float((value - reference).norm() / reference.norm())


IMAGES = {swin: 16, vit: 16, resnet: 32}


REPRESENTATIVES = Representatives(torch.rand(5, 3, 16, 16, generator=torch.Generator()))
"""Images that pag's gradients point to, of 16 pixels, one per class."""


def classifier(build, dtype: torch.dtype = torch.float32) -> Classifier:
    """Builds a network with fixed random weights that normalises its images."""
    model = Classifier(made(build, dtype), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), IMAGES[build])
    return model.to(dtype)


def objective(**values) -> Objective:
    """Builds an objective. values: options that differ from the defaults."""
    return build_objective(Config().replace(**values).objective, REPRESENTATIVES)


class NoModules(contextlib.nullcontext):
    """FlopCounterMode's own tracker of modules hangs hooks on their inputs, and autograd.grad
    refuses those on a leaf."""

    parents = {"Global"}
