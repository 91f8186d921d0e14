"""Name -> network: timm's, with the normalisation inside, the activations and kernels chosen and
every operator twice differentiable."""

import copy
import dataclasses
import difflib
import inspect
import math
import re
import sys
from collections import Counter
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_act_layer, set_fused_attn
from timm.models import build_model_with_cfg, model_entrypoint
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastgn.config import initial_file
from fastgn.config.groups import ArchitectureConfig, model_kwargs
from fastgn.errors import SUGGESTIONS, UserError, check, first_line, nearest, parse_number
from fastgn.preact_resnet import PreActResNet18
from fastgn.second_order import find_operators, replace_operators
from fastgn.weights import OLD_SWIN, Adapted, from_paper, load_weights, read_weights

ALIASES = {
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_l": "swin_large_patch4_window7_224",
}
OWN = {"preact_resnet18": PreActResNet18}
PIECEWISE_LINEAR = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Hardtanh,
    nn.Threshold,
)
ACTIVATIONS = (
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "silu",
    "mish",
    "relu",
    "leaky_relu",
    "elu",
    "celu",
    "selu",
    "tanh",
    "softplus",
)
ACTIVATION_ARGUMENT = {"leaky_relu": "negative_slope", "elu": "alpha", "softplus": "beta"}
"""What the number in an activation such as softplus:10 is."""


class Classifier(nn.Module):
    """0..1 pixels -> logits: the normalisation is part of the network, so attacks work in pixels.

    normalize: images_BCHW in 0..1 to the backbone's units. backbone: timm's network, timm's keys.
    img_size: side of the images in pixels. crop_pct: share of a resized image's side that the
    network's own preprocessing keeps.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        img_size: int,
        crop_pct: float = DEFAULT_CROP_PCT,
    ):
        super().__init__()
        self.backbone = backbone
        self.img_size = img_size
        self.crop_pct = crop_pct
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        return (images_BCHW - self.mean) / self.std

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.backbone(self.normalize(images_BCHW))


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """What was done to the network, for the log."""

    parameters: int
    swapped_activations: int
    unfused_attentions: int
    piecewise_linear: dict[str, int]
    """Class name -> how many are left: operators that gradnorm gets no signal through."""
    replaced_operators: dict[str, int]
    """Operator that cannot be differentiated twice everywhere -> number of calls replaced."""
    fused: dict[str, int] | None = None
    """Kind -> how many run fastgn_kernels; None: they were not asked for."""
    not_fused: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name -> why a module that looks like one of those does not."""
    adapted: Adapted | None = None
    """How the initial weights were made to fit; None if the network starts from none."""

    def lines(self, cfg: ArchitectureConfig) -> list[str]:
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
            out.append(f"kernels: {kinds or 'no module has one'}")
        if self.not_fused:
            name, reason = next(iter(self.not_fused.items()))
            out.append(f"kernels: {len(self.not_fused)} left out, such as {name}: {reason}")
        return out


class PatchConv2d(nn.Conv2d):
    """A convolution whose windows do not overlap, as one matrix product: cuDNN's derivatives of a
    convolution of 3 channels are slow, and its layout has to be turned for what follows; of a
    product, a compiled step drops what it does not need."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """As nn.Conv2d; the result is channels-last."""
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
    """Makes the patch embeddings in `module` matrix products, in place; returns how many."""
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
    """Puts fastgn_kernels' ops into a network, in place: kind -> how many modules, and name -> why
    a module that looks like one of those stays as it was."""
    from fastgn_kernels.modules import swap_modules  # here: triton is for Linux alone

    multiply_patches(backbone)
    swapped = swap_modules(backbone)
    return swapped.counts, swapped.left


def kernels_for(choice: str, device: torch.device) -> str:
    """--kernels for a device: "triton" or "reference". Raises UserError."""
    check(
        choice != "triton" or device.type == "cuda",
        f"--kernels triton needs a CUDA device, and this run is on {device.type}: leave it out "
        "(auto), or --kernels reference",
    )
    return choice if choice != "auto" else "triton" if device.type == "cuda" else "reference"


def build_model(
    cfg: ArchitectureConfig, num_classes: int, kernels: str = "reference"
) -> tuple[Classifier, ModelReport]:
    """The configured network on the CPU, in fp32. kernels: see `kernels_for`.

    Raises UserError: unknown name, argument or activation, an image size the network cannot take,
    weights that cannot be had or belong to another network.
    """
    check(
        cfg.num_classes in (None, num_classes),
        f"--num-classes {cfg.num_classes} does not fit the data, which has {num_classes}",
    )
    name = check_name(cfg)
    backbone, _ = create(name, cfg, num_classes)
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
    with find_operators(backbone) as finder:  # after the kernels, which some no longer call
        probe(model, cfg, num_classes)
    replaced = replace_operators(finder)
    adapted = None
    if cfg.initial_checkpoint:
        weights = read_weights(initial_file(cfg.initial_checkpoint))
        if isinstance(backbone, SwinTransformer) and any(k.endswith(OLD_SWIN) for k in weights):
            weights = from_paper(weights)
        source = f"--initial-checkpoint {cfg.initial_checkpoint}"
        adapted = load_weights(model, weights, source, adapt=cfg.adapt_weights)
    report = ModelReport(count, swapped, unfused, dict(kinds), replaced, fused, not_fused, adapted)
    return model, report


def check_name(cfg: ArchitectureConfig) -> str:
    """The network's full name. Raises UserError where name or activation cannot be: the checks that
    need no data."""
    name = ALIASES.get(cfg.model, cfg.model)
    # timm looks no further than the first dot, and what stands behind it reaches generated code
    plain = re.fullmatch(r"[\w.-]+", name, re.ASCII) is not None
    if name not in OWN and not (plain and timm.is_model(name)):
        matches = timm.list_models(name) if set(name) & set("*?[") else []
        if matches:
            raise UserError(
                f"--model {cfg.model!r} matches {len(matches)} networks, such as "
                f"{', '.join(matches[:SUGGESTIONS])}: name one, or see --list models {cfg.model!r}"
            )
        valid = [*ALIASES, *OWN, *timm.list_models()]
        raise UserError(f"--model {cfg.model!r} is unknown: {nearest(name, valid)}")
    if cfg.activation:
        parse_activation(cfg.activation)
    return name


def create(
    name: str, cfg: ArchitectureConfig, num_classes: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The bare network, and the arguments that its constructor took. Raises UserError."""
    given = model_kwargs(cfg.model_kwargs)
    check_kwargs(name, given)
    kwargs = {"num_classes": num_classes, "drop_rate": cfg.drop, **given}
    if name in OWN:
        check(not cfg.pretrained, f"--pretrained: there are no weights of {name} to fetch")
        check(
            not cfg.drop_path,
            f"--drop-path {cfg.drop_path}: {name} has no stochastic depth; leave it out",
        )
        try:
            return OWN[name](**kwargs), kwargs
        except Exception as error:  # whatever a constructor makes of odd arguments
            raise UserError(f"{described(cfg)} cannot be built: {first_line(error)}") from None
    if cfg.pretrained:
        look_for_hub()
    # Always given where it is taken: Swin's own default drop_path is 0.1
    optional: dict[str, Any] = {"drop_path_rate": cfg.drop_path, "img_size": cfg.img_size}
    optional = {k: v for k, v in optional.items() if v is not None and k not in kwargs}
    while True:
        try:
            network = timm.create_model(name, pretrained=cfg.pretrained, **kwargs, **optional)
            return network, kwargs | optional
        except TypeError as error:
            refused = next((k for k in optional if f"'{k}'" in str(error)), None)
            if refused is None:
                raise UserError(f"{described(cfg)} cannot be built: {first_line(error)}") from None
            check(
                refused != "drop_path_rate" or not cfg.drop_path,
                f"--drop-path {cfg.drop_path}: {name} has no stochastic depth; leave it out",
            )
            del optional[refused]
        except OSError as error:
            raise UserError(
                f"--pretrained: no weights of {name} from the hub ({first_line(error)}); fetch "
                "them elsewhere and give --initial-checkpoint FILE"
            ) from None
        except Exception as error:  # whatever a constructor makes of odd arguments
            what = "--pretrained" if cfg.pretrained else f"{described(cfg)} cannot be built"
            raise UserError(f"{what}: {first_line(error)}") from None


def described(cfg: ArchitectureConfig) -> str:
    """Returns the flags that a network is made by."""
    if not cfg.model_kwargs:
        return f"--model {cfg.model}"
    return f"--model {cfg.model} --model-kwargs {' '.join(cfg.model_kwargs)}"


NEVER_GIVEN = ("features_only", "out_indices", "device", "dtype", "kwargs")
"""What some networks' constructors take and a classifier on a device of ours must not be given."""


def constructor_arguments(name: str) -> set[str]:
    """Returns the arguments that the classes of a network take, its blocks' included.

    Those of timm's own factories are not among them: they name files and folders to load from.
    """
    if name in OWN:
        return set(inspect.signature(OWN[name]).parameters)
    module = sys.modules[model_entrypoint(name.partition(".")[0]).__module__]
    classes = [c for c in vars(module).values() if inspect.isclass(c)]
    found = {"bn_eps", "bn_momentum"}  # taken by the builders of EfficientNets
    for kind in {k for c in classes for k in c.__mro__ if k.__module__.startswith("timm.models.")}:
        found |= set(inspect.signature(kind).parameters)
    factories = set(inspect.signature(timm.create_model).parameters)
    factories |= set(inspect.signature(build_model_with_cfg).parameters)
    return found - factories - set(NEVER_GIVEN)


def check_kwargs(name: str, given: dict[str, Any]) -> None:
    """Raises UserError unless --model-kwargs are plain values for a network's constructor. A file
    that a stranger made says them too, and they must not make timm open another one."""
    known = constructor_arguments(name) if given else set()
    for key, value in given.items():
        close = difflib.get_close_matches(key, sorted(known), n=1)
        check(
            key in known,
            f"--model-kwargs {key}: the constructor of {name} takes no such argument"
            + (f"; did you mean {close[0]!r}?" if close else ""),
        )
        check(
            is_plain(value),
            f"--model-kwargs {key}: {value!r:.80} must be a number, text, list or None",
        )


def is_plain(value: Any) -> bool:
    """Whether a value is None, a text, a truth value, a finite number, or lists of these."""
    if isinstance(value, (tuple, list)):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    if isinstance(value, (int, float)):
        return math.isfinite(value) and abs(value) < 2**31
    return value is None or isinstance(value, str)


def look_for_hub() -> None:
    """Without an answer within seconds, the hub's client takes what its cache holds and no more:
    left to itself, it tries again for 47 s, and for minutes where packets are dropped."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever its HTTP library of the day raises
        constants.HF_HUB_OFFLINE = True


def probe(model: Classifier, cfg: ArchitectureConfig, num_classes: int) -> None:
    """One image through the network, so that a wrong size fails here and in one line."""
    images = torch.zeros(1, 3, model.img_size, model.img_size)
    training = model.training
    channels = model_kwargs(cfg.model_kwargs).get("in_chans", 3)
    check(
        channels == 3, f"--model-kwargs in_chans={channels}: images have 3 channels; leave it out"
    )
    try:
        with torch.no_grad():
            logits: Any = model.eval()(images)
    except Exception as error:  # whatever a network makes of a size that it was not made for
        raise UserError(
            f"--img-size {model.img_size} does not suit {described(cfg)}: {first_line(error)}"
        ) from None
    finally:
        model.train(training)
    given = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    check(
        given == (1, num_classes),
        f"{described(cfg)} gives {given} and not 1 x {num_classes} logits",
    )


def check_batch(model: Classifier, cfg: ArchitectureConfig, batch_size: int) -> None:
    """Raises UserError if BatchNorm gets one value per channel, of which there is no variance."""
    if batch_size > 1 or not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return
    trial = copy.deepcopy(model).train()
    try:
        with torch.no_grad():
            trial(torch.zeros(1, 3, model.img_size, model.img_size))
    except ValueError:
        raise UserError(
            f"--batch-size 1: BatchNorm in --model {cfg.model} at {model.img_size} px gets one "
            "value per channel and has no variance to divide by: use --batch-size 2 or more"
        ) from None


def activation_layer(name: str) -> type[nn.Module]:
    """Name, without a number -> class. Raises UserError with the nearest name."""
    check(name in ACTIVATIONS, f"--activation {name!r} is unknown: {nearest(name, ACTIVATIONS)}")
    layer = nn.Softplus if name == "softplus" else get_act_layer(name)
    assert layer is not None
    return layer


def parse_activation(text: str) -> tuple[type[nn.Module], dict[str, float]]:
    """NAME or NAME:NUMBER -> the class and its arguments. Raises UserError."""
    name, colon, number = text.partition(":")
    layer = activation_layer(name)
    if not colon:
        return layer, {}
    kinds = ", ".join(f"{k} ({v})" for k, v in ACTIVATION_ARGUMENT.items())
    check(name in ACTIVATION_ARGUMENT, f"--activation {text}: a number goes with {kinds} alone")
    value = parse_number(number)
    least = "at least" if name == "leaky_relu" else "above"
    right = value >= 0 if name == "leaky_relu" else value > 0
    check(right and math.isfinite(value), f"--activation {text}: {number} must be {least} 0")
    return layer, {ACTIVATION_ARGUMENT[name]: value}


def replaced_classes() -> tuple[type[nn.Module], ...]:
    """The activations that `swap_activations` replaces: torch's, and timm's of those on offer."""
    return tuple(
        {activation_layer(n) for n in ACTIVATIONS}
        | {*PIECEWISE_LINEAR, nn.GELU, nn.SiLU, nn.Hardswish}
    )


def swap_activations(model: nn.Module, name: str) -> int:
    """Replaces every activation module below `model` in place; returns how many."""
    layer, arguments = parse_activation(name)
    known = replaced_classes()
    count = 0
    for parent in model.modules():
        for child_name, child in parent.named_children():
            if isinstance(child, known):
                setattr(parent, child_name, layer(**arguments))
                count += 1
    check(count > 0, f"--activation {name}: the network has no activation module to replace")
    return count


def switch_off_fused_attention(model: nn.Module) -> int:
    """SDPA's flash and memory-efficient kernels have no second derivative: use plain products."""
    set_fused_attn(False)
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    return len(fused)
