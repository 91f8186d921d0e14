"""Scales losses so that no gradient in fp16 underflows or overflows, to second order.

fp16 holds magnitudes from 6e-8 to 65,504. Many gradients of a trained network are smaller. Let L be
a loss whose penalty P depends on the input gradient g = dL/dx. Differentiating L + P takes three
sweeps through the network, and all of them have to stay within these limits:

1. The first backward begins with s L, where s is the scale. It carries s times the derivatives of
   L and ends with s g. `differentiate_images` divides s g by s in fp32, so that norms of g, and P,
   have their true values.
2. The second backward begins with s (L + P). The division of sweep 1 divides its derivative with
   respect to g by s again. So the sweep back through sweep 1 begins with dP/dg and carries
   directional derivatives at their natural size, whatever s is.
3. The rest of the second backward carries s times the derivatives of L + P. What sweep 2 adds to
   it are products with the values of sweep 1, which have the factor s too. The gradients of the
   weights therefore have the factor s. They are divided by s in fp32.

One scale serves both backwards. If they had two, sweep 2 would carry the quotient of the two.

The scale is a power of 2, so that multiplying and dividing by it rounds nothing in fp32. It is a
tensor on the device. Therefore its changes cause no recompilation, and the host never reads it in
an update.
"""

import math

import torch
from torch import Tensor

FIRST = 2.0**13
"""Scale at the beginning of a run.

The gradient of an untrained small Swin or ViT has the same error with every scale from 2^8 to 2^16.
If a network's derivatives are larger, its first few updates are skipped.
"""
SMALLEST = 2.0**-10
"""A run ends when its scale has fallen to this number, because smaller ones would not help."""
EXHAUSTED = f"even with the smallest loss scale ({2 * SMALLEST:.3g})"
"""Clause of an error message. The scale that it names is the last one that a run tries."""
LARGEST = 2.0**24
"""Largest scale. It lifts the smallest number of fp16 to 1."""
GROWTH_INTERVAL = 2000
"""The scale is doubled after this number of updates if none of them was skipped."""


def differentiate_images(
    score: Tensor,
    images_BCHW: Tensor,
    loss_scale: Tensor | None = None,
    *,
    summed: int = 1,
    create_graph: bool = False,
) -> Tensor:
    """Returns the gradient of a score with respect to images, computed with a scaled score.

    score: scalar tensor in fp32 or wider. loss_scale: scalar tensor by which the score is
    multiplied and the gradient is divided. None means that nothing is scaled. summed: number of
    images over which the score is a sum, or 1 if it is a mean. The scale is divided by this number
    because sums have larger derivatives than the mean loss, for which the scale is chosen.
    create_graph: whether the gradient can be differentiated again.
    """
    if loss_scale is None:
        (grad_BCHW,) = torch.autograd.grad(score, images_BCHW, create_graph=create_graph)
        return grad_BCHW
    scale = loss_scale / summed
    (grad_BCHW,) = torch.autograd.grad(score * scale, images_BCHW, create_graph=create_graph)
    return grad_BCHW.to(score.dtype) / scale


class LossScale:
    """The scale of the losses of a run, which adapts to the gradients as in PyTorch's GradScaler.

    An update whose gradient is not finite is skipped and halves the scale. After `GROWTH_INTERVAL`
    updates without a skipped one, the scale is doubled. Only `can_shrink_again` and `columns` wait
    for the device.
    """

    def __init__(self, device: torch.device):
        self.scale = torch.full((), FIRST, device=device)
        """The scale, a scalar in fp32. It is changed in place."""
        self.finite_updates = torch.zeros((), device=device)
        """Number of updates since the scale has last changed, a scalar in fp32."""

    def multiply(self, total: Tensor) -> Tensor:
        """Returns a loss times the scale. If the loss is not finite, neither is its gradient.

        Therefore all processes that sum their gradients skip an update if the loss of one of them
        is not finite.
        """
        return total * torch.where(total.detach().isfinite(), self.scale, torch.nan)

    def update(self, skipped: Tensor) -> None:
        """Adapts the scale after an update. skipped: bool scalar, whether the update is skipped."""
        count = torch.where(skipped, 0, self.finite_updates + 1)
        grows = count >= GROWTH_INTERVAL
        factor = torch.where(skipped, 0.5, torch.where(grows, 2.0, 1.0))
        self.scale.copy_((self.scale * factor).clamp(SMALLEST, LARGEST))
        self.finite_updates.copy_(torch.where(grows, 0, count))

    def can_shrink_again(self) -> bool:
        """Returns whether another skipped update would leave a scale above the smallest one. Waits
        for the device."""
        return float(self.scale) > 2 * SMALLEST

    def is_exhausted(self) -> Tensor:
        """Returns whether the scale has fallen to the smallest one, as a bool scalar."""
        return self.scale <= SMALLEST

    def has_skipped_all(self, updates: int) -> bool:
        """Returns whether all updates of a run were skipped. Waits for the device.

        updates: number of all updates of the run. Any other update leaves a larger scale than that
        many halvings.
        """
        return updates > 0 and float(self.scale) <= FIRST * 0.5**updates

    def columns(self, updates: int, finite: Tensor) -> dict[str, float]:
        """Returns the columns loss_scale and skipped_updates of metrics.csv. Waits for the device.

        updates: number of updates since the last row. finite: number of these updates that were not
        skipped.
        """
        return {"loss_scale": float(self.scale), "skipped_updates": updates - round(float(finite))}

    def state(self) -> Tensor:
        """Returns the scale and the number of updates since it has changed, as a tensor (2,)."""
        return torch.stack([self.scale, self.finite_updates])

    def load(self, state: Tensor) -> None:
        """Continues with the values that `state` has returned."""
        scale, finite_updates = state.unbind()
        self.scale.copy_(scale)
        self.finite_updates.copy_(finite_updates)


def judge_values(row: Tensor, loss_scale: LossScale | None) -> tuple[Tensor, Tensor]:
    """Returns the logged values of an update, and whether they must end the run, as a bool scalar.

    The run must end if the loss or the gradient is not finite. In fp16, such an update is skipped
    instead, and its values become NaN. The run then ends only if the scale has fallen to the
    smallest one. Does not wait for the device. row: the values, first the loss, last the norm of
    the gradient.
    """
    loss_is_finite, gradient_is_finite = row[0].isfinite(), row[-1].isfinite()
    if loss_scale is None:
        return row, ~(loss_is_finite & gradient_is_finite)
    row = row.where(gradient_is_finite, torch.nan)
    return row, ~gradient_is_finite & loss_scale.is_exhausted()


def is_state(value: object) -> bool:
    """Returns whether a value could come from `LossScale.state`."""
    if not isinstance(value, Tensor) or value.shape != (2,) or value.dtype != torch.float32:
        return False
    scale, finite_updates = value.tolist()
    fits = SMALLEST <= scale <= LARGEST and 0 <= finite_updates < GROWTH_INTERVAL
    return fits and math.frexp(scale)[0] == 0.5 and finite_updates == int(finite_updates)
