"""The sanity report: each kind of masking is caught, by the check that is for it, and an honest
model passes."""

import dataclasses
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastgn.analysis.attack_checks import judge_gap
from fastgn.analysis.model_checks import Check
from fastgn.analysis.sanity import format_checks, make_sanity_report
from fastgn.errors import UserError

EPS = 0.1


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """1797 x 1 x 8 x 8 in 0..1, and labels, shuffled: their writers come one after the other."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images / 16).float()[:, None]
    return images[order], torch.tensor(data.target)[order]


@pytest.fixture(scope="module")
def honest(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """A small smooth network that hides nothing. No label smoothing: with 0.1 PGD on the
    cross-entropy left 39.8 % where PGD on the margin left 32.8 %, and the report said so."""
    images, labels = digits[0][128:], digits[1][128:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for _ in range(150):
            noisy = (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
            optimizer.zero_grad()
            F.cross_entropy(model(noisy), labels).backward()
            optimizer.step()
    return model.eval()


class Wrapped(nn.Module):
    """model(before(x)) through after."""

    def __init__(self, model: nn.Module, before=lambda x: x, after=lambda logits: logits) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.model(self.before(images)))


def report(
    model: nn.Module, digits: tuple[Tensor, Tensor], n: int = 48, **more
) -> dict[str, Check]:
    """Without the slow Square unless it is asked for."""
    options = {"eps": EPS, "seed": 0, "batch_size": 64, "square_images": 0, "apgd_images": 8}
    checks = make_sanity_report(model.eval(), digits[0][:n], digits[1][:n], **(options | more))
    assert len({c.name for c in checks}) == len(checks)
    return {c.name: c for c in checks}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, c in checks.items() if c.verdict == "fail"}


@pytest.fixture(scope="module")
def honest_checks(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> dict[str, Check]:
    return report(honest, digits, n=128, square_images=8)


def test_an_honest_model_has_no_fail(honest_checks: dict[str, Check]) -> None:
    assert not failed(honest_checks), format_checks(list(honest_checks.values()), "honest")
    assert len(honest_checks) == 18
    assert honest_checks["clean accuracy"].numbers["accuracy_clean"] > 0.9
    fall = honest_checks["accuracy falls to 0"].numbers
    assert fall["eps"][:2] == [EPS, 2 * EPS] and fall["accuracy_pgd20"][-1] < 0.02
    steps = honest_checks["more iterations"].numbers
    noise = honest_checks["PGD beats noise"].numbers
    assert 0.1 < steps["accuracy_pgd100"] < noise["accuracy_noise"] - 0.1
    square = honest_checks["white box beats black box"].numbers
    assert square["square_images"] == 8 and square["accuracy_pgd"] <= square["accuracy_square"]


def test_the_page_has_a_line_a_check(honest_checks: dict[str, Check]) -> None:
    checks = list(honest_checks.values())
    lines = format_checks(checks, "a title").splitlines()
    assert lines[0] == "a title" and lines[1].startswith("0 fail, ")
    assert len(lines) == 3 + len(checks)
    for line, c in zip(lines[3:], checks, strict=True):
        assert line.startswith(f"{c.verdict.upper()}  {c.name}") and line.endswith(c.detail)
    json.dumps([dataclasses.asdict(c) for c in checks], allow_nan=False)  # as the evaluation does


def test_saturated_logits_fail(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """The softmax of logits of 1e4 is 0 or 1 in fp32: the cross-entropy has no gradient where the
    image is right, and the margin has."""
    checks = report(Wrapped(honest, after=lambda logits: 1e4 * logits), digits)
    assert failed(checks) >= {
        "gradients reach the images",
        "accuracy falls to 0",
        "cross-entropy attacks no worse than margin",
        "cross-entropy PGD no worse than APGD",
    }
    assert checks["gradients reach the images"].numbers["vanished_share"] > 0.5
    assert checks["AutoAttack: zero gradients"].verdict == "pass"  # DLR does not know the scale


@pytest.mark.slow
def test_quantised_inputs_fail(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """No white-box attack moves, and a black-box one does."""
    model = Wrapped(honest, before=lambda x: torch.round(8 * x) / 8)
    checks = report(model, digits, n=9, square_images=8)
    assert failed(checks) >= {
        "gradients reach the images",
        "AutoAttack: zero gradients",
        "white box beats black box",
    }
    assert checks["gradients reach the images"].numbers["vanished_share"] == 1
    assert checks["AutoAttack: zero gradients"].numbers["zero_gradients"] == 8
    assert checks["PGD beats noise"].verdict != "pass"


def test_random_outputs_fail(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    model = Wrapped(honest, after=lambda logits: logits + 0.1 * torch.randn_like(logits))
    checks = report(model, digits, n=16)
    assert failed(checks) >= {"deterministic", "AutoAttack: randomised"}
    assert "AutoAttack: probabilities" not in failed(checks)


def test_probabilities_fail(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    checks = report(Wrapped(honest, after=lambda logits: logits.softmax(1)), digits, n=16)
    assert failed(checks) >= {"outputs are logits", "AutoAttack: probabilities"}
    assert "deterministic" not in failed(checks)


def test_precision_that_decides_is_told(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """Near 1000 bf16 knows multiples of 4 alone: the logits tie."""
    checks = report(Wrapped(honest, after=lambda logits: logits + 1000), digits, apgd_images=0)
    assert checks["fp32 and bf16 agree"].verdict == "warn"
    assert checks["fp32 and bf16 agree"].numbers["disagreement_share"] > 0.02


def test_cut_gradients_fail(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """Before the weights autograd has nothing to follow, after them nothing at all."""
    for wrapped in (
        Wrapped(honest, before=torch.detach),
        Wrapped(honest, after=torch.detach),
    ):
        assert failed(report(wrapped, digits, n=8)) == {"gradients reach the images"}


def test_training_mode_fails_and_is_put_back(digits: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10), nn.Dropout(0.5))
    model.train()[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checks = make_sanity_report(
        model, digits[0][:8], digits[1][:8], eps=EPS, seed=0, batch_size=8, square_images=0,
        apgd_images=0,
    )  # fmt: skip
    verdicts = {c.name: c.verdict for c in checks}
    assert verdicts["evaluation mode"] == "fail" and verdicts["deterministic"] == "pass"
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_is_right_on_nothing_fails(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    checks = report(honest, (images, (labels + 5) % 10), n=8)
    assert "clean accuracy" in failed(checks) and "PGD beats noise" not in checks


def test_batches_and_the_generators_are_no_part_of_it(
    honest: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    """Square and APGD draw by the batch; at 4 images in one batch they have the same one."""
    state = torch.get_rng_state()
    one = report(honest, digits, n=32, apgd_images=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    seven = report(honest, digits, n=32, apgd_images=4, batch_size=7)
    own = {"deterministic", "outputs are logits"}  # of the first batch
    assert {n: c.numbers for n, c in one.items() if n not in own} == {
        n: c.numbers for n, c in seven.items() if n not in own
    }
    other = report(honest, digits, n=32, apgd_images=0, eps=2 * EPS)
    assert other["more iterations"].numbers != one["more iterations"].numbers


def test_one_image_is_within_the_tolerance() -> None:
    assert [judge_gap(images, 20) for images in (-3, 0, 1, 2, 3)] == ["pass"] * 3 + ["warn", "fail"]
    assert [judge_gap(images, 1000) for images in (10, 11, 50, 51)] == [
        "pass",
        "warn",
        "warn",
        "fail",
    ]


def test_what_is_not_run_is_said(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    checks = report(honest, digits, n=8, apgd_images=0)
    for name in ("white box beats black box", "cross-entropy PGD no worse than APGD"):
        assert checks[name].verdict == "warn" and "not run" in checks[name].detail


def test_warnings_are_caught_from_a_silenced_logger(
    honest: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    logger = logging.getLogger("auto-attack")
    logger.setLevel(logging.CRITICAL)
    handlers = list(logger.handlers)  # pytest's own, where another test stopped its propagation
    try:
        model = Wrapped(honest, after=lambda logits: logits.softmax(1))
        checks = report(model, digits, n=4, apgd_images=2)
        assert logger.level == logging.CRITICAL and logger.handlers == handlers
    finally:
        logger.setLevel(logging.NOTSET)
    assert checks["AutoAttack: probabilities"].verdict == "fail"


def test_l2_stays_in_its_ball_and_falls(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    checks = report(honest, digits, n=32, norm="L2", eps=0.5, apgd_images=4)
    assert not failed(checks), format_checks(list(checks.values()), "L2")
    fall = checks["accuracy falls to 0"].numbers
    assert 0.02 < fall["accuracy_pgd20"][0] < 1 and fall["accuracy_pgd20"][-1] == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"eps": 0.0}, "eps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"images_BCHW": torch.full((8, 1, 8, 8), 2.0)}, "outside 0..1"),
        ({"images_BCHW": torch.zeros(7, 1, 8, 8)}, "7 images but 8 labels"),
        ({"images_BCHW": torch.zeros(0, 1, 8, 8)}, "no images"),
    ],
)
def test_mistakes_are_one_line(honest: nn.Module, change: dict, word: str) -> None:
    inputs = {"images_BCHW": torch.zeros(8, 1, 8, 8), "labels_B": torch.zeros(8).long()}
    with pytest.raises(UserError, match=word) as error:
        make_sanity_report(honest, **(inputs | {"eps": EPS, "seed": 0, "batch_size": 8} | change))
    assert "\n" not in str(error.value)
