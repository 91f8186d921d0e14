"""Sums the gradients over the processes while the backward still computes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

BUCKET = 4 * 2**20
"""Smallest number of elements that one all-reduce sums. The last all-reduce of a backward, and the
last one before weights of another dtype, may sum fewer."""
COMPILE_OPTIONS = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms"],
}
"""Options of torch.compile that begin each all-reduce as soon as its gradients are known."""
CUDA_GRAPHS = {
    "triton.cudagraphs": True,
    "graph_partition": True,
    "custom_should_partition_ops": ["_c10d_functional::all_reduce_"],
    # if True, the compiler would move every all-reduce to the end, so that one CUDA graph is enough
    "triton.reorder_for_reducing_graph_partitions": False,
}
"""Further options of torch.compile. With them, the kernels between two all-reduces are replayed as
a CUDA graph. The all-reduces themselves are in no graph."""


class Bucket(NamedTuple):
    """Consecutive weights whose gradients are summed in one all-reduce."""

    start: int
    """Index of the bucket's first weight in the list of all weights."""
    stop: int
    """Index after the bucket's last weight in the list of all weights."""
    slot: Tensor
    """An extra input of the loss, which only serves to get a gradient. The backward returns the
    summed gradients of the bucket as the gradient of the slot.

    It is a tensor (N,) that requires grad, where N is the number of elements of the bucket's
    weights. Its dtype is that in which the gradients are sent. Its values are never read and share
    the memory of one number.
    """


def make_buckets(weights: Sequence[Tensor], dtype: torch.dtype | None) -> list[Bucket]:
    """Divides weights into buckets of at least `BUCKET` elements.

    The first bucket has the last weights, because a backward computes their gradients first.
    Weights of different dtypes do not share a bucket. dtype: dtype in which gradients are sent
    between processes. None means the dtype of the weights.
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
    """Passes weights through unchanged, and sums their gradients over the processes in the
    backward.

    The sum needs one all-reduce. It becomes the gradient of an extra input, the slot (see Bucket).
    The backward does not wait for the all-reduce, so both run at the same time. Later `split_sums`
    waits for the all-reduce.
    """

    @staticmethod
    def forward(slot: Tensor, group: str, *weights: Tensor) -> tuple[Tensor, ...]:
        """Returns the weights unchanged. Only the backward of this function does something.

        slot: tensor whose gradient becomes the summed gradients of the weights. group: name of the
        process group.
        """
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps what the backward needs: the dtype of the sum and the process group."""
        ctx.dtype, ctx.group = inputs[0].dtype, inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Begins the all-reduce of the weights' gradients, and returns its result as the gradient
        of the slot. grads: gradients of the weights in this process."""
        flat = torch.cat([grad.flatten() for grad in grads]).to(ctx.dtype)
        sums = torch.ops._c10d_functional.all_reduce(flat, "sum", ctx.group)
        return sums, None, *[None] * len(grads)


class SummedInBackward(nn.Module):
    """Computes a loss whose backward also sums the gradients over the processes.

    Each bucket of weights has a slot, which is an extra input of the loss. The backward returns the
    bucket's summed gradients as the gradient of the slot. Nothing in the compiled graph reads a
    sum, not even a cast or a division, so the graph never waits for an all-reduce.

    module: computes the loss. The caller divides it, or in fp16 its gradients, by the number of
    processes. buckets: made from the weights of `module` that require grad. group: name of the
    process group.
    """

    def __init__(self, module: nn.Module, buckets: Sequence[Bucket], group: str):
        super().__init__()
        self.module = module
        self.buckets = buckets
        self.group = group

    def forward(
        self, images_BCHW: Tensor, targets: Tensor, ramp: Tensor, *slots: Tensor, **scale: Tensor
    ) -> Any:
        """Returns the loss.

        slots: the extra input that belongs to each bucket (Bucket.slot), in the order of the
        buckets. scale: {"loss_scale": tensor} in fp16, otherwise empty.
        """
        named = [(n, p.detach()) for n, p in self.module.named_parameters() if p.requires_grad]
        replaced: dict[str, Tensor] = {}
        for bucket, slot in zip(self.buckets, slots, strict=True):
            names, weights = zip(*named[bucket.start : bucket.stop], strict=True)
            summed = SumInBackward.apply(slot, self.group, *weights)
            replaced |= zip(names, summed, strict=True)
        return functional_call(self.module, replaced, (images_BCHW, targets, ramp), scale)


def split_sums(
    sums: Sequence[Tensor | None], buckets: Sequence[Bucket], weights: Sequence[Tensor]
) -> list[Tensor | None]:
    """Waits for the all-reduces of a backward, and returns the summed gradient of each weight.

    On a GPU only the stream waits, not the host. If the loss depends on no weight of a bucket, the
    gradients of the bucket's weights are None. If the loss depends on only some of them, the
    gradients of the others are zeros.

    sums: gradients of the buckets' slots. weights: the weights from which the buckets were made.
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
