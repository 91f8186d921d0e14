"""Layer normalisation over the last dimension, with an optional residual sum, three orders.

Over a row x of C values, xh = (x - mean) rs, g = gy w, P(z) = z - mean(z) - xh mean(z xh):
y = xh w + b; gx = rs P(g), gw = sum gy xh, gb = sum gy. Given the cotangents (v, vw, vb) of those:
a = rs P(v), m = mean(g xh), n = mean(v xh), s = mean(v g) - mean(v) mean(g) - n m;
to gy: w a + vw xh + vb; to x: rs P(-rs (m v + n g) + gy vw) - rs^2 xh s; to w: sum of a gy.

Statistics are float32 (float64 for float64) and are recomputed in every order: the row is in
registers anyway, and nothing but the inputs has to be kept.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgn_kernels import reference
from fastgn_kernels.dispatch import (
    LAUNCH,
    define,
    differentiable,
    inlines,
    is_floating,
    no_forward_mode,
    no_third_derivative,
    round_up,
    runs_triton,
    strips,
    tl_wide,
    wide,
)

LARGEST = 4096
"""The widest row that a program holds; wider ones take the plain body. At 8192 columns the kernel
of the second derivative spilled 144 bytes of registers a thread; in float64, which is for checks,
it spills 80 at 1024 and more at 4096."""


@triton.jit
def _row(x, inside, columns, eps):
    """(xh, rs) of each row of a tile."""
    mean = tl.sum(x, axis=1)[:, None] / columns
    centred = tl.where(inside, x - mean, 0.0)
    rs = tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / columns + eps)
    return tl.where(inside, centred * rs, 0.0), rs


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, rows, columns,
    EPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(WIDE)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(WIDE)
        total = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offsets, total, mask=inside)
        x = total.to(WIDE)  # what the backward will read
    xh, _ = _row(x, inside, columns, EPS)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(WIDE)
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(WIDE)
    tl.store(y_ptr + offsets, xh * weight[None, :] + bias[None, :], mask=inside)


@triton.jit
def _layer_norm_bwd_kernel(
    gy_ptr, gsum_ptr, x_ptr, weight_ptr, gx_ptr, partial_ptr, rows, columns,
    EPS: tl.constexpr, HAS_GSUM: tl.constexpr, WEIGHT_GRADS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(WIDE)[None, :]
    gw = tl.zeros((BLOCK_R, BLOCK_C), WIDE)
    gb = tl.zeros((BLOCK_R, BLOCK_C), WIDE)
    for start in range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        offsets = row[:, None].to(tl.int64) * columns + column[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(WIDE)
        gy = tl.load(gy_ptr + offsets, mask=inside, other=0.0).to(WIDE)
        xh, rs = _row(x, inside, columns, EPS)
        if WEIGHT_GRADS:
            gw += gy * xh
            gb += gy
        g = gy * weight
        mean_g = tl.sum(g, axis=1)[:, None] / columns
        m = tl.sum(g * xh, axis=1)[:, None] / columns
        gx = rs * (g - mean_g - xh * m)
        if HAS_GSUM:
            gx += tl.load(gsum_ptr + offsets, mask=inside, other=0.0).to(WIDE)
        tl.store(gx_ptr + offsets, gx, mask=inside)
    if WEIGHT_GRADS:
        # partial sums rather than atomics: the same bits in every run
        to = partial_ptr + tl.program_id(0).to(tl.int64) * columns + column
        tl.store(to, tl.sum(gw, axis=0), mask=column < columns)
        to += tl.num_programs(0).to(tl.int64) * columns
        tl.store(to, tl.sum(gb, axis=0), mask=column < columns)


@triton.jit
def _layer_norm_bwd_bwd_kernel(
    v_ptr, vw_ptr, vb_ptr, gy_ptr, x_ptr, weight_ptr, ggy_ptr, gx_ptr, partial_ptr, rows, columns,
    EPS: tl.constexpr, HAS_VW: tl.constexpr, HAS_VB: tl.constexpr, WEIGHT_GRADS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(WIDE)[None, :]
    if HAS_VW:
        vw = tl.load(vw_ptr + column, mask=column < columns, other=0.0).to(WIDE)[None, :]
    if HAS_VB:
        vb = tl.load(vb_ptr + column, mask=column < columns, other=0.0).to(WIDE)[None, :]
    gw = tl.zeros((BLOCK_R, BLOCK_C), WIDE)
    for start in range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        offsets = row[:, None].to(tl.int64) * columns + column[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(WIDE)
        gy = tl.load(gy_ptr + offsets, mask=inside, other=0.0).to(WIDE)
        v = tl.load(v_ptr + offsets, mask=inside, other=0.0).to(WIDE)
        xh, rs = _row(x, inside, columns, EPS)
        g = gy * weight
        mean_g = tl.sum(g, axis=1)[:, None] / columns
        mean_v = tl.sum(v, axis=1)[:, None] / columns
        m = tl.sum(g * xh, axis=1)[:, None] / columns
        n = tl.sum(v * xh, axis=1)[:, None] / columns
        s = tl.sum(v * g, axis=1)[:, None] / columns - mean_v * mean_g - n * m
        a = rs * (v - mean_v - xh * n)
        if WEIGHT_GRADS:
            gw += tl.where(inside, gy * a, 0.0)  # beyond the rows, eps = 0 makes a NaN of a
        ggy = weight * a
        # mean(z) and mean(z xh) of z = -rs (m v + n g) follow from the means at hand
        z = -rs * (m * v + n * g)
        mean_z = -rs * (m * mean_v + n * mean_g)
        mean_zxh = -2.0 * rs * m * n
        if HAS_VW:
            ggy += vw * xh
            z += gy * vw
            mean_z += tl.sum(gy * vw, axis=1)[:, None] / columns
            mean_zxh += tl.sum(gy * vw * xh, axis=1)[:, None] / columns
        if HAS_VB:
            ggy += vb
        tl.store(ggy_ptr + offsets, ggy, mask=inside)
        gx = rs * (z - mean_z - xh * (mean_zxh + rs * s))
        tl.store(gx_ptr + offsets, gx, mask=inside)
    if WEIGHT_GRADS:
        to = partial_ptr + tl.program_id(0).to(tl.int64) * columns + column
        tl.store(to, tl.sum(gw, axis=0), mask=column < columns)


def _tile(columns: int, forward: bool = False) -> dict[str, Any]:
    """Rows and columns of a tile and its warps: several rows a program where they are narrow."""
    block_c = triton.next_power_of_2(columns)
    warps = 4 if block_c <= 1024 else 8
    if forward and block_c in (1024, 4096):
        warps *= 2  # ptxas spills 16 bytes a thread on sm_80 without, and in the others with it
    return {"BLOCK_R": max(2048 // block_c, 1), "BLOCK_C": block_c, "num_warps": warps}


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
        x = x.contiguous()
        residual_ = x if residual is None else residual.contiguous()
        columns = x.shape[-1]
        rows = x.numel() // columns
        tile = _tile(columns, forward=True)
        _layer_norm_fwd_kernel[(round_up(rows, tile["BLOCK_R"]),)](
            x, residual_, weight.contiguous(), bias.contiguous(), y, total, rows, columns,
            eps, residual is not None, tl_wide(x.dtype), **tile, **LAUNCH,
        )  # fmt: skip
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
    columns = x.shape[-1]
    rows = x.numel() // columns
    tile = _tile(columns)
    num = strips(rows, tile["BLOCK_R"], 1)
    shape = (2, num if weight_grads else 0, columns)
    partial = torch.empty(shape, dtype=wide(x.dtype), device=x.device)
    gy = gy.contiguous()
    _layer_norm_bwd_kernel[(num,)](
        gy, gy if gsum is None else gsum.contiguous(), x.contiguous(), weight.contiguous(),
        gx, partial, rows, columns, eps, gsum is not None, weight_grads, tl_wide(x.dtype),
        **tile, **LAUNCH,
    )  # fmt: skip
    if weight_grads:
        gw, gb = (sums.sum(0).to(weight.dtype) for sums in partial)
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
    columns = x.shape[-1]
    rows = x.numel() // columns
    tile = _tile(columns)
    num = strips(rows, tile["BLOCK_R"], 1)
    partial = torch.empty(num if weight_grads else 0, columns, dtype=wide(x.dtype), device=x.device)
    weight = weight.contiguous()
    _layer_norm_bwd_bwd_kernel[(num,)](
        v.contiguous(), weight if vw is None else vw.contiguous(),
        weight if vb is None else vb.contiguous(), gy.contiguous(), x.contiguous(), weight,
        ggy, gx, partial, rows, columns, eps, vw is not None, vb is not None, weight_grads,
        tl_wide(x.dtype), **tile, **LAUNCH,
    )  # fmt: skip
    return ggy, gx, partial.sum(0).to(weight.dtype) if weight_grads else gw


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
