"""Launches the Triton kernels for window attention.

The docstring of `window_attention_kernels` explains the names of the tensors.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from fastgn_kernels.dispatch import LAUNCH, compute_dtype, triton_compute_dtype
from fastgn_kernels.window_attention_kernels import (
    _window_attention_bwd_bwd_kernel,
    _window_attention_bwd_kernel,
    _window_attention_fwd_kernel,
)


def pack(qkv: Tensor) -> Tensor:
    """Returns qkv, which is (3, B, H, N, D), as a contiguous tensor (B, N, 3, H, D).

    If qkv is a view of the output of a linear layer, nothing is copied.
    """
    return qkv.permute(1, 3, 0, 2, 4).contiguous()


def pack_output(o: Tensor) -> Tensor:
    """Returns o, which is (B, H, N, D), as a contiguous tensor (B, N, H, D)."""
    return o.transpose(1, 2).contiguous()


def choose_grid(qkv: Tensor, mask: Tensor | None, programs: int = 1056) -> tuple[int, int]:
    """Returns the grid of a launch: (number of heads, number of strips of windows).

    A program processes the windows of one strip for one head. All windows of a strip have the same
    mask, so the number of strips is a multiple of the number of masks.

    programs: largest useful number of programs. The default is 8 for each of an H200's 132
    multiprocessors.
    """
    _, windows, heads, _, _ = qkv.shape
    masks = 1 if mask is None else mask.shape[0]
    return heads, masks * max(1, min(programs // (heads * masks), windows // masks))


def _choose_constants(qkv: Tensor, scale: float) -> dict[str, Any]:
    """Returns the compile-time constants and launch options that all three kernels take."""
    _, _, heads, tokens, dim = qkv.shape
    return {
        "HEADS": heads,
        "TOKENS": tokens,
        "DIM": dim,
        "SCALE": scale,
        "COMPUTE_DTYPE": triton_compute_dtype(qkv.dtype),
        "BLOCK_TOKENS": choose_block(qkv),
        "BLOCK_DIM": min(32, max(16, triton.next_power_of_2(dim))),
        "num_warps": 4,
        "num_stages": 1,
        **LAUNCH,
    }


def choose_block(qkv: Tensor) -> int:
    """Returns the number of tokens per window after padding, which is the side of a tile."""
    return max(16, triton.next_power_of_2(qkv.shape[3]))


def pad_bias_and_mask(qkv: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """Returns bias + mask for each of W masks and H heads, as a tensor (W, H, N', N').

    N' is the number of tokens after padding. The padding makes programs read whole cache lines at
    constant offsets. Padded keys have -inf, so that no query sees them. Padded queries have 0, so
    that their softmax is finite.
    """
    _, _, heads, tokens, _ = qkv.shape
    block, masks = choose_block(qkv), 1 if mask is None else mask.shape[0]
    padded = qkv.new_zeros((masks, heads, block, block), dtype=compute_dtype(qkv.dtype))
    padded[..., tokens:] = -torch.inf
    for term in (bias, mask if mask is None else mask[:, None]):
        if term is not None:
            padded[:, :, :tokens, :tokens] += term
    return padded


def pad_with_zeros(ggbias: Tensor, qkv: Tensor) -> Tensor:
    """Returns ggbias in the compute dtype, padded with zeros from N x N to the size of a tile.

    ggbias: gradient of the loss with respect to the gradient of the bias.
    """
    padding = choose_block(qkv) - ggbias.shape[-1]
    wide = ggbias.to(compute_dtype(qkv.dtype))
    padded = torch.nn.functional.pad(wide, (0, padding, 0, padding))
    return padded.contiguous()  # without padding, F.pad keeps the strides of ggbias


def _allocate_partial_sums(qkv: Tensor, learned: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Returns zeros, to which each program adds the bias gradients of its strip of windows.

    learned: the bias of the attention, or None if the gradient of the bias is not wanted. If None,
    the returned tensor has no elements. grid: (number of heads, number of strips).
    """
    heads, strips = grid
    block = choose_block(qkv)
    shape = (strips if learned is not None else 0, heads, block, block)
    return torch.zeros(shape, dtype=compute_dtype(qkv.dtype), device=qkv.device)


def sum_strips(partial_sums: Tensor, learned: Tensor | None) -> Tensor | None:
    """Returns the gradient of the bias, as the sum of the partial sums of all strips of windows.

    learned: the bias of the attention, or None if the gradient of the bias is not wanted. If None,
    the result is None.
    """
    if learned is None:
        return None
    tokens = learned.shape[-1]
    return partial_sums[:, :, :tokens, :tokens].sum(0).to(learned.dtype)


def launch_forward(
    qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, o: Tensor
) -> None:
    """Computes the output of the attention with a Triton kernel, and writes it into o."""
    bias_and_mask = pad_bias_and_mask(qkv, bias, mask)
    _window_attention_fwd_kernel[choose_grid(qkv, mask)](
        pack(qkv), bias_and_mask, o, qkv.shape[1], bias_and_mask.shape[0],
        **_choose_constants(qkv, scale),
    )  # fmt: skip


def launch_backward(
    go: Tensor, qkv: Tensor, extra: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    scale: float, learned: Tensor | None, gqkv: Tensor,
) -> Tensor | None:  # fmt: skip
    """Computes the gradient of qkv with a Triton kernel, and writes it into gqkv.

    - go: gradient of the loss with respect to the output of the attention.
    - extra: tensor that is added to the gradient of qkv, or None.
    - learned: the same tensor as bias if the gradient of the bias is wanted, otherwise None.

    Returns the gradient of the bias, or None if learned is None.
    """
    bias_and_mask, packed = pad_bias_and_mask(qkv, bias, mask), pack(qkv)
    grid = choose_grid(qkv, mask)
    partial_sums = _allocate_partial_sums(qkv, learned, grid)
    _window_attention_bwd_kernel[grid](
        pack_output(go), packed, packed if extra is None else pack(extra), bias_and_mask, gqkv,
        partial_sums, qkv.shape[1], bias_and_mask.shape[0], **_choose_constants(qkv, scale),
        BIAS_GRAD=learned is not None, HAS_EXTRA=extra is not None,
    )  # fmt: skip
    return sum_strips(partial_sums, learned)


def launch_backward_backward(
    ggqkv: Tensor, ggbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, learned: Tensor | None, ggo: Tensor, gqkv: Tensor,
) -> Tensor | None:  # fmt: skip
    """Computes the second derivative with a Triton kernel.

    - ggqkv, ggbias: gradients of the loss with respect to the results of the backward, which are
      the gradients of qkv and bias. If ggbias is None, it is zero.
    - go: gradient of the loss with respect to the output, from which the backward started.
    - learned: the same tensor as bias if the gradient of the bias is wanted, otherwise None.
    - ggo, gqkv: tensors into which the gradients with respect to go and qkv are written.

    Returns the gradient of the bias, or None if learned is None.
    """
    bias_and_mask = pad_bias_and_mask(qkv, bias, mask)
    grid = choose_grid(qkv, mask)
    partial_sums = _allocate_partial_sums(qkv, learned, grid)
    _window_attention_bwd_bwd_kernel[grid](
        pack(ggqkv), bias_and_mask if ggbias is None else pad_with_zeros(ggbias, qkv),
        pack_output(go), pack(qkv), bias_and_mask, ggo, gqkv, partial_sums, qkv.shape[1],
        bias_and_mask.shape[0], **_choose_constants(qkv, scale), BIAS_GRAD=learned is not None,
        HAS_GGBIAS=ggbias is not None,
    )  # fmt: skip
    return sum_strips(partial_sums, learned)
