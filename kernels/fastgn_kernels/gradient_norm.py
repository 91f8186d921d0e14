"""The input-gradient penalty: each sample's L1 or L2 norm of a gradient, three orders.

L1: sum |g|; gives back n sign(g); given the cotangent v of that, to n: sum v sign(g), to g: zero.
L2, with u = g / norm, or 0 where the norm is 0: gives back n u; to n: s = sum u v; to g:
n (v - u s) / norm.
Every pass reads each input once and writes each output once, but L2's last: s must be known before
the first element of the result, so that g and v are read twice, by one kernel after the other.
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

TILE = 1024
"""Elements of a tile: 8 a thread, one 16-byte access at 16 bits."""


@triton.jit
def _inverse(norm_ptr, row, rows, L1: tl.constexpr, WIDE: tl.constexpr):
    """1 / norm of each sample, 0 where the norm is 0; for L1, which has no use for it, 1."""
    if L1:
        return tl.full(row.shape, 1.0, WIDE)
    norm = tl.load(norm_ptr + row, mask=row < rows, other=1.0).to(WIDE)
    return tl.where(norm == 0, 0.0, 1.0 / tl.where(norm == 0, 1.0, norm))


@triton.jit
def _direction(g, inverse, L1: tl.constexpr):
    """sign(g), or u."""
    if L1:
        # NaN to 0, as PyTorch's sign does
        return tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0)).to(g.dtype)
    return g * inverse


@triton.jit
def _gradient_norm_reduce_kernel(
    g_ptr, v_ptr, norm_ptr, partial_ptr, rows, columns,
    L1: tl.constexpr, HAS_V: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial sums over a strip of each sample: |g| or g^2, with v those of v sign(g) or v u."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    if HAS_V:
        inverse = _inverse(norm_ptr, row, rows, L1, WIDE)
    total = tl.zeros((BLOCK_R, BLOCK_C), WIDE)
    start = tl.program_id(1).to(tl.int64) * BLOCK_C
    for first in range(start, columns, tl.num_programs(1) * BLOCK_C):
        column = (first + tl.arange(0, BLOCK_C).to(tl.int64))[None, :]
        offsets = row * columns + column
        inside = (row < rows) & (column < columns)
        g = tl.load(g_ptr + offsets, mask=inside, other=0.0).to(WIDE)
        if HAS_V:
            v = tl.load(v_ptr + offsets, mask=inside, other=0.0).to(WIDE)
            total += _direction(g, inverse, L1) * v
        else:
            total += tl.where(g < 0, -g, g) if L1 else g * g
    # partial sums rather than atomics: the same bits in every run
    to = partial_ptr + row * tl.num_programs(1) + tl.program_id(1)
    tl.store(to, tl.sum(total, axis=1, keep_dims=True), mask=row < rows)


@triton.jit
def _gradient_norm_map_kernel(
    n_ptr, n_stride, g_ptr, v_ptr, norm_ptr, s_ptr, out_ptr, rows, columns,
    L1: tl.constexpr, HAS_V: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """n sign(g) or n u; with v n (v - u s) / norm."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    n = tl.load(n_ptr + row * n_stride, mask=row < rows, other=0.0).to(WIDE)
    inverse = _inverse(norm_ptr, row, rows, L1, WIDE)
    if HAS_V:
        s = tl.load(s_ptr + row, mask=row < rows, other=0.0).to(WIDE)
    start = tl.program_id(1).to(tl.int64) * BLOCK_C
    for first in range(start, columns, tl.num_programs(1) * BLOCK_C):
        column = (first + tl.arange(0, BLOCK_C).to(tl.int64))[None, :]
        offsets = row * columns + column
        inside = (row < rows) & (column < columns)
        direction = _direction(
            tl.load(g_ptr + offsets, mask=inside, other=0.0).to(WIDE), inverse, L1
        )
        if HAS_V:
            v = tl.load(v_ptr + offsets, mask=inside, other=0.0).to(WIDE)
            tl.store(out_ptr + offsets, n * ((v - direction * s) * inverse), mask=inside)
        else:
            tl.store(out_ptr + offsets, n * direction, mask=inside)


def _tiles(g: Tensor, ord: int) -> tuple[int, int, dict[str, Any]]:
    """(rows, columns, constants) of a kernel's tiles: several samples a program where small."""
    rows, columns = g.shape[0], math.prod(g.shape[1:])
    block_c = min(triton.next_power_of_2(columns), TILE)
    constants = {"L1": ord == 1, "WIDE": tl_wide(g.dtype)}
    return rows, columns, constants | {"BLOCK_R": TILE // block_c, "BLOCK_C": block_c}


def _reduce(g: Tensor, ord: int, v: Tensor | None = None, norm: Tensor | None = None) -> Tensor:
    """Per sample: sum |g| or g^2; with v: sum v sign(g) or v u."""
    rows, columns, constants = _tiles(g, ord)
    blocks = round_up(rows, constants["BLOCK_R"])
    # all the threads that an H200 holds: one 16-byte load of each is in flight
    num = strips(columns, constants["BLOCK_C"], blocks, programs=2112)
    sums = torch.empty(rows, num, dtype=wide(g.dtype), device=g.device)
    _gradient_norm_reduce_kernel[(blocks, num)](
        g, v if v is not None else g, norm if norm is not None else sums, sums, rows, columns,
        HAS_V=v is not None, **constants, **LAUNCH,
    )  # fmt: skip
    return sums.sum(1) if num > 1 else sums[:, 0]


def _map(
    n: Tensor, g: Tensor, norm: Tensor | None, ord: int,
    v: Tensor | None = None, s: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """n sign(g) or n u; with v: n (v - u s) / norm."""
    out = torch.empty_like(g)
    rows, columns, constants = _tiles(g, ord)
    num = min(round_up(columns, constants["BLOCK_C"]), LARGEST_GRID_Y)
    _gradient_norm_map_kernel[(round_up(rows, constants["BLOCK_R"]), num)](
        n, n.stride(0), g, v if v is not None else g, norm if norm is not None else n,
        s if s is not None else n, out, rows, columns,
        HAS_V=v is not None, **constants, **LAUNCH,
    )  # fmt: skip
    return out


def _launch(
    order: int, g: Tensor, ord: int, n: Tensor | None = None, norm: Tensor | None = None,
    v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The order's outputs: (norm, -), (-, gradient) or (gn, gradient; none for L1)."""
    per_sample, out = _outputs(order, g, ord)
    if not g.numel():
        return per_sample.zero_(), out
    blocks = _in_blocks(g)
    if n is None:
        sums = _reduce(blocks, ord)
        return sums if ord == 1 else sums.sqrt(), out
    if v is None:
        return per_sample, _map(n, blocks, norm, ord)
    v = laid_out_as(v, blocks)
    s = _reduce(blocks, ord, v, norm)
    return s, out if ord == 1 else _map(n, blocks, norm, ord, v, s)


def _plain(
    order: int, g: Tensor, ord: int, n: Tensor | None = None, norm: Tensor | None = None,
    v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `_launch` computes, by PyTorch's operators."""
    per_sample, out = _outputs(order, g, ord)
    x = g.to(per_sample.dtype)
    rest = (g.shape[0], math.prod(g.shape[1:]))
    apart = (-1,) + (1,) * (g.ndim - 1)
    if n is None:
        sums = (x.abs() if ord == 1 else x * x).reshape(rest).sum(1)
        return per_sample.copy_(sums if ord == 1 else sums.sqrt()), out
    if norm is None:
        u = inverse = x.sign()
    else:
        inverse = torch.where(norm == 0, 0.0, 1.0 / norm).view(apart)
        u = x * inverse
    if v is None:
        return per_sample, out.copy_(n.view(apart) * u)
    v = v.to(x.dtype)
    s = per_sample.copy_((u * v).reshape(rest).sum(1))
    if ord == 1:
        return s, out
    return s, out.copy_(n.view(apart) * ((v - u * s.view(apart)) * inverse))


def _in_blocks(g: Tensor) -> Tensor:
    """g with each sample in one block of memory, whatever the order within: itself, as for
    channels_last images, or a contiguous copy."""
    if torch.empty_like(g, device="meta").stride() == g.stride():  # no holes
        if g.shape[0] < 2 or g.stride(0) == math.prod(g.shape[1:]):
            return g
    return g.contiguous()


def _outputs(order: int, g: Tensor, ord: int) -> tuple[Tensor, Tensor]:
    """Room for (norm or gn, gradient): empty tensors where there is none. Gradients have the
    strides of `_in_blocks`."""
    per_sample = g.new_empty(0 if order == 1 else g.shape[0], dtype=wide(g.dtype))
    has_gradient = order == 1 or (order == 2 and ord == 2)
    return per_sample, torch.empty_like(_in_blocks(g)) if has_gradient else g.new_empty(0)


def _body(g: Tensor) -> Any:
    return _launch if runs_triton(g) else _plain


@define("fastgn::gradient_norm")
def _gradient_norm(g: Tensor, ord: int) -> Tensor:
    return _body(g)(0, g, ord)[0]


@define("fastgn::gradient_norm_bwd")
def _gradient_norm_bwd(n: Tensor, g: Tensor, norm: Tensor | None, ord: int) -> Tensor:
    return _body(g)(1, g, ord, n, norm)[1]


@define("fastgn::gradient_norm_bwd_bwd")
def _gradient_norm_bwd_bwd(
    v: Tensor, n: Tensor, g: Tensor, norm: Tensor | None, ord: int
) -> tuple[Tensor, Tensor]:
    return _body(g)(2, g, ord, n, norm, v)


@_gradient_norm.register_fake
def _(g: Tensor, ord: int) -> Tensor:
    return _outputs(0, g, ord)[0]


@_gradient_norm_bwd.register_fake
def _(n: Tensor, g: Tensor, norm: Tensor | None, ord: int) -> Tensor:
    return _outputs(1, g, ord)[1]


@_gradient_norm_bwd_bwd.register_fake
def _(v: Tensor, n: Tensor, g: Tensor, norm: Tensor | None, ord: int) -> tuple[Tensor, Tensor]:
    return _outputs(2, g, ord)


def _backward(options: tuple, saved: tuple, wanted: tuple[bool, ...], n: Tensor) -> tuple:
    g, norm = saved
    return _gradient_norm_bwd(n, g, norm, options[-1]), None


def _backward_backward(options: tuple, saved: tuple, wanted: tuple[bool, ...], v: Tensor) -> tuple:
    n, g, norm = saved
    ord = options[-1]
    gn, gg = _gradient_norm_bwd_bwd(v, n, g, norm, ord)
    # gg is the total derivative, through the norm too: norm itself gets none
    return gn, gg if ord == 2 else None, None, None


differentiable(
    _gradient_norm,
    "gradient_norm",
    save=lambda inputs, norm: (inputs[0], norm if inputs[1] == 2 else None),
    backward=_backward,
)
differentiable(
    _gradient_norm_bwd,
    "gradient_norm",
    save=lambda inputs, out: inputs[:3],
    backward=_backward_backward,
)
no_third_derivative(_gradient_norm_bwd_bwd, "gradient_norm")


def gradient_norm(grad: Tensor, ord: int = 1) -> Tensor:
    """Each sample's norm of a gradient, as the penalties of gradnorm (L1) and WGAN-GP (L2) want it.

    grad: (B, ...), any floating dtype. ord: 1 or 2. Returns (B,), summed in float32, or in float64
    for float64, and of that dtype: no sum or square of float16 overflows. Samples that are one
    block of memory each, channels_last images too, are read in place; others are copied first.

    sign(0) is 0 and so is the L2 norm's gradient at 0, as in PyTorch; so is its second derivative
    there, where PyTorch's is NaN. L1 sends nothing back to grad at second order: its second
    derivative is zero wherever there is one. In a compiled region this is
    `reference.gradient_norm`, which Inductor fuses.

    Raises ValueError on another ord or a grad without dimensions, TypeError on integers; a third
    derivative raises RuntimeError.
    """
    is_floating("gradient_norm", grad=grad)
    if ord not in (1, 2):
        raise ValueError(f"gradient_norm: ord {ord!r} should be 1 or 2")
    if not grad.ndim:
        raise ValueError("gradient_norm: grad is (), should be (B, ...)")
    if inlines():
        return reference.gradient_norm(grad, ord)
    no_forward_mode("gradient_norm", grad)
    return _gradient_norm(grad, int(ord))
