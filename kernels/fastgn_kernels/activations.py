"""Activation functions with an optional fused bias, and their first and second derivatives.

Names: u = x + bias is the input of the activation f, and y = f(u). gy is the gradient of the loss
with respect to y; gx and gbias are those with respect to x and bias. ggx and ggbias are the
cotangents of gx and gbias: the gradients that the second backward pass starts from. The results of
that pass are ggy, the gradient with respect to gy, and again gx and gbias.

Forward: y = f(u).
Backward: gx = gy f'(u), and gbias is the sum of gx over the rows.
Backward of the backward, with s = ggx + ggbias: ggy = s f'(u), gx = s gy f''(u), and gbias is the
sum of that gx over the rows.

Each of these is one kernel, which reads every input once and writes every output once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgn_kernels import reference
from fastgn_kernels.dispatch import (
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
from fastgn_kernels.maths import TABLE, in_pytorch

BLOCK = 1024
"""Number of elements per Triton program if the activation has no bias. Each thread has 8 elements,
so it reads 16 bytes of a 16-bit dtype at once."""
TILE = 2048
"""Number of elements per Triton program if the activation has a bias. The elements form a tile of
rows and columns."""

WITH_PARAMETER = ("softplus", "elu", "leaky_relu")
"""Kinds of activation that take a parameter."""


@triton.jit
def _process_tile(
    x_pointer, gy_pointer, ggx_pointer, out_pointer, gx_pointer, offsets, inside, bias, ggbias,
    VALUE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, MULTIPLY: tl.constexpr,
    PARAMETER: tl.constexpr, ORDER: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes the outputs of one tile, and returns the gradient with respect to u = x + bias.

    The sum of this gradient over the rows is gbias. ORDER is 0 for the forward, 1 for the backward
    and 2 for the backward of the backward. The forward returns u instead of a gradient. The tensor
    `out` is y for order 0, gx for order 1 and ggy for order 2. VALUE, FIRST, SECOND, MULTIPLY: the
    functions of a `maths.Activation`.
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
    """Computes the forward, the backward or the backward of the backward of an activation without a
    bias."""
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
    """Computes the forward, the backward or the backward of the backward of an activation with a
    bias.

    Each program also writes a partial sum of the bias gradient.
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
        # partial sums instead of atomic additions, so that every run gives the same bits
        to = partial_sums_pointer + tl.program_id(1).to(tl.int64) * columns + column
        tl.store(to, tl.sum(total, axis=0), mask=column < columns)


def _run_kernel(
    order: int, x: Tensor, bias: Tensor | None, kind: str, parameter: float, weight_grads: bool,
    gy: Tensor | None = None, ggx: Tensor | None = None, ggbias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes an activation or one of its two derivatives with a Triton kernel.

    order: 0 for the forward, 1 for the backward, 2 for the backward of the backward. kind: name of
    the activation. parameter: parameter of that activation, such as the slope of leaky_relu.
    weight_grads: whether to compute gbias. Returns (y, empty, empty) for order 0, (gx, empty,
    gbias) for order 1 and (ggy, gx, gbias) for order 2. "empty" is a tensor without elements, and
    so is gbias if it is not computed.
    """
    out, gx, gbias = _allocate_outputs(order, x, bias, weight_grads)
    maths = (*TABLE[kind][:4], parameter, order, triton_compute_dtype(x.dtype))
    x = with_strides_of(x, out)
    # a kernel needs a tensor for every argument, so it gets x for those that it will not read
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

    The arguments and results are those of `_run_kernel`, which runs a Triton kernel.
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

    order: 0 for the forward, 1 for the backward, 2 for the backward of the backward. A result that
    is not computed is a tensor without elements, because a custom op cannot return None. Without a
    bias, the results have the strides of `x` if these leave no holes in memory.
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
    """Returns the gradients of the forward op's inputs. `register_derivative` describes the
    arguments."""
    gx, gbias = _activation_bwd(gy, *saved, *options[-2:], wanted[1])
    return gx, gbias if wanted[1] else None, None, None


def _backward_backward(
    options: tuple, saved: tuple, wanted: tuple[bool, ...],
    ggx: Tensor | None, ggbias: Tensor | None,
) -> tuple:  # fmt: skip
    """Returns the gradients of the backward op's inputs. `register_derivative` describes the
    arguments."""
    gy, x, bias = saved
    if ggx is None:
        ggx = torch.zeros_like(x)
    kind, parameter, had_bias_grad = options[-3:]
    ggy, gx, gbias = _activation_bwd_bwd(
        ggx, ggbias if had_bias_grad else None, gy, x, bias, kind, parameter, wanted[2]
    )
    return ggy, gx, gbias if wanted[2] else None, None, None, None


register_derivative(
    _activation, "activation", save=lambda inputs, y: inputs[:2], backward=_backward
)
register_derivative(
    _activation_bwd,
    "activation",
    save=lambda inputs, outputs: inputs[:3],
    backward=_backward_backward,
)
forbid_third_derivative(_activation_bwd_bwd, "activation")


def activation(
    x: Tensor, kind: str, bias: Tensor | None = None, parameter: float | None = None
) -> Tensor:
    """Returns f(x + bias) for an activation function f.

    The value, the first derivative and the second derivative take one kernel each. They are
    computed in float32, or in float64 if x is float64. In code compiled by torch.compile the
    function calls `reference.activation` instead, whose operators Inductor fuses with their
    neighbours.

    Args:
        x: tensor of any shape (..., C) and any floating-point dtype.
        kind: one of ``fastgn_kernels.ACTIVATIONS``.
        bias: (C,), any floating-point dtype. The kernel that computes the gradient of x also
            computes the gradient of bias.
        parameter: beta of softplus, alpha of elu or negative slope of leaky_relu. If None,
            PyTorch's default is used.

    Returns:
        A tensor with the shape and dtype of x.

    Raises:
        ValueError: if kind is unknown, if a parameter is given for a kind that has none, or if the
            shape of bias does not fit.
        TypeError: if a tensor is not floating-point.
        RuntimeError: if the result is differentiated three times.
    """
    if kind not in TABLE:
        raise ValueError(f"activation: kind {kind!r} is not one of {', '.join(TABLE)}")
    if parameter is not None and kind not in WITH_PARAMETER:
        # an error, because reference.activation would ignore the parameter in compiled code
        raise ValueError(
            f"activation: {kind} has no parameter, only {', '.join(WITH_PARAMETER)} have one"
        )
    if bias is not None and (bias.ndim != 1 or bias.shape != x.shape[-1:]):
        raise ValueError(
            f"activation: bias is {tuple(bias.shape)}, should be {tuple(x.shape[-1:])}"
        )
    check_floating("activation", x=x, bias=bias)
    if parameter is None:
        parameter = TABLE[kind].parameter
    if is_compiling():
        return reference.activation(x, kind, bias, parameter)
    check_no_forward_mode("activation", x, bias)
    return _activation(x, bias, kind, parameter)


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """Returns gelu(x + bias), with the shape and dtype of x; see `activation`.

    approximate: "none" for the exact function with erf, or "tanh", as in ``F.gelu``. Raises
    ValueError for any other value.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate {approximate!r} should be 'none' or 'tanh'")
    return activation(x, "gelu" if approximate == "none" else "gelu_tanh", bias)


def silu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns silu(x + bias), with the shape and dtype of x; see `activation`."""
    return activation(x, "silu", bias)
