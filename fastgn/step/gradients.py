"""Keeps the gradients of an update in a few large tensors, and sums them over the processes.

The gradients are summed when the backward has ended. overlap.py instead sums some of them while the
backward still computes the others.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Each gradient begins at a multiple of this number of elements, so that kernels can load whole
vectors."""
CHUNK_BYTES = 128 * 2**20
"""Largest number of bytes that one all-reduce sums. More bytes are divided into chunks. While the
sum of one chunk is copied into the buffer, the all-reduce of the next chunk runs."""


GRAD_DTYPES = {"fp32": None, "bf16": torch.bfloat16}
"""Value of --grad-dtype -> dtype in which gradients travel. None means the dtype of the weights."""


class Ranks(Protocol):
    """The processes that compute an update together, each one on its own images."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def any(self, flag: bool) -> bool:
        """Returns True in all processes if one of them passes True. Does not wait for devices."""


class OneRank:
    """Takes the place of Ranks if one process computes the update alone."""

    size = 1

    def any(self, flag: bool) -> bool:
        """Returns `flag`."""
        return flag


class PreparedSum(NamedTuple):
    """Memory for one all-reduce. It is allocated before the processes agree to begin it."""

    sent: Tensor
    """Tensor that the all-reduce replaces by its sum over all processes."""
    targets: list[Tensor]
    """Tensors into which the parts of the sum are copied. The list is empty if the sum stays in
    `sent`."""


class GradientBuffer:
    """Holds the gradients of all weights in one tensor per dtype.

    The .grad of each weight is a view of such a tensor. However many weights there are, a few
    copies fill the buffer, and a few all-reduces sum it over the processes. The copies are also
    needed for CUDA graphs, because the next replay of a graph overwrites the gradients in it.

    weights: the parameters, which all require grad. sum_dtype: dtype in which the gradients travel
    between processes. None means the dtype of each weight.
    """

    def __init__(self, weights: Sequence[nn.Parameter], sum_dtype: torch.dtype | None = None):
        self.weights = list(weights)
        self.sum_dtype = sum_dtype
        starts = []
        sizes: dict[torch.dtype, int] = {}
        for weight in self.weights:
            starts.append(sizes.get(weight.dtype, 0))
            sizes[weight.dtype] = starts[-1] + -(-weight.numel() // ALIGNMENT) * ALIGNMENT
        flats = {d: self.weights[0].new_zeros(size, dtype=d) for d, size in sizes.items()}
        self.flats = list(flats.values())
        """One tensor (N,) for each dtype of the weights."""
        self.views = [
            flats[weight.dtype][start : start + weight.numel()].view(weight.shape)
            for weight, start in zip(self.weights, starts, strict=True)
        ]
        """The part of the buffer that belongs to each weight, in the shape of the weight."""

    def add(self, grads: Sequence[Tensor | None], factor: Tensor | None = None) -> None:
        """Adds the gradients of a micro-batch to the .grad of the weights.

        If the .grad of a weight is None, the gradient becomes its .grad. grads: one gradient for
        each weight, or None for a weight that the loss does not depend on. factor: scalar tensor by
        which the gradients are multiplied. None means 1.
        """
        copies: tuple[list[Tensor], list[Tensor]] = [], []
        sums: tuple[list[Tensor], list[Tensor]] = [], []
        for weight, view, grad in zip(self.weights, self.views, grads, strict=True):
            if grad is None:
                continue
            targets, sources = copies if weight.grad is None else sums
            if weight.grad is None:
                weight.grad = view
            targets.append(weight.grad)
            sources.append(grad)
        with torch.no_grad():
            if copies[0]:
                torch._foreach_copy_(*copies)
                if factor is not None:
                    torch._foreach_mul_(copies[0], factor)
            if sums[0]:
                added = sums[1] if factor is None else torch._foreach_mul(sums[1], factor)
                torch._foreach_add_(sums[0], added)

    def clear(self) -> None:
        """Sets the .grad of all weights to None."""
        for weight in self.weights:
            weight.grad = None

    def prepare_sums(self) -> list[PreparedSum]:
        """Returns what `sum_prepared` needs to replace the gradients by their sums.

        The gradients are then in the buffer, and in the dtype in which they are sent. Does not wait
        for a GPU.
        """
        unused = []
        for weight, view in zip(self.weights, self.views, strict=True):
            if weight.grad is None:
                unused.append(view)
            elif weight.grad is not view:  # the caller has put another tensor into .grad
                view.copy_(weight.grad)
                weight.grad = view
        if unused:  # the buffer holds sums of an earlier update for weights without a gradient
            torch._foreach_zero_(unused)
        sums = []
        for flat in self.flats:
            for chunk in flat.split(CHUNK_BYTES // flat.element_size()):
                sent = chunk.to(self.sum_dtype or chunk.dtype)
                sums.append(PreparedSum(sent, [] if sent is chunk else [chunk]))
        return sums


def prepare_means(buffers: Sequence[Tensor], size: int) -> list[PreparedSum]:
    """Returns what `sum_prepared` needs to replace floating-point buffers by their means over all
    processes. There is one all-reduce for each dtype. size: number of processes."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in buffers:
        if buffer.is_floating_point():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
    return [
        PreparedSum(torch.cat([buffer.flatten() for buffer in group]) / size, group)
        for group in by_dtype.values()
    ]


def sum_prepared(sums: Sequence[PreparedSum]) -> None:
    """Runs all-reduces that were prepared, and copies the sums to where they belong.

    Allocates no memory, because a process without memory could not take part, and the others would
    wait for it. Does not wait for a GPU.
    """
    works = [torch.distributed.all_reduce(s.sent, async_op=True) for s in sums]
    for (sent, targets), work in zip(sums, works, strict=True):
        work.wait()
        if targets:
            parts = sent.split([target.numel() for target in targets])
            views = [p.view_as(t) for p, t in zip(parts, targets, strict=True)]
            torch._foreach_copy_(targets, views)
