"""Passes and operations of an update, counted in advance and while it runs."""

import dataclasses
from typing import Any

import pytest
import torch
from support.networks import classifier, objective, vit
from support.steps import batches_for, flops, model_and_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastgn.config.groups import ArchitectureConfig
from fastgn.models.network import Classifier, build_model
from fastgn.step.options import Quirks, StepOptions
from fastgn.step.passes import count_passes
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step


def test_flops_of_a_step_in_units_of_a_forward() -> None:
    """natural 3, gradnorm 6, fair PGD-3 9, the paper's PGD-3 13 units. The bound is wide because
    this network is so small that the patch embedding, whose input gradient natural training does
    not need, and the products of the attention weigh more than in Swin-B."""
    model = classifier(vit)
    batch = batches_for(vit, 1)[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch[0])
    unit = counter.get_total_flops()
    assert flops(model, batch, method="natural") / unit == pytest.approx(3, rel=0.12)
    assert flops(model, batch, method="gradnorm") / unit == pytest.approx(6, rel=0.12)
    assert flops(model, batch, method="pgd_at") / unit == pytest.approx(9, rel=0.12)
    for method in ("fgsm_rs", "n_fgsm"):
        assert flops(model, batch, method=method) / unit == pytest.approx(5, rel=0.12)
    for method in ("edge", "pag"):
        assert flops(model, batch, method=method) / unit == pytest.approx(6, rel=0.12)
    assert flops(model, batch, method="trades") / unit == pytest.approx(13, rel=0.12)
    turns = [flops(model, batch, method="gradnorm+fgsm", update=u) / unit for u in (0, 1)]
    assert turns == pytest.approx([6, 5], rel=0.12)
    paper = {"method": "pgd_at", "attack_select": "paper", "attack_weight_grads": True}
    assert flops(model, batch, **paper) / unit == pytest.approx(13, rel=0.12)


class Sweeps:
    """Counts a network's forwards and the backward sweeps over it."""

    def __init__(self, model: Classifier, monkeypatch: pytest.MonkeyPatch):
        self.forwards = self.sweeps = 0
        model.backbone.register_forward_pre_hook(lambda *args: self.count("forwards"))
        for name in ("grad", "backward"):
            original = getattr(torch.autograd, name)

            def counted(*args, original=original, **kwargs):
                self.count("sweeps")
                return original(*args, **kwargs)

            monkeypatch.setattr(torch.autograd, name, counted)

    def count(self, name: str) -> None:
        setattr(self, name, getattr(self, name) + 1)


METHODS = {
    "natural": ({"method": "natural"}, Schedule(), 1, 1),
    "exact": ({}, Schedule(), 1, 2),
    "finite-difference": ({}, Schedule("finite-difference"), 2, 2),
    "central-difference": ({}, Schedule("central-difference"), 3, 3),
    "pgd-3": ({"method": "pgd_at"}, Schedule(), 4, 4),
    "pgd-3 as in the paper": (
        {"method": "pgd_at", "attack_select": "paper", "attack_weight_grads": True},
        *(Schedule(), 5, 4),
    ),
    "fgsm-rs": ({"method": "fgsm_rs"}, Schedule(), 2, 2),
    "n-fgsm": ({"method": "n_fgsm"}, Schedule(), 2, 2),
    "edge": ({"method": "edge"}, Schedule(), 1, 2),
    "pag": ({"method": "pag"}, Schedule(), 1, 2),
    "l2": ({"gn_norm": "l2", "gn_start": 0.01}, Schedule(), 1, 2),
    "trades": ({"method": "trades"}, Schedule(), 6, 4),
    "gradnorm at attacked images": ({"gn_attacked": True}, Schedule(), 4, 5),
    "gradnorm+fgsm, its penalty": ({"method": "gradnorm+fgsm"}, Schedule(), 1, 2),
}
"""Values of the objective, schedule, forwards and calls of autograd: a double backward is one call
and, as the paper counts, two passes."""


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_forwarded_or_swept_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values, schedule, forwards, sweeps = METHODS[name]
    model, batch = model_and_batch()
    wasteful = values.get("attack_weight_grads", False)
    step = Step(
        model,
        objective(**values),
        StepOptions(schedule=schedule, compile=False, quirks=Quirks(attack_weight_grads=wasteful)),
    )
    counts = Sweeps(model, monkeypatch)
    step([batch], torch.tensor(1.0, dtype=torch.float64))
    assert (counts.forwards, counts.sweeps) == (forwards, sweeps)
    double = 2 if step.objective.needs_input_gradient and not schedule.differences else 0
    double += step.objective.forwards - 1  # one call sweeps back through all of a loss's forwards
    alone = dataclasses.replace(step.objective, rest=None)
    assert count_passes(alone, schedule, wasteful).paper == forwards + sweeps + double


PAPER_PASSES = {
    "natural": (2, 3),
    "exact": (5, 6),
    "finite-difference": (4, 6),
    "central-difference": (6, 9),
    "pgd-3": (8, 9),
    "pgd-3 as in the paper": (9, 13),
    "fgsm-rs": (4, 5),
    "n-fgsm": (4, 5),
    "edge": (5, 6),
    "pag": (5, 6),
    "l2": (5, 6),
    "trades": (11, 13),
    "gradnorm at attacked images": (11, 12),
    "gradnorm+fgsm, its penalty": (4.5, 5.5),
}
"""(passes in the paper's convention, forwards' worth of operations): METHOD of arXiv 2409.20139,
table 3, for natural, exact and pgd-3."""


@pytest.mark.parametrize("name", METHODS)
def test_passes_are_known_beforehand(name: str) -> None:
    values, schedule, *_ = METHODS[name]
    wasteful = values.get("attack_weight_grads", False)
    assert count_passes(objective(**values), schedule, wasteful) == PAPER_PASSES[name]


def test_passes_of_lazy_and_partial_penalties() -> None:
    assert count_passes(objective(), Schedule("lazy", lazy_interval=4)) == (2.75, 3.75)
    assert count_passes(objective(), Schedule("subset", subset_fraction=0.5)) == (3.5, 4.5)


def test_flops_of_lazy_and_partial_penalties() -> None:
    model = classifier(vit)
    batch = batches_for(vit, 1)[0]
    natural_flops, exact_flops = (flops(model, batch, method=m) for m in ("natural", "gradnorm"))
    lazy = [flops(model, batch, schedule=Schedule("lazy"), update=u) for u in range(4)]
    assert lazy == [exact_flops, natural_flops, natural_flops, natural_flops]
    half = flops(model, batch, schedule=Schedule("subset"))
    assert half == pytest.approx((natural_flops + exact_flops) / 2, rel=1e-3)


@pytest.mark.slow
def test_flops_of_swin_b_at_224_px() -> None:
    """natural : exact : PGD-3 : the paper's PGD-3 : finite difference = 3 : 6 : 9 : 13 : 6
    forwards, counted while each runs."""
    cfg = ArchitectureConfig(model="swin_b")
    model, _ = build_model(cfg, 1000)
    batch = (torch.rand(1, 3, 224, 224), torch.randint(0, 1000, (1,)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch[0])
    unit = counter.get_total_flops()
    assert unit / 1e9 == pytest.approx(30.9, rel=0.005)
    for name in ("natural", "exact", "pgd-3", "pgd-3 as in the paper", "finite-difference"):
        values, schedule, *_ = METHODS[name]
        counted = flops(model, batch, schedule=schedule, **values) / unit
        model.zero_grad()
        assert counted == pytest.approx(PAPER_PASSES[name][1], rel=0.02), name


class ConvolutionGradients(TorchDispatchMode):
    """Which gradients the backwards of convolutions were asked for: of input, weight, bias."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("natural", ["weights"]),
        ("exact", ["image", "weights"]),
        ("finite-difference", ["both", "weights"]),
        ("pgd-3", ["image", "image", "image", "weights"]),
    ],
)
def test_no_gradient_is_computed_that_nobody_asks_for(name: str, masks: list[str]) -> None:
    """Seen at the patch embedding, the network's first operator: attacks and input gradients take
    no weights', and the last backward takes no images'."""
    kinds = {"image": [True, False, False], "weights": [False, True, True], "both": [True] * 3}
    values, schedule, *_ = METHODS[name]
    model, (images, targets) = model_and_batch()
    step = Step(model, objective(**values), StepOptions(schedule=schedule, compile=False))
    with ConvolutionGradients() as seen:
        step([(images, targets)], torch.tensor(1.0, dtype=torch.float64))
    assert seen.masks == [kinds[mask] for mask in masks]
    assert images.grad is None
