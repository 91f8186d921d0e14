"""A run's folder as timm reads one, and the crop that belongs to a network."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.runs import tiny_run
from timm.data import create_dataset, create_loader, resolve_data_config

from fastgn import evaluate, train
from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import UserError
from fastgn.hub import make_timm_config
from fastgn.models.network import build_model

SWIN = (
    *("--model", "swin_t", "--img-size", "16", "--model-kwargs", "patch_size=4", "embed_dim=8"),
    *("depths=(1, 1)", "num_heads=(1, 2)", "window_size=2"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a folder of images that a crop changes: their border is noise."""
    root = tmp_path_factory.mktemp("hub")
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 12)):
        for label, level in (("dark", 90), ("light", 150), ("mid", 120)):
            (root / "images" / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = draw.normal(level, 40, (37, 45, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(root / "images" / split / label / f"{index}.png")
    output = root / "run"
    options = ["--batch-size", "8", "--epochs", "8", "--warmup-epochs", "0", "--lr", "0.01"]
    options += ["--method", "natural", "--eval-images", "0", "--workers", "0", "--no-model-ema"]
    data = ["--data", "imagefolder", "--data-dir", str(root / "images"), "--output", str(output)]
    assert train.main([*SWIN, *options, *data]) == 0
    return output


def test_timm_loads_a_run_and_measures_the_same_accuracy(run: Path, tmp_path: Path) -> None:
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    config = resolve_data_config(model=model)
    assert config["input_size"] == (3, 16, 16) or list(config["input_size"]) == [3, 16, 16]
    assert config["crop_pct"] == 0.9 and config["interpolation"] == "bicubic"
    dataset = create_dataset("", root=str(run.parent / "images" / "val"))
    loader = create_loader(
        dataset, batch_size=6, is_training=False, use_prefetcher=False, num_workers=0, **config
    )
    right = []
    with torch.no_grad():
        for images, labels in loader:
            right += (model(images).argmax(1) == labels).tolist()
    result = tmp_path / "e.json"
    args = ["--checkpoint", str(run), "--attacks", "clean", "--output", str(result)]
    assert evaluate.main([*args, "--workers", "0"]) == 0
    (record,) = json.loads(result.read_text())["models"]
    assert record["results"][0]["accuracy"] == sum(right) / len(right)
    assert 0.34 < sum(right) / len(right) < 1, "an accuracy that says something"


def test_the_run_records_the_crop(run: Path) -> None:
    assert "crop_pct = 0.9\n" in (run / "config.toml").read_text()
    loaded = json.loads((run / "config.json").read_text())
    assert loaded["architecture"] == "swin_tiny_patch4_window7_224"
    assert loaded["label_names"] == ["dark", "light", "mid"] and loaded["num_classes"] == 3


@pytest.mark.parametrize(
    ("name", "activation", "expressed"),
    [
        ("resnet18", None, True),
        ("resnet18", "silu", True),
        ("vit_tiny_patch16_224", "silu", True),
        ("resnet18", "softplus:10", False),
        ("swin_t", "silu", False),
        ("preact_resnet18", None, False),
    ],
)
def test_what_timms_arguments_can_express(name: str, activation: str | None, expressed: bool):
    small = {
        "resnet18": ("channels=(4, 8, 8, 8)",),
        "preact_resnet18": ("width=4",),
        "vit_tiny_patch16_224": ("patch_size=4", "embed_dim=12", "depth=2", "num_heads=2"),
        "swin_t": SWIN[5:],
    }[name]
    side = 32 if "resnet" in name else 16
    cfg = ArchitectureConfig(name, small, activation=activation, img_size=side)
    model, _ = build_model(cfg, 3)
    weights = model.backbone.state_dict()
    if not expressed:
        with pytest.raises(UserError, match=r"timm's (arguments cannot|networks)") as caught:
            make_timm_config(cfg, weights, ("a", "b", "c"), 0.9)
        assert "\n" not in str(caught.value)
        return
    config = make_timm_config(cfg, weights, ("a", "b", "c"), 0.9)
    assert ("act_layer" in config["model_args"]) == (activation is not None)
    assert config["pretrained_cfg"]["crop_pct"] == 0.9


@pytest.mark.parametrize(
    ("kwargs", "line"),
    [
        (("in_chans=1",), "--model-kwargs in_chans=1: images have 3 channels: leave in_chans out"),
        (("depths=()",), "--model swin_t --model-kwargs depths=() cannot be built: "),
        (("depths=3",), "--model swin_t --model-kwargs depths=3 cannot be built: "),
        (("num_heads=(0, 0, 0, 0)",), "--model swin_t --model-kwargs num_heads="),
    ],
)
def test_arguments_that_make_no_classifier_are_one_line(kwargs: tuple, line: str) -> None:
    with pytest.raises(UserError) as caught:
        build_model(ArchitectureConfig("swin_t", kwargs), 5)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_one_image_at_a_time_through_batchnorm_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = ["--model", "resnet18", "--model-kwargs", "channels=(4, 8, 8, 8)", "--img-size", "32"]
    run += ["--data", "digits", "--batch-size", "1", "--output", str(tmp_path / "run")]
    assert train.main(run) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert line.startswith("fastgn.train: error: --batch-size 1: BatchNorm in --model resnet18 at")
    assert not (tmp_path / "run" / "config.toml").exists()


def test_no_error_of_timms_network_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("CUDA out of memory\nTried to allocate")

    monkeypatch.setattr("fastgn.hub.build_model", fail)
    assert train.main(tiny_run(tmp_path / "run", "--max-updates", "1", "--eval-images", "0")) == 0
    said = capsys.readouterr().err.splitlines()
    line = "warning: config.json for timm failed and is left out: RuntimeError: CUDA out of memory"
    assert line in said and said[-1].startswith("finished: 1 updates")
    assert (tmp_path / "run" / "summary.json").is_file()
