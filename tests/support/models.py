"""Networks with few weights, built from their configuration or refused."""

from typing import Any

import pytest
import torch

from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import UserError
from fastgn.models.network import Classifier, ModelReport, build_model

TINY: dict[str, dict[str, Any]] = {
    "swin_t": {
        "model_kwargs": (
            *("patch_size=4", "embed_dim=8", "depths=(2, 2)", "num_heads=(1, 2)"),
            "window_size=2",
        ),
        "img_size": 16,
    },
    "vit_tiny_patch16_224": {
        "model_kwargs": ("patch_size=4", "embed_dim=12", "depth=2", "num_heads=2"),
        "img_size": 8,
    },
    "resnet18": {"model_kwargs": ("channels=(4, 8, 8, 8)",), "img_size": 32},
    "resnet50": {"model_kwargs": ("channels=(4, 4, 4, 4)",), "img_size": 32},
    "preact_resnet18": {"model_kwargs": ("width=4",), "img_size": 16},
}


def tiny(name: str, num_classes: int = 5, **keys: Any) -> tuple[Classifier, ModelReport]:
    """Builds a network of TINY. keys: options that differ from its own."""
    torch.manual_seed(0)
    return build_model(ArchitectureConfig(model=name, **(TINY[name] | keys)), num_classes)


def refused(classes: int = 5, **keys: Any) -> str:
    """Returns the one-line message with which a network is refused."""
    with pytest.raises(UserError) as caught:
        build_model(ArchitectureConfig(**keys), classes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TINY_KWARGS = ("patch_size=4", "embed_dim=8", "depths=(1, 1)", "num_heads=(1, 2)", "window_size=2")
