"""Makes config.json, with which timm can load a run's folder.

If the folder RUN holds config.json and model.safetensors, timm.create_model('local-dir:RUN',
pretrained=True) returns the network with its weights. timm.data.resolve_data_config then returns
how images must be preprocessed for the network.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor

from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import UserError, check, first_line
from fastgn.files import parse_json
from fastgn.models.create import OWN, check_name, create_network
from fastgn.models.network import build_model

KEPT = ("first_conv", "classifier", "fixed_input_size")
"""Keys of timm's pretrained_cfg that are copied into config.json, because they describe the
structure of the network."""


def make_timm_config(
    cfg: ArchitectureConfig,
    weights: Mapping[str, Tensor],
    classes: Sequence[str],
    crop_pct: float,
) -> dict[str, Any]:
    """Returns the content of config.json, with which timm can build the network.

    Raises UserError if no arguments of timm.create_model give the network. To test the arguments,
    the function builds a network from them and compares its logits for one image.

    weights: state dict of the network. classes: names of the classes. crop_pct: side of the central
    crop in an evaluation, divided by the shorter side of the image.
    """
    name = check_name(cfg)
    check(name not in OWN, f"{name} is not one of timm's networks")
    cfg = cfg.started()
    loaded = {k: v.detach().cpu() for k, v in weights.items()}
    ours, _ = build_model(cfg, len(classes))
    ours.backbone.load_state_dict(loaded)
    network, arguments = create_network(name, cfg, len(classes))
    del arguments["num_classes"]
    if cfg.activation:
        arguments["act_layer"] = cfg.activation
    try:  # convert the arguments to JSON and back, because timm will read them from JSON
        arguments = parse_json(json.dumps(arguments), "model_args")
        theirs = timm.create_model(name, num_classes=len(classes), **arguments)
        theirs.load_state_dict(loaded)
    except Exception as error:  # a constructor may raise any error for an unknown argument
        reason = first_line(error)
        raise UserError(
            f"timm's arguments cannot express {describe_network(cfg)} ({reason})"
        ) from None
    image = ours.normalize(torch.rand(1, 3, ours.img_size, ours.img_size))
    with torch.no_grad():
        expected, found = ours.eval().backbone(image), theirs.eval()(image)
    check(
        expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-3, atol=1e-4),
        f"timm's arguments cannot express {describe_network(cfg)}",
    )
    known: Any = network.pretrained_cfg
    return {
        "architecture": name.partition(".")[0],
        "num_classes": len(classes),
        "label_names": list(classes),
        "model_args": arguments,
        "pretrained_cfg": {k: known[k] for k in KEPT if known.get(k) is not None}
        | {
            "num_classes": len(classes),
            "input_size": [3, ours.img_size, ours.img_size],
            "mean": ours.mean.flatten().tolist(),
            "std": ours.std.flatten().tolist(),
            "crop_pct": crop_pct,
            "crop_mode": "center",
            "interpolation": "bicubic",
        },
    }


def describe_network(cfg: ArchitectureConfig) -> str:
    """Returns the network's name, and its activation if the configuration replaces it."""
    return f"{cfg.model} with activation {cfg.activation}" if cfg.activation else cfg.model
