"""Names, normalisation, activations, attention, kernels, and weights from elsewhere."""

import argparse
import copy
import functools
import json
import math
import os
import pickle
import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fastgn_kernels import modules as fused
from safetensors.torch import save_file
from support.runs import tiny_run
from support.states import differences, read_state
from timm.layers import set_fused_attn
from torch import Tensor, nn

from fastgn import evaluate, train
from fastgn.checkpoint import find_checkpoint
from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import UserError
from fastgn.models import activations, create, network
from fastgn.models.network import Classifier, ModelReport, build_model, multiply_patches
from fastgn.models.preact_resnet import PreActResNet18
from fastgn.models.weights import convert_paper_weights, load_weights, read_weights
from fastgn.objectives import ObjectiveConfig, gradnorm, piecewise_linear_warning

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


@pytest.fixture(autouse=True)
def timm_as_it_was():
    """build_model switches timm's fused attention off for the process: each test starts with it
    on."""
    set_fused_attn(True, experimental=True)
    yield
    set_fused_attn(True)


def tiny(name: str, num_classes: int = 5, **keys: Any) -> tuple[Classifier, ModelReport]:
    torch.manual_seed(0)
    return build_model(ArchitectureConfig(model=name, **(TINY[name] | keys)), num_classes)


def refused(classes: int = 5, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        build_model(ArchitectureConfig(**keys), classes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------- names


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


@pytest.mark.parametrize("name", TINY)
def test_the_report_counts_the_parameters(name):
    model, report = tiny(name)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert model(torch.rand(2, 3, model.img_size, model.img_size)).shape == (2, 5)


def test_preact_resnet18_has_the_published_parameters():
    """11,171,146 is the count of the usual implementation (kuangliu/pytorch-cifar): the same
    network, whose final BatchNorm (2 x 512) that implementation leaves out, as He et al. do not."""
    expected = 11_171_146 + 2 * 512
    assert expected == 11_172_170
    assert sum(p.numel() for p in PreActResNet18(10).parameters()) == expected
    _, report = build_model(ArchitectureConfig(model="preact_resnet18", activation="gelu"), 10)
    assert report.parameters == expected


def test_preact_resnet18_has_the_published_shape():
    model = PreActResNet18(10)
    with torch.no_grad():
        x = model.conv1(torch.rand(1, 3, 32, 32))
        shapes = [tuple((x := block(x)).shape[1:]) for block in model.blocks]
    sides = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert shapes == [side for side in sides for _ in range(2)]
    assert [b.shortcut is not None for b in model.blocks] == [False, False] + [True, False] * 3


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


# ------------------------------------------------------------------------------------ normalisation


def test_normalisation_inside_is_that_outside():
    model, _ = tiny("resnet18", mean=(0.1, 0.2, 0.3), std=(0.2, 0.4, 0.5))
    images = torch.rand(3, 3, 32, 32)
    outside = torch.stack(
        [(images[:, c] - m) / s for c, (m, s) in enumerate(((0.1, 0.2), (0.2, 0.4), (0.3, 0.5)))],
        dim=1,
    )
    assert torch.equal(model.normalize(images), outside)
    model.eval()
    assert torch.equal(model(images), model.backbone(outside))


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("swin_t", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("vit_tiny_patch16_224", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("preact_resnet18", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ],
)
def test_the_normalisation_is_the_models_own(name, mean, std):
    model, _ = tiny(name)
    assert model.mean.flatten().tolist() == pytest.approx(mean)
    assert model.std.flatten().tolist() == pytest.approx(std)


def test_the_image_size_is_the_models_own():
    keys = {"model_kwargs": TINY["preact_resnet18"]["model_kwargs"]}
    model, _ = build_model(ArchitectureConfig(model="preact_resnet18", **keys), 5)
    assert model.img_size == 32


def test_checkpoints_hold_timms_keys_alone():
    model, _ = tiny("swin_t")
    assert {k.removeprefix("backbone.") for k in model.state_dict()} == set(
        model.backbone.state_dict()
    )
    assert all(k.startswith("backbone.") for k in model.state_dict())


# -------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize(
    ("name", "own", "count"),
    [
        ("swin_t", nn.GELU, 4),
        ("vit_tiny_patch16_224", nn.GELU, 2),
        ("resnet18", nn.ReLU, 17),
        ("resnet50", nn.ReLU, 49),
        ("preact_resnet18", nn.ReLU, 17),
    ],
)
def test_activations_are_replaced(name, own, count):
    """The count is one an MLP, and for ResNets one a convolution, so nothing is left."""
    model, report = tiny(name, activation="silu")
    assert report.swapped_activations == count
    kinds = [type(m).__name__ for m in model.modules()]
    assert own.__name__ not in kinds
    new = [m for m in model.modules() if "silu" in type(m).__name__.lower() or is_silu(m)]
    assert len(new) == count
    plain, untouched = tiny(name)
    assert untouched.swapped_activations == 0
    assert any(isinstance(m, own) or type(m).__name__ == own.__name__ for m in plain.modules())
    images = torch.rand(2, 3, model.img_size, model.img_size)
    assert not torch.allclose(model.eval()(images), plain.eval()(images))


def is_silu(module: nn.Module) -> bool:
    return type(module).__name__ == "Swish"


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_every_activation_on_offer_can_be_built(name):
    model, report = tiny("preact_resnet18", activation=name)
    assert report.swapped_activations == 17
    assert bool(report.piecewise_linear) == (name in ("relu", "leaky_relu"))


def test_an_activation_takes_its_number():
    model, report = tiny("preact_resnet18", activation="softplus:10")
    (beta,) = {m.beta for m in model.modules() if isinstance(m, nn.Softplus)}
    assert beta == 10 and report.swapped_activations == 17
    assert "gelu:2: only these take a number: " in refused(model="resnet18", activation="gelu:2")
    assert "must be above 0" in refused(model="resnet18", activation="softplus:0")
    assert "is not a number" in refused(model="resnet18", activation="elu:x")


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
    "tuple": (lambda logits: (logits, logits), "gives a tuple instead of 1 x 5 logits"),
    "dict": (lambda logits: {"logits": logits}, "gives a dict instead of 1 x 5 logits"),
    "list": (lambda logits: [logits], "gives a list instead of 1 x 5 logits"),
    "None": (lambda logits: None, "gives a NoneType instead of 1 x 5 logits"),
    "features": (lambda logits: logits[:, :, None], "gives (1, 5, 1) instead of 1 x 5 logits"),
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


@pytest.mark.parametrize(
    ("name", "side", "fewest"),
    [("resnet18", 32, 2), ("resnet18", 64, 1), ("preact_resnet18", 32, 1), ("swin_t", 16, 1)],
)
def test_how_few_images_can_be_trained_on(name: str, side: int, fewest: int) -> None:
    """ResNet-18 divides the side by 32: of one pixel BatchNorm has one value. What is there stays
    as it was."""
    cfg = ArchitectureConfig(model=name, **(TINY[name] | {"img_size": side, "drop": 0.5}))
    model, _ = build_model(cfg, 5)
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert network.find_smallest_batch(model, cfg, 5) == fewest
    assert differences(model.state_dict(), before) == []
    assert torch.equal(torch.get_rng_state(), drawn) and model.training


def test_hard_activations_are_replaced_too():
    cfg = ArchitectureConfig(model="mobilenetv3_small_050", activation="gelu", img_size=32)
    model, _ = build_model(cfg, 5)
    left = {type(m).__name__ for m in model.modules()} & {"Hardswish", "HardSwish", "ReLU"}
    assert left == set()


def test_an_unknown_activation_names_the_nearest():
    assert "'gleu' is unknown: did you mean 'gelu'?" in refused(model="resnet18", activation="gleu")


def test_gradnorm_warns_of_piecewise_linear_activations():
    _, report = tiny("resnet18")
    assert report.piecewise_linear == {"ReLU": 17}
    warning = piecewise_linear_warning(ObjectiveConfig("gradnorm"), report.piecewise_linear)
    assert warning is not None and "17 ReLU" in warning and "--activation gelu" in warning
    assert piecewise_linear_warning(ObjectiveConfig("natural"), report.piecewise_linear) is None
    _, smooth = tiny("resnet18", activation="gelu")
    assert smooth.piecewise_linear == {}
    assert piecewise_linear_warning(ObjectiveConfig("gradnorm"), smooth.piecewise_linear) is None


# ---------------------------------------------------------------------------------- fused attention


def second_derivative(model: nn.Module, images: Tensor) -> Tensor:
    """The L1 norm of every weight gradient of gradnorm's penalty alone."""
    loss = gradnorm(model, images, torch.arange(len(images)) % 5, ce_weight=0.0)
    return torch.stack(
        [
            torch.zeros(()) if g is None else g.abs().sum()
            for g in torch.autograd.grad(loss.total, list(model.parameters()), allow_unused=True)
        ]
    )


@pytest.mark.parametrize(("name", "attentions"), [("vit_tiny_patch16_224", 2), ("swin_t", 4)])
def test_fused_attention_is_switched_off_and_a_second_derivative_exists(name, attentions):
    model, report = tiny(name)
    assert report.unfused_attentions == attentions
    assert not any(getattr(m, "fused_attn", False) for m in model.modules())
    lines = report.format_lines(ArchitectureConfig(model=name))
    assert any("double backward" in line for line in lines)
    images = torch.rand(2, 3, model.img_size, model.img_size)
    assert float(second_derivative(model, images).sum()) > 0


def test_fused_attention_changes_no_logit():
    name, keys = "vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 12, "depth": 2}
    torch.manual_seed(0)
    fused = timm.create_model(name, num_classes=5, img_size=8, num_heads=2, **keys).eval()
    assert any(getattr(m, "fused_attn", False) for m in fused.modules())
    images = torch.rand(2, 3, 8, 8)
    plain, _ = tiny(name)
    plain.backbone.load_state_dict(fused.state_dict())
    torch.testing.assert_close(plain.eval()(images), fused(plain.normalize(images)))


# ------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize(
    ("choice", "device", "kernels"),
    [
        ("auto", "cuda", "triton"),
        ("auto", "cpu", "reference"),
        ("triton", "cuda", "triton"),
        ("reference", "cuda", "reference"),
        ("reference", "cpu", "reference"),
    ],
)
def test_which_kernels_run(choice, device, kernels):
    assert network.choose_kernels(choice, torch.device(device)) == kernels


def fused_kinds(model: nn.Module) -> list[str]:
    kinds = (fused.FusedActivation, fused.FusedLayerNorm, fused.FusedWindowAttention)
    return [type(m).__name__ for m in model.modules() if isinstance(m, kinds)]


@pytest.mark.parametrize(
    ("name", "keys", "counts"),
    [
        ("swin_t", {}, {"layer_norm": 11, "window_attention": 4, "gelu": 4}),
        ("vit_tiny_patch16_224", {"activation": "silu"}, {"layer_norm": 5, "silu": 2}),
        ("resnet18", {}, {"relu": 17}),
        ("preact_resnet18", {"activation": "celu"}, {}),
    ],
)
def test_the_kernels_are_put_in_and_counted(name, keys, counts):
    plain, untouched = tiny(name, **keys)
    torch.manual_seed(0)
    cfg = ArchitectureConfig(model=name, **(TINY[name] | keys))
    model, report = build_model(cfg, 5, kernels="triton")
    assert fused_kinds(plain) == [] and len(fused_kinds(model)) == sum(counts.values())
    assert report.fused == counts and report.not_fused == {} and untouched.fused is None
    (line,) = [line for line in report.format_lines(cfg) if line.startswith("kernels: ")]
    expected = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "no module has a fused one"
    assert line == f"kernels: {expected}"
    assert not any(line.startswith("kernels") for line in untouched.format_lines(cfg))
    assert differences(model.state_dict(), plain.state_dict()) == []
    images = torch.rand(2, 3, model.img_size, model.img_size)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images))


def test_piecewise_linear_activations_are_found_under_the_kernels():
    cfg = ArchitectureConfig(model="resnet18", **TINY["resnet18"])
    _, report = build_model(cfg, 5, kernels="triton")
    assert report.fused == {"relu": 17} and report.piecewise_linear == {"ReLU": 17}


def test_what_has_no_kernel_is_named():
    keys = TINY["swin_t"] | {
        "model_kwargs": (*TINY["swin_t"]["model_kwargs"], "attn_drop_rate=0.1")
    }
    cfg = ArchitectureConfig(model="swin_t", **keys)
    _, report = build_model(cfg, 5, kernels="triton")
    assert report.fused == {"layer_norm": 11, "gelu": 4}
    assert report.format_lines(cfg)[-1] == (
        "kernels: 4 not replaced, such as layers.0.blocks.0.attn: it uses dropout on attention "
        "weights"
    )


def test_a_run_with_kernels_is_the_run_without(tmp_path, monkeypatch, capsys):
    """The trainer's choice for CUDA, made on a CPU, where the ops have plain bodies: recorded,
    said, trained, averaged, resumed, exported, evaluated; and the weights are the other run's."""
    plain, swapped = tmp_path / "plain", tmp_path / "swapped"
    assert train.main(tiny_run(plain, "--max-updates", "3")) == 0
    assert "kernels: " not in capsys.readouterr().err
    monkeypatch.setattr(network, "choose_kernels", lambda choice, device: "triton")
    assert train.main(tiny_run(swapped, "--max-updates", "2")) == 0
    assert "kernels: 7 layer_norm, 2 window_attention, 2 gelu\n" in capsys.readouterr().err
    assert train.main(["--resume", str(swapped), "--max-updates", "3"]) == 0
    for folder, kernels in ((plain, "reference"), (swapped, "triton")):
        resolved = json.loads((folder / "environment.json").read_text())["resolved"]
        assert resolved["kernels"] == kernels
    mine, theirs = (read_state(find_checkpoint(folder)) for folder in (swapped, plain))
    assert mine["update"] == theirs["update"] == 3
    for part in ("model", "ema"):
        assert differences(mine[part], theirs[part]) != [], "the kernels did not run"
        torch.testing.assert_close(mine[part], theirs[part], rtol=1e-4, atol=1e-5)
    assert evaluate.main(["--checkpoint", str(swapped), "--attacks", "clean"]) == 0


# ----------------------------------------------------------------------------- what cannot be built


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
            "gives (1, 7) instead of 1 x 5 logits",
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


# ------------------------------------------------------------------------------------------ weights


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """A state dict unlike what a fresh network starts from."""
    torch.manual_seed(9)
    backbone = PreActResNet18(5, width=4)
    for value in backbone.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 0.2)
    return backbone.state_dict()


def wrappings(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "bare": weights,
        "distributed": {f"module.{k}": v for k, v in weights.items()},
        "classifier": {f"backbone.{k}": v for k, v in weights.items()},
        "both": {f"module.backbone.{k}": v for k, v in weights.items()},
        "timm": {"epoch": 3, "state_dict": weights, "arch": "preact_resnet18"},
        "fastgn": {"format": 1, "model": {"conv1.weight": torch.zeros(1)}, "ema": weights},
        "fastgn without ema": {"format": 1, "model": weights, "ema": None},
    }


@pytest.mark.parametrize("wrapping", [*wrappings({}), "safetensors", "run folder"])
def test_initial_checkpoints(wrapping, trained, tmp_path):
    where = path = tmp_path / "weights.pt"
    if wrapping == "safetensors":
        where = path = tmp_path / "weights.safetensors"
        save_file(trained, path)
    elif wrapping == "run folder":
        where = tmp_path
        save_file(trained, tmp_path / "model.safetensors")
    else:
        torch.save(wrappings(trained)[wrapping], path)
    model, _ = tiny("preact_resnet18", initial_checkpoint=str(where))
    loaded = model.backbone.state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[k], trained[k]) for k in trained)


def test_an_initial_checkpoint_with_another_activation(trained, tmp_path):
    """A natural ReLU network's weights start a GELU one: activations have no weights."""
    torch.save(trained, tmp_path / "relu.pt")
    model, report = tiny(
        "preact_resnet18", activation="gelu", initial_checkpoint=str(tmp_path / "relu.pt")
    )
    assert report.swapped_activations == 17
    assert torch.equal(model.backbone.state_dict()["fc.weight"], trained["fc.weight"])


def test_an_initial_checkpoint_of_another_network(trained, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(trained, path)
    start = {"initial_checkpoint": str(path)}
    wide = {"model": "preact_resnet18", "model_kwargs": ("width=8",)}
    line = refused(**wide, **start)
    assert f"--initial-checkpoint {path} belongs to another network" in line
    assert "conv1.weight is (4, 3, 3, 3) in the file, but (8, 3, 3, 3) in the network" in line
    narrow = {"model": "preact_resnet18", "model_kwargs": ("width=4",)}
    assert "fc.weight is (5, 32) in the file, but (7, 32) in the network" in refused(
        7, **narrow, **start
    )
    line = refused(model="swin_t", **TINY["swin_t"], **start)
    assert "keys are missing" in line and "unknown: the file has " in line


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 torn"])
def test_a_spoilt_initial_checkpoint(suffix, content, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    line = refused(model="preact_resnet18", initial_checkpoint=str(path))
    assert line.startswith(f"{path} is corrupt") and "trusted" not in line


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_initial_checkpoint(suffix, trained, tmp_path):
    path = tmp_path / f"weights{suffix}"
    save_file(trained, path) if suffix == ".safetensors" else torch.save(trained, path)
    content = path.read_bytes()
    for length in range(0, len(content), len(content) // 12):
        path.write_bytes(content[:length])
        line = refused(model="preact_resnet18", initial_checkpoint=str(path))
        assert line.startswith(f"{path} is corrupt")


def test_what_holds_no_state_dict(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save([1, 2], path)
    assert refused(model="preact_resnet18", initial_checkpoint=str(path)) == (
        f"{path} holds no state dict"
    )


def test_a_run_that_has_not_finished(tmp_path):
    line = refused(model="preact_resnet18", initial_checkpoint=str(tmp_path))
    assert "this run has not finished (no model.safetensors)" in line


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("form", ["torch.save", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused_unexecuted(form, tmp_path):
    path, proof = tmp_path / "weights.pt", tmp_path / "proof"
    content = {"state_dict": {"weight": Malicious(proof)}}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch.save")
    line = refused(model="preact_resnet18", initial_checkpoint=str(path))
    what = "a bare pickle" if form == "pickle" else f"{os.mkdir.__module__}.mkdir"
    assert line == (
        f"{path} holds more than tensors ({what}): it was not loaded, because loading it "
        "could run code"
    )
    if form == "torch.save":
        with pytest.raises(UserError) as caught:
            read_state(path)
        assert str(caught.value) == line
    assert not proof.exists()
    # the file would have done it: what is tested is the reader
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(
            path.read_bytes()
        )
    assert proof.exists()


def test_what_a_checkpoint_holds_is_named(tmp_path):
    """A class that does no harm is not run either; timm's own stored arguments are read."""
    torch.save({"state_dict": {}, "extra": ArchitectureConfig()}, tmp_path / "weights.pt")
    with pytest.raises(
        UserError, match=r"tensors \(fastgn\.config\.groups\.ArchitectureConfig\): it was"
    ):
        read_weights(tmp_path / "weights.pt")
    with pytest.raises(
        UserError, match=r"tensors \(fastgn\.config\.groups\.ArchitectureConfig\): it was"
    ):
        read_state(tmp_path / "weights.pt")
    arguments = argparse.Namespace(model="swin", lr=0.1)
    weights = {"a": torch.ones(2)}
    torch.save({"state_dict": weights, "args": arguments}, tmp_path / "timm.pth.tar")
    read = read_weights(tmp_path / "timm.pth.tar")
    assert differences(read, weights) == []


# ----------------------------------------------------------------------------- the paper's weights


DEEP = {
    "model_kwargs": (
        *("patch_size=2", "embed_dim=8", "depths=(1, 2, 1)", "num_heads=(1, 2, 4)"),
        "window_size=2",
    ),
    "img_size": 16,
}
"""Three stages: a downsampling that moves has one before it and one behind."""


@pytest.fixture(scope="module")
def swin() -> Classifier:
    torch.manual_seed(4)
    model, _ = build_model(ArchitectureConfig(model="swin_t", **DEEP), 5)
    for value in model.state_dict().values():
        value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def old_form(swin: Classifier) -> dict[str, Tensor]:
    """timm 0.6's keys, written down from its module tree: PatchMerging ends stages 0 and 1, the
    head is a plain Linear, and the windows' indices and masks are among the buffers."""
    names = {
        "layers.1.downsample": "layers.0.downsample",
        "layers.2.downsample": "layers.1.downsample",
        "head.fc": "head",
    }
    out = {}
    for key, value in swin.backbone.state_dict().items():
        new = next((key.replace(a, b) for a, b in names.items() if key.startswith(a)), key)
        assert new not in out
        out[new] = value
    for name, buffer in swin.backbone.named_buffers():
        if name.endswith(("attn_mask", "relative_position_index")):
            out[name] = buffer
    assert "layers.0.downsample.reduction.weight" in out
    assert "layers.1.blocks.1.attn_mask" in out and "head.weight" in out
    return out


def normalised(weights: dict[str, Tensor], wrapper: str) -> dict[str, Tensor]:
    first, second = {"sequential": ("0", "1"), "named": ("normalize", "model")}[wrapper]
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225))
    return {f"{first}.mean": mean, f"{first}.std": std} | {
        f"{second}.{k}": v for k, v in weights.items()
    }


@pytest.mark.parametrize(
    "form", ["ema", "sequential", "named", "distributed", "distributed sequential", "new keys"]
)
def test_the_papers_checkpoints_give_the_same_logits(form, swin, tmp_path):
    """The files themselves cannot be had: these are a small Swin's, in their form."""
    old, path = old_form(swin), tmp_path / "last.pth.tar"
    zeros = {k: torch.zeros_like(v) for k, v in old.items()}
    content: dict[str, Any] = {
        "ema": {"state_dict": zeros, "state_dict_ema": old, "args": argparse.Namespace(lr=1.0)},
        "sequential": normalised(old, "sequential"),
        "named": {"state_dict": normalised(old, "named")},
        "distributed": {f"module.{k}": v for k, v in old.items()},
        "distributed sequential": {
            f"module.{k}": v for k, v in normalised(old, "sequential").items()
        },
        "new keys": normalised(dict(swin.backbone.state_dict()), "sequential"),
    }[form]
    torch.save(content, path)
    images = torch.rand(3, 3, 16, 16)
    torch.manual_seed(0)
    model, _ = build_model(ArchitectureConfig(model="swin_t", **DEEP), 5)
    assert not torch.allclose(model.eval()(images), swin(images), atol=1e-2)
    load_weights(model, read_weights(path, paper=True), str(path))
    assert torch.equal(model(images), swin(images))


def test_timm_1_0s_keys_stay_as_they_are(swin):
    weights = swin.backbone.state_dict()
    assert differences(convert_paper_weights(weights), dict(weights)) == []


def test_an_initial_checkpoint_may_be_an_old_swin(swin, tmp_path):
    torch.save({"state_dict_ema": old_form(swin)}, tmp_path / "old.pth")
    start = ArchitectureConfig(model="swin_t", **DEEP, initial_checkpoint=str(tmp_path / "old.pth"))
    model, _ = build_model(start, 5)
    assert differences(model.backbone.state_dict(), swin.backbone.state_dict()) == []


def test_what_is_not_the_papers_is_named(swin, tmp_path):
    old = old_form(swin)
    with pytest.raises(UserError, match=r"^1\.absolute_pos_embed is unknown: no Swin of timm"):
        convert_paper_weights({"1.absolute_pos_embed": torch.zeros(1), "1.other": torch.zeros(1)})
    path = tmp_path / "resnet.pt"
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError) as caught:
        read_weights(path, paper=True)
    assert str(caught.value).startswith(f"{path}: conv1.weight is unknown")
    other = normalised(old, "sequential") | {"0.std": torch.tensor((0.5, 0.5, 0.5))}
    with pytest.raises(UserError, match=r"^0\.std is \[0\.5, 0\.5, 0\.5\] instead of ImageNet's"):
        convert_paper_weights(other)
    with pytest.raises(UserError, match="the file holds no tensor"):
        convert_paper_weights({"epoch": 3})


# --------------------------------------------------------------------------------------------- hub


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


# patch embeddings as products


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 16, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_patch_embedding_as_a_product_is_the_convolution(shape: tuple, bias: bool) -> None:
    """Values and first and second derivatives, in float64; the weights keep their place."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 5, 4, 4, bias=bias)).double()
    keys = list(module.state_dict())
    results = []
    for product in (False, True):
        if product:
            assert multiply_patches(module) == 1
        x = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape)
        x.requires_grad_()
        y = module(x)
        (grad,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        module.zero_grad()
        grad.square().sum().backward()
        results.append([y, grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert list(module.state_dict()) == keys
    assert len(results[0]) == len(results[1]) == 3 + bias
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_which_convolutions_are_patch_embeddings() -> None:
    """Windows that overlap, leave gaps or are padded are not; a size that does not divide takes the
    convolution, which leaves out the rest."""
    others = [
        nn.Conv2d(3, 4, 4, 2),
        nn.Conv2d(3, 4, 2, 4),
        nn.Conv2d(3, 4, 4, 4, padding=1),
        nn.Conv2d(4, 4, 4, 4, groups=2),
        nn.Conv2d(3, 4, 2, 2, dilation=2),
        nn.Conv2d(3, 4, 1, 1),
    ]
    assert multiply_patches(nn.ModuleList(others)) == 0
    patches = nn.Conv2d(3, 4, (4, 2), (4, 2))
    x = torch.rand(2, 3, 17, 9)
    expected = patches(x)
    assert multiply_patches(nn.ModuleList([patches])) == 1
    assert expected.shape == (2, 4, 4, 4) and torch.equal(patches(x), expected)
    torch.testing.assert_close(patches(x[:, :, :16, :8]), expected)
