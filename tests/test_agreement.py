"""Outcomes against those of others: a published network's accuracy, AutoAttack as its authors call
it, torchattacks' PGD."""

from pathlib import Path
from typing import Any

import numpy as np
import pyautoattack
import pytest
import torch
from pyautoattack.examples.resnet import ResNet18
from support import SHARED
from support.runs import tiny_run
from torch import Tensor, nn

from fastgn import attacks
from fastgn.analysis.attacker import Attacker
from fastgn.analysis.selection import select_images
from fastgn.config.programs import EvaluateConfig
from fastgn.train import main as train_main
from fastgn.trained import load_trained

CPU = torch.device("cpu")
CIFAR = SHARED / "cifar10_lossless_5k_1k.npz"
WEIGHTS = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"
VERSIONS = {"autoattack": "standard", "autoattack-rand": "rand"}
SEED = 3


class Recorder(Attacker):
    """Keeps what it made of the images."""

    def attack(self, *args: Any) -> Tensor:
        self.__dict__["attacked"] = super().attack(*args)
        return self.__dict__["attacked"]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """The CIFAR-10 ResNet-18 that AutoAttack's authors ship; it takes pixels in 0..1."""
    model = ResNet18()
    model.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def cifar() -> tuple[Tensor, Tensor]:
    """The first 1,000 test images, lossless, in 0..1."""
    if not CIFAR.is_file():
        pytest.skip(f"{CIFAR} is not there")
    with np.load(CIFAR) as arrays:
        images_BHWC, labels_B = arrays["test_images"], arrays["test_labels"]
    images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 255
    return images_BCHW.contiguous(), torch.from_numpy(labels_B).long()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Tensor]:
    """A small model that has learned something, and images of which it gets some wrong."""
    folder = tmp_path_factory.mktemp("agreement") / "tiny"
    more = ("--epochs", "6", "--method", "natural", "--no-model-ema", "--smoothing", "0")
    assert train_main(tiny_run(folder, *more, "--eval-interval", "6")) == 0
    trained = load_trained(str(folder), CPU)
    cfg = EvaluateConfig(checkpoint=(str(folder),), num_images=48)
    return trained.model, *next(iter(select_images(trained, cfg, CPU)))


@pytest.fixture(scope="module")
def quick(digits: tuple[nn.Module, Tensor, Tensor]) -> nn.Module:
    """For the attacks that ask thousands of times: two layers, fitted to all digits but the first
    12."""
    torch.manual_seed(0)
    _, images, labels = digits
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 32), nn.GELU())
    model.append(nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[12:]), labels[12:]).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def test_the_published_clean_accuracy(resnet: nn.Module, cifar: tuple[Tensor, Tensor]) -> None:
    images, labels = cifar
    attacker, right = Attacker("Linf", SEED, 100, CPU), 0
    for first in range(0, 1000, 100):
        batch = slice(first, first + 100)
        ids = range(first, first + 100)
        right += sum(
            attacker.find_correct(resnet, images[batch], labels[batch], ids, "clean", 0, None)
        )
    assert right == 937


def check_against_its_authors(
    model: nn.Module, images: Tensor, labels: Tensor, name: str, norm: str, eps: float
) -> int:
    """The same verdict on every image, and the same adversarial images to the last bit, which
    another seed or another attack would not give; returns how many images stay right."""
    size = len(labels)
    what = {"version": VERSIONS[name]} if name in VERSIONS else {"attacks": [name]}
    theirs = pyautoattack.AutoAttack(
        model, norm=norm, eps=eps, seed=SEED, **{"version": "custom", **what}
    )
    direct, _ = theirs.run_standard_evaluation(images, labels, batch_size=size)
    attacker = Recorder(norm, SEED, size, CPU)
    clean = attacker.find_correct(model, images, labels, range(size), "clean", 0, None)
    got = attacker.find_correct(model, images, labels, range(size), name, eps, clean)
    with torch.no_grad():
        assert got == (model(direct).argmax(1) == labels).tolist()
    assert torch.equal(attacker.__dict__["attacked"], direct[clean])
    assert sum(got) < sum(clean), "an attack that fools none tells little"
    return sum(got)


def test_apgd_on_a_published_network(resnet: nn.Module, cifar: tuple[Tensor, Tensor]) -> None:
    images, labels = cifar
    check_against_its_authors(resnet, images[:2], labels[:2], "apgd-ce", "Linf", 2 / 255)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "norm", "eps"),
    [("apgd-ce", "L2", 0.3), ("apgd-t", "L2", 0.3)],
)
def test_autoattack_image_for_image(
    digits: tuple[nn.Module, Tensor, Tensor], name: str, norm: str, eps: float
) -> None:
    """Where some images are wrong anyway, some are fooled and some stay."""
    model, images, labels = digits
    assert check_against_its_authors(model, images[:12], labels[:12], name, norm, eps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "norm", "eps"),
    [("apgd-t", "Linf", 0.05), ("fab-t", "Linf", 0.05), ("fab-t", "L2", 1.0)]
    + [("square", "Linf", 0.05), ("autoattack", "L2", 1.0), ("autoattack-rand", "Linf", 0.05)],
)
def test_costly_autoattack_image_for_image(
    digits: tuple[nn.Module, Tensor, Tensor], quick: nn.Module, name: str, norm: str, eps: float
) -> None:
    _, images, labels = digits
    assert check_against_its_authors(quick, images[:12], labels[:12], name, norm, eps)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.015), ("L2", 0.3)])
def test_pgd_of_torchattacks(
    digits: tuple[nn.Module, Tensor, Tensor], norm: str, eps: float
) -> None:
    """From the images themselves: the two draw their random starts otherwise."""
    torchattacks = pytest.importorskip("torchattacks")
    (model, images, labels), steps = digits, 10
    start = torch.zeros_like(images)
    ours = attacks.restarted_pgd(
        model, images, labels, eps=eps, steps=steps, starts=[start], norm=norm
    )
    attack = torchattacks.PGD if norm == "Linf" else torchattacks.PGDL2
    options = {"alpha": 2.5 * eps / steps, "steps": steps, "random_start": False}
    theirs = attack(model, eps=eps, **options)(images, labels)
    with torch.no_grad():
        got, expected = (model(x).argmax(1) == labels for x in (ours, theirs))
        clean = model(images).argmax(1) == labels
    assert torch.equal(got, expected) and 0 < int(got.sum()) < int(clean.sum())
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
