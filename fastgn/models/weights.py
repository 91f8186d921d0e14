"""Reads state dicts from many kinds of files, renames their keys to timm's, and loads them."""

import dataclasses
import math
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from fastgn.archive import read_archive
from fastgn.errors import UserError, check, first_line
from fastgn.files import read_safetensors

WRAPPINGS = (
    *("ema", "state_dict_ema", "model_ema", "ema_state_dict", "params_ema"),
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params"),
)
"""Keys under which files store a state dict, in the order in which they are tried. Keys of averaged
weights come first."""
OLD_SWIN = "layers.0.downsample.reduction.weight"
"""Key that only Swins of timm 0.6 have. In timm 1.0 the first stage has no downsampling."""
SWIN_KEYS = (
    r"(patch_embed\.(proj|norm)|norm|head|head\.fc|layers\.\d+\.(downsample\.(norm|reduction)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.(qkv|proj)|mlp\.fc[12])))\.(weight|bias)"
    r"|layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table"
)
"""Regular expression that matches all keys of Swins in timm 0.6 and 1.0."""
NORMALISATION = re.compile(r"(?:.*\.)?(mean|mu|std|sigma)")
"""Regular expression for keys of the mean and the standard deviation that a file stores with a
network."""


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Changes that were made to weights so that they fit the network."""

    anew: tuple[str, ...] = ()
    """Keys of the classifier head that were not loaded and keep their random initial values."""
    resized: tuple[str, ...] = ()
    """Keys of position tables that were interpolated to another image size."""

    def __bool__(self) -> bool:
        return bool(self.anew or self.resized)

    def __str__(self) -> str:
        parts = []
        if self.anew:
            parts.append(
                f"{', '.join(self.anew)} are initialised at random, because the classes differ"
            )
        if self.resized:
            parts.append(
                f"{len(self.resized)} tables resized to the image size, such as {self.resized[0]}"
            )
        return "; ".join(parts)


class Normalised(Protocol):
    """Type of a model that load_weights accepts, such as a `network.Classifier`."""

    backbone: nn.Module
    mean: Tensor
    std: Tensor


def load_weights(
    model: Normalised, weights: dict[str, Tensor], source: str, *, adapt: bool = False
) -> Adapted:
    """Loads a state dict with timm's keys into a network. A prefix that all keys share is removed.

    adapt: whether to change weights that do not fit. timm's filter for checkpoints resizes position
    tables to the network's image size. If the number of classes differs, the network keeps its
    random classifier head.

    Raises UserError if the weights belong to another network, or to a network with another
    normalisation. source: flag and file for the beginning of the error's message.
    """
    own = model.backbone.state_dict()
    weights = strip_shared_prefix(check_normalisations(model, weights, source), own)
    adapted = Adapted()
    if adapt:
        weights, adapted = adapt_weights(model.backbone, weights, own, source)
    problem = find_mismatch(weights, own, adapted.anew)
    if problem:
        fits = not adapt and bool(find_adaptable(weights, own))
        hint = "; with --initial-checkpoint, add --adapt-weights to make the weights fit"
        raise UserError(f"{source} belongs to another network: {problem}{hint if fits else ''}")
    model.backbone.load_state_dict(weights, strict=False)
    return adapted


def collect_trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors that training changes, by name: weights and running statistics of
    BatchNorm.

    Other buffers are left out because they may contain infinities, as masks do.
    """
    statistics = {name: t for name, t in module.named_buffers() if "running_" in name}
    found = dict(module.named_parameters()) | statistics
    return {name: t.detach() for name, t in found.items() if t.numel()}


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether all values of the tensors are finite. Runs one reduction per device and waits
    for the result."""
    largest = torch.nn.utils.get_total_norm(tensors, norm_type=math.inf)
    return bool(largest.isfinite())


def find_mismatch(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], optional: Collection[str] = ()
) -> str | None:
    """Returns why a state dict does not fit a network, with examples of keys, or None if it fits.

    own: the network's state dict. optional: keys that may be missing, in addition to BatchNorm's
    counters of batches.
    """
    missing = [
        k
        for k in own
        if k not in weights and k not in optional and not k.endswith("num_batches_tracked")
    ]
    extra = [k for k in weights if k not in own]
    if missing and extra:
        return (
            f"{len(missing)} keys are missing, {len(extra)} unknown: the file has {extra[0][:80]} "
            f"where the network has {missing[0]}"
        )
    if missing or extra:
        example = (missing + extra)[0][:80]
        return f"{len(missing)} keys are missing, {len(extra)} unknown, such as {example}"
    for key, mine in own.items():
        given = weights.get(key, mine)
        if given.shape != mine.shape:
            return (
                f"{key} is {tuple(given.shape)} in the file, but {tuple(mine.shape)} in the network"
            )
        if given.is_complex() != mine.is_complex():
            return f"{key} is {given.dtype} in the file, but {mine.dtype} in the network"
    return None


def strip_shared_prefix(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the weights without the prefixes that all of their keys share, such as
    `module._orig_mod.`.

    A prefix that the network's own keys have is kept. own: the network's state dict.
    """
    weights = dict(weights)
    while weights and not weights.keys() & own.keys():
        if len({key.partition(".")[0] for key in weights}) > 1:
            break
        if not all("." in key for key in weights):
            break
        weights = {key.partition(".")[2]: value for key, value in weights.items()}
    return weights


def check_normalisations(
    model: Normalised, weights: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Returns the weights without the mean and standard deviation that a file may store with them.

    Raises UserError if these values differ from the model's normalisation. source: flag and file
    for the beginning of the error's message.
    """
    out = {}
    for key, value in weights.items():
        kind = NORMALISATION.fullmatch(key)
        if kind is None or value.numel() not in (1, 3) or key in model.backbone.state_dict():
            out[key] = value
            continue
        name = "mean" if kind[1] in ("mean", "mu") else "std"
        mine = getattr(model, name).flatten().float().cpu()
        check(
            bool(((value.flatten().float() - mine).abs() < 1e-4).all()),
            f"{source}: {key} is {format_values(value)}, but the network's {name} is "
            f"{format_values(mine)}: add "
            f"--{name} {' '.join(map(str, format_values(value) * (3 // value.numel())))}",
        )
    return out


def format_values(values: Tensor) -> list[float]:
    """Returns the first three values of a tensor, rounded to four decimals, for messages."""
    return [round(v, 4) for v in values.flatten().tolist()[:3]]


def find_adaptable(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Returns the keys of the weights that have another shape in the network.

    Returns no keys if the weights also have keys that the network lacks. own: the network's state
    dict.
    """
    same = weights.keys() <= own.keys()
    return [k for k in weights if same and weights[k].shape != own[k].shape]


def adapt_weights(
    backbone: nn.Module, weights: dict[str, Tensor], own: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], Adapted]:
    """Returns weights that fit the network's image size and number of classes, and the changes
    made.

    weights: name in the network -> weight. own: the network's present weights, whose shapes are
    wanted. source: where the weights come from, for messages. Raises UserError if timm's function
    that adapts weights to a network fails.
    """
    module = sys.modules[type(backbone).__module__]
    resize = getattr(module, "checkpoint_filter_fn", None)
    before = weights
    if resize is not None:
        try:
            weights = dict(resize(dict(weights), backbone))
        except Exception as error:  # timm may raise any error for another network's weights
            raise UserError(f"{source} cannot be adapted: {first_line(error)}") from None
    resized = [k for k in weights if k in before and weights[k].shape != before[k].shape]
    classes = getattr(backbone, "num_classes", None)
    anew = [
        k
        for k, mine in own.items()
        if mine.dim() > 0
        and len(mine) == classes
        and (k not in weights or is_other_head(weights[k], mine))
    ]
    weights = {k: v for k, v in weights.items() if k not in anew}
    return weights, Adapted(tuple(anew), tuple(resized))


def is_other_head(given: Tensor, mine: Tensor) -> bool:
    """Returns whether two tensors of a classifier head differ only in the number of classes.

    given: the tensor in the file. mine: the tensor in the network.
    """
    return (
        given.dim() == mine.dim() and given.shape[1:] == mine.shape[1:] and len(given) != len(mine)
    )


def read_weights(file: Path, *, paper: bool = False) -> dict[str, Tensor]:
    """Returns the state dict in a .safetensors file or a file of torch.save, on the CPU.

    No code from the file is run. If the file also holds averaged weights, these are returned.

    paper: whether the file is a checkpoint of the authors of arXiv 2409.20139, whose keys
    `convert_paper_weights` converts.

    Raises UserError if the file cannot be read, is damaged, has other objects than tensors and
    plain values, or has no state dict.
    """
    if file.suffix == ".safetensors":
        content: Any = read_safetensors(file)[0]
    else:
        content = read_archive(file, legacy=True)
    weights = find_state_dict(content)
    keys = ", ".join(map(str, content))[:80] if isinstance(content, dict) else ""
    reason = f"its keys are {keys}" if keys else "it has no keys"
    check(bool(weights), f"{file} holds no state dict: {reason}")
    if not paper:
        return weights
    try:
        return convert_paper_weights(weights)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def find_state_dict(content: Any) -> dict[str, Tensor]:
    """Returns the state dict in a file's content, as a dict of tensors.

    The state dict is the value of a key such as state_dict (see WRAPPINGS), or the content itself.
    The result is empty if the content has no tensors.
    """
    if not isinstance(content, dict):
        return {}
    for key in WRAPPINGS:
        found = find_state_dict(content.get(key))
        if found:
            return found
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def convert_paper_weights(weights: dict[str, Any]) -> dict[str, Tensor]:
    """Returns a Swin's state dict with timm 1.0's keys, from a checkpoint of arXiv 2409.20139.

    The checkpoints of this paper have the keys of timm 0.6. In timm 0.6 the downsampling is the end
    of a stage, and in timm 1.0 it is the beginning of the next stage. The classifier is called
    `head` in timm 0.6 and `head.fc` in timm 1.0. Buffers that can be computed from the shapes are
    left out of the result. Keys of timm 1.0 are accepted unchanged.

    weights: the state dict, or a dict that holds it under a key such as model. The keys of
    the state dict may have the prefixes `1.`, `model.` or `module.`, as those of a network behind a
    normalisation have. Tensors are not copied.

    Raises UserError if a key belongs to no Swin, and names the first such key. Also raises
    UserError if the checkpoint has a normalisation other than ImageNet's, because `Classifier`
    would ignore it.
    """
    tensors = find_state_dict(weights)
    check(bool(tensors), "the file holds no tensor")
    out: dict[str, Tensor] = {}
    plain = {re.sub(r"^((module|model|backbone|1)\.)+", "", k): k for k in tensors}
    old = OLD_SWIN in plain
    for key, given in plain.items():
        normalisation = re.fullmatch(r"(?:(?:0|normali[sz]e)\.)?(mean|std)", key)
        if normalisation:
            check_normalisation(given, tensors[given], normalisation[1])
            continue
        if re.search(r"\.(attn_mask|relative_position_index)$", key):
            continue
        check(
            re.fullmatch(SWIN_KEYS, key) is not None,
            f"weight {given} is unknown: no Swin of timm 0.6 or 1.0 has it",
        )
        if old:
            key = re.sub(
                r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key
            )
        out[re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)] = tensors[given]
    return out


def check_normalisation(key: str, given: Tensor, kind: str) -> None:
    """Raises UserError unless `given` is ImageNet's mean or standard deviation.

    key: name of the value in the file, for the message. kind: "mean" or "std".
    """
    values = given.flatten().tolist()
    expected = IMAGENET_DEFAULT_MEAN if kind == "mean" else IMAGENET_DEFAULT_STD
    same = len(values) == 3 and all(
        abs(a - b) < 1e-4 for a, b in zip(values, expected, strict=True)
    )
    check(same, f"{key} is {format_values(given)} instead of ImageNet's {list(expected)}")
