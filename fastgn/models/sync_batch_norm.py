"""BatchNorm layers whose statistics are computed over the images of all ranks (--sync-bn).

torch.nn.SyncBatchNorm refuses tensors on the CPU and has no second derivative. The layers of this
module have derivatives of any order. All ranks differentiate their own losses at the same time. The
gradient on each rank is then the derivative of the sum of all ranks' losses.
"""

from typing import Any, cast

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.nn.modules.batchnorm import _BatchNorm

from fastgn.errors import check


@torch.library.custom_op("fastgn::sum_over_ranks", mutates_args=())
def sum_over_ranks(x: Tensor, group_name: str) -> Tensor:
    """Returns the sum of a tensor over the ranks of a process group.

    All ranks have to call it in the same order, with tensors of the same shape. The operator uses
    gloo on the CPU and nccl on CUDA. Its derivative is the operator itself, because each rank's
    tensor is part of the result on every rank.
    """
    total = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=_resolve_process_group(cast(Any, group_name)))
    return total


@sum_over_ranks.register_fake
def _sum_fake(x: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    _, ctx.group_name = inputs


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return sum_over_ranks(grad, ctx.group_name), None


sum_over_ranks.register_autograd(_sum_backward, setup_context=_keep_group)


def compute_statistics(x: Tensor, count: int, group_name: str) -> tuple[Tensor, Tensor]:
    """Returns the mean and the biased variance of each channel over the images of all ranks.

    x: images of this rank, (B, C, ...). count: number of values per channel over all ranks. The
    mean is computed first and subtracted, because otherwise the variance would lose digits.
    """
    rest = [d for d in range(x.ndim) if d != 1]
    mean_C = sum_over_ranks(x.sum(rest), group_name) / count
    squares = (x - reshape_as_channels(mean_C, x)).square()
    return mean_C, sum_over_ranks(squares.sum(rest), group_name) / count


def reshape_as_channels(values_C: Tensor, x: Tensor) -> Tensor:
    """Returns `values_C`, one value per channel, in a shape that broadcasts to `x`, which is (B, C,
    ...)."""
    return values_C.view(-1, *[1] * (x.ndim - 2))


class SyncBatchNorm(_BatchNorm):
    """Base class of BatchNorm layers whose statistics are those of all ranks' images.

    Every rank must have the same number of images. In eval mode the layers do what PyTorch's do.
    Their parameters and buffers have the same names as those of PyTorch's layers.
    """

    group_name: str
    """Name of the process group of the ranks."""
    ranks: int
    """Number of ranks in the group."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        count = x.numel() // x.shape[1] * self.ranks
        if count == 1:
            raise ValueError(
                f"BatchNorm got one value per channel, which has no variance, in an input of shape "
                f"{tuple(x.shape)}: give more images"
            )
        mean_C, var_C = compute_statistics(x, count, self.group_name)
        if self.track_running_stats:
            self._track(mean_C.detach(), var_C.detach() * (count / (count - 1)))
        scale_C = (var_C + self.eps).rsqrt()
        if self.weight is not None:
            scale_C = scale_C * self.weight
        y = (x - reshape_as_channels(mean_C, x)) * reshape_as_channels(scale_C, x)
        if self.bias is not None:
            y = y + reshape_as_channels(self.bias, x)
        return y.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean_C: Tensor, var_C: Tensor) -> None:
        """Moves the running statistics towards those of a batch. var_C: the unbiased variance."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share: float | Tensor | None = self.momentum
        if share is None:  # without momentum, the running statistics are the mean over all batches
            share = self.num_batches_tracked.double().reciprocal()
        for running_C, value_C in ((self.running_mean, mean_C), (self.running_var, var_C)):
            assert running_C is not None
            running_C.add_(share * (value_C - running_C))


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d with statistics over the images of all ranks."""


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d with statistics over the images of all ranks."""


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d with statistics over the images of all ranks."""


class SyncBatchNormAct2d(SyncBatchNorm, BatchNormAct2d):
    """timm's BatchNormAct2d (BatchNorm and an activation) with statistics over the images of all
    ranks."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return self.act(self.drop(y)) if self.training else y


CLASSES: dict[type[nn.Module], type[SyncBatchNorm]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    BatchNormAct2d: SyncBatchNormAct2d,
}
"""Class of a BatchNorm layer -> class of that layer with statistics over the images of all
ranks."""


def sync_batch_norms(model: nn.Module, ranks: int) -> int:
    """Makes the BatchNorm layers of a network use the images of all ranks, in place.

    With one rank the layers stay as they are. Frozen layers are never changed, because they use no
    statistics of a batch. Returns the number of BatchNorm layers.

    Raises UserError if a layer is of an unknown class that is derived from BatchNorm.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    for name, module in norms.items():
        check(
            type(module) in CLASSES,
            f"--sync-bn: layer {name} is a {type(module).__name__}, which is not supported: leave "
            "--sync-bn out",
        )
    if ranks > 1:
        world = torch.distributed.group.WORLD
        assert world is not None
        for module in norms.values():
            module.__class__ = CLASSES[type(module)]
            module.group_name, module.ranks = world.group_name, ranks  # type: ignore[assignment]
    return len(norms)


def has_collectives(model: nn.Module) -> bool:
    """Returns whether a forward in train mode communicates with the other ranks.

    If so, a rank that stops in the middle of an update leaves the others waiting. The update then
    cannot be repeated.
    """
    return any(isinstance(m, SyncBatchNorm) for m in model.modules())
