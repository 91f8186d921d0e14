"""Activations with an optional fused bias, three orders, one kernel body.

y = f(u), u = x + bias. First derivative: gx = gy f'(u), gbias = sum of gx over rows. Given the
cotangents (v, w) of (gx, gbias), with s = v + w: to gy: s f'(u); to x: s gy f''(u); to bias: its
sum over rows. Each pass reads every input once and writes every output once.
"""

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
    laid_out_as,
    no_forward_mode,
    no_third_derivative,
    round_up,
    runs_triton,
    strips,
    tl_wide,
    wide,
)
from fastgn_kernels.maths import TABLE, in_pytorch

BLOCK = 1024
"""Elements of a program without bias: 8 a thread, one 16-byte access at 16 bits."""
TILE = 2048
"""Elements of a tile with bias."""

WITH_PARAMETER = ("softplus", "elu", "leaky_relu")


@triton.jit
def _tile(
    x_ptr, gy_ptr, v_ptr, out_ptr, gx_ptr, offsets, inside, bias, w,
    VALUE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, TIMES: tl.constexpr,
    PARAMETER: tl.constexpr, ORDER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of one order; returns what the bias gradient sums."""
    u = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(WIDE) + bias
    if ORDER == 0:
        tl.store(out_ptr + offsets, VALUE(u, PARAMETER), mask=inside)
        return u
    gy = tl.load(gy_ptr + offsets, mask=inside, other=0.0).to(WIDE)
    first = FIRST(u, PARAMETER)
    if ORDER == 1:
        gu = TIMES(gy, first)
        tl.store(out_ptr + offsets, gu, mask=inside)
        return tl.where(inside, gu, 0.0)
    s = tl.load(v_ptr + offsets, mask=inside, other=0.0).to(WIDE) + w
    gu = TIMES(s * gy, SECOND(u, PARAMETER))
    tl.store(out_ptr + offsets, TIMES(s, first), mask=inside)
    tl.store(gx_ptr + offsets, gu, mask=inside)
    return tl.where(inside, gu, 0.0)


@triton.jit
def _activation_kernel(
    x_ptr, gy_ptr, v_ptr, out_ptr, gx_ptr, num,
    VALUE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, TIMES: tl.constexpr,
    PARAMETER: tl.constexpr, ORDER: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _tile(x_ptr, gy_ptr, v_ptr, out_ptr, gx_ptr, offsets, offsets < num, 0.0, 0.0,
          VALUE, FIRST, SECOND, TIMES, PARAMETER, ORDER, WIDE)  # fmt: skip


@triton.jit
def _bias_activation_kernel(
    x_ptr, bias_ptr, gy_ptr, v_ptr, w_ptr, out_ptr, gx_ptr, partial_ptr, rows, columns,
    VALUE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, TIMES: tl.constexpr,
    PARAMETER: tl.constexpr, ORDER: tl.constexpr, WIDE: tl.constexpr, HAS_W: tl.constexpr,
    BIAS_GRAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(WIDE)[None, :]
    w = tl.zeros((1, BLOCK_C), WIDE)
    if HAS_W:
        w = tl.load(w_ptr + column, mask=column < columns, other=0.0).to(WIDE)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), WIDE)
    for start in range(tl.program_id(1) * BLOCK_R, rows, tl.num_programs(1) * BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        offsets = row[:, None].to(tl.int64) * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        gu = _tile(x_ptr, gy_ptr, v_ptr, out_ptr, gx_ptr, offsets, inside, bias, w,
                   VALUE, FIRST, SECOND, TIMES, PARAMETER, ORDER, WIDE)  # fmt: skip
        if BIAS_GRAD:
            total += gu
    if BIAS_GRAD:
        # partial sums rather than atomics: the same bits in every run
        to = partial_ptr + tl.program_id(1).to(tl.int64) * columns + column
        tl.store(to, tl.sum(total, axis=0), mask=column < columns)


def _launch(
    order: int, x: Tensor, bias: Tensor | None, kind: str, parameter: float, weight_grads: bool,
    gy: Tensor | None = None, v: Tensor | None = None, w: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The order's outputs: (y, -, -), (gx, -, gbias) or (ggy, gx, gbias); gbias only with
    weight_grads."""
    out, gx, gbias = _outputs(order, x, bias, weight_grads)
    maths = (*TABLE[kind][:4], parameter, order, tl_wide(x.dtype))
    x = laid_out_as(x, out)
    # an argument that the order does not read is still an argument
    gy = laid_out_as(gy, out) if gy is not None else x
    v = laid_out_as(v, out) if v is not None else x
    if bias is None:
        if x.numel():
            grid = (round_up(x.numel(), BLOCK),)
            _activation_kernel[grid](x, gy, v, out, gx, x.numel(), *maths, BLOCK=BLOCK, **LAUNCH)
        return out, gx, gbias
    columns = x.shape[-1]
    if not x.numel():
        return out, gx, gbias.zero_()
    block_c = min(triton.next_power_of_2(columns), 256)
    block_r = TILE // block_c
    blocks = round_up(columns, block_c)
    rows = x.numel() // columns
    num = strips(rows, block_r, blocks)
    sums = torch.empty(num if weight_grads else 0, columns, dtype=wide(x.dtype), device=x.device)
    bias = bias.contiguous()
    _bias_activation_kernel[(blocks, num)](
        x, bias, gy, v, w.contiguous() if w is not None else bias, out, gx, sums, rows, columns,
        *maths, HAS_W=w is not None, BIAS_GRAD=weight_grads, BLOCK_R=block_r, BLOCK_C=block_c,
        **LAUNCH,
    )  # fmt: skip
    return out, gx, sums.sum(0).to(bias.dtype) if weight_grads else gbias


def _plain(
    order: int, x: Tensor, bias: Tensor | None, kind: str, parameter: float, weight_grads: bool,
    gy: Tensor | None = None, v: Tensor | None = None, w: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `_launch` computes, by PyTorch's operators."""
    out, gx, gbias = _outputs(order, x, bias, weight_grads)
    value, first, second, times = map(in_pytorch, TABLE[kind][:4])
    u = x.to(wide(x.dtype))
    if bias is not None:
        u = u + bias.to(u.dtype)
    if gy is None:
        return out.copy_(value(u, parameter)), gx, gbias
    if v is None:
        gu = times(gy.to(u.dtype), first(u, parameter))
        out.copy_(gu)
    else:
        s = v.to(u.dtype)
        if w is not None:
            s = s + w.to(u.dtype)
        gu = times(s * gy.to(u.dtype), second(u, parameter))
        gx.copy_(gu)
        out.copy_(times(s, first(u, parameter)))
    if bias is not None and weight_grads:
        gbias.copy_(gu.flatten(0, -2).sum(0) if gu.ndim > 1 else gu)
    return out, gx, gbias


def _outputs(order: int, x: Tensor, bias: Tensor | None, weight_grads: bool) -> tuple[Tensor, ...]:
    """Room for (y or gx or ggy, gx of order 2, gbias): empty tensors where there is none, since
    custom ops return tensors. In the strides of `x` where those have no holes."""
    strides = torch.preserve_format if bias is None else torch.contiguous_format
    out = torch.empty_like(x, memory_format=strides)
    gx = torch.empty_like(x, memory_format=strides) if order == 2 else x.new_empty(0)
    gbias = torch.empty_like(bias) if weight_grads and bias is not None else x.new_empty(0)
    return out, gx, gbias


@define("fastgn::activation")
def _activation(x: Tensor, bias: Tensor | None, kind: str, parameter: float) -> Tensor:
    return (_launch if runs_triton(x) else _plain)(0, x, bias, kind, parameter, False)[0]


@define("fastgn::activation_bwd")
def _activation_bwd(
    gy: Tensor, x: Tensor, bias: Tensor | None, kind: str, parameter: float, weight_grads: bool
) -> tuple[Tensor, Tensor]:
    body = _launch if runs_triton(x) else _plain
    gx, _, gbias = body(1, x, bias, kind, parameter, weight_grads, gy)
    return gx, gbias


@define("fastgn::activation_bwd_bwd")
def _activation_bwd_bwd(
    v: Tensor, w: Tensor | None, gy: Tensor, x: Tensor, bias: Tensor | None, kind: str,
    parameter: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    body = _launch if runs_triton(x) else _plain
    ggy, gx, gbias = body(2, x, bias, kind, parameter, weight_grads, gy, v, w)
    return ggy, gx, gbias


@_activation.register_fake
def _(x: Tensor, bias: Tensor | None, kind: str, parameter: float) -> Tensor:
    return _outputs(0, x, bias, False)[0]


@_activation_bwd.register_fake
def _(
    gy: Tensor, x: Tensor, bias: Tensor | None, kind: str, parameter: float, weight_grads: bool
) -> tuple[Tensor, Tensor]:
    gx, _, gbias = _outputs(1, x, bias, weight_grads)
    return gx, gbias


@_activation_bwd_bwd.register_fake
def _(
    v: Tensor, w: Tensor | None, gy: Tensor, x: Tensor, bias: Tensor | None, kind: str,
    parameter: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    ggy, gx, gbias = _outputs(2, x, bias, weight_grads)
    return ggy, gx, gbias


def _backward(options: tuple, saved: tuple, wanted: tuple[bool, ...], gy: Tensor) -> tuple:
    gx, gbias = _activation_bwd(gy, *saved, *options[-2:], wanted[1])
    return gx, gbias if wanted[1] else None, None, None


def _backward_backward(
    options: tuple, saved: tuple, wanted: tuple[bool, ...], v: Tensor | None, w: Tensor | None
) -> tuple:
    gy, x, bias = saved
    if v is None:
        v = torch.zeros_like(x)
    kind, parameter, had_bias_grad = options[-3:]
    ggy, gx, gbias = _activation_bwd_bwd(
        v, w if had_bias_grad else None, gy, x, bias, kind, parameter, wanted[2]
    )
    return ggy, gx, gbias if wanted[2] else None, None, None, None


differentiable(_activation, "activation", save=lambda inputs, y: inputs[:2], backward=_backward)
differentiable(
    _activation_bwd,
    "activation",
    save=lambda inputs, outputs: inputs[:3],
    backward=_backward_backward,
)
no_third_derivative(_activation_bwd_bwd, "activation")


def activation(
    x: Tensor, kind: str, bias: Tensor | None = None, parameter: float | None = None
) -> Tensor:
    """f(x + bias) in one pass, and one pass for each of its two derivatives.

    x: any shape, any floating dtype, computed in float32 or wider. kind: see
    ``fastgn_kernels.ACTIVATIONS``. bias: (C,), over the last dimension of x; its gradient is summed
    in the backward's own pass. parameter: softplus' beta, elu's alpha, leaky_relu's slope; None:
    PyTorch's default. Returns x's shape and dtype, whatever the bias' dtype.

    In a compiled region this is `reference.activation`, which Inductor fuses. Raises ValueError on
    an unknown kind, a parameter for a kind without one or a bias of another size, TypeError on
    integers; a third derivative raises RuntimeError.
    """
    if kind not in TABLE:
        raise ValueError(f"activation: kind {kind!r} is not one of {', '.join(TABLE)}")
    if parameter is not None and kind not in WITH_PARAMETER:
        # reference.activation, and so a compiled region, knows none either
        raise ValueError(f"activation: {kind} has no parameter, {', '.join(WITH_PARAMETER)} have")
    if bias is not None and (bias.ndim != 1 or bias.shape != x.shape[-1:]):
        raise ValueError(
            f"activation: bias is {tuple(bias.shape)}, should be {tuple(x.shape[-1:])}"
        )
    is_floating("activation", x=x, bias=bias)
    if parameter is None:
        parameter = TABLE[kind].parameter
    if inlines():
        return reference.activation(x, kind, bias, parameter)
    no_forward_mode("activation", x, bias)
    return _activation(x, bias, kind, parameter)


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(x + bias), see `activation`. approximate: "none" (erf) or "tanh", as in PyTorch."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate {approximate!r} should be 'none' or 'tanh'")
    return activation(x, "gelu" if approximate == "none" else "gelu_tanh", bias)


def silu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(x + bias), see `activation`."""
    return activation(x, "silu", bias)
