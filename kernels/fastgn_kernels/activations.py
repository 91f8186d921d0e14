"""Activation functions with an optional fused bias, and their first and second derivatives.

Names of tensors:

- x is the input, bias is the bias, and u = x + bias;
- y = f(u) is the output of the activation function f;
- gy, gx, gbias and gu are the gradients of the loss with respect to y, x, bias and u;
- ggx and ggbias are the gradients of the loss with respect to gx and gbias. The backward of the
  backward starts from them;
- ggy is the gradient of the loss with respect to gy. The backward of the backward returns it, and
  also other gradients with respect to x and bias, which are called gx and gbias, too.

Formulas:

- Forward: y = f(u).
- Backward: gx = gy f'(u), and gbias is the sum of gx over the rows.
- Backward of the backward: let s = ggx + ggbias. Then ggy = s f'(u) and gx = s gy f''(u). gbias is
  the sum of this gx over the rows.

Each of the three passes is one kernel, which reads every input once and writes every output once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgn_kernels import formulas, reference
from fastgn_kernels.dispatch import (
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
from fastgn_kernels.maths import TABLE, in_pytorch

BLOCK = 1024
"""Number of elements that a Triton program processes if the activation has no bias. Each thread has
8 elements, so it reads 16 bytes of a 16-bit dtype at once."""
TILE = 2048
"""Number of elements that a Triton program processes at a time if the activation has a bias. They
form a tile of rows and columns."""

WITH_PARAMETER = ("softplus", "elu", "leaky_relu")
"""Kinds of activation for which `activation` takes a parameter, such as the slope of leaky_relu."""


@triton.jit
def _process_tile(
    x_pointer, gy_pointer, ggx_pointer, out_pointer, gx_pointer, offsets, inside, bias, ggbias,
    VALUE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, MULTIPLY: tl.constexpr,
    PARAMETER: tl.constexpr, ORDER: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
):  # fmt: skip
    """Computes one tile of the outputs and stores it. A tile is what a program processes at a time.

    - x_pointer: input x of the activation.
    - gy_pointer: gradient of the loss with respect to the output y. Orders 1 and 2 read it.
    - ggx_pointer: gradient of the loss with respect to gx, the result of the backward. Only order 2
      reads it.
    - out_pointer: y for order 0, gx for order 1, and the gradient with respect to gy for order 2.
    - gx_pointer: gradient with respect to x for order 2. Other orders do not use it.
    - offsets, inside: positions of the tile's elements, and a mask that is False for padding.
    - bias, ggbias: the bias, and the gradient of the loss with respect to the bias gradient. Each
      is a row of the tile's width, or 0.0 if the activation has no bias.
    - VALUE, FIRST, SECOND: Triton functions for the activation and its two derivatives.
    - MULTIPLY: Triton function that multiplies a gradient by one of these derivatives.
    - PARAMETER: the activation's parameter, such as the slope of leaky_relu.
    - ORDER: 0 for the forward, 1 for the backward and 2 for the backward of the backward.

    Returns u = x + bias for order 0, otherwise the gradient with respect to u. The sum of this
    gradient over the rows is the gradient of the bias.
    """
    u = tl.load(x_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE) + bias
    if ORDER == 0:
        tl.store(out_pointer + offsets, VALUE(u, PARAMETER), mask=inside)
        return u
    gy = tl.load(gy_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE)
    first = FIRST(u, PARAMETER)
    if ORDER == 1:
        gu = MULTIPLY(gy, first)
        tl.store(out_pointer + offsets, gu, mask=inside)
        return tl.where(inside, gu, 0.0)
    s = tl.load(ggx_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE) + ggbias
    gu = MULTIPLY(s * gy, SECOND(u, PARAMETER))
    tl.store(out_pointer + offsets, MULTIPLY(s, first), mask=inside)
    tl.store(gx_pointer + offsets, gu, mask=inside)
    return tl.where(inside, gu, 0.0)


@triton.jit
def _activation_kernel(
    x_pointer, gy_pointer, ggx_pointer, out_pointer, gx_pointer, num_elements,
    VALUE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, MULTIPLY: tl.constexpr,
    PARAMETER: tl.constexpr, ORDER: tl.constexpr, COMPUTE_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes an activation without a bias, or one of its two derivatives.

    ORDER is 0 for the forward, 1 for the backward and 2 for the backward of the backward. x has
    num_elements elements, of which each program processes BLOCK. `_process_tile` describes the
    other arguments.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _process_tile(
        x_pointer, gy_pointer, ggx_pointer, out_pointer, gx_pointer, offsets,
        offsets < num_elements, 0.0, 0.0,
        VALUE, FIRST, SECOND, MULTIPLY, PARAMETER, ORDER, COMPUTE_DTYPE,
    )  # fmt: skip


@triton.jit
def _bias_activation_kernel(
    x_pointer, bias_pointer, gy_pointer, ggx_pointer, ggbias_pointer, out_pointer, gx_pointer,
    partial_sums_pointer, rows, columns,
    VALUE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, MULTIPLY: tl.constexpr,
    PARAMETER: tl.constexpr, ORDER: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    HAS_GGBIAS: tl.constexpr, BIAS_GRAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes an activation with a bias, or one of its two derivatives.

    If BIAS_GRAD is True, each program also computes the sum of the bias gradient over its own rows,
    and stores this partial sum at partial_sums_pointer.

    ORDER is 0 for the forward, 1 for the backward and 2 for the backward of the backward. rows,
    columns: shape of x as a matrix. HAS_GGBIAS: whether the kernel reads ggbias_pointer. If not,
    ggbias is zero. `_process_tile` describes the other arguments.
    """
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    bias = tl.load(bias_pointer + column, mask=column < columns, other=0.0)
    bias = bias.to(COMPUTE_DTYPE)[None, :]
    ggbias = tl.zeros((1, BLOCK_COLUMNS), COMPUTE_DTYPE)
    if HAS_GGBIAS:
        ggbias = tl.load(ggbias_pointer + column, mask=column < columns, other=0.0)
        ggbias = ggbias.to(COMPUTE_DTYPE)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE_DTYPE)
    for start in range(tl.program_id(1) * BLOCK_ROWS, rows, tl.num_programs(1) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        offsets = row[:, None].to(tl.int64) * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        gu = _process_tile(
            x_pointer, gy_pointer, ggx_pointer, out_pointer, gx_pointer, offsets, inside, bias,
            ggbias, VALUE, FIRST, SECOND, MULTIPLY, PARAMETER, ORDER, COMPUTE_DTYPE,
        )  # fmt: skip
        if BIAS_GRAD:
            total += gu
    if BIAS_GRAD:
        # each program stores its own sum, because the order of atomic additions varies between runs
        to = partial_sums_pointer + tl.program_id(1).to(tl.int64) * columns + column
        tl.store(to, tl.sum(total, axis=0), mask=column < columns)


def _run_kernel(
    order: int, x: Tensor, bias: Tensor | None, kind: str, parameter: float, weight_grads: bool,
    gy: Tensor | None = None, ggx: Tensor | None = None, ggbias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes an activation or one of its two derivatives with a Triton kernel.

    - order: 0 for the forward, 1 for the backward, 2 for the backward of the backward.
    - kind, parameter: name of the activation, and its parameter, such as the slope of leaky_relu.
    - weight_grads: whether to compute gbias, the gradient of the bias.
    - gy: gradient of the loss with respect to the output y. None for order 0.
    - ggx, ggbias: gradients of the loss with respect to gx and gbias, the results of the backward.
      Only order 2 uses them.

    Returns three tensors:

    - Order 0: (y, empty, empty).
    - Order 1: (gx, empty, gbias), the gradients with respect to x and bias.
    - Order 2: (ggy, gx, gbias), the gradients with respect to gy, x and bias.

    "empty" is a tensor without elements. gbias is empty if it is not computed.
    """
    out, gx, gbias = _allocate_outputs(order, x, bias, weight_grads)
    maths = (*TABLE[kind][:4], parameter, order, triton_compute_dtype(x.dtype))
    x = with_strides_of(x, out)
    # a kernel needs a tensor for every argument, so x takes the place of a gy or ggx that is None
    gy = with_strides_of(gy, out) if gy is not None else x
    ggx = with_strides_of(ggx, out) if ggx is not None else x
    if bias is None:
        if x.numel():
            grid = (triton.cdiv(x.numel(), BLOCK),)
            _activation_kernel[grid](x, gy, ggx, out, gx, x.numel(), *maths, BLOCK=BLOCK, **LAUNCH)
        return out, gx, gbias
    columns = x.shape[-1]
    if not x.numel():
        return out, gx, gbias.zero_()
    block_columns = min(triton.next_power_of_2(columns), 256)
    block_rows = TILE // block_columns
    blocks = triton.cdiv(columns, block_columns)
    rows = x.numel() // columns
    strips = count_strips(rows, block_rows, blocks)
    shape = (strips if weight_grads else 0, columns)
    partial_sums = torch.empty(shape, dtype=compute_dtype(x.dtype), device=x.device)
    bias = bias.contiguous()
    _bias_activation_kernel[(blocks, strips)](
        x, bias, gy, ggx, ggbias.contiguous() if ggbias is not None else bias, out, gx,
        partial_sums, rows, columns, *maths, HAS_GGBIAS=ggbias is not None, BIAS_GRAD=weight_grads,
        BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, **LAUNCH,
    )  # fmt: skip
    return out, gx, partial_sums.sum(0).to(bias.dtype) if weight_grads else gbias


def _run_plain(
    order: int, x: Tensor, bias: Tensor | None, kind: str, parameter: float, weight_grads: bool,
    gy: Tensor | None = None, ggx: Tensor | None = None, ggbias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes an activation or one of its two derivatives with PyTorch's operators.

    Arguments and results are those of `_run_kernel`, which runs a Triton kernel instead.
    """
    out, gx, gbias = _allocate_outputs(order, x, bias, weight_grads)
    value, first, second, multiply = map(in_pytorch, TABLE[kind][:4])
    u = x.to(compute_dtype(x.dtype))
    if bias is not None:
        u = u + bias.to(u.dtype)
    if gy is None:
        return out.copy_(value(u, parameter)), gx, gbias
    if ggx is None:
        gu = multiply(gy.to(u.dtype), first(u, parameter))
        out.copy_(gu)
    else:
        s = ggx.to(u.dtype)
        if ggbias is not None:
            s = s + ggbias.to(u.dtype)
        gu = multiply(s * gy.to(u.dtype), second(u, parameter))
        gx.copy_(gu)
        out.copy_(multiply(s, first(u, parameter)))
    if bias is not None and weight_grads:
        gbias.copy_(gu.flatten(0, -2).sum(0) if gu.ndim > 1 else gu)
    return out, gx, gbias


def _allocate_outputs(
    order: int, x: Tensor, bias: Tensor | None, weight_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns uninitialised tensors for the three results of `_run_kernel`.

    order: 0 for the forward, 1 for the backward, 2 for the backward of the backward. weight_grads:
    whether the gradient of the bias is computed.

    A result that is not computed is a tensor without elements, because a custom op cannot return
    None. The results have the strides of `x` if there is no bias and the elements of `x` fill its
    memory without holes.
    """
    memory_format = torch.preserve_format if bias is None else torch.contiguous_format
    out = torch.empty_like(x, memory_format=memory_format)
    gx = torch.empty_like(x, memory_format=memory_format) if order == 2 else x.new_empty(0)
    gbias = torch.empty_like(bias) if weight_grads and bias is not None else x.new_empty(0)
    return out, gx, gbias


@define_op("fastgn::activation")
def _activation(x: Tensor, bias: Tensor | None, kind: str, parameter: float) -> Tensor:
    return (_run_kernel if runs_triton(x) else _run_plain)(0, x, bias, kind, parameter, False)[0]


@define_op("fastgn::activation_bwd")
def _activation_bwd(
    gy: Tensor, x: Tensor, bias: Tensor | None, kind: str, parameter: float, weight_grads: bool
) -> tuple[Tensor, Tensor]:
    run = _run_kernel if runs_triton(x) else _run_plain
    gx, _, gbias = run(1, x, bias, kind, parameter, weight_grads, gy)
    return gx, gbias


@define_op("fastgn::activation_bwd_bwd")
def _activation_bwd_bwd(
    ggx: Tensor, ggbias: Tensor | None, gy: Tensor, x: Tensor, bias: Tensor | None, kind: str,
    parameter: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    run = _run_kernel if runs_triton(x) else _run_plain
    ggy, gx, gbias = run(2, x, bias, kind, parameter, weight_grads, gy, ggx, ggbias)
    return ggy, gx, gbias


@_activation.register_fake
def _(x: Tensor, bias: Tensor | None, kind: str, parameter: float) -> Tensor:
    return _allocate_outputs(0, x, bias, False)[0]


@_activation_bwd.register_fake
def _(
    gy: Tensor, x: Tensor, bias: Tensor | None, kind: str, parameter: float, weight_grads: bool
) -> tuple[Tensor, Tensor]:
    gx, _, gbias = _allocate_outputs(1, x, bias, weight_grads)
    return gx, gbias


@_activation_bwd_bwd.register_fake
def _(
    ggx: Tensor, ggbias: Tensor | None, gy: Tensor, x: Tensor, bias: Tensor | None, kind: str,
    parameter: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _allocate_outputs(2, x, bias, weight_grads)


def _backward(options: tuple, saved: tuple, wanted: tuple[bool, ...], gy: Tensor) -> tuple:
    """Returns the gradient of each input of the forward op, which takes (x, bias, kind, parameter).

    gy: gradient of the loss with respect to the output. `dispatch.register_derivative` describes
    the other arguments.
    """
    args = (*saved, *options[-2:], wanted[1])
    gx, gbias = run_op(_activation_bwd, formulas.activation_bwd, gy, *args)
    return gx, gbias if wanted[1] else None, None, None


def _backward_backward(
    options: tuple, saved: tuple, wanted: tuple[bool, ...],
    ggx: Tensor | None, ggbias: Tensor | None,
) -> tuple:  # fmt: skip
    """Returns the gradient of each input of the backward op.

    The inputs are (gy, x, bias, kind, parameter, weight_grads). The last three are not tensors, so
    their gradients are None.

    ggx, ggbias: gradients of the loss with respect to the outputs of the backward op. None means
    zero. `dispatch.register_derivative` describes the other arguments.
    """
    gy, x, bias = saved
    if ggx is None:
        ggx = torch.zeros_like(x)
    kind, parameter, had_bias_grad = options[-3:]
    args = (ggbias if had_bias_grad else None, gy, x, bias, kind, parameter, wanted[2])
    ggy, gx, gbias = run_op(_activation_bwd_bwd, formulas.activation_bwd_bwd, ggx, *args)
    return ggy, gx, gbias if wanted[2] else None, None, None, None


register_derivative(_activation, save=lambda inputs, y: inputs[:2], backward=_backward)
register_derivative(
    _activation_bwd,
    save=lambda inputs, outputs: inputs[:3],
    backward=_backward_backward,
)
register_third_derivative(_activation_bwd_bwd, "activation", formulas.activation_bwd_bwd)


def activation(
    x: Tensor, kind: str, bias: Tensor | None = None, parameter: float | None = None
) -> Tensor:
    """Returns f(x + bias) for an activation function f.

    The value, the first derivative and the second derivative take one kernel each. They are
    computed in float32, or in float64 if x is float64. In code compiled by torch.compile, this
    function calls `reference.activation` instead. Inductor fuses the operators of that function
    with the operations around them.

    Args:
        x: tensor of any shape (..., C) and any floating-point dtype.
        kind: one of ``fastgn_kernels.ACTIVATIONS``.
        bias: (C,), any floating-point dtype. None means that there is no bias. The kernel that
            computes the gradient of x also computes the gradient of bias.
        parameter: beta of softplus, alpha of elu or negative slope of leaky_relu. If None,
            PyTorch's default is used.

    Returns:
        A tensor with the shape and dtype of x.

    Raises:
        ValueError: if kind is unknown, if a parameter is given for a kind that has none, or if the
            shape of bias does not fit.
        TypeError: if a tensor is not floating-point.
    """
    if kind not in TABLE:
        raise ValueError(f"activation: kind {kind!r} is not one of {', '.join(TABLE)}")
    if parameter is not None and kind not in WITH_PARAMETER:
        # without an error here, compiled code would silently ignore the argument `parameter`
        raise ValueError(
            f"activation: {kind} has no parameter, only {', '.join(WITH_PARAMETER)} have one: "
            "leave out the argument parameter"
        )
    if bias is not None and (bias.ndim != 1 or bias.shape != x.shape[-1:]):
        raise ValueError(
            f"activation: bias has shape {tuple(bias.shape)}, should be {tuple(x.shape[-1:])}"
        )
    check_floating("activation", x=x, bias=bias)
    if parameter is None:
        parameter = TABLE[kind].parameter
    if is_compiling():
        return reference.activation(x, kind, bias, parameter)
    return run_op(_activation, formulas.activation, x, bias, kind, parameter)


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """Returns gelu(x + bias), with the shape and dtype of x, as `activation` does.

    approximate: "none" for the exact function with erf, or "tanh" for its approximation with tanh,
    as in ``F.gelu``. Raises ValueError for any other value. bias: see `activation`.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate {approximate!r} should be 'none' or 'tanh'")
    return activation(x, "gelu" if approximate == "none" else "gelu_tanh", bias)


def silu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns silu(x + bias), with the shape and dtype of x. `activation` describes the
    arguments."""
    return activation(x, "silu", bias)
