"""The formulas of every activation function, and of its first and second derivatives.

Each formula is a Triton function. It takes the input u and p, the activation's parameter, such as
the slope of leaky_relu. For example, gelu returns the value, gelu_1 the first derivative with
respect to u, and gelu_2 the second derivative.

`in_pytorch` runs the same source code on torch tensors. To add an activation, write its three
functions here and add a row to `TABLE`.
"""

import builtins
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastgn_kernels.dispatch import INTERPRETED

# Write u * SQRT_HALF, because Triton's interpreter would make a tl.constexpr of SQRT_HALF * u.
SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def erf(x):
    return tl.erf(x)


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def constant(u, c):
    """Returns a tensor with the shape and dtype of u, in which every element is the number c.

    Formulas call this function because `where` with two plain numbers returns float32, even if u is
    float64.
    """
    return tl.full(u.shape, c, u.dtype)


def _by_numpy(function: Callable) -> Callable:
    """Returns a function that applies a NumPy function, such as numpy.log1p, in Triton's
    interpreter.

    On a GPU, kernels call functions of the library libdevice instead, which the interpreter lacks.
    """

    def run(x: Any) -> Any:
        handle = interpreter.TensorHandle(function(x.handle.data), x.handle.dtype)
        return tl.tensor(handle, x.type)

    return run


if INTERPRETED:
    import numpy
    from triton.runtime import interpreter

    log1p, expm1, tanh = map(_by_numpy, (numpy.log1p, numpy.expm1, numpy.tanh))
else:
    log1p, expm1, tanh = libdevice.log1p, libdevice.expm1, libdevice.tanh


@triton.jit
def logistic(u):
    return 1.0 / (1.0 + exp(-u))


@triton.jit
def log_one_plus_exp(u):
    return where(u > 0, u, 0.0) + log1p(exp(where(u > 0, -u, u)))


@triton.jit
def gelu(u, p):
    return 0.5 * u * (1.0 + erf(u * SQRT_HALF))


@triton.jit
def gelu_1(u, p):
    return 0.5 * (1.0 + erf(u * SQRT_HALF)) + u * exp(-0.5 * u * u) * INV_SQRT_2_PI


@triton.jit
def gelu_2(u, p):
    return exp(-0.5 * u * u) * INV_SQRT_2_PI * (2.0 - u * u)


@triton.jit
def gelu_tanh(u, p):
    """Returns the tanh approximation of GELU, computed with the logistic function instead of tanh.

    The usual formula is 0.5 u (1 + tanh(z / 2)), with z as in the code of the first derivative.
    The factor 0.5 (1 + tanh(z / 2)) equals logistic(z), which is also precise if tanh is near -1.

    The derivatives contain 1 - logistic(z). They compute it as logistic(-z), which is also precise
    if logistic(z) is close to 1. With the formula 1 - tanh(z / 2)^2 instead, the second
    derivative in float32 had 8 times the error of PyTorch's.
    """
    return u * logistic((u + u * u * u * TANH_CUBIC) * (SQRT_2_OVER_PI * 2.0))


@triton.jit
def gelu_tanh_1(u, p):
    z = (u + u * u * u * TANH_CUBIC) * (SQRT_2_OVER_PI * 2.0)
    z_1 = (1.0 + 3.0 * u * u * TANH_CUBIC) * (SQRT_2_OVER_PI * 2.0)
    s = logistic(z)
    return s + u * (s * logistic(-z) * z_1)


@triton.jit
def gelu_tanh_2(u, p):
    z = (u + u * u * u * TANH_CUBIC) * (SQRT_2_OVER_PI * 2.0)
    z_1 = (1.0 + 3.0 * u * u * TANH_CUBIC) * (SQRT_2_OVER_PI * 2.0)
    z_2 = u * (TANH_CUBIC * SQRT_2_OVER_PI * 12.0)
    s, t = logistic(z), logistic(-z)
    return s * t * (2.0 * z_1 + u * (z_2 + (t - s) * z_1 * z_1))


@triton.jit
def swish(u, p):
    return u * logistic(p * u)


@triton.jit
def swish_1(u, p):
    s = logistic(p * u)
    return s + p * (u * (s * (1.0 - s)))


@triton.jit
def swish_2(u, p):
    s = logistic(p * u)
    return p * s * (1.0 - s) * (2.0 + p * u * (1.0 - 2.0 * s))


@triton.jit
def mish(u, p):
    return u * tanh(log_one_plus_exp(u))


@triton.jit
def mish_1(u, p):
    w = tanh(log_one_plus_exp(u))
    return w + u * (logistic(u) * (1.0 - w * w))


@triton.jit
def mish_2(u, p):
    w, s = tanh(log_one_plus_exp(u)), logistic(u)
    w_1 = s * (1.0 - w * w)
    return w_1 * (2.0 + u * (1.0 - s - 2.0 * w * s))


@triton.jit
def softplus(u, p):
    return log_one_plus_exp(p * u) / p


@triton.jit
def softplus_1(u, p):
    return logistic(p * u)


@triton.jit
def softplus_2(u, p):
    s = logistic(p * u)
    return p * (s * (1.0 - s))


@triton.jit
def elu(u, p):
    return where(u <= 0, p * expm1(where(u <= 0, u, 0.0)), u)


@triton.jit
def elu_1(u, p):
    return where(u <= 0, p * exp(where(u <= 0, u, 0.0)), 1.0)


@triton.jit
def elu_2(u, p):
    return where(u < 0, p * exp(where(u < 0, u, 0.0)), 0.0)


@triton.jit
def tanh_0(u, p):
    return tanh(u)


@triton.jit
def tanh_1(u, p):
    t = tanh(u)
    return 1.0 - t * t


@triton.jit
def tanh_2(u, p):
    t = tanh(u)
    return -2.0 * t * (1.0 - t * t)


@triton.jit
def sigmoid(u, p):
    return logistic(u)


@triton.jit
def sigmoid_1(u, p):
    s = logistic(u)
    return s * (1.0 - s)


@triton.jit
def sigmoid_2(u, p):
    s = logistic(u)
    return s * (1.0 - s) * (1.0 - 2.0 * s)


@triton.jit
def squared_relu(u, p):
    r = where(u <= 0, 0.0, u)
    return r * r


@triton.jit
def squared_relu_1(u, p):
    return where(u <= 0, 0.0, 2.0 * u)


@triton.jit
def squared_relu_2(u, p):
    return where(u <= 0, 0.0, 2.0)


@triton.jit
def leaky_relu(u, p):
    return where(u > 0, u, p * u)


@triton.jit
def leaky_relu_1(u, p):
    return where(u > 0, 1.0, constant(u, p))


@triton.jit
def relu(u, p):
    return where(u <= 0, 0.0, u)


@triton.jit
def relu_1(u, p):
    return where(u <= 0, 0.0, 1.0)


@triton.jit
def zero(u, p):
    return where(u > 0, 0.0, 0.0)


@triton.jit
def product(g, derivative):
    return g * derivative


@triton.jit
def masked_product(g, derivative):
    """Returns the product of the gradient g and a derivative of an activation.

    The result is 0 wherever the derivative is 0, even if g is NaN or infinite. The backward of
    PyTorch's relu returns 0 in this case, too.
    """
    return where(derivative == 0.0, 0.0, g * derivative)


class Activation(NamedTuple):
    """The Triton functions of one activation, such as GELU, and the default value of its
    parameter."""

    value: Any
    """Triton function that takes the input u and the activation's parameter p. Returns the
    activation of u."""
    first: Any
    """Triton function that takes the input u and the activation's parameter p. Returns the first
    derivative of the activation at u."""
    second: Any
    """Triton function that takes the input u and the activation's parameter p. Returns the second
    derivative of the activation at u."""
    multiply: Any = product
    """Triton function that takes (g, derivative). It multiplies the gradient g by the first or
    second derivative of the activation."""
    parameter: float = 1.0
    """Default value of the activation's parameter, such as 0.01 for the slope of leaky_relu.
    Formulas without a parameter ignore it."""


TABLE = {
    "gelu": Activation(gelu, gelu_1, gelu_2),
    "gelu_tanh": Activation(gelu_tanh, gelu_tanh_1, gelu_tanh_2),
    "silu": Activation(swish, swish_1, swish_2),
    "quick_gelu": Activation(swish, swish_1, swish_2, parameter=1.702),
    "mish": Activation(mish, mish_1, mish_2),
    "softplus": Activation(softplus, softplus_1, softplus_2),
    "elu": Activation(elu, elu_1, elu_2),
    "tanh": Activation(tanh_0, tanh_1, tanh_2),
    "sigmoid": Activation(sigmoid, sigmoid_1, sigmoid_2),
    "squared_relu": Activation(squared_relu, squared_relu_1, squared_relu_2, masked_product),
    "relu": Activation(relu, relu_1, zero, masked_product),
    "leaky_relu": Activation(leaky_relu, leaky_relu_1, zero, masked_product, 0.01),
}
"""Name of each activation -> its functions and the default value of its parameter p.

The parameter is beta of softplus, alpha of elu, and the negative slope of leaky_relu. For silu and
quick_gelu, which compute u * logistic(p * u), it is the factor p. Other activations ignore p."""


_PYTORCH: dict[str, Any] = {
    "exp": torch.exp,
    "erf": torch.erf,
    "tanh": torch.tanh,
    "log1p": torch.log1p,
    "expm1": torch.expm1,
    "where": torch.where,
    "constant": torch.full_like,
}


@functools.cache
def in_pytorch(function: Any) -> Callable[..., torch.Tensor]:
    """Returns a function that computes one of the formulas in this file on torch tensors.

    function: a Triton function, such as `gelu_1`. The returned function runs its Python code, in
    which names such as `exp` now mean PyTorch's functions, such as torch.exp.
    """
    constants = {k: v.value for k, v in globals().items() if isinstance(v, tl.constexpr)}
    # the builtins contain __import__, which some operators of PyTorch call when they run
    names = constants | _PYTORCH | {"__builtins__": builtins}
    for helper in (logistic, log_one_plus_exp):
        names[helper.fn.__name__] = types.FunctionType(helper.fn.__code__, names)
    return types.FunctionType(function.fn.__code__, names)
