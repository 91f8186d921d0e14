"""The L1 or L2 norm of each sample of a gradient, and the two derivatives of that norm.

Gradient penalties need these norms. Names:

- g is the gradient of one sample. The forward computes its norm.
- direction is the derivative of the norm with respect to g. It is sign(g) for L1. For L2 it is g /
  norm, or 0 if the norm is 0.
- gn is the gradient of the loss with respect to the norm. The backward starts from it.
- gg is the gradient of the loss with respect to g. The backward returns it.
- ggg is the gradient of the loss with respect to gg. The backward of the backward starts from it.
- ggn is the gradient of the loss with respect to gn. The backward of the backward returns it, and
  also another gradient with respect to g, which the code calls gg, too.

Formulas:

- Forward: norm = sum(abs(g)) for L1, and sqrt(sum(g^2)) for L2.
- Backward: gg = gn * direction.
- Backward of the backward: ggn = sum(ggg * direction). For L1, its gg is 0. For L2, its gg is gn *
  (ggg - direction * ggn) / norm, or 0 if the norm is 0.

Each of the three passes is one kernel, which reads every input once and writes every output once.
Only the backward of the backward of L2 takes two kernels, because it needs ggn before it can
compute gg.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgn_kernels import formulas, reference
from fastgn_kernels.dispatch import (
    LARGEST_GRID_Y,
    LAUNCH,
    check_floating,
    compute_dtype,
    count_strips,
    define_op,
    is_compiling,
    register_derivative,
    register_third_derivative,
    run_op,
    runs_triton,
    triton_compute_dtype,
    with_strides_of,
)

TILE = 1024
"""Number of elements that a Triton program processes at a time. Each thread has 8 of them, so it
reads 16 bytes of a 16-bit dtype at once."""


@triton.jit
def _load_inverse(norm_pointer, row, rows, L1: tl.constexpr, COMPUTE_DTYPE: tl.constexpr):
    """Returns 1 / norm for each sample of a tile, or 0 if the norm is 0.

    norm_pointer: the norms, (rows,). row: indices of the samples. rows: number of samples.

    For the L1 norm, the result is 1, because the derivatives of that norm do not contain the norm.
    """
    if L1:
        return tl.full(row.shape, 1.0, COMPUTE_DTYPE)
    norm = tl.load(norm_pointer + row, mask=row < rows, other=1.0).to(COMPUTE_DTYPE)
    return tl.where(norm == 0, 0.0, 1.0 / tl.where(norm == 0, 1.0, norm))


@triton.jit
def _compute_direction(g, inverse, L1: tl.constexpr):
    """Returns the derivative of a sample's norm with respect to the sample g.

    For the L1 norm it is sign(g), and for the L2 norm g / norm. inverse: 1 / norm.
    """
    if L1:
        # this gives 0 if g is NaN, as torch.sign does
        return tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0)).to(g.dtype)
    return g * inverse


@triton.jit
def _gradient_norm_reduce_kernel(
    g_pointer, ggg_pointer, norm_pointer, partial_sums_pointer, rows, columns,
    L1: tl.constexpr, HAS_GGG: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes partial sums over the elements of each sample, from which the norms are computed.

    Each program sums some of the elements: abs(g) for the L1 norm, or g^2 for the L2 norm. If
    HAS_GGG is True, it sums ggg * direction instead, for the backward of the backward. The
    direction is the derivative of the norm with respect to g.

    - g_pointer: the matrix (rows, columns) in which each row is a sample.
    - ggg_pointer: gradient of the loss with respect to the result of the backward, (rows, columns).
    - norm_pointer: the norms, (rows,). They are read only for L2 and if HAS_GGG is True.
    - partial_sums_pointer: the sums, (rows, programs per row), which the kernel writes.
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
    # each program stores its own sum, because the order of atomic additions varies between runs
    to = partial_sums_pointer + row * tl.num_programs(1) + tl.program_id(1)
    tl.store(to, tl.sum(total, axis=1, keep_dims=True), mask=row < rows)


@triton.jit
def _gradient_norm_map_kernel(
    gn_pointer, gn_stride, g_pointer, ggg_pointer, norm_pointer, ggn_pointer, gg_pointer, rows,
    columns, L1: tl.constexpr, HAS_GGG: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of the loss with respect to g.

    It is the result of the backward or, if HAS_GGG is True, of the backward of the backward.

    - gn_pointer, gn_stride: gradient of the loss with respect to each norm, and the distance
      between its elements.
    - g_pointer: the matrix (rows, columns) in which each row is a sample.
    - norm_pointer: the norms, (rows,). They are read only for L2.
    - gg_pointer: the gradient with respect to g, which the kernel writes.
    - ggg_pointer: gradient of the loss with respect to the result of the backward. It is read only
      if HAS_GGG is True.
    - ggn_pointer: gradient with respect to gn, which `_gradient_norm_reduce_kernel` has computed.
      It is read only if HAS_GGG is True.
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
    """Returns (rows, columns, constants), which are arguments of both kernels.

    - rows, columns: number of samples, and number of elements of each sample. The kernels treat g
      as a matrix of this shape.
    - constants: the kernels' compile-time constants, which include the size of a tile. A tile is
      the part of the matrix that a program processes at a time. It holds several small samples.

    ord: 1 or 2 for the L1 or L2 norm.
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


def _sum_samples(
    g: Tensor, ord: int, ggg: Tensor | None = None, norm: Tensor | None = None
) -> Tensor:
    """Returns, for each sample of g, the sum of abs(g) if ord is 1, or of g^2 if ord is 2.

    If ggg is given, returns the sum of ggg * direction instead. The direction is the derivative of
    the norm with respect to g.

    - ord: 1 or 2 for the L1 or L2 norm.
    - ggg: gradient of the loss with respect to the result of the backward.
    - norm: the norm of each sample. It is needed if ggg is given and ord is 2.
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


def _compute_grad(
    gn: Tensor, g: Tensor, norm: Tensor | None, ord: int,
    ggg: Tensor | None = None, ggn: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns the gradient of the loss with respect to g.

    It is the result of the backward or, if ggg and ggn are given, of the backward of the backward.

    - gn: gradient of the loss with respect to each norm.
    - g: a batch of samples, of which the forward computes the norms.
    - norm: the norms, or None for L1.
    - ord: 1 or 2 for the L1 or L2 norm.
    - ggg: gradient of the loss with respect to the result of the backward.
    - ggn: gradient of the loss with respect to gn, which `_sum_samples` has computed.
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
    """Computes the norms or one of their two derivatives with Triton kernels.

    - order: 0 for the forward, 1 for the backward, 2 for the backward of the backward.
    - g: a batch of samples, of which the norms are computed.
    - ord: 1 or 2 for the L1 or L2 norm.
    - gn: gradient of the loss with respect to each norm. None for order 0.
    - norm: the norms, or None for order 0 and for L1.
    - ggg: gradient of the loss with respect to the result of the backward. Only order 2 uses it.

    Returns two tensors:

    - Order 0: (norms, empty).
    - Order 1: (empty, gradient with respect to g).
    - Order 2: (gradient with respect to gn, gradient with respect to g).

    "empty" is a tensor without elements. For order 2 and L1, the second tensor is empty too,
    because the gradient with respect to g is zero.
    """
    per_sample, gg = _allocate_outputs(order, g, ord)
    if not g.numel():
        return per_sample.zero_(), gg
    blocks = _with_samples_in_blocks(g)
    if gn is None:
        sums = _sum_samples(blocks, ord)
        return sums if ord == 1 else sums.sqrt(), gg
    if ggg is None:
        return per_sample, _compute_grad(gn, blocks, norm, ord)
    ggg = with_strides_of(ggg, blocks)
    ggn = _sum_samples(blocks, ord, ggg, norm)
    return ggn, gg if ord == 1 else _compute_grad(gn, blocks, norm, ord, ggg, ggn)


def _run_plain(
    order: int, g: Tensor, ord: int, gn: Tensor | None = None, norm: Tensor | None = None,
    ggg: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes the norms or one of their two derivatives with PyTorch's operators.

    Arguments and results are those of `_run_kernel`, which runs Triton kernels instead.
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
    """Returns g if each of its samples fills one block of memory, otherwise a contiguous copy of g.

    The order of the elements within a sample does not matter for a norm. Therefore a batch of
    images in channels_last is not copied.
    """
    # empty_like keeps the strides of g only if the elements of g fill its memory without holes
    if torch.empty_like(g, device="meta").stride() == g.stride():
        if g.shape[0] < 2 or g.stride(0) == math.prod(g.shape[1:]):
            return g
    return g.contiguous()


def _allocate_outputs(order: int, g: Tensor, ord: int) -> tuple[Tensor, Tensor]:
    """Returns uninitialised tensors for the two results of `_run_kernel`.

    - order: 0 for the forward, 1 for the backward, 2 for the backward of the backward.
    - ord: 1 or 2 for the L1 or L2 norm.

    The first tensor has one element for each sample. The second one has the shape of g, and the
    strides of the tensor that `_with_samples_in_blocks` returns. If a result is not computed, its
    tensor has no elements, because a custom op cannot return None.
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
    """Returns the gradients of the inputs (g, ord) of the forward op. The number ord gets None.

    gn: gradient of the loss with respect to each norm. `dispatch.register_derivative` describes the
    other arguments.
    """
    g, norm = saved
    args = (g, norm, options[-1])
    return run_op(_gradient_norm_bwd, formulas.gradient_norm_bwd, gn, *args), None


def _backward_backward(
    options: tuple, saved: tuple, wanted: tuple[bool, ...], ggg: Tensor
) -> tuple:
    """Returns the gradients of the inputs (gn, g, norm, ord) of the backward op.

    ggg: gradient of the loss with respect to the output of the backward op.
    `dispatch.register_derivative` describes the other arguments.
    """
    gn, g, norm = saved
    ord = options[-1]
    args = (gn, g, norm, ord)
    ggn, gg = run_op(_gradient_norm_bwd_bwd, formulas.gradient_norm_bwd_bwd, ggg, *args)
    # the input `norm` gets no gradient, because gg already treats the norm as a function of g
    return ggn, gg if ord == 2 else None, None, None


register_derivative(
    _gradient_norm,
    save=lambda inputs, norm: (inputs[0], norm if inputs[1] == 2 else None),
    backward=_backward,
)
register_derivative(
    _gradient_norm_bwd,
    save=lambda inputs, gg: inputs[:3],
    backward=_backward_backward,
)
register_third_derivative(_gradient_norm_bwd_bwd, "gradient_norm", formulas.gradient_norm_bwd_bwd)


def gradient_norm(grad: Tensor, ord: int = 1) -> Tensor:
    """Returns the norm of each sample of a gradient, for gradient penalties.

    The penalty of fastgn's method gradnorm uses the L1 norm, and WGAN-GP uses the L2 norm. The norm
    is summed in float32, or in float64 for float64 gradients. Therefore sums and squares of float16
    values do not overflow. grad is copied first unless each sample fills one block of memory. A
    batch of images in channels_last is not copied.

    As in PyTorch, sign(0) is 0, and so is the gradient of the L2 norm at 0. The second derivative
    of the L2 norm at 0 is 0 too, although PyTorch's is NaN. For L1, grad gets no second-order
    gradient, because that gradient is zero almost everywhere.

    In code compiled by torch.compile, this function calls `reference.gradient_norm` instead.
    Inductor fuses the operators of that function with the operations around them.

    Args:
        grad: (B, ...), any floating-point dtype.
        ord: 1 or 2 for the L1 or L2 norm.

    Returns:
        (B,), float64 for a float64 grad, otherwise float32.

    Raises:
        ValueError: if ord is neither 1 nor 2, or if grad has no dimensions.
        TypeError: if grad is not floating-point.
    """
    check_floating("gradient_norm", grad=grad)
    if ord not in (1, 2):
        raise ValueError(f"gradient_norm: ord {ord!r} should be 1 or 2")
    if not grad.ndim:
        raise ValueError("gradient_norm: grad has shape (), should be (B, ...)")
    if is_compiling():
        return reference.gradient_norm(grad, ord)
    return run_op(_gradient_norm, formulas.gradient_norm, grad, int(ord))
