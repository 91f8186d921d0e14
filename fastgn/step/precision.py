"""The precisions in which an update can be computed."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode

from fastgn.config.groups import Precision

PRECISIONS: tuple[str, ...] = get_args(Precision)


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Value of --precision -> dtype in which autocast runs."""
PURE = {"bf16-pure": torch.bfloat16, "fp16-pure": torch.float16}
"""Value of --precision -> dtype of all weights and activations within an update."""
CAPABILITY = {"tf32": (8, 0), "bf16": (8, 0), "bf16-pure": (8, 0)}
CAPABILITY |= {"fp16": (5, 3), "fp16-pure": (5, 3)}
"""Precision -> least compute capability of a CUDA device that computes in it."""


def is_fp16(precision: str) -> bool:
    """Returns whether losses have to be scaled in this precision, as fastgn.loss_scale explains."""
    return torch.float16 in (AUTOCAST.get(precision), PURE.get(precision))


def short_dtype(precision: str) -> torch.dtype | None:
    """Returns the 16-bit dtype in which this precision computes matrix products, or None if it
    computes them in 32 bits."""
    return (AUTOCAST | PURE).get(precision)


def autocast(device_type: str, precision: str) -> contextlib.AbstractContextManager:
    """Returns a context with the autocast of "bf16" or "fp16", or one without effect for other
    precisions."""
    dtype = AUTOCAST.get(precision)
    return torch.autocast(device_type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def in_precision(model: Any, precision: str, loss_scale: Tensor | None = None) -> Any:
    """Returns the object that a loss calls in place of `model`.

    For "bf16-pure" and "fp16-pure", this object computes in 16 bits throughout. For "fp16" and
    "fp16-pure", it returns logits in fp32 and has the attribute `loss_scale`, see
    objectives.Objective. For other precisions, it is `model` itself.
    """
    if precision in PURE:
        return InShortDtype(model, PURE[precision], loss_scale)
    return InAutocast(model, loss_scale) if is_fp16(precision) else model


AUTOCAST_NORMS: tuple[Callable, ...] = (
    *(F.layer_norm, torch.layer_norm),
    *(F.group_norm, torch.group_norm),
)
"""Normalisations whose results are fp32 under autocast, as PyTorch has it on CUDA."""
NORMS: tuple[Callable, ...] = (
    *AUTOCAST_NORMS,
    *(F.rms_norm, torch.rms_norm),
    *(F.batch_norm, torch.batch_norm),
    *(F.instance_norm, torch.instance_norm),
)
"""PyTorch's normalisations. torch.compile shows the functions of F only in part to a mode, but it
shows all those of torch that they call."""


FP32_WEIGHTS: dict[torch.dtype, tuple[type[nn.Module], ...]] = {
    torch.bfloat16: (_BatchNorm,),
    torch.float16: (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
}
"""Dtype of "bf16-pure" or "fp16-pure" -> modules that keep their weights and buffers in fp32.
_NormBase is the base class of BatchNorm and InstanceNorm."""


class Fp32Norms(TorchFunctionMode):
    """Context manager in which PyTorch's normalisations of fp16 tensors compute in fp32.

    PyTorch computes the derivatives of a normalisation partly in the dtype of its input. The second
    derivative contains the third power of the inverse standard deviation. In fp16, it overflows if
    the standard deviation is below 0.025, with every scale of the losses. fastgn_kernels and
    models.sync_batch_norm compute in fp32 themselves.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_among(func, NORMS):
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        if x.dtype != torch.float16:
            return func(*args, **kwargs)
        floats = [to_fp32(value) for value in args]
        result = func(*floats, **{key: to_fp32(value) for key, value in kwargs.items()})
        stays = torch.is_autocast_enabled(x.device.type) and is_among(func, AUTOCAST_NORMS)
        return result if stays else result.half()


def is_among(func: Any, functions: tuple[Callable, ...]) -> bool:
    """Returns whether a function is one of several, which torch.compile can only compare one by
    one."""
    for function in functions:  # noqa: SIM110
        if func is function:
            return True
    return False


def to_fp32(value: Any) -> Any:
    """Returns an fp16 tensor in fp32, and any other value as it is."""
    is_short = isinstance(value, Tensor) and value.dtype == torch.float16
    return value.float() if is_short else value


class InAutocast:
    """Calls a classifier under autocast in fp16, and returns its logits in fp32.

    With logits in fp16, the scaled loss would overflow. See `Fp32Norms` for the normalisations.

    model: a classifier with `normalize` and `backbone`. loss_scale: scalar tensor, or None.
    """

    def __init__(self, model: Any, loss_scale: Tensor | None = None):
        self.model = model
        self.loss_scale = loss_scale

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """Returns fp32 images with the mean and variance that the network expects."""
        return self.model.normalize(images_BCHW)

    def backbone(self, images_BCHW: Tensor) -> Tensor:
        """Returns fp32 logits (B, K) of normalised images."""
        with Fp32Norms():
            return self.model.backbone(images_BCHW).float()

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        return self.backbone(self.normalize(images_BCHW))


class InShortDtype(InAutocast):
    """Runs the network of a classifier in 16 bits throughout, with gradients in fp32.

    The weights and buffers are cast when a forward begins, so that the optimizer updates fp32
    weights. BatchNorm keeps its weights and statistics in fp32. If a forward changes any other
    buffer, it changes only the cast copy, and the buffer itself keeps its value. Images and logits
    are fp32. LayerNorm's statistics, softmax and sums are fp32 inside the operators of PyTorch and
    fastgn_kernels. In fp16, all normalisations compute in fp32 with fp32 weights, see `Fp32Norms`.

    dtype: dtype to which the weights and buffers are cast. See InAutocast for the other arguments.
    """

    def __init__(self, model: Any, dtype: torch.dtype, loss_scale: Tensor | None = None):
        super().__init__(model, loss_scale)
        self.dtype = dtype

    def cast_weights(self) -> dict[str, Tensor]:
        """Returns copies of the network's weights and buffers in 16 bits, except those of the
        normalisations that keep theirs in fp32."""
        modules, kinds = list(self.model.backbone.modules()), FP32_WEIGHTS[self.dtype]
        norms = [m for m in modules if isinstance(m, kinds)]
        kept = {id(t) for m in norms for t in (*m.parameters(), *m.buffers())}
        named = (*self.model.backbone.named_parameters(), *self.model.backbone.named_buffers())
        return {
            name: t.to(self.dtype)
            for name, t in named
            if t.is_floating_point() and id(t) not in kept
        }

    def backbone(self, images_BCHW: Tensor) -> Tensor:
        """Returns fp32 logits (B, K) of normalised images."""
        images, weights = images_BCHW.to(self.dtype), self.cast_weights()
        with Fp32Norms() if self.dtype == torch.float16 else contextlib.nullcontext():
            return functional_call(self.model.backbone, weights, (images,)).float()


def explain_unsupported(precision: str, device: torch.device) -> str | None:
    """Returns why `device` cannot compute in `precision`, or None if it can."""
    if precision == "tf32" and device.type != "cuda":
        return f"tf32 needs a CUDA device, not {device.type}"
    if precision in CAPABILITY and device.type == "cuda":
        least, has = CAPABILITY[precision], torch.cuda.get_device_capability(device)
        if has < least:
            name, (needs, only) = (
                torch.cuda.get_device_name(device),
                map(join_version, (least, has)),
            )
            return f"{precision} needs compute capability {needs}, but {name} has only {only}"
    return None


def choose_short_precision(device: torch.device) -> str | None:
    """Returns the first of "bf16" and "fp16" that a device supports, or None if it supports
    neither."""
    supported = (p for p in AUTOCAST if explain_unsupported(p, device) is None)
    return next(supported, None)


def join_version(numbers: tuple[int, int]) -> str:
    """Returns a version as text, such as 7.0."""
    return ".".join(map(str, numbers))


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Lets matrix products and convolutions run in TF32 if `precision` is "tf32", or else in fp32.

    PyTorch's own default is fp32 for matrix products and TF32 for convolutions.
    """
    tf32 = precision == "tf32"
    before: tuple[Any, Any]
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # raised if the program has used PyTorch's newer settings for TF32
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
