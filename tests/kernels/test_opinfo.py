"""Tests the ops on the sample inputs that PyTorch has for its own functions, in three orders.

PyTorch keeps these samples in torch.testing._internal, which needs the package expecttest.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastgn_kernels import activation, cross_entropy, gelu, layer_norm
from support import independent
from support.checks import DEVICE, leaves, relative, wave
from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:fastgn_kernels.* has kernels for two:UserWarning"),
]


IGNORED = ("inplace", "threshold")
"""Options that do not change an exact result. Above its threshold, F.softplus(x) is x."""


def of_kind(kind: str, parameter: str | None = None) -> Callable:
    """Returns a function that makes an op of the arguments of PyTorch's activation.

    parameter: name that PyTorch has for the parameter of the activation, or None.
    """

    def make(*args: Any, **options: Any) -> Callable | None:
        options = {k: v for k, v in options.items() if k not in IGNORED}
        value = args[0] if args else options.pop(parameter, None)
        if options or len(args) > 1:
            return None
        return lambda x: activation(x, kind, parameter=value)

    return make


def make_layer_norm(
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Callable | None:
    """Returns the op for the arguments of F.layer_norm, or None if it normalises two dimensions."""
    if len(shape) != 1:
        return None
    return lambda x, *affine: layer_norm(x, *(affine or (None, None)), eps=eps)


def make_cross_entropy(targets: Tensor, reduction: str = "mean", **options: Any) -> Callable | None:
    """Returns the op for the arguments of F.cross_entropy, or None if it has more options."""
    if options or targets.ndim != (2 if targets.is_floating_point() else 1):
        return None
    return lambda z: cross_entropy(z, targets.detach(), reduction)


OPS: dict[str, tuple[Callable, Callable[..., Callable | None]]] = {
    "nn.functional.gelu": (F.gelu, lambda approximate="none": lambda x: gelu(x, None, approximate)),
    "nn.functional.silu": (F.silu, of_kind("silu")),
    "nn.functional.mish": (F.mish, of_kind("mish")),
    "nn.functional.softplus": (F.softplus, of_kind("softplus", "beta")),
    "nn.functional.elu": (F.elu, of_kind("elu", "alpha")),
    "nn.functional.leaky_relu": (F.leaky_relu, of_kind("leaky_relu", "negative_slope")),
    "nn.functional.relu": (F.relu, of_kind("relu")),
    "tanh": (torch.tanh, of_kind("tanh")),
    "sigmoid": (torch.sigmoid, of_kind("sigmoid")),
    "nn.functional.layer_norm": (F.layer_norm, make_layer_norm),
    "nn.functional.cross_entropy": (F.cross_entropy, make_cross_entropy),
}
"""Name in PyTorch's list -> PyTorch's function, and a function that makes the op.

It takes the arguments of PyTorch's function except the first one. The op takes the tensors that are
differentiated. It is None if the op does not have the options."""


def orders(function: Callable, xs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the output, and the gradients of three orders, each of a loss made of the last."""
    xs = leaves(xs)
    y = function(*xs)
    results, loss = [y], ((wave(y) + y / 2) * y).sum()
    for _ in range(3):
        gs = torch.autograd.grad(loss, xs, create_graph=True, materialize_grads=True)
        results += gs
        loss = sum((torch.tanh(wave(g) + g) * g).sum() for g in gs)
    return results


def samples(name: str) -> list[Any]:
    """Returns PyTorch's sample inputs for one of its functions, in float64."""
    pytest.importorskip("expecttest", reason="PyTorch's sample inputs need expecttest: install it")
    from torch.testing._internal.common_methods_invocations import op_db

    # the import forbids all later tests of this process to set flags such as allow_tf32
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    assert not torch.backends.flags_frozen()
    return [
        sample
        for info in op_db
        if info.name == name
        for sample in info.sample_inputs(DEVICE, torch.float64, requires_grad=True)
    ]


@pytest.mark.parametrize("name", OPS)
def test_pytorchs_samples(name: str) -> None:
    pytorchs, make = OPS[name]
    compared = 0
    for sample in samples(name):
        op = make(*sample.args, **sample.kwargs)
        z = sample.input
        if op is None or (name.endswith("cross_entropy") and z.ndim != 2):
            continue
        weights = []
        if name.endswith("layer_norm"):  # whose third derivative is wrong in PyTorch
            weights = [w for w in sample.args[1:3] if isinstance(w, Tensor)]
            if len(weights) == 1:
                continue
            eps = sample.kwargs.get("eps", 1e-5)
            exact = orders(
                lambda x, *affine: independent.layer_norm(x, *(affine or (None, None)), eps=eps),  # noqa: B023
                [z, *weights],
            )
            first = F.layer_norm(z, *sample.args, **sample.kwargs)
            assert relative(first, exact[0]) < 1e-10
        else:
            args = sample.args
            options = {k: v for k, v in sample.kwargs.items() if k not in IGNORED}
            exact = orders(lambda x: pytorchs(x, *args, **options), [z])  # noqa: B023
        for ours, theirs in zip(orders(op, [z, *weights]), exact, strict=True):
            assert ours.shape == theirs.shape
            assert relative(ours, theirs) < 1e-8, (sample, relative(ours, theirs))
        compared += 1
    assert compared
