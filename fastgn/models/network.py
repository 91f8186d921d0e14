"""Builds the classifier that is trained.

The classifier normalises its own input, and has the configured activations and kernels. All of its
operators can be differentiated twice.
"""

import dataclasses
import math
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import set_fused_attn
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from fastgn.config import initial_file
from fastgn.config.groups import ArchitectureConfig
from fastgn.config.pairs import model_kwargs
from fastgn.errors import UserError, check, first_line
from fastgn.models.activations import PIECEWISE_LINEAR, swap_activations
from fastgn.models.create import check_name, create_network, format_flags
from fastgn.models.second_order import find_operators, replace_operators
from fastgn.models.weights import (
    OLD_SWIN,
    Adapted,
    convert_paper_weights,
    load_weights,
    read_weights,
)


class Classifier(nn.Module):
    """A network that takes pixels in 0..1, `(B, 3, H, W), fp32`, and returns logits, `(B, K)`.

    The normalisation is part of the network, so that attacks work in pixels.
    """

    mean: Tensor
    """Mean of each channel, `(1, 3, 1, 1), fp32`."""
    std: Tensor
    """Standard deviation of each channel, `(1, 3, 1, 1), fp32`."""

    def __init__(
        self,
        backbone: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        img_size: int,
        crop_pct: float = DEFAULT_CROP_PCT,
    ):
        """Wraps a network.

        backbone: the network, with timm's parameter names. mean, std: one value per channel.
        img_size: side of the images in pixels. crop_pct: share of the resized image's side that
        evaluation's centre crop keeps.
        """
        super().__init__()
        self.backbone = backbone
        self.img_size = img_size
        self.crop_pct = crop_pct
        self.fewest_images = 1
        """Smallest number of images that the network can be trained on at once."""
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """Returns pixels in 0..1 normalised with the mean and the standard deviation."""
        return (images_BCHW - self.mean) / self.std

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.backbone(self.normalize(images_BCHW))


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """Report for the log about a network and the changes that were made to it."""

    parameters: int
    """Number of parameters."""
    swapped_activations: int
    """Number of activation modules that --activation replaced."""
    unfused_attentions: int
    """Number of attention modules whose fused kernel was switched off."""
    piecewise_linear: dict[str, int]
    """Class of a piecewise linear activation -> number of such modules in the network."""
    replaced_operators: dict[str, int]
    """Operator without a finite second derivative -> number of calls that were replaced."""
    fused: dict[str, int] | None = None
    """Name of an activation such as "gelu", or "layer_norm", or "window_attention" -> number of
    modules of this kind that use fastgn_kernels. None means that the kernels are off."""
    not_fused: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name of a module that could have used fastgn_kernels -> reason why it does not use them."""
    adapted: Adapted | None = None
    """How the initial weights were changed to fit. None means that the network starts with random
    weights."""

    def format_lines(self, cfg: ArchitectureConfig) -> list[str]:
        """Returns the report as lines for the log."""
        out = [f"{cfg.model}: {self.parameters / 1e6:.2f} M parameters"]
        if self.adapted:
            out.append(f"initial weights: {self.adapted}")
        if cfg.activation:
            out.append(f"{self.swapped_activations} activations replaced by {cfg.activation}")
        if self.unfused_attentions:
            out.append(
                f"{self.unfused_attentions} fused attentions switched off: they have no double "
                "backward"
            )
        if self.replaced_operators:
            calls = ", ".join(f"{n} {name}" for name, n in self.replaced_operators.items())
            out.append(f"replaced because their second derivative is missing or NaN: {calls}")
        if self.fused is not None:
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.fused.items())
            out.append(f"kernels: {kinds or 'no module has a fused one'}")
        if self.not_fused:
            name, reason = next(iter(self.not_fused.items()))
            out.append(f"kernels: {len(self.not_fused)} not replaced, such as {name}: {reason}")
        return out


class PatchConv2d(nn.Conv2d):
    """A convolution whose windows do not overlap, computed as one matrix product.

    This is faster for three reasons. cuDNN computes the derivatives of a convolution with 3
    channels slowly. The convolution's output would have to be transposed for the next layer. A
    compiled step can leave out those parts of a matrix product whose results are not used.
    """

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Returns the output of nn.Conv2d in channels-last layout."""
        batch, channels, height, width = images_BCHW.shape
        p, q = (int(side) for side in self.kernel_size)
        if height % p or width % q:
            return super().forward(images_BCHW)
        windows = images_BCHW.reshape(batch, channels, height // p, p, width // q, q)
        windows = windows.permute(0, 2, 4, 1, 3, 5).reshape(
            batch, height // p, width // q, channels * p * q
        )
        return F.linear(windows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def multiply_patches(module: nn.Module) -> int:
    """Makes the patch embeddings of a network compute with matrix products, in place.

    Returns the number of changed modules.
    """
    found = [
        m
        for m in module.modules()
        if type(m) is nn.Conv2d
        and m.kernel_size == m.stride != (1, 1)
        and (m.padding, m.dilation, m.groups) == ((0, 0), (1, 1), 1)
    ]
    for convolution in found:
        convolution.__class__ = PatchConv2d
    return len(found)


def use_kernels(backbone: nn.Module) -> tuple[dict[str, int], dict[str, str]]:
    """Makes the modules of a network use the operators of fastgn_kernels, in place.

    Returns {kind of module: number of changed modules} and {name of a module that could not be
    changed: reason}.
    """
    # imported here, because Triton exists only on Linux
    from fastgn_kernels.swap import swap_modules

    multiply_patches(backbone)
    swapped = swap_modules(backbone)
    return swapped.counts, swapped.left


def choose_kernels(choice: str, device: torch.device) -> str:
    """Returns which kernels a device uses, "triton" or "reference".

    choice: value of --kernels. Raises UserError if it is "triton" and Triton cannot make code for
    the device.
    """
    reason = explain_no_triton(device)
    check(
        choice != "triton" or reason is None,
        f"--kernels triton {reason}: leave --kernels out, or use --kernels reference",
    )
    return choice if choice != "auto" else "triton" if reason is None else "reference"


def explain_no_triton(device: torch.device) -> str | None:
    """Returns why Triton cannot make code for a device, or None if it can.

    On CUDA, torch.compile needs Triton. The text has no subject, such as "needs a CUDA device".
    """
    if device.type != "cuda":
        return f"needs a CUDA device, but this run is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 7:
        return None
    name = torch.cuda.get_device_name(device)
    return f"needs compute capability 7.0, but {name} has only {major}.{minor}"


def build_model(
    cfg: ArchitectureConfig, num_classes: int, kernels: str = "reference"
) -> tuple[Classifier, ModelReport]:
    """Returns the configured network on the CPU, in fp32, and a report about it.

    kernels: "triton" or "reference", see `choose_kernels`.

    Raises UserError if a name or an argument is unknown, or if the network cannot take the image
    size. Also raises UserError if the initial weights are missing or belong to another network.
    """
    check(
        cfg.num_classes in (None, num_classes),
        f"--num-classes {cfg.num_classes} does not fit the data, which has {num_classes} classes",
    )
    name = check_name(cfg)
    backbone, _ = create_network(name, cfg, num_classes)
    swapped = swap_activations(backbone, cfg.activation) if cfg.activation else 0
    unfused = switch_off_fused_attention(backbone)
    defaults = getattr(backbone, "pretrained_cfg", None) or {}
    side = cfg.img_size or defaults.get("input_size", (3, 224, 224))[-1]
    model = Classifier(
        backbone,
        cfg.mean or defaults.get("mean") or IMAGENET_DEFAULT_MEAN,
        cfg.std or defaults.get("std") or IMAGENET_DEFAULT_STD,
        side,
        defaults.get("crop_pct") or DEFAULT_CROP_PCT,
    )
    kinds = Counter(type(m).__name__ for m in backbone.modules() if isinstance(m, PIECEWISE_LINEAR))
    count = sum(p.numel() for p in backbone.parameters())
    fused, not_fused = use_kernels(backbone) if kernels == "triton" else (None, {})
    # search only after use_kernels, because it has replaced some of these operators already
    with find_operators(backbone) as finder:
        check_output(model, cfg, num_classes)
    replaced = replace_operators(finder)
    adapted = None
    if cfg.initial_checkpoint:
        weights = read_weights(initial_file(cfg.initial_checkpoint))
        if isinstance(backbone, SwinTransformer) and any(k.endswith(OLD_SWIN) for k in weights):
            weights = convert_paper_weights(weights)
        source = f"--initial-checkpoint {cfg.initial_checkpoint}"
        adapted = load_weights(model, weights, source, adapt=cfg.adapt_weights)
    report = ModelReport(count, swapped, unfused, dict(kinds), replaced, fused, not_fused, adapted)
    return model, report


def check_output(model: Classifier, cfg: ArchitectureConfig, num_classes: int) -> None:
    """Raises UserError unless a model returns one logit per class for an image of model.img_size
    pixels."""
    images = torch.zeros(1, 3, model.img_size, model.img_size)
    training = model.training
    channels = model_kwargs(cfg.model_kwargs).get("in_chans", 3)
    check(
        channels == 3,
        f"--model-kwargs in_chans={channels}: images have 3 channels: leave in_chans out",
    )
    try:
        with torch.no_grad():
            logits: Any = model.eval()(images)
    except Exception as error:  # a network may raise any error for an unsuitable size
        raise UserError(
            f"--img-size {model.img_size} does not suit {format_flags(cfg)}: {first_line(error)}"
        ) from None
    finally:
        model.train(training)
    check_logits(logits, 1, num_classes, cfg)


def check_logits(logits: Any, images: int, classes: int, cfg: ArchitectureConfig) -> None:
    """Raises UserError unless a network's output has the shape `(images, classes)`."""
    output = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    check(
        output == (images, classes),
        f"{format_flags(cfg)} returns {output} instead of {images} x {classes} logits",
    )


def find_smallest_batch(
    model: Classifier, cfg: ArchitectureConfig, num_classes: int, ranks: int = 1
) -> int:
    """Returns the smallest number of images per rank on which a network can be trained, 1 or 2.

    BatchNorm cannot be trained on one value per channel, because one value has no variance. If a
    single image gives it only one value per channel, the ranks that share BatchNorm's statistics
    need two images together.

    Weights, running statistics and the state of random generators do not change.

    ranks: number of ranks whose images BatchNorm uses together, see `sync_batch_norm`.

    Raises UserError if the network returns no logits in training, as networks with several outputs
    do.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def train_on(count: int) -> int:
        images = torch.zeros(count, 3, model.img_size, model.img_size)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = torch.func.functional_call(model, buffers, images)
        check_logits(logits, count, num_classes, cfg)
        return count

    training = model.training
    model.train()
    try:
        return train_on(1)
    except UserError:
        raise
    except ValueError:  # BatchNorm raises ValueError if it gets one value per channel
        return math.ceil(train_on(2) / ranks)
    finally:
        model.train(training)


def switch_off_fused_attention(model: nn.Module) -> int:
    """Makes attention modules use plain matrix products. Returns the number of changed modules.

    PyTorch's fused attention kernels have no second derivative.
    """
    set_fused_attn(False)
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    return len(fused)
