"""The operations that PyTorch's counter finds in window attention."""

import pytest
import torch
from fastgn_kernels import window_attention_qkvpacked
from torch.utils.flop_counter import FlopCounterMode

WINDOWS, HEADS, TOKENS, DIM = 3, 2, 4, 5
PRODUCT = 2 * WINDOWS * HEADS * TOKENS * TOKENS * DIM
"""Operations of one matrix product: scores of all pairs of tokens."""


@pytest.mark.parametrize(("order", "products"), [(0, 2), (1, 2 + 5), (2, 2 + 5 + 12 + 5)])
def test_products_of_each_order(order: int, products: int) -> None:
    """The second order runs 12 products of its own, and the first backward once more."""
    qkv = torch.rand(3, WINDOWS, HEADS, TOKENS, DIM, requires_grad=order > 0)
    with FlopCounterMode(display=False) as counter:
        y = window_attention_qkvpacked(qkv)
        if order == 1:
            torch.autograd.grad(y.sum(), qkv)
        elif order == 2:
            (grad,) = torch.autograd.grad(y.square().sum(), qkv, create_graph=True)
            torch.autograd.grad(grad.square().sum(), qkv)
    assert counter.get_total_flops() == products * PRODUCT
