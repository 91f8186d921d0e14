"""python -m fastgn.evaluate: the table, the JSON, the picture, and AutoAttack as its authors have
it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_run
from PIL import Image
from pyautoattack import AutoAttack

from fastgn import attacks, evaluate
from fastgn.analysis.figures import GREEN, RED
from fastgn.train import main as train_main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits model that has learned something."""
    folder = tmp_path_factory.mktemp("evaluate") / "tiny"
    more = ("--epochs", "6", "--method", "natural", "--no-model-ema", "--smoothing", "0")
    assert train_main(tiny_run(folder, *more, "--eval-interval", "6")) == 0
    return folder


def test_table_json_and_order(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "evaluation.json"
    args = ["--checkpoint", str(run), str(run), "--eps", "1/255", "0.05", "--num-images", "64"]
    attack_names = ["--attacks", "clean", "fgsm", "pgd-5"]
    assert evaluate.main([*args, *attack_names, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    record = json.loads(output.read_text())
    results = record["models"][0]["results"]
    assert (
        record["models"][0]["results"][0]["accuracy"]
        == record["models"][1]["results"][0]["accuracy"]
    )
    assert [(r["attack"], round(r["eps"], 4)) for r in results] == [
        ("clean", 0.0),
        ("fgsm", 0.0039),
        ("fgsm", 0.05),
        ("pgd-5", 0.0039),
        ("pgd-5", 0.05),
    ]
    accuracy = [r["accuracy"] for r in results]
    assert accuracy[0] > 0.4 and accuracy[0] >= accuracy[3] >= accuracy[4]
    assert record["models"][0]["subset"] == "first 64 of 360"
    assert record["norm"] == "Linf" and "versions" in record
    for word in ("1/255", "0.05", "fgsm", f"{accuracy[4]:.1%}", "eps in 0..1 pixel units"):
        assert word in out


def test_autoattack_is_its_authors_image_for_image(run: Path) -> None:
    """The standard version, at a radius where few images stay, so that it ends in seconds."""
    cfg = evaluate.EvaluateConfig(checkpoint=(str(run),), num_images=16)
    trained = evaluate.load_trained(str(run), torch.device("cpu"))
    world = evaluate.World(0, 1, torch.device("cpu"))
    images, labels = next(iter(evaluate.subset_of(trained, cfg, world)))
    options = {"eps": 0.3, "batch_size": 16, "seed": 0, "device": world.device}
    ours = attacks.autoattack(trained.model, images, labels, **options)
    theirs, _ = AutoAttack(trained.model, eps=0.3, seed=0).run_standard_evaluation(images, labels)
    assert torch.equal(ours, theirs)
    assert (ours - images).abs().max() <= 0.3 + 1e-6
    right = (trained.model(images).argmax(1) == labels).sum()
    assert (trained.model(ours).argmax(1) == labels).sum() < right


def test_picture_shows_both_frames(run: Path, tmp_path: Path) -> None:
    """Green where the model withstands, red where not: both colours, as many columns as models ask
    for."""
    path = tmp_path / "picture.png"
    args = ["--checkpoint", str(run), str(run), "--attacks", "clean", "--num-images", "32"]
    assert evaluate.main([*args, "--eps", "0.004", "--picture", str(path), "--picture-images", "12",
                          "--output", str(tmp_path / "e.json")]) == 0  # fmt: skip
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[1] > 700
    for colour in (GREEN, RED):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels - rgb).sum(2) == 0).sum() > 100, colour


def test_a_last_checkpoint_stands_in_for_the_export(run: Path) -> None:
    device = torch.device("cpu")
    from_export = evaluate.load_trained(str(run), device).model.state_dict()
    last = sorted((run / "checkpoints").glob("update_*.pt"))[-1]
    from_checkpoint = evaluate.load_trained(str(last), device).model.state_dict()
    assert all(torch.equal(a, from_checkpoint[k]) for k, a in from_export.items())


def test_radius_names() -> None:
    assert evaluate.shown(4 / 255) == "4/255"
    assert evaluate.shown(0.025) == "0.025"
    assert evaluate.shown(0.5 / 255) == "0.00196078"
