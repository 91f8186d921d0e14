"""The activations that `--activation` offers, and functions that put them into a network."""

import math

from timm.layers import get_act_layer
from torch import nn

from fastgn.errors import check, check_name, parse_number

PIECEWISE_LINEAR = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Hardtanh,
    nn.Threshold,
)
"""Activations whose second derivative is 0 almost everywhere. Through them, a penalty on an input
gradient, such as that of --method gradnorm, gets almost no training signal."""
ACTIVATIONS = (
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "silu",
    "mish",
    "relu",
    "leaky_relu",
    "elu",
    "celu",
    "selu",
    "tanh",
    "softplus",
)
"""Names that --activation takes."""
ACTIVATION_ARGUMENT = {"leaky_relu": "negative_slope", "elu": "alpha", "softplus": "beta"}
"""Name of an activation -> argument of its constructor that the number in a text such as
softplus:10 sets."""


def get_activation_layer(name: str) -> type[nn.Module]:
    """Returns the class of an activation. Raises UserError, which suggests names, if it is unknown.

    name: one of ACTIVATIONS, without the number that may follow it on the command line.
    """
    check_name(name, ACTIVATIONS, f"--activation {name!r} is unknown")
    layer = nn.Softplus if name == "softplus" else get_act_layer(name)
    assert layer is not None
    return layer


def parse_activation(text: str) -> tuple[type[nn.Module], dict[str, float]]:
    """Returns the class of an activation NAME or NAME:NUMBER, and its constructor's arguments.

    Raises UserError if the name is unknown, if the number is out of range, or if the activation
    takes no number.
    """
    name, colon, number = text.partition(":")
    layer = get_activation_layer(name)
    if not colon:
        return layer, {}
    kinds = ", ".join(f"{k} ({v})" for k, v in ACTIVATION_ARGUMENT.items())
    check(
        name in ACTIVATION_ARGUMENT,
        f"--activation {text}: leave out the number, only these take one: {kinds}",
    )
    value = parse_number(number)
    above_or_at_least = "at least" if name == "leaky_relu" else "above"
    right = value >= 0 if name == "leaky_relu" else value > 0
    check(
        right and math.isfinite(value),
        f"--activation {text}: the number must be {above_or_at_least} 0, not {number}",
    )
    return layer, {ACTIVATION_ARGUMENT[name]: value}


def list_replaced_classes() -> tuple[type[nn.Module], ...]:
    """Returns the classes of the activation modules that `swap_activations` replaces.

    These are PyTorch's classes and timm's classes of the same activations.
    """
    return tuple(
        {get_activation_layer(n) for n in ACTIVATIONS}
        | {*PIECEWISE_LINEAR, nn.GELU, nn.SiLU, nn.Hardswish}
    )


def swap_activations(model: nn.Module, name: str) -> int:
    """Replaces every activation module of a network in place. Returns the number of replaced
    modules.

    name: NAME of an activation, or NAME:NUMBER with its parameter, such as softplus:10 for beta 10.
    Raises UserError if the network has no activation module.
    """
    layer, arguments = parse_activation(name)
    known = list_replaced_classes()
    count = 0
    for parent in model.modules():
        for child_name, child in parent.named_children():
            if isinstance(child, known):
                setattr(parent, child_name, layer(**arguments))
                count += 1
    check(count > 0, f"--activation {name}: the network has no activation: leave --activation out")
    return count
