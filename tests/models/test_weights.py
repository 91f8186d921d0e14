"""Weights from elsewhere: other runs, wrapped checkpoints, and those of the paper."""

import argparse
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.models import TINY, refused, tiny
from support.states import differences, read_state
from torch import Tensor

from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import UserError
from fastgn.models.network import Classifier, build_model
from fastgn.models.preact_resnet import PreActResNet18
from fastgn.models.weights import convert_paper_weights, load_weights, read_weights


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
        f"{path} holds no state dict: it has no keys"
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
    with pytest.raises(
        UserError, match=r"^weight 1\.absolute_pos_embed is unknown: no Swin of timm"
    ):
        convert_paper_weights({"1.absolute_pos_embed": torch.zeros(1), "1.other": torch.zeros(1)})
    path = tmp_path / "resnet.pt"
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError) as caught:
        read_weights(path, paper=True)
    assert str(caught.value).startswith(f"{path}: weight conv1.weight is unknown")
    other = normalised(old, "sequential") | {"0.std": torch.tensor((0.5, 0.5, 0.5))}
    with pytest.raises(UserError, match=r"^0\.std is \[0\.5, 0\.5, 0\.5\] instead of ImageNet's"):
        convert_paper_weights(other)
    with pytest.raises(UserError, match="the file holds no tensor"):
        convert_paper_weights({"epoch": 3})
