"""Triton kernels for layer normalisation and its two derivatives, and the functions to launch them.

Names, for a row x of C values:

- inv_std = 1 / sqrt(variance of x + eps), and x_hat = (x - mean of x) inv_std is the normalised
  row.
- gy, gx, gweight, gbias: gradients of the loss with respect to the output y, x, weight and bias.
- gsum: gradient of the loss with respect to the sum x + residual.
- ggx, ggweight, ggbias: gradients of the loss with respect to gx, gweight and gbias. The backward
  of the backward starts from them.
- ggy: gradient of the loss with respect to gy. The backward of the backward computes it, and also
  other gradients with respect to x and weight, which are called gx and gweight, too.
- g = gy weight: gradient of the loss with respect to x_hat.
- P(z) = z - mean(z) - x_hat mean(z x_hat): the row z without its mean and without its component
  along x_hat.

Forward: y = x_hat weight + bias.

Backward: gx = inv_std P(g), or inv_std P(g) + gsum if there is a residual. The sums of gy x_hat and
of gy over the rows are gweight and gbias.

Backward of the backward: if x changes by ggx, x_hat changes by tangent = inv_std P(ggx). Let

    covariance = mean(ggx g) - mean(ggx) mean(g) - mean(ggx x_hat) mean(g x_hat),
    z = gy ggweight - inv_std (mean(g x_hat) ggx + mean(ggx x_hat) g).

Then

    ggy = weight tangent + ggweight x_hat + ggbias,
    gx = inv_std P(z) - inv_std^2 x_hat covariance,
    gweight = sum(tangent gy) over the rows.

Means and variances are float32, or float64 for float64 inputs. Every kernel holds the row in
registers and recomputes its mean and variance. Therefore only the op's inputs are kept for the
backward.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgn_kernels.dispatch import LAUNCH, compute_dtype, count_strips, triton_compute_dtype


@triton.jit
def _normalise(x, inside, columns, eps):
    """Returns the normalised rows x_hat of a tile x, and 1 / standard deviation of each row.

    - x: a tile, which holds the rows that a program processes at a time.
    - inside: mask that is False for the padding of the tile.
    - columns: length of a row.
    - eps: number added to the variance before the square root.
    """
    mean = tl.sum(x, axis=1)[:, None] / columns
    centred = tl.where(inside, x - mean, 0.0)
    inv_std = tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / columns + eps)
    return tl.where(inside, centred * inv_std, 0.0), inv_std


@triton.jit
def _layer_norm_fwd_kernel(
    x_pointer, residual_pointer, weight_pointer, bias_pointer, y_pointer, sum_pointer, rows,
    columns, EPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes the normalised output.

    - x_pointer: input, (rows, columns).
    - residual_pointer: a tensor with the shape of the input. If HAS_RESIDUAL is True, it is added
      to the input before the normalisation.
    - weight_pointer, bias_pointer: factor and summand of each column.
    - y_pointer: the normalised output, which the kernel writes.
    - sum_pointer: the sum of input and residual, which the kernel writes if HAS_RESIDUAL is True.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row[:, None] * columns + column[None, :]
    x = tl.load(x_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE)
    if HAS_RESIDUAL:
        x += tl.load(residual_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE)
        total = x.to(sum_pointer.dtype.element_ty)
        tl.store(sum_pointer + offsets, total, mask=inside)
        # normalise the sum after rounding, because the backward starts from the rounded sum
        x = total.to(COMPUTE_DTYPE)
    x_hat, _ = _normalise(x, inside, columns, EPS)
    weight = tl.load(weight_pointer + column, mask=column < columns, other=0.0).to(COMPUTE_DTYPE)
    bias = tl.load(bias_pointer + column, mask=column < columns, other=0.0).to(COMPUTE_DTYPE)
    tl.store(y_pointer + offsets, x_hat * weight[None, :] + bias[None, :], mask=inside)


@triton.jit
def _layer_norm_bwd_kernel(
    gy_pointer, gsum_pointer, x_pointer, weight_pointer, gx_pointer, partial_sums_pointer, rows,
    columns, EPS: tl.constexpr, HAS_GSUM: tl.constexpr, WEIGHT_GRADS: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of x, and partial sums of the gradients of weight and bias.

    - gy_pointer: gradient of the loss with respect to the output.
    - gsum_pointer: gradient of the loss with respect to the sum x + residual. It is added to the
      gradient of x if HAS_GSUM is True.
    - x_pointer, weight_pointer: the inputs x, (rows, columns), and weight, (columns,).
    - gx_pointer: the gradient of x, which the kernel writes.
    - partial_sums_pointer: for each program, the gradients of weight and bias, summed over the rows
      that the program processes. The kernel writes them if WEIGHT_GRADS is True.
    """
    column = tl.arange(0, BLOCK_COLUMNS)
    weight = tl.load(weight_pointer + column, mask=column < columns, other=0.0)
    weight = weight.to(COMPUTE_DTYPE)[None, :]
    gweight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE_DTYPE)
    gbias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE_DTYPE)
    for start in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        offsets = row[:, None].to(tl.int64) * columns + column[None, :]
        x = tl.load(x_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE)
        gy = tl.load(gy_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE)
        x_hat, inv_std = _normalise(x, inside, columns, EPS)
        if WEIGHT_GRADS:
            gweight += gy * x_hat
            gbias += gy
        g = gy * weight
        mean_g = tl.sum(g, axis=1)[:, None] / columns
        mean_g_x_hat = tl.sum(g * x_hat, axis=1)[:, None] / columns
        gx = inv_std * (g - mean_g - x_hat * mean_g_x_hat)
        if HAS_GSUM:
            gx += tl.load(gsum_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE)
        tl.store(gx_pointer + offsets, gx, mask=inside)
    if WEIGHT_GRADS:
        # each program stores its own sum, because the order of atomic additions varies between runs
        to = partial_sums_pointer + tl.program_id(0).to(tl.int64) * columns + column
        tl.store(to, tl.sum(gweight, axis=0), mask=column < columns)
        to += tl.num_programs(0).to(tl.int64) * columns
        tl.store(to, tl.sum(gbias, axis=0), mask=column < columns)


@triton.jit
def _layer_norm_bwd_bwd_kernel(
    ggx_pointer, ggweight_pointer, ggbias_pointer, gy_pointer, x_pointer, weight_pointer,
    ggy_pointer, gx_pointer, partial_sums_pointer, rows, columns,
    EPS: tl.constexpr, HAS_GGWEIGHT: tl.constexpr, HAS_GGBIAS: tl.constexpr,
    WEIGHT_GRADS: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes the second derivative of layer normalisation.

    - ggx_pointer, ggweight_pointer, ggbias_pointer: gradients of the loss with respect to the
      results of the backward, which are the gradients of x, weight and bias. The kernel reads the
      last two if HAS_GGWEIGHT and HAS_GGBIAS are True.
    - gy_pointer: gradient of the loss with respect to the output, from which the backward started.
    - x_pointer, weight_pointer: the inputs x, (rows, columns), and weight, (columns,).
    - ggy_pointer, gx_pointer: the gradients with respect to gy and x, which the kernel writes.
    - partial_sums_pointer: for each program, the gradient of weight, summed over the rows that the
      program processes. The kernel writes it if WEIGHT_GRADS is True.
    """
    column = tl.arange(0, BLOCK_COLUMNS)
    exists = column < columns
    weight = tl.load(weight_pointer + column, mask=exists, other=0.0).to(COMPUTE_DTYPE)[None, :]
    if HAS_GGWEIGHT:
        ggweight = tl.load(ggweight_pointer + column, mask=exists, other=0.0)
        ggweight = ggweight.to(COMPUTE_DTYPE)[None, :]
    if HAS_GGBIAS:
        ggbias = tl.load(ggbias_pointer + column, mask=exists, other=0.0)
        ggbias = ggbias.to(COMPUTE_DTYPE)[None, :]
    gweight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE_DTYPE)
    for start in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        offsets = row[:, None].to(tl.int64) * columns + column[None, :]
        x = tl.load(x_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE)
        gy = tl.load(gy_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE)
        ggx = tl.load(ggx_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE)
        x_hat, inv_std = _normalise(x, inside, columns, EPS)
        g = gy * weight
        mean_g = tl.sum(g, axis=1)[:, None] / columns
        mean_ggx = tl.sum(ggx, axis=1)[:, None] / columns
        mean_g_x_hat = tl.sum(g * x_hat, axis=1)[:, None] / columns
        mean_ggx_x_hat = tl.sum(ggx * x_hat, axis=1)[:, None] / columns
        covariance = tl.sum(ggx * g, axis=1)[:, None] / columns - mean_ggx * mean_g
        covariance = covariance - mean_ggx_x_hat * mean_g_x_hat
        tangent = inv_std * (ggx - mean_ggx - x_hat * mean_ggx_x_hat)
        if WEIGHT_GRADS:
            # Leave out padded rows. Their variance is 0, so their tangent is NaN if eps is 0.
            gweight += tl.where(inside, gy * tangent, 0.0)
        ggy = weight * tangent
        # compute mean(z) and mean(z x_hat) from the means above, to save two sums over the row
        z = -inv_std * (mean_g_x_hat * ggx + mean_ggx_x_hat * g)
        mean_z = -inv_std * (mean_g_x_hat * mean_ggx + mean_ggx_x_hat * mean_g)
        mean_z_x_hat = -2.0 * inv_std * mean_g_x_hat * mean_ggx_x_hat
        if HAS_GGWEIGHT:
            ggy += ggweight * x_hat
            z += gy * ggweight
            mean_z += tl.sum(gy * ggweight, axis=1)[:, None] / columns
            mean_z_x_hat += tl.sum(gy * ggweight * x_hat, axis=1)[:, None] / columns
        if HAS_GGBIAS:
            ggy += ggbias
        tl.store(ggy_pointer + offsets, ggy, mask=inside)
        gx = inv_std * (z - mean_z - x_hat * (mean_z_x_hat + inv_std * covariance))
        tl.store(gx_pointer + offsets, gx, mask=inside)
    if WEIGHT_GRADS:
        to = partial_sums_pointer + tl.program_id(0).to(tl.int64) * columns + column
        tl.store(to, tl.sum(gweight, axis=0), mask=exists)


def choose_tile(columns: int, forward: bool = False) -> dict[str, Any]:
    """Returns the size of the tile that a program processes at a time, and the number of its warps.

    They are keyword arguments for the launch of a kernel. A tile holds one whole row, or several
    rows if these are short. columns: length of a row. forward: whether the forward kernel is
    launched.
    """
    block_columns = triton.next_power_of_2(columns)
    warps = 4 if block_columns <= 1024 else 8
    if forward and block_columns in (1024, 4096):
        # with half as many warps, each thread of the forward kernel spills 16 bytes on sm_80
        warps *= 2
    return {
        "BLOCK_ROWS": max(2048 // block_columns, 1),
        "BLOCK_COLUMNS": block_columns,
        "num_warps": warps,
    }


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, y: Tensor,
    total: Tensor,
) -> None:  # fmt: skip
    """Computes the normalised rows with a Triton kernel, and writes them into y.

    If there is a residual, normalises x + residual and also writes this sum into total.
    """
    x = x.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    tile = choose_tile(columns, forward=True)
    _layer_norm_fwd_kernel[(triton.cdiv(rows, tile["BLOCK_ROWS"]),)](
        x, x if residual is None else residual.contiguous(), weight.contiguous(),
        bias.contiguous(), y, total, rows, columns, eps, residual is not None,
        triton_compute_dtype(x.dtype), **tile, **LAUNCH,
    )  # fmt: skip


def launch_backward(
    gy: Tensor, gsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grads: bool,
    gx: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Computes the gradient of x with a Triton kernel, and writes it into gx.

    - gy: gradient of the loss with respect to the output.
    - gsum: gradient of the loss with respect to the sum x + residual, which is added to the
      gradient of x. None means zero.
    - weight_grads: whether to compute the gradients of weight and bias.

    Returns [gradient of weight, gradient of bias], or [] if weight_grads is False.
    """
    columns = x.shape[-1]
    rows = x.numel() // columns
    tile = choose_tile(columns)
    strips = count_strips(rows, tile["BLOCK_ROWS"], 1)
    shape = (2, strips if weight_grads else 0, columns)
    partial_sums = torch.empty(shape, dtype=compute_dtype(x.dtype), device=x.device)
    gy = gy.contiguous()
    _layer_norm_bwd_kernel[(strips,)](
        gy, gy if gsum is None else gsum.contiguous(), x.contiguous(), weight.contiguous(),
        gx, partial_sums, rows, columns, eps, gsum is not None, weight_grads,
        triton_compute_dtype(x.dtype), **tile, **LAUNCH,
    )  # fmt: skip
    return [sums.sum(0).to(weight.dtype) for sums in partial_sums] if weight_grads else []


def launch_backward_backward(
    ggx: Tensor, ggweight: Tensor | None, ggbias: Tensor | None, gy: Tensor, x: Tensor,
    weight: Tensor, eps: float, weight_grads: bool, ggy: Tensor, gx: Tensor,
) -> Tensor | None:  # fmt: skip
    """Computes the second derivative of layer normalisation with a Triton kernel.

    - ggx, ggweight, ggbias: gradients of the loss with respect to the results of the backward,
      which are the gradients of x, weight and bias. If ggweight or ggbias is None, it is zero.
    - gy: gradient of the loss with respect to the output, from which the backward started.
    - weight_grads: whether to compute the gradient of weight.
    - ggy, gx: tensors into which the gradients with respect to gy and x are written.

    Returns the gradient of weight, or None if weight_grads is False.
    """
    columns = x.shape[-1]
    rows = x.numel() // columns
    tile = choose_tile(columns)
    strips = count_strips(rows, tile["BLOCK_ROWS"], 1)
    shape = (strips if weight_grads else 0, columns)
    partial_sums = torch.empty(shape, dtype=compute_dtype(x.dtype), device=x.device)
    weight = weight.contiguous()
    _layer_norm_bwd_bwd_kernel[(strips,)](
        ggx.contiguous(), weight if ggweight is None else ggweight.contiguous(),
        weight if ggbias is None else ggbias.contiguous(), gy.contiguous(), x.contiguous(), weight,
        ggy, gx, partial_sums, rows, columns, eps, ggweight is not None, ggbias is not None,
        weight_grads, triton_compute_dtype(x.dtype), **tile, **LAUNCH,
    )  # fmt: skip
    return partial_sums.sum(0).to(weight.dtype) if weight_grads else None
