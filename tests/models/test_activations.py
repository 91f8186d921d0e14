"""Activations are replaced, and unknown ones are refused."""

import pytest
import torch
from support.models import refused, tiny
from torch import nn

from fastgn.config.groups import ArchitectureConfig
from fastgn.models import activations
from fastgn.models.network import build_model
from fastgn.objectives import ObjectiveConfig, piecewise_linear_warning


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
    assert "gelu:2: leave out the number, only these take one: " in refused(
        model="resnet18", activation="gelu:2"
    )
    assert "must be above 0" in refused(model="resnet18", activation="softplus:0")
    assert "is not a number" in refused(model="resnet18", activation="elu:x")


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
