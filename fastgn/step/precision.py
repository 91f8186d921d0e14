"""The precision that a step computes in."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

PRECISIONS = ("fp32", "tf32", "bf16", "bf16-pure")


def autocast(device_type: str, precision: str) -> contextlib.AbstractContextManager:
    """bf16 autocast for "bf16", else nothing."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bf16")


def in_precision(model: Any, precision: str) -> Any:
    """`model`, with a bf16 copy of its weights for "bf16-pure"."""
    return InBfloat16(model) if precision == "bf16-pure" else model


class InBfloat16:
    """A classifier's (`normalize`, `backbone`) network in bf16 throughout, its gradients in fp32.

    Weights and buffers are cast where a forward begins, so that what the optimizer moves stays
    fp32; BatchNorm keeps its own in fp32 (what a forward writes into other buffers is lost). Images
    and logits are fp32. LayerNorm's statistics, softmax and sums are PyTorch's (or
    fastgn_kernels') fp32 inside the operators.
    """

    def __init__(self, model: Any):
        self.model = model

    def weights(self) -> dict[str, Tensor]:
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
        return self.model.normalize(images_BCHW)

    def backbone(self, images_BCHW: Tensor) -> Tensor:
        images = images_BCHW.to(torch.bfloat16)
        return functional_call(self.model.backbone, self.weights(), (images,)).float()

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        return self.backbone(self.normalize(images_BCHW))


def unsupported(precision: str, device: torch.device) -> str | None:
    """Why `device` cannot compute in `precision`, or None."""
    if precision == "tf32" and device.type != "cuda":
        return f"tf32 exists on CUDA alone, not on {device.type}"
    if precision != "fp32" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            name = torch.cuda.get_device_name(device)
            return f"{precision} needs compute capability 8.0, and {name} has {major}.{minor}"
    return None


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """TF32 products and convolutions for "tf32", for all else those of full fp32: by default
    PyTorch multiplies in fp32 and convolves in TF32."""
    tf32 = precision == "tf32"
    before: tuple[Any, Any]
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # PyTorch's newer settings are in use, which do not mix with these
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
