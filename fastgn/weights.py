"""State dicts of networks: read from files of all kinds, renamed to timm's keys, loaded."""

import argparse
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from fastgn.checkpoint import first_line, foreign_object, not_run
from fastgn.errors import UserError, check

WRAPPINGS = ("ema", "state_dict_ema", "state_dict", "model")
"""Where files keep the state dict, averaged weights first."""
OLD_SWIN = "layers.0.downsample.reduction.weight"
"""In timm 0.6's Swins alone: in timm 1.0's the first stage has no downsampling."""
SWIN_KEYS = (
    r"(patch_embed\.(proj|norm)|norm|head|head\.fc|layers\.\d+\.(downsample\.(norm|reduction)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.(qkv|proj)|mlp\.fc[12])))\.(weight|bias)"
    r"|layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table"
)
"""Regular expression of a Swin's keys, timm 0.6's and 1.0's."""


def load_weights(backbone: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Loads a state dict in timm's keys. Raises UserError where it is another network's."""
    own = backbone.state_dict()
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    extra = [k for k in weights if k not in own]
    shapes = [k for k in own if k in weights and own[k].shape != weights[k].shape]
    if shapes and not (missing or extra):
        key = shapes[0]
        detail = f"{key} is {tuple(weights[key].shape)} there, {tuple(own[key].shape)} here"
    else:
        example = (missing + extra + [""])[0]
        detail = f"{len(missing)} keys are missing, {len(extra)} unknown, such as {example}"
    check(not (missing or extra or shapes), f"{source} is of another network: {detail}")
    backbone.load_state_dict(weights, strict=False)


def read_weights(file: Path, *, paper: bool = False) -> dict[str, Tensor]:
    """A state dict in timm's keys from .safetensors or torch.save's files, on the CPU; averaged
    weights come before the others. Never runs code from the file.

    paper: the file is one of the paper's, or in their form: `from_paper` renames its keys. Raises
    UserError: unreadable, objects besides tensors and plain values, no state dict.
    """
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            # timm's own training script stores its arguments: a Namespace holds values, no code
            with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
                warnings.simplefilter("ignore")
                content = torch.load(file, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        OSError,
        pickle.UnpicklingError,
        struct.error,
        LookupError,
        ValueError,
    ) as error:
        what = foreign_object(error)
        if what:
            raise UserError(not_run(file, what)) from None
        raise UserError(f"{file} cannot be read as weights: {first_line(error)}") from None
    for key in WRAPPINGS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    check(isinstance(content, dict), f"{file} holds no state dict")
    weights = strip_prefixes(content)
    if not paper:
        return weights
    try:
        return from_paper(weights)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def strip_prefixes(weights: dict[str, Any]) -> dict[str, Tensor]:
    """timm's keys from those of a Classifier or of a DistributedDataParallel; tensors alone."""
    out = {}
    for key, value in weights.items():
        if isinstance(value, Tensor):
            out[key.removeprefix("module.").removeprefix("backbone.")] = value
    return out


def from_paper(weights: dict[str, Any]) -> dict[str, Tensor]:
    """A Swin's state dict in timm 1.0's keys from one of the paper's checkpoints, whose keys are
    timm 0.6's: there a stage ends with the downsampling that now begins the next one, the
    classifier is `head` and not `head.fc`, and buffers that follow from the shape are stored.

    weights: the state dict, or a dict that holds it as "state_dict_ema", "state_dict", ...; its
    keys may be those of a network behind a normalisation (`1.`, `model.`, `module.`). timm 1.0's
    own keys stay as they are. Tensors are passed on, not copied.

    Raises UserError: a key that no Swin has (the first is named), or a normalisation by other than
    ImageNet's mean and standard deviation, which `Classifier` would not apply.
    """
    for key in WRAPPINGS:
        if isinstance(weights.get(key), dict):
            weights = weights[key]
            break
    tensors = {k: v for k, v in weights.items() if isinstance(v, Tensor)}
    check(bool(tensors), "no tensor in it")
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
            f"{given} is unknown: no Swin of timm 0.6 or 1.0 has it",
        )
        if old:
            key = re.sub(
                r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key
            )
        out[re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)] = tensors[given]
    return out


def check_normalisation(key: str, given: Tensor, kind: str) -> None:
    """Raises UserError unless `given` is ImageNet's mean or std (kind), of any shape."""
    values = given.flatten().tolist()
    expected = IMAGENET_DEFAULT_MEAN if kind == "mean" else IMAGENET_DEFAULT_STD
    same = len(values) == 3 and all(
        abs(a - b) < 1e-4 for a, b in zip(values, expected, strict=True)
    )
    shown = [round(v, 4) for v in values[:3]]
    check(same, f"{key} is {shown} and not ImageNet's {list(expected)}")
