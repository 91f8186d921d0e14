"""Sums the gradients over the processes while the backward still computes."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

BUCKET = 3 * 2**20
"""Number of gradients that one all-reduce sums.

PyTorch's default joins all gradients, so that their sum begins when the backward has ended. A size
that depends on the number of the bucket is of no use, because Inductor (2.14) asks for the first
one's alone.
"""


def size_bucket(index: int, itemsize: int) -> float:
    """Returns the size of a bucket of gradients in MiB.

    index: number of the bucket in the backward. itemsize: bytes per gradient.
    """
    return BUCKET * itemsize / 2**20


def make_compile_options(dtype: torch.dtype) -> dict[str, Any]:
    """Returns options of torch.compile that join the all-reduces of several weights into one.

    dtype: dtype in which the gradients travel.
    """
    sizes = functools.partial(size_bucket, itemsize=dtype.itemsize)
    return {
        "bucket_all_reduces_fx": "all",
        "bucket_all_reduces_fx_bucket_size_determinator": sizes,
    }


@torch.library.custom_op("fastgn::zero_summed", mutates_args=())
def zero_summed(slot: Tensor, shape: Sequence[int], dtype: torch.dtype, group: str) -> Tensor:
    """Returns zeros of the given shape. Their gradient, summed over the processes, is the gradient
    of `slot`.

    slot: a tensor of the given shape that requires grad. Its values are not read. The gradient
    travels in its dtype. group: name of the process group.
    """
    return slot.new_zeros((), dtype=dtype).expand(shape)


@zero_summed.register_fake
def _zero_summed_fake(slot: Tensor, shape: Sequence[int], dtype: torch.dtype, group: str) -> Tensor:
    return slot.new_empty((), dtype=dtype).expand(shape)


def _keep_dtype(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype, ctx.group = inputs[0].dtype, inputs[3]


def _sum_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    ops = torch.ops._c10d_functional
    summed = ops.wait_tensor(ops.all_reduce(grad.to(ctx.dtype).contiguous(), "sum", ctx.group))
    return summed, None, None, None


zero_summed.register_autograd(_sum_gradient, setup_context=_keep_dtype)


class SummedInBackward(nn.Module):
    """Computes a loss whose backward also sums the gradients over the processes.

    The sums are the gradients of `slots`, one tensor for each weight, and have the dtype of the
    slot. No operator in the compiled graph reads a sum, not even a cast or a division. Therefore
    the compiler can begin an all-reduce as soon as its gradients are known, and compute meanwhile.

    module: computes the loss, divided by the number of processes. group: name of the process group.
    """

    def __init__(self, module: nn.Module, group: str):
        super().__init__()
        self.module = module
        self.group = group

    def forward(self, images_BCHW: Tensor, targets: Tensor, ramp: Tensor, *slots: Tensor) -> Any:
        named = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        weights = {
            # this addition is fused with the next operator, such as autocast's cast
            name: weight.detach() + zero_summed(slot, weight.shape, weight.dtype, self.group)
            for (name, weight), slot in zip(named, slots, strict=True)
        }
        return functional_call(self.module, weights, (images_BCHW, targets, ramp))


def find_default_group() -> str:
    """Returns the name of the process group of all processes."""
    group = torch.distributed.group.WORLD
    assert group is not None
    return group.group_name
