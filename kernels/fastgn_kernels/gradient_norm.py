"""The L1 or L2 norm of each sample of a gradient, and the two derivatives of that norm.

Gradient penalties need these norms. Names: g is the gradient of one sample, whose norm is computed.
gn is the gradient of the loss with respect to this norm, and gg is the gradient of the loss with
respect to g. ggg is the cotangent of gg: the gradient that the second backward pass starts from.
That pass computes ggn, the gradient with respect to gn, and a second gradient with respect to g,
which the code also calls gg. The direction is the derivative of the norm with respect to g. It is
sign(g) for L1. For L2 it is g / norm, or 0 if the norm is 0.

Forward: norm = sum(abs(g)) for L1, sqrt(sum(g^2)) for L2.
Backward: gg = gn * direction.
Backward of the backward: ggn = sum(ggg * direction). The second gg is 0 for L1. For L2 it is
gn * (ggg - direction * ggn) / norm, or 0 if the norm is 0.

Each of these is one kernel, which reads every input once and writes every output once. Only the
second backward pass of L2 takes two kernels, because ggn must be known before gg.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgn_kernels import reference
from fastgn_kernels.dispatch import (
    LARGEST_GRID_Y,
    LAUNCH,
    check_floating,
    check_no_forward_mode,
    compute_dtype,
    count_strips,
    define_op,
    forbid_third_derivative,
    is_compiling,
    register_derivative,
    runs_triton,
    triton_compute_dtype,
    with_strides_of,
)

TILE = 1024
"""Number of elements that a Triton program processes at a time. Each thread has 8 of them, so it
reads 16 bytes of a 16-bit dtype at once."""


@triton.jit
def _load_inverse(norm_pointer, row, rows, L1: tl.constexpr, COMPUTE_DTYPE: tl.constexpr):
    """Returns 1 / norm for each sample, or 0 if the norm is 0.

    For the L1 norm, returns 1, because the derivatives of that norm do not contain the norm.
    """
    if L1:
        return tl.full(row.shape, 1.0, COMPUTE_DTYPE)
    norm = tl.load(norm_pointer + row, mask=row < rows, other=1.0).to(COMPUTE_DTYPE)
    return tl.where(norm == 0, 0.0, 1.0 / tl.where(norm == 0, 1.0, norm))


@triton.jit
def _compute_direction(g, inverse, L1: tl.constexpr):
    """Returns the derivative of the norm with respect to the gradient g.

    For the L1 norm it is sign(g), and for the L2 norm g / norm. inverse: 1 / norm.
    """
    if L1:
        # gives 0 for NaN, as PyTorch's sign does
        return tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0)).to(g.dtype)
    return g * inverse


@triton.jit
def _gradient_norm_reduce_kernel(
    g_pointer, ggg_pointer, norm_pointer, partial_sums_pointer, rows, columns,
    L1: tl.constexpr, HAS_GGG: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes partial sums over the elements of each sample, from which the norm follows.

    Each program writes the sum over some of the elements. The kernel sums abs(g) for the L1 norm
    and g^2 for the L2 norm. With HAS_GGG it sums ggg * direction instead, for the second backward
    pass. The direction is the derivative of the norm with respect to g.
    """
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    if HAS_GGG:
        inverse = _load_inverse(norm_pointer, row, rows, L1, COMPUTE_DTYPE)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE_DTYPE)
    start = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS
    for first in range(start, columns, tl.num_programs(1) * BLOCK_COLUMNS):
        column = (first + tl.arange(0, BLOCK_COLUMNS).to(tl.int64))[None, :]
        offsets = row * columns + column
        inside = (row < rows) & (column < columns)
        g = tl.load(g_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE)
        if HAS_GGG:
            ggg = tl.load(ggg_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE)
            total += _compute_direction(g, inverse, L1) * ggg
        else:
            total += tl.where(g < 0, -g, g) if L1 else g * g
    # partial sums instead of atomic additions, so that every run gives the same bits
    to = partial_sums_pointer + row * tl.num_programs(1) + tl.program_id(1)
    tl.store(to, tl.sum(total, axis=1, keep_dims=True), mask=row < rows)


@triton.jit
def _gradient_norm_map_kernel(
    gn_pointer, gn_stride, g_pointer, ggg_pointer, norm_pointer, ggn_pointer, gg_pointer, rows,
    columns, L1: tl.constexpr, HAS_GGG: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes gg, the gradient of the loss with respect to g.

    With HAS_GGG it computes gg of the second backward pass, from ggg and ggn. The docstring of this
    file defines these names.
    """
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    gn = tl.load(gn_pointer + row * gn_stride, mask=row < rows, other=0.0).to(COMPUTE_DTYPE)
    inverse = _load_inverse(norm_pointer, row, rows, L1, COMPUTE_DTYPE)
    if HAS_GGG:
        ggn = tl.load(ggn_pointer + row, mask=row < rows, other=0.0).to(COMPUTE_DTYPE)
    start = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS
    for first in range(start, columns, tl.num_programs(1) * BLOCK_COLUMNS):
        column = (first + tl.arange(0, BLOCK_COLUMNS).to(tl.int64))[None, :]
        offsets = row * columns + column
        inside = (row < rows) & (column < columns)
        direction = _compute_direction(
            tl.load(g_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE), inverse, L1
        )
        if HAS_GGG:
            ggg = tl.load(ggg_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE)
            tl.store(gg_pointer + offsets, gn * ((ggg - direction * ggn) * inverse), mask=inside)
        else:
            tl.store(gg_pointer + offsets, gn * direction, mask=inside)


def _choose_tile(g: Tensor, ord: int) -> tuple[int, int, dict[str, Any]]:
    """Returns the number of rows, the number of columns, and the kernels' compile-time constants.

    The kernels treat g as a matrix in which each row is a sample. A tile is the part of this matrix
    that a program processes at a time. It holds several samples if they are small. ord: 1 or 2 for
    L1 or L2.
    """
    rows, columns = g.shape[0], math.prod(g.shape[1:])
    block_columns = min(triton.next_power_of_2(columns), TILE)
    constants = {
        "L1": ord == 1,
        "COMPUTE_DTYPE": triton_compute_dtype(g.dtype),
        "BLOCK_ROWS": TILE // block_columns,
        "BLOCK_COLUMNS": block_columns,
    }
    return rows, columns, constants


def _reduce(g: Tensor, ord: int, ggg: Tensor | None = None, norm: Tensor | None = None) -> Tensor:
    """Returns, for each sample, the sum of abs(g) if ord is 1, or of g^2 if ord is 2.

    If ggg is given, returns the sum of ggg * direction instead. The direction is the derivative of
    the norm with respect to g.
    """
    rows, columns, constants = _choose_tile(g, ord)
    blocks = triton.cdiv(rows, constants["BLOCK_ROWS"])
    # an H200 can hold 2112 programs of 128 threads at once
    strips = count_strips(columns, constants["BLOCK_COLUMNS"], blocks, programs=2112)
    sums = torch.empty(rows, strips, dtype=compute_dtype(g.dtype), device=g.device)
    _gradient_norm_reduce_kernel[(blocks, strips)](
        g, ggg if ggg is not None else g, norm if norm is not None else sums, sums, rows, columns,
        HAS_GGG=ggg is not None, **constants, **LAUNCH,
    )  # fmt: skip
    return sums.sum(1) if strips > 1 else sums[:, 0]


def _map(
    gn: Tensor, g: Tensor, norm: Tensor | None, ord: int,
    ggg: Tensor | None = None, ggn: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns the gradient with respect to g: that of the first backward pass, or that of the
    second one if ggg and ggn are given.

    gn: gradient of the loss with respect to the norms. norm: the norms, or None for L1. ggg:
    gradient with respect to the first pass's result. ggn: the second pass's gradient with respect
    to gn. ord: 1 or 2 for L1 or L2.
    """
    gg = torch.empty_like(g)
    rows, columns, constants = _choose_tile(g, ord)
    blocks = triton.cdiv(rows, constants["BLOCK_ROWS"])
    strips = min(triton.cdiv(columns, constants["BLOCK_COLUMNS"]), LARGEST_GRID_Y)
    _gradient_norm_map_kernel[(blocks, strips)](
        gn, gn.stride(0), g, ggg if ggg is not None else g, norm if norm is not None else gn,
        ggn if ggn is not None else gn, gg, rows, columns,
        HAS_GGG=ggg is not None, **constants, **LAUNCH,
    )  # fmt: skip
    return gg


def _run_kernel(
    order: int, g: Tensor, ord: int, gn: Tensor | None = None, norm: Tensor | None = None,
    ggg: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes the norm or one of its two derivatives with Triton kernels.

    order: 0 for the forward, 1 for the backward, 2 for the backward of the backward. ord: 1 or 2
    for L1 or L2. Returns (norm, empty) for order 0, (empty, gg) for order 1 and (ggn, gg) for order
    2. "empty" is a tensor without elements. For L1, gg of order 2 is zero, and "empty" stands for
    it.
    """
    per_sample, gg = _allocate_outputs(order, g, ord)
    if not g.numel():
        return per_sample.zero_(), gg
    blocks = _with_samples_in_blocks(g)
    if gn is None:
        sums = _reduce(blocks, ord)
        return sums if ord == 1 else sums.sqrt(), gg
    if ggg is None:
        return per_sample, _map(gn, blocks, norm, ord)
    ggg = with_strides_of(ggg, blocks)
    ggn = _reduce(blocks, ord, ggg, norm)
    return ggn, gg if ord == 1 else _map(gn, blocks, norm, ord, ggg, ggn)


def _run_plain(
    order: int, g: Tensor, ord: int, gn: Tensor | None = None, norm: Tensor | None = None,
    ggg: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes the norm or one of its two derivatives with PyTorch's operators.

    The arguments and results are those of `_run_kernel`, which runs Triton kernels.
    """
    per_sample, gg = _allocate_outputs(order, g, ord)
    x = g.to(per_sample.dtype)
    matrix = (g.shape[0], math.prod(g.shape[1:]))
    broadcast = (-1,) + (1,) * (g.ndim - 1)
    if gn is None:
        sums = (x.abs() if ord == 1 else x * x).reshape(matrix).sum(1)
        return per_sample.copy_(sums if ord == 1 else sums.sqrt()), gg
    if norm is None:
        direction = inverse = x.sign()
    else:
        inverse = torch.where(norm == 0, 0.0, 1.0 / norm).view(broadcast)
        direction = x * inverse
    if ggg is None:
        return per_sample, gg.copy_(gn.view(broadcast) * direction)
    ggg = ggg.to(x.dtype)
    ggn = per_sample.copy_((direction * ggg).reshape(matrix).sum(1))
    if ord == 1:
        return ggn, gg
    projected = ggg - direction * ggn.view(broadcast)
    return ggn, gg.copy_(gn.view(broadcast) * (projected * inverse))


def _with_samples_in_blocks(g: Tensor) -> Tensor:
    """Returns g if each sample fills one block of memory, otherwise a contiguous copy of g.

    The order of the elements within a sample does not matter for a norm. Therefore images in
    channels_last are not copied.
    """
    if torch.empty_like(g, device="meta").stride() == g.stride():  # no holes between elements
        if g.shape[0] < 2 or g.stride(0) == math.prod(g.shape[1:]):
            return g
    return g.contiguous()


def _allocate_outputs(order: int, g: Tensor, ord: int) -> tuple[Tensor, Tensor]:
    """Returns uninitialised tensors for the two results of `_run_kernel`.

    order: 0 for the forward, 1 for the backward, 2 for the backward of the backward. A result that
    is not computed is a tensor without elements, because a custom op cannot return None. The second
    tensor has the strides that `_with_samples_in_blocks` gives to g.
    """
    rows = 0 if order == 1 else g.shape[0]
    per_sample = g.new_empty(rows, dtype=compute_dtype(g.dtype))
    has_gg = order == 1 or (order == 2 and ord == 2)
    return per_sample, torch.empty_like(_with_samples_in_blocks(g)) if has_gg else g.new_empty(0)


@define_op("fastgn::gradient_norm")
def _gradient_norm(g: Tensor, ord: int) -> Tensor:
    return (_run_kernel if runs_triton(g) else _run_plain)(0, g, ord)[0]


@define_op("fastgn::gradient_norm_bwd")
def _gradient_norm_bwd(gn: Tensor, g: Tensor, norm: Tensor | None, ord: int) -> Tensor:
    return (_run_kernel if runs_triton(g) else _run_plain)(1, g, ord, gn, norm)[1]


@define_op("fastgn::gradient_norm_bwd_bwd")
def _gradient_norm_bwd_bwd(
    ggg: Tensor, gn: Tensor, g: Tensor, norm: Tensor | None, ord: int
) -> tuple[Tensor, Tensor]:
    return (_run_kernel if runs_triton(g) else _run_plain)(2, g, ord, gn, norm, ggg)


@_gradient_norm.register_fake
def _(g: Tensor, ord: int) -> Tensor:
    return _allocate_outputs(0, g, ord)[0]


@_gradient_norm_bwd.register_fake
def _(gn: Tensor, g: Tensor, norm: Tensor | None, ord: int) -> Tensor:
    return _allocate_outputs(1, g, ord)[1]


@_gradient_norm_bwd_bwd.register_fake
def _(ggg: Tensor, gn: Tensor, g: Tensor, norm: Tensor | None, ord: int) -> tuple[Tensor, Tensor]:
    return _allocate_outputs(2, g, ord)


def _backward(options: tuple, saved: tuple, wanted: tuple[bool, ...], gn: Tensor) -> tuple:
    """Returns the gradients of the forward op's inputs. `register_derivative` describes the
    arguments."""
    g, norm = saved
    return _gradient_norm_bwd(gn, g, norm, options[-1]), None


def _backward_backward(
    options: tuple, saved: tuple, wanted: tuple[bool, ...], ggg: Tensor
) -> tuple:
    """Returns the gradients of the backward op's inputs. `register_derivative` describes the
    arguments."""
    gn, g, norm = saved
    ord = options[-1]
    ggn, gg = _gradient_norm_bwd_bwd(ggg, gn, g, norm, ord)
    # the norm was computed from g, and gg takes that into account, so the norm gets no gradient
    return ggn, gg if ord == 2 else None, None, None


register_derivative(
    _gradient_norm,
    "gradient_norm",
    save=lambda inputs, norm: (inputs[0], norm if inputs[1] == 2 else None),
    backward=_backward,
)
register_derivative(
    _gradient_norm_bwd,
    "gradient_norm",
    save=lambda inputs, gg: inputs[:3],
    backward=_backward_backward,
)
forbid_third_derivative(_gradient_norm_bwd_bwd, "gradient_norm")


def gradient_norm(grad: Tensor, ord: int = 1) -> Tensor:
    """Returns the norm of each sample of a gradient, for gradient penalties.

    The penalty of fastgn's method gradnorm uses L1, and WGAN-GP uses L2. The norm is summed in
    float32, or in float64 for float64 gradients, so that sums and squares of float16 values do not
    overflow. grad is copied first unless each sample fills one block of memory. A batch of images
    in channels_last is not copied.

    As in PyTorch, sign(0) and the gradient of the L2 norm at 0 are 0. The second derivative of the
    L2 norm at 0 is 0 too, although PyTorch's is NaN. For L1, grad gets no second-order gradient,
    because that gradient is zero almost everywhere. In code compiled by torch.compile the function
    calls `reference.gradient_norm` instead, whose operators Inductor fuses with their neighbours.

    Args:
        grad: (B, ...), any floating-point dtype.
        ord: 1 or 2 for the L1 or L2 norm.

    Returns:
        (B,), float64 for a float64 grad, otherwise float32.

    Raises:
        ValueError: if ord is neither 1 nor 2, or if grad has no dimensions.
        TypeError: if grad is not floating-point.
        RuntimeError: if the result is differentiated three times.
    """
    check_floating("gradient_norm", grad=grad)
    if ord not in (1, 2):
        raise ValueError(f"gradient_norm: ord {ord!r} should be 1 or 2")
    if not grad.ndim:
        raise ValueError("gradient_norm: grad is (), should be (B, ...)")
    if is_compiling():
        return reference.gradient_norm(grad, ord)
    check_no_forward_mode("gradient_norm", grad)
    return _gradient_norm(grad, int(ord))
