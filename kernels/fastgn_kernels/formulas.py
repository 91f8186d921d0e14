"""The formula of each custom op, from PyTorch's operators.

A formula takes the arguments of its custom op and returns the same results. It can be
differentiated any number of times, also in forward mode and by the transforms of torch.func, such
as vmap. `dispatch.run_op` calls it in place of the op in these modes, and
`dispatch.register_third_derivative` differentiates the formulas of second derivatives.

The formula of a forward op is the function of `reference`. The formula of a backward op is the
derivative of the forward formula, and so on. Every formula computes statistics, such as the mean of
a row, again from the inputs, so that their derivatives are not lost.

A result that a custom op would return without elements is None here. The names of tensors are
explained in the file of each op.
"""

import torch
from torch import Tensor

from fastgn_kernels import reference
from fastgn_kernels.dispatch import differentiate


def activation(x: Tensor, bias: Tensor | None, kind: str, parameter: float) -> Tensor:
    return reference.activation(x, kind, bias, parameter)


def activation_bwd(
    gy: Tensor, x: Tensor, bias: Tensor | None, kind: str, parameter: float, weight_grads: bool
) -> list[Tensor | None]:
    def of(x: Tensor, bias: Tensor | None) -> Tensor:
        return activation(x, bias, kind, parameter)

    return differentiate(of, (x, bias), (gy,), (True, weight_grads))


def activation_bwd_bwd(
    ggx: Tensor, ggbias: Tensor | None, gy: Tensor, x: Tensor, bias: Tensor | None, kind: str,
    parameter: float, weight_grads: bool,
) -> list[Tensor | None]:  # fmt: skip
    def of(gy: Tensor, x: Tensor, bias: Tensor | None) -> list[Tensor | None]:
        return activation_bwd(gy, x, bias, kind, parameter, ggbias is not None)

    return differentiate(of, (gy, x, bias), (ggx, ggbias), (True, True, weight_grads))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y = reference.layer_norm(x, weight, bias, eps, None, dtype)
    assert isinstance(y, Tensor)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor | tuple[Tensor, Tensor]:
    return reference.layer_norm(x, weight, bias, eps, residual, dtype)


def layer_norm_bwd(
    gy: Tensor, gsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grads: bool
) -> list[Tensor | None]:
    def of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x, weight, bias, eps, gy.dtype)

    bias = torch.zeros_like(weight)  # no derivative depends on the value of the bias
    wanted = (True, weight_grads, weight_grads)
    gx, gweight, gbias = differentiate(of, (x, weight, bias), (gy,), wanted)
    return [gx if gsum is None else gx + gsum, gweight, gbias]


def layer_norm_bwd_bwd(
    ggx: Tensor, ggweight: Tensor | None, ggbias: Tensor | None, gy: Tensor, x: Tensor,
    weight: Tensor, eps: float, weight_grads: bool,
) -> list[Tensor | None]:  # fmt: skip
    def of(gy: Tensor, x: Tensor, weight: Tensor) -> list[Tensor | None]:
        return layer_norm_bwd(gy, None, x, weight, eps, True)

    wanted = (True, True, weight_grads)
    return differentiate(of, (gy, x, weight), (ggx, ggweight, ggbias), wanted)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return reference.cross_entropy(logits, targets, "none")


def cross_entropy_bwd(gl: Tensor, logits: Tensor, targets: Tensor) -> Tensor | None:
    return differentiate(lambda z: cross_entropy(z, targets), (logits,), (gl,))[0]


def cross_entropy_bwd_bwd(
    ggz: Tensor, gl: Tensor, logits: Tensor, targets: Tensor
) -> list[Tensor | None]:
    return differentiate(lambda gl, z: cross_entropy_bwd(gl, z, targets), (gl, logits), (ggz,))


def gradient_norm(g: Tensor, ord: int) -> Tensor:
    return reference.gradient_norm(g, ord)


def gradient_norm_bwd(gn: Tensor, g: Tensor, norm: Tensor | None, ord: int) -> Tensor | None:
    return differentiate(lambda g: gradient_norm(g, ord), (g,), (gn,))[0]


def gradient_norm_bwd_bwd(
    ggg: Tensor, gn: Tensor, g: Tensor, norm: Tensor | None, ord: int
) -> list[Tensor | None]:
    return differentiate(lambda gn, g: gradient_norm_bwd(gn, g, None, ord), (gn, g), (ggg,))


def window_attention(
    qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, None]:
    q, k, v = qkv.unbind()
    return reference.window_attention(q, k, v, bias, mask, scale), None


def window_attention_bwd(
    go: Tensor, qkv: Tensor, stand_in: Tensor | None, extra: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> list[Tensor | None]:  # fmt: skip
    def of(qkv: Tensor, bias: Tensor | None) -> Tensor:
        return window_attention(qkv, bias, mask, scale)[0]

    gqkv, gbias = differentiate(of, (qkv, bias), (go,), (True, weight_grads))
    return [gqkv if extra is None else gqkv + extra, gbias]


def window_attention_bwd_bwd(
    ggqkv: Tensor, ggbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> list[Tensor | None]:  # fmt: skip
    def of(go: Tensor, qkv: Tensor, bias: Tensor | None) -> list[Tensor | None]:
        return window_attention_bwd(go, qkv, None, None, bias, mask, scale, ggbias is not None)

    return differentiate(of, (go, qkv, bias), (ggqkv, ggbias), (True, True, weight_grads))
