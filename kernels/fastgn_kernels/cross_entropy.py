"""Cross-entropy with class indices or class probabilities, and its two derivatives.

Names, for one sample:

- z are the logits, and p = softmax(z).
- t are the target probabilities. For a class index, t is 1 for that class and 0 for the others.
- T is the sum of t.
- gl is the gradient of the final loss with respect to this sample's loss.
- gz is the gradient of the final loss with respect to z.
- ggz is the gradient of the final loss with respect to gz. The backward of the backward starts from
  it.
- ggl is the gradient of the final loss with respect to gl. The backward of the backward returns it,
  and also another gradient with respect to z, which is called gz, too.

Formulas:

- Forward: loss = T logsumexp(z) - sum(t z).
- Backward: gz = gl (T p - t).
- Backward of the backward: ggl = sum(ggz (T p - t)) and gz = gl T p (ggz - sum(p ggz)).

Each of the three passes is one kernel, which reads every input once and writes every output once. A
program holds whole rows, and every kernel recomputes p. Therefore only z and t are kept for the
backward.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgn_kernels import formulas, reference
from fastgn_kernels.dispatch import (
    LAUNCH,
    check_floating,
    compute_dtype,
    define_op,
    is_compiling,
    register_derivative,
    register_third_derivative,
    run_op,
    runs_triton,
    triton_compute_dtype,
)

TILE = 1024
"""Smallest number of elements that a Triton program processes. Shorter rows of logits share a
program, and a longer row has a program of its own."""
PER_THREAD = 8
"""Number of elements that each thread of a Triton program processes. With 8, a thread reads 16
bytes of a 16-bit dtype at once."""
LARGEST_ROW = 64 << 10
"""Largest size in bytes of a row of logits, in the compute dtype, for which the Triton kernels run.
A longer row would not fit the registers of 1024 threads.

With rows of 16384 float32 classes, no kernel spills registers to memory on sm_70, sm_80 and sm_90.
With 32768 classes, a thread spills up to 700 bytes. With 8192 float64 classes, the kernel of the
second derivative spills 112 bytes per thread."""


@triton.jit
def _load_tile(
    logits_pointer, targets_pointer, rows,
    COLUMNS: tl.constexpr, INDEXED: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Loads the rows of logits that one program processes, and computes what all three kernels
    need.

    logits_pointer, targets_pointer: the logits, (rows, COLUMNS), and the targets. INDEXED: whether
    the targets are class indices, (rows,), instead of probabilities, (rows, COLUMNS).

    Returns a tuple of nine tiles. Here z are the logits, and t are the target probabilities.

    - row: indices of the rows.
    - offsets: positions of the rows' elements in memory.
    - inside: mask that is False for padding.
    - chosen: mask of the elements that may contribute to the sum of t * z.
    - t: the target probabilities.
    - total: sum of t in each row. It is NaN if a class index is out of range.
    - shifted: z - max(z) in each row.
    - exponential: exp(z - max(z)).
    - normaliser: sum of exp(z - max(z)) in each row.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = row[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    # COLUMNS is a compile-time constant, so the compiler knows when it may load 8 elements at once
    offsets = row * COLUMNS + column
    inside = (row < rows) & (column < COLUMNS)
    z = tl.load(logits_pointer + offsets, mask=inside, other=float("-inf")).to(COMPUTE_DTYPE)
    if INDEXED:
        index = tl.load(targets_pointer + row, mask=row < rows, other=0)
        chosen = inside & (column == index)
        t = chosen.to(COMPUTE_DTYPE)
        valid = (index >= 0) & (index < COLUMNS)
        total = tl.where(valid, 1.0, float("nan")).to(COMPUTE_DTYPE)
    else:
        # choose all classes, so that a target of 0 times a logit of -inf gives NaN, as in PyTorch
        chosen = inside
        t = tl.load(targets_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE)
        total = tl.sum(t, axis=1, keep_dims=True)
    shifted = z - tl.max(z, axis=1, keep_dims=True)
    exponential = tl.exp(shifted)
    normaliser = tl.sum(exponential, axis=1, keep_dims=True)
    return row, offsets, inside, chosen, t, total, shifted, exponential, normaliser


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_pointer, targets_pointer, loss_pointer, rows,
    COLUMNS: tl.constexpr, INDEXED: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes the loss of each sample.

    - logits_pointer, targets_pointer: see `_load_tile`.
    - loss_pointer: the losses, (rows,), which the kernel writes.
    """
    row, _, _, chosen, t, total, shifted, _, normaliser = _load_tile(
        logits_pointer, targets_pointer, rows, COLUMNS, INDEXED, COMPUTE_DTYPE,
        BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    # the sum uses z - max(z) instead of z, which would lose precision if all logits are large
    picked = tl.sum(tl.where(chosen, t * shifted, 0.0), axis=1, keep_dims=True)
    tl.store(loss_pointer + row, total * tl.log(normaliser) - picked, mask=row < rows)


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_pointer, targets_pointer, gl_pointer, gl_stride, gz_pointer, rows,
    COLUMNS: tl.constexpr, INDEXED: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of the final loss with respect to the logits.

    - logits_pointer, targets_pointer: see `_load_tile`.
    - gl_pointer, gl_stride: gradient of the final loss with respect to each sample's loss, and the
      distance between its elements. The distance is 0 if all samples have the same gradient.
    - gz_pointer: the gradient with respect to the logits, which the kernel writes.
    """
    row, offsets, inside, _, t, total, _, exponential, normaliser = _load_tile(
        logits_pointer, targets_pointer, rows, COLUMNS, INDEXED, COMPUTE_DTYPE,
        BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    gl = tl.load(gl_pointer + row * gl_stride, mask=row < rows, other=0.0).to(COMPUTE_DTYPE)
    tl.store(gz_pointer + offsets, gl * (total * (exponential / normaliser) - t), mask=inside)


@triton.jit
def _cross_entropy_bwd_bwd_kernel(
    logits_pointer, targets_pointer, gl_pointer, gl_stride, ggz_pointer, ggl_pointer, gz_pointer,
    rows,
    COLUMNS: tl.constexpr, INDEXED: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes the second derivative of the cross-entropy.

    - logits_pointer, targets_pointer: see `_load_tile`.
    - gl_pointer, gl_stride: gradient of the final loss with respect to each sample's loss, and the
      distance between its elements. The distance is 0 if all samples have the same gradient.
    - ggz_pointer: gradient of the final loss with respect to gz, the result of the backward.
    - ggl_pointer, gz_pointer: the gradients with respect to gl and the logits, which the kernel
      writes.
    """
    row, offsets, inside, _, t, total, _, exponential, normaliser = _load_tile(
        logits_pointer, targets_pointer, rows, COLUMNS, INDEXED, COMPUTE_DTYPE,
        BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    gl = tl.load(gl_pointer + row * gl_stride, mask=row < rows, other=0.0).to(COMPUTE_DTYPE)
    ggz = tl.load(ggz_pointer + offsets, mask=inside, other=0.0).to(COMPUTE_DTYPE)
    p = exponential / normaliser
    ggl = tl.sum(ggz * (total * p - t), axis=1, keep_dims=True)
    mean = tl.sum(p * ggz, axis=1, keep_dims=True)
    tl.store(ggl_pointer + row, ggl, mask=row < rows)
    tl.store(gz_pointer + offsets, gl * total * p * (ggz - mean), mask=inside)


def _run_kernel(
    order: int, logits: Tensor, targets: Tensor, gl: Tensor | None = None, ggz: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the cross-entropy or one of its two derivatives with a Triton kernel.

    - order: 0 for the forward, 1 for the backward, 2 for the backward of the backward.
    - gl: gradient of the final loss with respect to each sample's loss. None for order 0.
    - ggz: gradient of the final loss with respect to gz, the result of the backward. Only order 2
      uses it.

    Returns two tensors:

    - Order 0: (the loss of each sample, empty).
    - Order 1: (empty, gz), with the gradient gz with respect to the logits.
    - Order 2: (ggl, gz), the gradients with respect to gl and to the logits.

    "empty" is a tensor without elements.
    """
    per_row, gz = _allocate_outputs(order, logits)
    rows, columns = logits.shape
    if not rows:
        return per_row, gz
    block_columns = triton.next_power_of_2(columns)
    block_rows = max(TILE // block_columns, 1)
    constants = {
        "COLUMNS": columns,
        "INDEXED": not targets.is_floating_point(),
        "COMPUTE_DTYPE": triton_compute_dtype(logits.dtype),
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        "num_warps": min(block_rows * block_columns // (32 * PER_THREAD), 32),
        **LAUNCH,
    }
    grid = (triton.cdiv(rows, block_rows),)
    logits, targets = logits.contiguous(), targets.contiguous()
    if gl is None:
        _cross_entropy_fwd_kernel[grid](logits, targets, per_row, rows, **constants)
    elif ggz is None:
        # if the loss is a mean over samples, gl is one number, expanded to all samples by stride 0
        _cross_entropy_bwd_kernel[grid](logits, targets, gl, gl.stride(0), gz, rows, **constants)
    else:
        _cross_entropy_bwd_bwd_kernel[grid](
            logits, targets, gl, gl.stride(0), ggz.contiguous(), per_row, gz, rows, **constants
        )
    return per_row, gz


def _run_plain(
    order: int, logits: Tensor, targets: Tensor, gl: Tensor | None = None, ggz: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the cross-entropy or one of its two derivatives with PyTorch's operators.

    Arguments and results are those of `_run_kernel`, which runs a Triton kernel instead.
    """
    per_row, gz = _allocate_outputs(order, logits)
    log_p = logits.to(per_row.dtype).log_softmax(1)
    if targets.is_floating_point():
        t = targets.to(log_p.dtype)
        total = t.sum(1, keepdim=True)
        picked = (t * log_p).sum(1)
    else:
        index, total = _check_indices(targets, log_p)
        t = torch.zeros_like(log_p).scatter_(1, index, 1.0) if order else log_p
        picked = (total * log_p.gather(1, index))[:, 0]
    if gl is None:
        return torch.neg(picked, out=per_row), gz
    p, gl = log_p.exp(), gl[:, None]
    if ggz is None:
        return per_row, gz.copy_(gl * (total * p - t))
    ggz = ggz.to(p.dtype)
    torch.sum(ggz * (total * p - t), 1, out=per_row)
    return per_row, gz.copy_(gl * total * p * (ggz - (p * ggz).sum(1, keepdim=True)))


def _check_indices(targets: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the class indices, clamped to 0..K-1, and the sum of each sample's target
    probabilities.

    Both have the shape (B, 1). log_p: (B, K), log-probabilities of the classes.

    The sum is 1 if the index is valid. If an index is out of range, the function raises ValueError
    on a CPU. On CUDA, raising an error would make the CPU wait for the GPU. There the sum is NaN
    instead, so that the sample's loss becomes NaN.
    """
    columns = log_p.shape[1]
    outside = (targets < 0) | (targets >= columns)
    if not targets.is_cuda and outside.any():
        raise ValueError(
            f"cross_entropy: target {targets[outside][0].item()} should be in 0..{columns - 1}, "
            "because cross_entropy has no ignore_index"
        )
    total = torch.ones_like(log_p[:, 0]).masked_fill_(outside, torch.nan)
    return targets.clamp(0, columns - 1)[:, None], total[:, None]


def _allocate_outputs(order: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns uninitialised tensors for the two results of `_run_kernel`.

    order: 0 for the forward, 1 for the backward, 2 for the backward of the backward.

    The first tensor has one element for each sample, and the second one has the shape of the
    logits. If a result is not computed, its tensor has no elements, because a custom op cannot
    return None.
    """
    rows = 0 if order == 1 else logits.shape[0]
    per_row = logits.new_empty(rows, dtype=compute_dtype(logits.dtype))
    return per_row, logits.new_empty(logits.shape if order else 0)


def _choose_implementation(logits: Tensor) -> Any:
    """Returns `_run_kernel`, or `_run_plain` if Triton kernels cannot run on the logits.

    They cannot run if the logits are on the CPU, except with Triton's interpreter. They also cannot
    run if a row of logits does not fit the registers of a Triton program.
    """
    fits = logits.shape[1] * compute_dtype(logits.dtype).itemsize <= LARGEST_ROW
    return _run_kernel if fits and runs_triton(logits) else _run_plain


@define_op("fastgn::cross_entropy")
def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return _choose_implementation(logits)(0, logits, targets)[0]


@define_op("fastgn::cross_entropy_bwd")
def _cross_entropy_bwd(gl: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    return _choose_implementation(logits)(1, logits, targets, gl)[1]


@define_op("fastgn::cross_entropy_bwd_bwd")
def _cross_entropy_bwd_bwd(
    ggz: Tensor, gl: Tensor, logits: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    return _choose_implementation(logits)(2, logits, targets, gl, ggz)


@_cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor) -> Tensor:
    return _allocate_outputs(0, logits)[0]


@_cross_entropy_bwd.register_fake
def _(gl: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    return _allocate_outputs(1, logits)[1]


@_cross_entropy_bwd_bwd.register_fake
def _(ggz: Tensor, gl: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return _allocate_outputs(2, logits)


def _backward(options: tuple, saved: tuple, wanted: tuple[bool, ...], gl: Tensor) -> tuple:
    """Returns the gradients of the inputs (logits, targets) of the forward op. Targets get None.

    gl: gradient of the final loss with respect to each sample's loss.
    `dispatch.register_derivative` describes the other arguments.
    """
    return run_op(_cross_entropy_bwd, formulas.cross_entropy_bwd, gl, *saved), None


def _backward_backward(
    options: tuple, saved: tuple, wanted: tuple[bool, ...], ggz: Tensor
) -> tuple:
    """Returns the gradients of the inputs (gl, logits, targets) of the backward op. Targets get
    None.

    ggz: gradient of the final loss with respect to the output of the backward op.
    `dispatch.register_derivative` describes the other arguments.
    """
    return *run_op(_cross_entropy_bwd_bwd, formulas.cross_entropy_bwd_bwd, ggz, *saved), None


register_derivative(_cross_entropy, save=lambda inputs, loss: inputs, backward=_backward)
register_derivative(_cross_entropy_bwd, save=lambda inputs, gz: inputs, backward=_backward_backward)
register_third_derivative(_cross_entropy_bwd_bwd, "cross_entropy", formulas.cross_entropy_bwd_bwd)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Returns the cross-entropy loss, as ``F.cross_entropy`` does, but in float32 or float64.

    The value, the first derivative and the second derivative take one kernel each. Logits that are
    not contiguous are copied first. Rows of more than 16384 classes (8192 in float64) do not fit
    the registers of a Triton program, so PyTorch's operators compute them. In code compiled by
    torch.compile, this function calls `reference.cross_entropy` instead. Inductor fuses the
    operators of that function with the operations around them.

    There is no ignore_index. On a CPU, an index outside 0..K-1 raises ValueError. On CUDA, it makes
    the loss and gradient of its sample NaN, because raising an error would make the CPU wait for
    the GPU. In compiled code, PyTorch checks the indices.

    Args:
        logits: (B, K), any floating-point dtype.
        targets: class indices as (B,), int64, or probabilities as (B, K) in any floating-point
            dtype, for example of mixup or label smoothing. Rows need not sum to 1.
        reduction: "mean" or "sum" over the samples, or "none".

    Returns:
        A scalar, or (B,) for the reduction "none". The dtype is float64 for float64 logits,
        otherwise float32. PyTorch would return the dtype of the logits, which rounds a
        half-precision loss to 3 digits.

    Raises:
        ValueError: if a shape or device does not fit, if the reduction is unknown, or if the
            targets require a gradient, because they would not get one.
        TypeError: if logits is not floating-point, or if targets is neither int64 nor
            floating-point.
    """
    check_floating("cross_entropy", logits=logits)
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(
            f"cross_entropy: logits has shape {tuple(logits.shape)}, should be (B, K) with K > 0"
        )
    if not targets.is_floating_point() and targets.dtype != torch.int64:
        raise TypeError(
            f"cross_entropy: targets is {targets.dtype}, should be int64 for class indices, or "
            "floating-point for probabilities"
        )
    shape = logits.shape if targets.is_floating_point() else logits.shape[:1]
    if targets.shape != shape:
        raise ValueError(
            f"cross_entropy: targets of {targets.dtype} has shape {tuple(targets.shape)}, "
            f"should be {tuple(shape)} because logits has shape {tuple(logits.shape)}"
        )
    if targets.device != logits.device:
        raise ValueError(
            f"cross_entropy: targets is on {targets.device}, should be on {logits.device} like "
            "logits"
        )
    if targets.requires_grad:
        raise ValueError(
            "cross_entropy: targets requires grad, but would get no gradient: detach targets, or "
            "use fastgn_kernels.reference.cross_entropy"
        )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"cross_entropy: reduction {reduction!r} should be none, mean or sum")
    if is_compiling():
        return reference.cross_entropy(logits, targets, reduction)
    loss = run_op(_cross_entropy, formulas.cross_entropy, logits, targets)
    return loss if reduction == "none" else getattr(loss, reduction)()
