"""The precisions in which an update can be computed."""

import contextlib
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from fastgn.config.groups import Precision

PRECISIONS: tuple[str, ...] = get_args(Precision)


def autocast(device_type: str, precision: str) -> contextlib.AbstractContextManager:
    """Returns a context with bf16 autocast if `precision` is "bf16", else one without effect."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bf16")


def in_precision(model: Any, precision: str) -> Any:
    """Returns `model`, wrapped by InBfloat16 if `precision` is "bf16-pure"."""
    return InBfloat16(model) if precision == "bf16-pure" else model


class InBfloat16:
    """Runs the network of a classifier in bf16 throughout, with gradients in fp32.

    The weights and buffers are cast when a forward begins, so that the optimizer updates fp32
    weights. BatchNorm keeps its weights and statistics in fp32. If a forward changes any other
    buffer, it changes only the cast copy, and the buffer itself keeps its value. Images and logits
    are fp32. LayerNorm's statistics, softmax and sums are fp32 inside the operators of PyTorch and
    fastgn_kernels.

    model: a classifier with `normalize` and `backbone`.
    """

    def __init__(self, model: Any):
        self.model = model

    def cast_weights(self) -> dict[str, Tensor]:
        """Returns bf16 copies of the network's weights and buffers, except those of BatchNorm."""
        model = self.model
        norms = [m for m in model.backbone.modules() if isinstance(m, _BatchNorm)]
        kept = {id(t) for m in norms for t in (*m.parameters(), *m.buffers())}
        named = (*model.backbone.named_parameters(), *model.backbone.named_buffers())
        return {
            name: t.to(torch.bfloat16)
            for name, t in named
            if t.is_floating_point() and id(t) not in kept
        }

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """Returns fp32 images with the mean and variance that the network expects."""
        return self.model.normalize(images_BCHW)

    def backbone(self, images_BCHW: Tensor) -> Tensor:
        """Returns fp32 logits (B, K) of normalised images."""
        images = images_BCHW.to(torch.bfloat16)
        return functional_call(self.model.backbone, self.cast_weights(), (images,)).float()

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        return self.backbone(self.normalize(images_BCHW))


def explain_unsupported(precision: str, device: torch.device) -> str | None:
    """Returns why `device` cannot compute in `precision`, or None if it can."""
    if precision == "tf32" and device.type != "cuda":
        return f"tf32 needs a CUDA device, not {device.type}"
    if precision != "fp32" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            name = torch.cuda.get_device_name(device)
            return f"{precision} needs compute capability 8.0, but {name} has only {major}.{minor}"
    return None


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Lets matrix products and convolutions run in TF32 if `precision` is "tf32", or else in fp32.

    PyTorch's own default is fp32 for matrix products and TF32 for convolutions.
    """
    tf32 = precision == "tf32"
    before: tuple[Any, Any]
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the program has used PyTorch's newer settings, which exclude these
        settings: tuple[Any, Any]
        settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
        before = settings[0].fp32_precision, settings[1].fp32_precision
        for setting in settings:
            setting.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            yield
        finally:
            for setting, value in zip(settings, before, strict=True):
                setting.fp32_precision = value
        return
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
