"""The Triton kernels of layer normalisation and their launches, one per order.

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

from fastgn_kernels.dispatch import LAUNCH, round_up, strips, tl_wide, wide


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


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, y: Tensor,
    total: Tensor,
) -> None:  # fmt: skip
    """Writes y and, with a residual, x + residual to `total`."""
    x = x.contiguous()
    residual_ = x if residual is None else residual.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    tile = _tile(columns, forward=True)
    _layer_norm_fwd_kernel[(round_up(rows, tile["BLOCK_R"]),)](
        x, residual_, weight.contiguous(), bias.contiguous(), y, total, rows, columns,
        eps, residual is not None, tl_wide(x.dtype), **tile, **LAUNCH,
    )  # fmt: skip


def launch_backward(
    gy: Tensor, gsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grads: bool,
    gx: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Writes gx; returns [gw, gb] with weight_grads, else []."""
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
    return [sums.sum(0).to(weight.dtype) for sums in partial] if weight_grads else []


def launch_backward_backward(
    v: Tensor, vw: Tensor | None, vb: Tensor | None, gy: Tensor, x: Tensor, weight: Tensor,
    eps: float, weight_grads: bool, ggy: Tensor, gx: Tensor,
) -> Tensor | None:  # fmt: skip
    """Writes ggy and gx; returns gw with weight_grads."""
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
    return partial.sum(0).to(weight.dtype) if weight_grads else None
