"""Files of weights: prefixes, nests, other heads and sizes, and weights that share memory."""

import re
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.models import TINY_KWARGS
from support.states import differences
from torch import Tensor, nn

from fastgn import files
from fastgn.config import Config
from fastgn.config.groups import ArchitectureConfig
from fastgn.config.programs import EvaluateConfig
from fastgn.errors import UserError
from fastgn.models.network import Classifier, build_model
from fastgn.models.weights import load_weights, read_weights
from fastgn.state import ExportHeader, keys_of
from fastgn.trained import load_bare_weights, load_trained


@pytest.fixture(scope="module")
def swin() -> Classifier:
    torch.manual_seed(1)
    return build_model(
        ArchitectureConfig(model="swin_t", model_kwargs=TINY_KWARGS, img_size=16), 5
    )[0]


NESTS = [
    (),
    ("net",),
    ("model_state_dict",),
    ("state_dict",),
    ("model",),
    ("model_ema",),
    ("module",),
    ("network",),
    ("model", "state_dict"),
    ("ema", "module"),
]


@pytest.mark.parametrize(
    "prefix",
    ["", "_orig_mod.", "model.", "1.", "module.", "backbone.", "module._orig_mod.1.model.", "a.b."],
)
@pytest.mark.parametrize("nest", NESTS, ids="/".join)
def test_prefixes_and_nests_are_seen_through(nest, prefix, swin, tmp_path):
    weights = swin.backbone.state_dict()
    content: Any = {f"{prefix}{k}": v for k, v in weights.items()}
    for key in reversed(nest):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}
    torch.save(content, tmp_path / "weights.pt")
    torch.manual_seed(2)
    start = ArchitectureConfig(
        model="swin_t",
        model_kwargs=TINY_KWARGS,
        img_size=16,
        initial_checkpoint=str(tmp_path / "weights.pt"),
    )
    model, _ = build_model(start, 5)
    assert differences(model.backbone.state_dict(), weights) == []


def test_another_normalisation_is_refused_and_its_own_taken(swin):
    weights = {f"1.{k}": v for k, v in swin.backbone.state_dict().items()}
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
    load_weights(swin, weights | {"0.mean": mean}, "FILE")
    with pytest.raises(UserError) as refusal:
        load_weights(swin, weights | {"normalize.mean": 0 * mean + 0.5}, "FILE")
    assert "normalize.mean is [0.5, 0.5, 0.5]" in str(refusal.value)
    assert str(refusal.value).endswith("add --mean 0.5 0.5 0.5")


def test_a_mismatch_shows_a_key_of_each(swin):
    weights = {f"blocks.{k}": v for k, v in swin.backbone.state_dict().items()} | {
        "x": torch.ones(1)
    }
    with pytest.raises(UserError) as refusal:
        load_weights(swin, weights, "FILE")
    assert re.search(
        r"\d+ keys are missing, \d+ unknown: the file has blocks\.\S+ where the network has \S+$",
        str(refusal.value),
    )


def test_another_head_and_size_are_adapted_on_request(swin, tmp_path, capsys):
    save_file(swin.backbone.state_dict(), tmp_path / "weights.safetensors")
    kwargs = (*TINY_KWARGS[:-1], "window_size=4")
    start = ArchitectureConfig(
        model="swin_t",
        model_kwargs=kwargs,
        img_size=32,
        initial_checkpoint=str(tmp_path / "weights.safetensors"),
    )
    with pytest.raises(UserError, match="--adapt-weights"):
        build_model(start, 3)
    torch.manual_seed(5)
    model, report = build_model(ArchitectureConfig(**{**start.__dict__, "adapt_weights": True}), 3)
    (line,) = [x for x in report.format_lines(start) if x.startswith("initial weights: ")]
    assert "head.fc.weight, head.fc.bias are initialised at random" in line
    assert "2 tables resized" in line
    mine, theirs = model.backbone.state_dict(), swin.backbone.state_dict()
    assert torch.equal(mine["patch_embed.proj.weight"], theirs["patch_embed.proj.weight"])
    assert mine["head.fc.weight"].shape == (3, 16)


def test_an_evaluation_needs_the_head_itself(swin, tmp_path):
    save_file(swin.backbone.state_dict(), tmp_path / "weights.safetensors")
    cfg = EvaluateConfig(
        checkpoint=(str(tmp_path / "weights.safetensors"),),
        model="swin_t",
        model_kwargs=TINY_KWARGS,
        img_size=16,
        adapt_weights=True,
        data="digits",
    )
    with pytest.raises(UserError, match="another number of classes than the data"):
        load_bare_weights(cfg.checkpoint[0], cfg, tuple("0123456789"), torch.device("cpu"))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a


def test_shared_weights_are_written_and_read(tmp_path):
    weights: dict[str, Tensor] = Tied().state_dict()
    whole = torch.arange(8.0)
    weights |= {"first": whole[:4], "second": whole[4:], "turned": whole.view(2, 4).T}
    path = tmp_path / "model.safetensors"
    files.write_safetensors(path, weights, {})
    read = read_weights(path)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[k], weights[k]) for k in weights)


def test_a_network_with_shared_weights_ends_its_run(tmp_path):
    """coat_lite_tiny has them, from training to the export and back."""
    torch.manual_seed(0)
    cfg = ArchitectureConfig(model="coat_lite_tiny", img_size=32)
    model, _ = build_model(cfg, 10)
    weights = model.backbone.state_dict()
    assert len({v.data_ptr() for v in weights.values()}) < len(weights)
    path = tmp_path / "model.safetensors"
    config = Config(architecture=cfg)
    metadata = {"config": config.to_toml(), "classes": list("0123456789")}
    assert metadata.keys() <= keys_of(ExportHeader).keys()
    files.write_safetensors(path, weights, metadata)
    again = load_trained(str(path), torch.device("cpu"))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.model(images), model.eval()(images))
