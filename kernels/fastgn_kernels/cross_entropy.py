"""Cross-entropy with class indices or probabilities, three orders, one kernel each.

Per sample, with p = softmax(z) and T = sum of t (1 for an index): loss = T logsumexp(z) - sum t z.
First derivative: gz = gl (T p - t). Given the cotangent v of gz: to gl: sum v (T p - t); to z:
gl T p (v - sum p v). A row lies in one tile and every order recomputes p from z, so that each pass
reads every input once, writes every output once and nothing but z and t is kept.
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
    tl_wide,
    wide,
)

TILE = 1024
"""Elements of a program's tile, or one row where rows are longer."""
PER_THREAD = 8
"""Elements of a thread: one 16-byte access at 16 bits."""
LARGEST_ROW = 64 << 10
"""Bytes, in the dtype computed in, of the widest row that 1024 threads hold in their registers:
16384 classes spill nothing on sm_70, 80 and 90, 32768 up to 700 bytes a thread. In float64 the last
order spills 112 at its 8192."""


@triton.jit
def _load(
    logits_ptr, targets_ptr, rows,
    K: tl.constexpr, INDEXED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile: (row, offsets, inside, chosen, t, T, z - max, exp(z - max), its sum)."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = tl.arange(0, BLOCK_K)[None, :]
    # K is a constant, so that a row of 1000 is known to start at a multiple of 8 elements
    offsets = row * K + column
    inside = (row < rows) & (column < K)
    z = tl.load(logits_ptr + offsets, mask=inside, other=float("-inf")).to(WIDE)
    if INDEXED:
        index = tl.load(targets_ptr + row, mask=row < rows, other=0)
        chosen = inside & (column == index)
        t = chosen.to(WIDE)
        total = tl.where((index >= 0) & (index < K), 1.0, float("nan")).to(WIDE)
    else:
        # where the target is 0 and the logit -inf, PyTorch's loss is NaN
        chosen = inside
        t = tl.load(targets_ptr + offsets, mask=inside, other=0.0).to(WIDE)
        total = tl.sum(t, axis=1, keep_dims=True)
    shifted = z - tl.max(z, axis=1, keep_dims=True)
    exponential = tl.exp(shifted)
    normaliser = tl.sum(exponential, axis=1, keep_dims=True)
    return row, offsets, inside, chosen, t, total, shifted, exponential, normaliser


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr, targets_ptr, loss_ptr, rows,
    K: tl.constexpr, INDEXED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, _, _, chosen, t, total, shifted, _, normaliser = _load(
        logits_ptr, targets_ptr, rows, K, INDEXED, WIDE, BLOCK_R, BLOCK_K
    )
    # of the shifted logits: a large common offset would take the loss' digits with it
    picked = tl.sum(tl.where(chosen, t * shifted, 0.0), axis=1, keep_dims=True)
    tl.store(loss_ptr + row, total * tl.log(normaliser) - picked, mask=row < rows)


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr, targets_ptr, gl_ptr, gl_stride, gz_ptr, rows,
    K: tl.constexpr, INDEXED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, offsets, inside, _, t, total, _, exponential, normaliser = _load(
        logits_ptr, targets_ptr, rows, K, INDEXED, WIDE, BLOCK_R, BLOCK_K
    )
    gl = tl.load(gl_ptr + row * gl_stride, mask=row < rows, other=0.0).to(WIDE)
    tl.store(gz_ptr + offsets, gl * (total * (exponential / normaliser) - t), mask=inside)


@triton.jit
def _cross_entropy_bwd_bwd_kernel(
    logits_ptr, targets_ptr, gl_ptr, gl_stride, v_ptr, ggl_ptr, gz_ptr, rows,
    K: tl.constexpr, INDEXED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, offsets, inside, _, t, total, _, exponential, normaliser = _load(
        logits_ptr, targets_ptr, rows, K, INDEXED, WIDE, BLOCK_R, BLOCK_K
    )
    gl = tl.load(gl_ptr + row * gl_stride, mask=row < rows, other=0.0).to(WIDE)
    v = tl.load(v_ptr + offsets, mask=inside, other=0.0).to(WIDE)
    p = exponential / normaliser
    ggl = tl.sum(v * (total * p - t), axis=1, keep_dims=True)
    mean = tl.sum(p * v, axis=1, keep_dims=True)
    tl.store(ggl_ptr + row, ggl, mask=row < rows)
    tl.store(gz_ptr + offsets, gl * total * p * (v - mean), mask=inside)


def _launch(
    order: int, logits: Tensor, targets: Tensor, gl: Tensor | None = None, v: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The order's outputs: (loss, -), (-, gz) or (ggl, gz)."""
    per_row, gz = _outputs(order, logits)
    rows, columns = logits.shape
    if not rows:
        return per_row, gz
    block_k = triton.next_power_of_2(columns)
    block_r = max(TILE // block_k, 1)
    shape = {
        "K": columns,
        "INDEXED": not targets.is_floating_point(),
        "WIDE": tl_wide(logits.dtype),
        "BLOCK_R": block_r,
        "BLOCK_K": block_k,
        "num_warps": min(block_r * block_k // (32 * PER_THREAD), 32),
        **LAUNCH,
    }
    grid = (round_up(rows, block_r),)
    logits, targets = logits.contiguous(), targets.contiguous()
    if gl is None:
        _cross_entropy_fwd_kernel[grid](logits, targets, per_row, rows, **shape)
    elif v is None:
        # gl of a mean is one number in stride 0
        _cross_entropy_bwd_kernel[grid](logits, targets, gl, gl.stride(0), gz, rows, **shape)
    else:
        _cross_entropy_bwd_bwd_kernel[grid](
            logits, targets, gl, gl.stride(0), v.contiguous(), per_row, gz, rows, **shape
        )
    return per_row, gz


def _plain(
    order: int, logits: Tensor, targets: Tensor, gl: Tensor | None = None, v: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `_launch` computes, by PyTorch's operators."""
    per_row, gz = _outputs(order, logits)
    log_p = logits.to(per_row.dtype).log_softmax(1)
    if targets.is_floating_point():
        t = targets.to(log_p.dtype)
        total = t.sum(1, keepdim=True)
        picked = (t * log_p).sum(1)
    else:
        index, total = _index(targets, log_p)
        t = torch.zeros_like(log_p).scatter_(1, index, 1.0) if order else log_p
        picked = (total * log_p.gather(1, index))[:, 0]
    if gl is None:
        return torch.neg(picked, out=per_row), gz
    p, gl = log_p.exp(), gl[:, None]
    if v is None:
        return per_row, gz.copy_(gl * (total * p - t))
    v = v.to(p.dtype)
    torch.sum(v * (total * p - t), 1, out=per_row)
    return per_row, gz.copy_(gl * total * p * (v - (p * v).sum(1, keepdim=True)))


def _index(targets: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1) indices to gather with, and T. An index out of range raises ValueError on CPU; on
    CUDA, where looking would stall the host, its T is NaN as in the kernels."""
    columns = log_p.shape[1]
    outside = (targets < 0) | (targets >= columns)
    if not targets.is_cuda and outside.any():
        raise ValueError(
            f"cross_entropy: target {targets[outside][0].item()} should be in 0..{columns - 1} "
            "(there is no ignore_index)"
        )
    total = torch.ones_like(log_p[:, 0]).masked_fill_(outside, torch.nan)
    return targets.clamp(0, columns - 1)[:, None], total[:, None]


def _outputs(order: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Room for (loss or ggl, gz): empty tensors where there is none."""
    rows = 0 if order == 1 else logits.shape[0]
    per_row = logits.new_empty(rows, dtype=wide(logits.dtype))
    return per_row, logits.new_empty(logits.shape if order else 0)


def _body(logits: Tensor) -> Any:
    fits = logits.shape[1] * wide(logits.dtype).itemsize <= LARGEST_ROW
    return _launch if fits and runs_triton(logits) else _plain


@define("fastgn::cross_entropy")
def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return _body(logits)(0, logits, targets)[0]


@define("fastgn::cross_entropy_bwd")
def _cross_entropy_bwd(gl: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    return _body(logits)(1, logits, targets, gl)[1]


@define("fastgn::cross_entropy_bwd_bwd")
def _cross_entropy_bwd_bwd(
    v: Tensor, gl: Tensor, logits: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    return _body(logits)(2, logits, targets, gl, v)


@_cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor) -> Tensor:
    return _outputs(0, logits)[0]


@_cross_entropy_bwd.register_fake
def _(gl: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    return _outputs(1, logits)[1]


@_cross_entropy_bwd_bwd.register_fake
def _(v: Tensor, gl: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return _outputs(2, logits)


def _backward(options: tuple, saved: tuple, wanted: tuple[bool, ...], gl: Tensor) -> tuple:
    return _cross_entropy_bwd(gl, *saved), None


def _backward_backward(options: tuple, saved: tuple, wanted: tuple[bool, ...], v: Tensor) -> tuple:
    return *_cross_entropy_bwd_bwd(v, *saved), None


differentiable(
    _cross_entropy, "cross_entropy", save=lambda inputs, loss: inputs, backward=_backward
)
differentiable(
    _cross_entropy_bwd, "cross_entropy", save=lambda inputs, gz: inputs, backward=_backward_backward
)
no_third_derivative(_cross_entropy_bwd_bwd, "cross_entropy")


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of each sample, then its mean, sum or "none".

    logits: (B, K), any floating dtype. targets: int64 (B,) class indices, or (B, K) probabilities
    of any floating dtype (mixup, smoothing), whose rows need not sum to 1. Returns (B,) or a scalar
    in float32, in float64 for float64 logits: PyTorch's returns the logits' dtype and rounds a
    half-precision loss to 3 digits. Logits that are not contiguous are copied first.

    There is no ignore_index: an index out of 0..K-1 raises ValueError on CPU; on CUDA it makes its
    sample's loss and gradient NaN, since to raise would stall the host (compiled, it is PyTorch's
    own check that finds it). Above 16384 classes (8192
    in float64) a row does not fit a program's registers and PyTorch's own operators run. In a
    compiled region this is `reference.cross_entropy`, which Inductor fuses.

    Raises ValueError on other shapes, an unknown reduction and targets that require grad, which
    would get none; TypeError on other dtypes; a third derivative raises RuntimeError.
    """
    is_floating("cross_entropy", logits=logits)
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"cross_entropy: logits is {tuple(logits.shape)}, should be (B, K), K > 0")
    if not targets.is_floating_point() and targets.dtype != torch.int64:
        raise TypeError(f"cross_entropy: targets is {targets.dtype}, should be int64 or floating")
    shape = logits.shape if targets.is_floating_point() else logits.shape[:1]
    if targets.shape != shape:
        raise ValueError(
            f"cross_entropy: targets is {tuple(targets.shape)} {targets.dtype}, should be "
            f"{tuple(shape)} for logits {tuple(logits.shape)}"
        )
    if targets.device != logits.device:
        raise ValueError(
            f"cross_entropy: targets is on {targets.device}, should be on {logits.device}"
        )
    if targets.requires_grad:
        raise ValueError(
            "cross_entropy: targets requires grad, which it would not get: detach it, or use "
            "fastgn_kernels.reference.cross_entropy"
        )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"cross_entropy: reduction {reduction!r} should be none, mean or sum")
    if inlines():
        return reference.cross_entropy(logits, targets, reduction)
    no_forward_mode("cross_entropy", logits, targets)
    loss = _cross_entropy(logits, targets)
    return loss if reduction == "none" else getattr(loss, reduction)()
