"""Layer normalisation over the last dimension, with an optional residual sum, three orders.

The formulas are in `layer_norm_kernels`.
"""

import torch
from torch import Tensor

from fastgn_kernels import reference
from fastgn_kernels.dispatch import (
    define,
    differentiable,
    inlines,
    is_floating,
    no_forward_mode,
    no_third_derivative,
    runs_triton,
    wide,
)
from fastgn_kernels.layer_norm_kernels import (
    launch_backward,
    launch_backward_backward,
    launch_forward,
)

LARGEST = 4096
"""The widest row that a program holds; wider ones take the plain body. At 8192 columns the kernel
of the second derivative spilled 144 bytes of registers a thread; in float64, which is for checks,
it spills 80 at 1024 and more at 4096."""


def _fits(x: Tensor) -> bool:
    return runs_triton(x) and 0 < x.shape[-1] <= LARGEST


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(y, x + residual); the second is empty without a residual."""
    y, total = _forward_outputs(x, residual, dtype)
    if not _fits(x):
        return _forward_plain(x, residual, weight, bias, eps, y, total)
    if x.numel():
        launch_forward(x, residual, weight, bias, eps, y, total)
    return y, total


def _forward_plain(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, y: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if residual is not None:
        x = total.copy_(x.to(wide(x.dtype)) + residual)
    xh, _ = _row_plain(x, eps)
    return y.copy_(xh * weight + bias), total


def _row_plain(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.to(wide(x.dtype))
    centred = x - x.mean(-1, keepdim=True)
    rs = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rs, rs


def _backward(
    gy: Tensor, gsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(gx, gw, gb); the last two are empty without weight_grads."""
    gx, gw, gb = _backward_outputs(x, weight, weight_grads)
    if not _fits(x):
        return _backward_plain(gy, gsum, x, weight, eps, weight_grads, gx, gw, gb)
    if not x.numel():
        return gx, gw.zero_(), gb.zero_()
    if weight_grads:
        gw, gb = launch_backward(gy, gsum, x, weight, eps, weight_grads, gx)
    else:
        launch_backward(gy, gsum, x, weight, eps, weight_grads, gx)
    return gx, gw, gb


def _backward_plain(
    gy: Tensor, gsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grads: bool,
    gx: Tensor, gw: Tensor, gb: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    xh, rs = _row_plain(x, eps)
    gy = gy.to(xh.dtype)
    grad = rs * _project(gy * weight, xh)
    gx.copy_(grad if gsum is None else grad + gsum)
    if weight_grads:
        gw.copy_(_row_sum(gy * xh))
        gb.copy_(_row_sum(gy))
    return gx, gw, gb


def _project(z: Tensor, xh: Tensor) -> Tensor:
    """P(z): z without its mean and its component along xh."""
    return z - z.mean(-1, keepdim=True) - xh * (z * xh).mean(-1, keepdim=True)


def _row_sum(z: Tensor) -> Tensor:
    return z.flatten(0, -2).sum(0) if z.ndim > 1 else z


def _backward_backward(
    v: Tensor, vw: Tensor | None, vb: Tensor | None, gy: Tensor, x: Tensor, weight: Tensor,
    eps: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(ggy, gx, gw); the last is empty without weight_grads."""
    ggy, gx, gw = _backward_backward_outputs(gy, x, weight, weight_grads)
    if not _fits(x):
        return _backward_backward_plain(v, vw, vb, gy, x, weight, eps, weight_grads, ggy, gx, gw)
    if not x.numel():
        return ggy, gx, gw.zero_()
    total = launch_backward_backward(v, vw, vb, gy, x, weight, eps, weight_grads, ggy, gx)
    return ggy, gx, gw if total is None else total


def _backward_backward_plain(
    v: Tensor, vw: Tensor | None, vb: Tensor | None, gy: Tensor, x: Tensor, weight: Tensor,
    eps: float, weight_grads: bool, ggy: Tensor, gx: Tensor, gw: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    xh, rs = _row_plain(x, eps)
    v, gy = v.to(xh.dtype), gy.to(xh.dtype)
    g = gy * weight
    m, n = (g * xh).mean(-1, keepdim=True), (v * xh).mean(-1, keepdim=True)
    s = (v * g).mean(-1, keepdim=True) - n * m
    s = s - v.mean(-1, keepdim=True) * g.mean(-1, keepdim=True)
    a = rs * _project(v, xh)
    z = -rs * (m * v + n * g)
    to_gy = weight * a
    if vw is not None:
        to_gy = to_gy + vw * xh
        z = z + gy * vw
    if vb is not None:
        to_gy = to_gy + vb
    gx.copy_(rs * _project(z, xh) - rs.square() * xh * s)
    return ggy.copy_(to_gy), gx, gw.copy_(_row_sum(a * gy)) if weight_grads else gw


def _forward_outputs(
    x: Tensor, residual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    return y, torch.empty(x.shape, dtype=x.dtype, device=x.device) if residual is not None else y


def _backward_outputs(
    x: Tensor, weight: Tensor, weight_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return gx, _weight_output(weight, weight_grads), _weight_output(weight, weight_grads)


def _backward_backward_outputs(
    gy: Tensor, x: Tensor, weight: Tensor, weight_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    ggy = torch.empty(x.shape, dtype=gy.dtype, device=x.device)
    gx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return ggy, gx, _weight_output(weight, weight_grads)


def _weight_output(weight: Tensor, weight_grads: bool) -> Tensor:
    """Room for a weight's gradient, empty where nobody asks: custom ops return tensors."""
    return torch.empty_like(weight) if weight_grads else weight.new_empty(0)


@define("fastgn::layer_norm")
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return _forward(x, None, weight, bias, eps, dtype)[0]


@define("fastgn::add_layer_norm")
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _forward(x, residual, weight, bias, eps, dtype)


@define("fastgn::layer_norm_bwd")
def _layer_norm_bwd(
    gy: Tensor, gsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(gy, gsum, x, weight, eps, weight_grads)


@define("fastgn::layer_norm_bwd_bwd")
def _layer_norm_bwd_bwd(
    v: Tensor, vw: Tensor | None, vb: Tensor | None, gy: Tensor, x: Tensor, weight: Tensor,
    eps: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward_backward(v, vw, vb, gy, x, weight, eps, weight_grads)


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return _forward_outputs(x, None, dtype)[0]


@_add_layer_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _forward_outputs(x, residual, dtype)


@_layer_norm_bwd.register_fake
def _(
    gy: Tensor, gsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_outputs(x, weight, weight_grads)


@_layer_norm_bwd_bwd.register_fake
def _(
    v: Tensor, vw: Tensor | None, vb: Tensor | None, gy: Tensor, x: Tensor, weight: Tensor,
    eps: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward_backward_outputs(gy, x, weight, weight_grads)


def _differentiate(options: tuple, saved: tuple, wanted: tuple[bool, ...], gy: Tensor) -> tuple:
    gx, gw, gb = _gradients(options, saved, any(wanted[1:]), gy, None)
    return gx, gw, gb, None, None


def _differentiate_sum(
    options: tuple, saved: tuple, wanted: tuple[bool, ...], gy: Tensor | None, gsum: Tensor | None
) -> tuple:
    if gy is None:
        return gsum, gsum, None, None, None, None
    gx, gw, gb = _gradients(options, saved, any(wanted[2:]), gy, gsum)
    return gx, gx, gw, gb, None, None


def _gradients(
    options: tuple, saved: tuple, weight_grads: bool, gy: Tensor, gsum: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, weight = saved
    gx, gw, gb = _layer_norm_bwd(gy, gsum, x, weight, options[0], weight_grads)
    return (gx, gw, gb) if weight_grads else (gx, None, None)


def _differentiate_twice(
    options: tuple, saved: tuple, wanted: tuple[bool, ...],
    v: Tensor | None, vw: Tensor | None, vb: Tensor | None,
) -> tuple:  # fmt: skip
    gy, gsum, x, weight = saved
    eps, had_weight_grads = options[-2:]
    if not had_weight_grads:
        vw = vb = None
    filled = torch.zeros_like(x) if v is None else v
    ggy, gx, gw = _layer_norm_bwd_bwd(filled, vw, vb, gy, x, weight, eps, wanted[3])
    return ggy, v if gsum is not None else None, gx, gw if wanted[3] else None, None, None


differentiable(
    _layer_norm,
    "layer_norm",
    save=lambda inputs, y: (inputs[0], inputs[1]),
    backward=_differentiate,
)
differentiable(
    _add_layer_norm,
    "layer_norm",
    save=lambda inputs, outputs: (outputs[1], inputs[2]),
    backward=_differentiate_sum,
)
differentiable(
    _layer_norm_bwd,
    "layer_norm",
    save=lambda inputs, outputs: inputs[:4],
    backward=_differentiate_twice,
)
no_third_derivative(_layer_norm_bwd_bwd, "layer_norm")


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalises the last dimension, as F.layer_norm; one pass for each of the three orders.

    x: (..., C), any floating dtype, statistics in float32 or wider. weight, bias: (C,), None for 1
    and 0. residual: of x's shape; then the result is (normalised x + residual, x + residual), the
    sum being rounded to its dtype first, as PyTorch would. dtype: of the normalised output; None:
    x's own, and float32 under autocast on CUDA, as F.layer_norm's. Source: Ba et al. 2016,
    arXiv 1607.06450; the second derivative is in this module's docstring.

    Raises ValueError on shapes that do not fit, TypeError on integers; a third derivative raises
    RuntimeError. Rows wider than 4096 take PyTorch's operators.
    """
    columns = x.shape[-1:]
    if not columns:
        raise ValueError("layer_norm: x is (), should be (..., C)")
    for name, value, shape in (
        ("weight", weight, columns),
        ("bias", bias, columns),
        ("residual", residual, x.shape),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(
                f"layer_norm: {name} is {tuple(value.shape)}, should be {tuple(shape)}"
            )
    is_floating("layer_norm", x=x, weight=weight, bias=bias, residual=residual)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"layer_norm: dtype is {dtype}, should be a floating-point one")
    if residual is not None and residual.dtype != x.dtype:
        common = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(common), residual.to(common)
    if dtype is None:
        autocast = x.is_cuda and torch.is_autocast_enabled("cuda")
        dtype = torch.promote_types(x.dtype, torch.float32) if autocast else x.dtype
    if inlines() and not _fits(x):
        return reference.layer_norm(x, weight, bias, eps, residual, dtype)
    no_forward_mode("layer_norm", x, weight, bias, residual)
    if weight is None:
        weight = torch.ones(columns, dtype=x.dtype, device=x.device)
    if bias is None:
        bias = torch.zeros(columns, dtype=weight.dtype, device=x.device)
    bias = bias.to(weight.dtype)
    if residual is None:
        return _layer_norm(x, weight, bias, eps, dtype)
    return _add_layer_norm(x, residual, weight, bias, eps, dtype)
