"""Sums the gradients over the processes while the backward still computes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

BUCKET = 4 * 2**20
"""Smallest number of elements that one all-reduce sums. The last one of a backward, and the last
one before another dtype, may have fewer."""
COMPILE_OPTIONS = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms"],
}
"""Options of torch.compile that begin each all-reduce as soon as its gradients are known."""
CUDA_GRAPHS = {
    "triton.cudagraphs": True,
    "graph_partition": True,
    "custom_should_partition_ops": ["_c10d_functional::all_reduce_"],
    # otherwise all all-reduces would move to the end, so that one graph is enough
    "triton.reorder_for_reducing_graph_partitions": False,
}
"""Further options of torch.compile that replay the kernels between two all-reduces as a CUDA graph.
The all-reduces themselves are in no graph."""


class Bucket(NamedTuple):
    """Consecutive weights whose gradients are summed in one all-reduce."""

    start: int
    """Position of the first weight in the list of all weights."""
    stop: int
    """Position after the last weight in this list."""
    slot: Tensor
    """A tensor (N,) that requires grad, where N is the number of elements of the weights.

    It is an input of the loss that only serves to get a gradient: the backward makes the summed
    gradients of the bucket the gradient of the slot. The gradients travel in the dtype of the slot.
    The N values of the slot are never read and share the memory of one number.
    """


def make_buckets(weights: Sequence[Tensor], dtype: torch.dtype | None) -> list[Bucket]:
    """Divides weights into buckets of at least `BUCKET` elements.

    The first bucket has the last weights, because a backward computes their gradients first.
    Weights of different dtypes do not share a bucket. dtype: dtype in which gradients travel. None
    means the dtype of the weights.
    """
    buckets: list[Bucket] = []
    stop, count = len(weights), 0
    for start in reversed(range(len(weights))):
        weight = weights[start]
        count += weight.numel()
        ends = start == 0 or weights[start - 1].dtype != weight.dtype
        if ends or count >= BUCKET:
            slot = weight.detach().new_zeros((), dtype=dtype or weight.dtype).expand(count)
            buckets.append(Bucket(start, stop, slot.requires_grad_()))
            stop, count = start, 0
    return buckets


@torch._dynamo.allow_in_graph  # otherwise the second derivative would be wrong
class SumInBackward(torch.autograd.Function):
    """Returns weights whose gradients the backward sums over the processes, in one all-reduce.

    The sums become the gradient of `slot`, see Bucket. Nothing here waits for the all-reduce, so
    that the rest of the backward runs at the same time. Later `split_sums` waits for it.
    """

    @staticmethod
    def forward(slot: Tensor, group: str, *weights: Tensor) -> tuple[Tensor, ...]:
        """Returns the weights as they are. group: name of the process group."""
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps what the backward needs."""
        ctx.dtype, ctx.group = inputs[0].dtype, inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Begins the all-reduce. grads: gradients of the weights on this process."""
        flat = torch.cat([grad.flatten() for grad in grads]).to(ctx.dtype)
        sums = torch.ops._c10d_functional.all_reduce(flat, "sum", ctx.group)
        return sums, None, *[None] * len(grads)


class SummedInBackward(nn.Module):
    """Computes a loss whose backward also sums the gradients over the processes.

    Each bucket has a slot: an input of the loss whose only purpose is its gradient. The backward
    makes the bucket's summed gradients the gradient of the slot. Nothing in the compiled graph
    reads a sum, not even a cast or a division, so the graph never waits for an all-reduce.

    module: computes the loss, divided by the number of processes. buckets: made from the weights of
    `module` that require grad. group: name of the process group.
    """

    def __init__(self, module: nn.Module, buckets: Sequence[Bucket], group: str):
        super().__init__()
        self.module = module
        self.buckets = buckets
        self.group = group

    def forward(self, images_BCHW: Tensor, targets: Tensor, ramp: Tensor, *slots: Tensor) -> Any:
        """Returns the loss. slots: those of the buckets, in the same order."""
        named = [(n, p.detach()) for n, p in self.module.named_parameters() if p.requires_grad]
        replaced: dict[str, Tensor] = {}
        for bucket, slot in zip(self.buckets, slots, strict=True):
            names, weights = zip(*named[bucket.start : bucket.stop], strict=True)
            summed = SumInBackward.apply(slot, self.group, *weights)
            replaced |= zip(names, summed, strict=True)
        return functional_call(self.module, replaced, (images_BCHW, targets, ramp))


def split_sums(
    sums: Sequence[Tensor | None], buckets: Sequence[Bucket], weights: Sequence[Tensor]
) -> list[Tensor | None]:
    """Waits for the all-reduces of a backward, and returns the summed gradient of each weight.

    If the loss depends on no weight of a bucket, the result is None for each of them. If it depends
    on some of them, the result is zeros for the others. The host does not wait for a GPU. sums:
    gradients of the buckets' slots. weights: those from which the buckets were made.
    """
    grads: list[Tensor | None] = []
    for bucket, flat in reversed(list(zip(buckets, sums, strict=True))):
        own = weights[bucket.start : bucket.stop]
        if flat is None:
            grads += [None] * len(own)
            continue
        parts = torch.ops._c10d_functional.wait_tensor(flat).split([w.numel() for w in own])
        grads += [part.view_as(weight) for part, weight in zip(parts, own, strict=True)]
    return grads


def find_default_group() -> str:
    """Returns the name of the process group of all processes."""
    group = torch.distributed.group.WORLD
    assert group is not None
    return group.group_name
