"""Window attention with matrix products by cuBLAS, and one Triton kernel between the products.

Triton has no fast matrix products for GPUs of a compute capability below 8.0, such as the V100. On
these GPUs, the (N, N) matrices between two products are stored in memory. The forward, the backward
and the backward of the backward each run one Triton kernel between their products. The kernel reads
each of these matrices once, and writes each result once into the same memory.
`window_attention_kernels` explains the names and has the formulas.

- Matrices between two products have the dtype of qkv, as in eager PyTorch. In float16, eager
  PyTorch also rounds after each operator. The kernel rounds once, because it computes in float32.
- cuBLAS multiplies by the scale before it rounds. So scores in float16 do not overflow earlier than
  in eager PyTorch.
- The backward passes compute the probabilities P again, instead of keeping those of the forward. To
  keep P would save about a seventh of the bytes that the first backward reads and writes. But in
  each layer of a Swin, P would take half as much memory as qkv.
- cuBLAS cannot multiply the heads of a linear layer's output where they are. So each tensor is
  copied once. PyTorch's operators would copy it once for each product.
- Rows of matrices are not padded. With N = 49, rows of 56 elements would be aligned to 16 bytes,
  but the matrices would have 31 % more elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgn_kernels.dispatch import LAUNCH, triton_compute_dtype
from fastgn_kernels.window_attention_kernels import centre, softmax
from fastgn_kernels.window_attention_launch import (
    choose_block,
    choose_grid,
    pad_bias_and_mask,
    pad_with_zeros,
    sum_strips,
)

PROGRAMS = 320
"""Largest number of Triton programs for each block of rows. It is 4 for each of the 80
multiprocessors of a V100.

More programs would write more partial sums of the gradient of the bias.
"""


@triton.jit
def _window_attention_products_kernel(
    scores_pointer, gradients_pointer, bias_and_mask_pointer, ggbias_pointer, partial_sums_pointer,
    windows, masks,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, ORDER: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BIAS_GRAD: tl.constexpr,
    HAS_GGBIAS: tl.constexpr,
):  # fmt: skip
    """Replaces matrices that products have computed by the matrices that the next products take.

    ORDER is 0 for the forward, 1 for the backward and 2 for the backward of the backward. The
    docstring of `window_attention_kernels` explains the names.

    ORDER 0: scores = (S) becomes (P).
    ORDER 1: scores = (S) becomes (P), and gradients = (gP) becomes (gS).
    ORDER 2: scores = (dS, S) becomes (dP, P), and gradients = (gP, E) becomes (gS, hS), where
        E = go ggv^T.

    Before the kernel runs, S lacks bias and mask, dS lacks ggbias, and dS and gP are not centred. A
    pair of matrices is stored as (B, H, N, 2, N). If BIAS_GRAD is True, the kernel also computes
    partial sums of the gradient of the bias: of gS for ORDER 1, and of hS for ORDER 2.
    """
    head, strip = tl.program_id(0), tl.program_id(1)
    i = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    j = tl.arange(0, BLOCK_TOKENS)[None, :]
    inside = (i < TOKENS) & (j < TOKENS)
    padded = head * (BLOCK_TOKENS * BLOCK_TOKENS) + i * BLOCK_TOKENS + j
    per_strip = HEADS * BLOCK_TOKENS * BLOCK_TOKENS
    bias_and_mask = tl.load(
        bias_and_mask_pointer + (strip % masks).to(tl.int64) * per_strip + padded
    )
    gbias = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), COMPUTE_DTYPE)
    SECOND: tl.constexpr = TOKENS if ORDER == 2 else 0  # offset of the second matrix of a pair
    for window in range(strip, windows, tl.num_programs(1)):
        matrix = tl.cast(window, tl.int64) * HEADS + head
        first = (matrix * TOKENS + i) * (TOKENS + SECOND) + j
        # all loads come before the first store, so that they do not wait for the store
        scores = tl.load(scores_pointer + first + SECOND, mask=inside, other=0.0)
        if ORDER > 0:
            gp = tl.load(gradients_pointer + first, mask=inside, other=0.0).to(COMPUTE_DTYPE)
        if ORDER == 2:
            ds = tl.load(scores_pointer + first, mask=inside, other=0.0).to(COMPUTE_DTYPE)
            e = tl.load(gradients_pointer + first + SECOND, mask=inside, other=0.0)
        p = softmax(scores.to(COMPUTE_DTYPE) + bias_and_mask)
        tl.store(scores_pointer + first + SECOND, p, mask=inside)
        if ORDER > 0:
            gp = centre(gp, p)
            gs = p * gp
            tl.store(gradients_pointer + first, gs, mask=inside)
        if ORDER == 2:
            if HAS_GGBIAS:
                ds += tl.load(ggbias_pointer + padded)
            ds = centre(ds, p)
            tl.store(scores_pointer + first, p * ds, mask=inside)
            gs = p * centre(gp * ds + e.to(COMPUTE_DTYPE), p)  # gs now holds hS
            tl.store(gradients_pointer + first + SECOND, gs, mask=inside)
        if BIAS_GRAD:
            gbias += gs
    if BIAS_GRAD:
        tl.store(partial_sums_pointer + strip.to(tl.int64) * per_strip + padded, gbias)


def launch_between_products(
    qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scores: Tensor, gradients: Tensor,
    order: int, learned: Tensor | None = None, ggbias: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Runs the kernel that changes the matrices `scores` and `gradients` in place.

    - scores, gradients: the matrices that `_window_attention_products_kernel` lists for each order.
    - order: 0 for the forward, 1 for the backward, 2 for the backward of the backward.
    - learned: the same tensor as bias if the gradient of the bias is wanted, otherwise None.
    - ggbias: gradient of the loss with respect to the gradient of the bias. None means zero.

    Returns the gradient of the bias, or None if learned is None.
    """
    _, windows, heads, tokens, _ = qkv.shape
    block = choose_block(qkv)
    rows = min(block, max(1, 1024 // block))
    bias_and_mask = pad_bias_and_mask(qkv, bias, mask)
    heads, strips = choose_grid(qkv, mask, PROGRAMS)
    partial_sums = bias_and_mask.new_empty(
        (strips if learned is not None else 0, *bias_and_mask.shape[1:])
    )
    _window_attention_products_kernel[(heads, strips, triton.cdiv(tokens, rows))](
        scores, gradients, bias_and_mask,
        bias_and_mask if ggbias is None else pad_with_zeros(ggbias, qkv), partial_sums,
        windows, bias_and_mask.shape[0], HEADS=heads, TOKENS=tokens, ORDER=order,
        COMPUTE_DTYPE=triton_compute_dtype(qkv.dtype), BLOCK_TOKENS=block, BLOCK_ROWS=rows,
        BIAS_GRAD=learned is not None, HAS_GGBIAS=ggbias is not None, num_warps=4, num_stages=1,
        **LAUNCH,
    )  # fmt: skip
    return sum_strips(partial_sums, learned)


def _multiply(x: Tensor, y: Tensor, into: Tensor, scale: float = 1.0, add: bool = False) -> None:
    """Writes scale * x @ y into `into`, or adds it to `into` if `add` is True.

    x, y and `into` are stacks of matrices.
    """
    into.baddbmm_(x, y, beta=int(add), alpha=scale)


def compute_forward(
    qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, o: Tensor
) -> None:
    """Computes the output of the attention, and writes it into o.

    Arguments are those of `launch_forward`, which runs one Triton kernel instead.
    """
    q, k, v = qkv.contiguous().flatten(1, 2)
    tokens = qkv.shape[3]
    p = q.new_empty(len(q), tokens, tokens)
    _multiply(q, k.mT, p, scale)
    launch_between_products(qkv, bias, mask, p, p, 0)
    o.copy_((p @ v).view(o.shape))


def compute_backward(
    go: Tensor, qkv: Tensor, extra: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    scale: float, learned: Tensor | None, gqkv: Tensor,
) -> Tensor | None:  # fmt: skip
    """Computes the gradient of qkv with matrix products and one Triton kernel, and writes it into
    gqkv.

    Arguments and result are those of `launch_backward`, which runs one Triton kernel instead.
    """
    q, k, v = qkv.contiguous().flatten(1, 2)
    go = go.contiguous().flatten(0, 1)
    tokens = qkv.shape[3]
    scores, gradients = q.new_empty(2, len(q), tokens, tokens)
    _multiply(q, k.mT, scores, scale)
    _multiply(go, v.mT, gradients)
    gbias = launch_between_products(qkv, bias, mask, scores, gradients, 1, learned)
    p, gs = scores, gradients
    results = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    gq, gk, gv = results.flatten(1, 2)
    _multiply(gs, k, gq, scale)
    _multiply(gs.mT, q, gk, scale)
    _multiply(p.mT, go, gv)
    if extra is None:
        gqkv.copy_(results)
    else:
        torch.add(results, extra, out=gqkv)
    return gbias


def compute_backward_backward(
    ggqkv: Tensor, ggbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, learned: Tensor | None, ggo: Tensor, gqkv: Tensor,
) -> Tensor | None:  # fmt: skip
    """Computes the second derivative with matrix products and one Triton kernel.

    Arguments and result are those of `launch_backward_backward`, which runs one Triton kernel
    instead.

    Where the layouts allow it, a sum of two products is computed as one product of longer matrices.
    This saves writing and reading the first product.
    """
    go = go.contiguous().flatten(0, 1)
    q_parts = torch.stack((ggqkv[0], qkv[0]), 3).flatten(0, 1)
    k_parts = torch.stack((qkv[1], ggqkv[1]), 3).flatten(0, 1)
    v_parts = torch.stack((qkv[2], ggqkv[2]), 2).flatten(0, 1)
    q, (k, ggk), values = q_parts[:, :, 1], k_parts.unbind(2), v_parts.flatten(1, 2)
    tokens = qkv.shape[3]
    scores, gradients = go.new_empty(2, len(go), tokens, 2, tokens)
    _multiply(q_parts.flatten(2), k_parts.flatten(2).mT, scores[:, :, 0], scale)
    _multiply(q, k.mT, scores[:, :, 1], scale)
    _multiply(go, values.mT, gradients.flatten(2))
    gbias = launch_between_products(qkv, bias, mask, scores, gradients, 2, learned, ggbias)
    dp, (gs, hs) = scores[:, :, 0], gradients.unbind(2)
    results = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    gq, gk, gv = results.flatten(1, 2)
    _multiply(hs, k, gq, scale)
    _multiply(gs, ggk, gq, scale, add=True)
    _multiply(gradients.flatten(1, 2).mT, q_parts.flatten(1, 2), gk, scale)
    _multiply(dp.mT, go, gv)
    gqkv.copy_(results)
    ggo.copy_((scores.flatten(2) @ values).view(ggo.shape))
    return gbias
