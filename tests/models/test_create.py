"""Names of networks, what can be built, and what is refused."""

import functools
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.models import TINY, refused, tiny
from timm.models import list_models
from torch import Tensor, nn

from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import UserError
from fastgn.models import create, network
from fastgn.models.network import build_model


@pytest.mark.parametrize(("alias", "name"), create.ALIASES.items())
def test_aliases_are_timm_models(alias, name):
    assert timm.is_model(name)
    assert create.check_name(ArchitectureConfig(model=alias)) == name


def test_an_alias_builds_what_its_name_builds():
    by_alias, _ = tiny("swin_t")
    torch.manual_seed(0)
    cfg = ArchitectureConfig(model="swin_tiny_patch4_window7_224", **TINY["swin_t"])
    by_name, _ = build_model(cfg, 5)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(by_alias.eval()(images), by_name.eval()(images))


@pytest.mark.parametrize(
    ("name", "near"),
    [("swin_bb", "swin_b"), ("resnet5", "resnet5"), ("preact_resnet", "preact_resnet18")],
)
def test_an_unknown_model_names_the_nearest(name, near):
    line = refused(model=name)
    assert line.startswith(f"--model '{name}' is unknown: did you mean '{near}")


def test_drop_path_is_what_is_asked_for():
    """Swin's own default is 0.1: it must not slip in."""

    def rates(drop_path: float) -> set[float]:
        model, _ = tiny("swin_t", drop_path=drop_path)
        return {m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"}

    assert rates(0.0) == set()
    assert max(rates(0.2)) == pytest.approx(0.2)
    assert "has no stochastic depth" in refused(model="preact_resnet18", drop_path=0.1)


ENCODER = {
    "model": "gemma4_vit_167m_enc",
    "model_kwargs": ("depth=1", "embed_dim=64", "num_heads=2", "head_dim=32"),
    "img_size": 96,
}
"""A network of timm's that has neither dropout nor a classifier."""


def test_dropout_that_a_network_lacks_is_refused_only_if_asked_for():
    assert "has no dropout: leave --drop out" in refused(**ENCODER, drop=0.1)
    assert "instead of 1 x 5 logits" in refused(**ENCODER)


class SeveralOutputs(nn.Module):
    """A network of one layer, whose logits come in a container of some kind."""

    def __init__(self, num_classes: int, drop_rate: float, container: Any, always: bool) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)
        self.container = container
        self.always = always

    def forward(self, images_BCHW: Tensor) -> Any:
        logits = self.head(images_BCHW.mean((2, 3)))
        return self.container(logits) if self.always or self.training else logits


CONTAINERS: dict[str, tuple[Any, str]] = {
    "tuple": (lambda logits: (logits, logits), "returns a tuple instead of 1 x 5 logits"),
    "dict": (lambda logits: {"logits": logits}, "returns a dict instead of 1 x 5 logits"),
    "list": (lambda logits: [logits], "returns a list instead of 1 x 5 logits"),
    "None": (lambda logits: None, "returns a NoneType instead of 1 x 5 logits"),
    "features": (lambda logits: logits[:, :, None], "returns (1, 5, 1) instead of 1 x 5 logits"),
}


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_what_gives_no_logits_is_one_line(
    kind: str, always: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it does so in training alone, as Inception with its second head."""
    container, line = CONTAINERS[kind]
    several = functools.partial(SeveralOutputs, container=container, always=always)
    monkeypatch.setitem(create.OWN, "several", several)
    cfg = ArchitectureConfig(model="several", img_size=8)
    if always:
        assert refused(model="several", img_size=8) == f"--model several {line}"
        return
    model, _ = build_model(cfg, 5)
    with pytest.raises(UserError, match=re.escape(f"--model several {line}")):
        network.find_smallest_batch(model, cfg, 5)
    assert model.training


SWIN = TINY["swin_t"]["model_kwargs"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"model": "vit_tiny_patch16_224", "img_size": 8}, "--img-size 8 does not suit"),
        ({"model": "swin_t", "img_size": 16, "num_classes": 7}, "--num-classes 7 does not fit"),
        ({"model": "swin_t", "model_kwargs": ("embed_dimm=8",)}, "embed_dimm"),
        ({"model": "swin_t", "model_kwargs": (*SWIN, "depths=two"), "img_size": 16}, "cannot be"),
        ({"model": "swin_t", "model_kwargs": ("patch_size=0",)}, "patch_size=0 cannot be built: "),
        (
            {"model": "swin_t", "model_kwargs": ("pretrained=True",)},
            "--model-kwargs pretrained: the",
        ),
        (
            {"model": "swin_t", "model_kwargs": (*SWIN, "num_classes=7"), "img_size": 16},
            "returns (1, 7) instead of 1 x 5 logits",
        ),
        (
            {"model": "preact_resnet18", "model_kwargs": ("widht=4",)},
            "--model-kwargs widht: the constructor of preact_resnet18 takes no such argument; did "
            "you mean 'width'?",
        ),
        ({"model": "preact_resnet18", "model_kwargs": ("width=four",)}, "cannot be built: "),
        ({"model": "preact_resnet18", "pretrained": True}, "--pretrained: there are no weights"),
        ({"model": "resnet18.nobody_in1k"}, "Invalid pretrained tag (nobody_in1k)"),
    ],
)
def test_what_cannot_be_built_is_one_line(keys, expected):
    assert expected in refused(**keys)


def test_pretrained_without_a_hub_is_one_line_and_soon(monkeypatch, tmp_path):
    """Port 9 refuses at once; the hub's own client would go on asking for 47 s."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    line = refused(model="resnet18", pretrained=True)
    assert time.perf_counter() - start < 20
    assert line.startswith("--pretrained: the hub gave no weights of resnet18 (")
    assert line.endswith("get them from elsewhere and add --initial-checkpoint FILE")
    assert constants.HF_HUB_OFFLINE


NO_CONSTRUCTORS = (
    *("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
    *("pretrained_strict", "pretrained_filter_fn", "pretrained_model_args", "model_cfg", "pruned"),
    *("features_only", "feature_cls", "out_indices", "feature_cfg", "kwargs_filter", "variant"),
    *(
        "scriptable",
        "exportable",
        "no_jit",
        "jit",
        "device",
        "dtype",
        "model_name",
        "kwargs",
        "self",
    ),
)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("model", ["resnet10t", "swin_t", "preact_resnet18", "test_byobnet"])
@pytest.mark.parametrize("key", NO_CONSTRUCTORS)
def test_arguments_that_are_not_the_constructors_are_refused(key, model, tmp_path):
    bomb, proof = tmp_path / "bomb.pt", tmp_path / "proof"
    torch.save({"state_dict": Bomb(proof)}, bomb)
    cfg = ArchitectureConfig(model=model, model_kwargs=(f"{key}={bomb}",))
    with pytest.raises(UserError, match=f"--model-kwargs {key}: the constructor of .* takes no"):
        build_model(cfg, 10)
    assert not proof.exists()


def test_no_network_of_timms_takes_a_file():
    for name in list_models():
        arguments = create.list_constructor_arguments(name)
        assert not arguments & set(NO_CONSTRUCTORS), name
        assert not [a for a in arguments if re.search("pretrained(?!_window)|checkpoint_|url", a)]


@pytest.mark.parametrize("value", ["1e999", "-1e999", "2**99", "9" * 40, "{1, 2}", "b'x'", "..."])
def test_values_are_plain(value):
    cfg = ArchitectureConfig(model="resnet10t", model_kwargs=(f"stem_width={value}",))
    with pytest.raises(UserError):
        build_model(cfg, 10)
