"""The images that a sanity report attacks, and the attacks on them.

The report checks whether a robust accuracy can be believed (--sanity of fastgn.evaluate).

Shapes: R images that are classified correctly without an attack, C channels, H x W pixels.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastgn import attacks

STEPS = (10, 20, 50, 100)
"""Numbers of steps of PGD. The report of --sanity compares the accuracies under PGD with each of
these numbers."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The R images that are classified correctly without an attack.

    Methods named resist_... attack them and return a bool tensor (R,) on the CPU, which is True for
    the images that withstand the attack. The random numbers for an image depend only on the seed
    and the image's index.
    """

    model: nn.Module
    images_RCHW: Tensor
    labels_R: Tensor
    indices: Sequence[int]
    """Index of each image among all images of the report."""
    images: int
    """Number of all images, including misclassified ones. Accuracies are shares of this number."""
    classes: int
    eps: float
    seed: int
    batch_size: int
    norm: attacks.Norm
    known: dict[int, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False)
    """Number of steps of PGD -> result of `resist_pgd`, kept because several checks need it."""

    @functools.cached_property
    def attacked(self) -> Tensor:
        """The attacked images `(R, C, H, W)`, after PGD with 20 steps."""
        return self.run_pgd(20)

    @functools.cached_property
    def resist_margin_pgd(self) -> Tensor:
        """Whether each image withstands PGD with 100 steps on the margin, a difference between
        logits. A bool tensor `(R,)`."""
        return self.find_resisting(self.run_pgd(STEPS[-1], attacks.margin_loss))

    def resist_pgd(self, steps: int) -> Tensor:
        """Returns whether each image withstands PGD on the cross-entropy with this number of
        steps."""
        if steps not in self.known:
            attacked = self.attacked if steps == 20 else self.run_pgd(steps)
            self.known[steps] = self.find_resisting(attacked)
        return self.known[steps]

    def resist_autoattack(self, names: Sequence[str]) -> Tensor:
        """Returns whether each image withstands all of the named parts of AutoAttack.

        The state of the random number generators stays as it was.
        """
        device = self.images_RCHW.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            adversarial = attacks.autoattack(
                self.model,
                self.images_RCHW,
                self.labels_R,
                eps=self.eps,
                batch_size=self.batch_size,
                seed=self.seed,
                device=device,
                norm=self.norm,
                attacks=names,
            )
        return self.find_resisting(adversarial)

    def find_resisting(self, adversarial_RCHW: Tensor) -> Tensor:
        """Returns whether each of the R attacked images is still classified correctly.

        The result is a bool tensor (R,) on the CPU.
        """
        with torch.no_grad():
            predicted = [self.model(adversarial_RCHW[p]).argmax(1) for p in self.batches()]
        return (torch.cat(predicted) == self.labels_R).cpu()

    def accuracy(self, resisting_R: Tensor) -> float:
        """Returns the accuracy, the share of all images that withstand an attack. resisting_R:
        whether each of the R images withstands the attack."""
        return int(resisting_R.sum()) / self.images

    def take_first(self, number: int) -> "Target":
        """Returns a target with only the first `number` images, as if there were no others."""
        part = min(number, len(self.labels_R))
        return dataclasses.replace(
            self,
            images_RCHW=self.images_RCHW[:part],
            labels_R=self.labels_R[:part],
            indices=self.indices[:part],
            images=part,
        )

    def batches(self) -> Iterator[slice]:
        """Yields for each batch the slice of its images."""
        for low in range(0, len(self.labels_R), self.batch_size):
            yield slice(low, low + self.batch_size)

    def draw_noise(self, part: slice, eps: float, *, use: int, draw: int) -> Tensor:
        """Returns uniform noise in the eps ball for a batch.

        part: the images of the batch. use: 0 if PGD starts from the noise, 1 if the noise itself is
        the attack. draw: index of the draw. Each index gives different noise.
        """
        seeds = [
            int(np.random.SeedSequence([self.seed, use, i, draw]).generate_state(1, np.uint64)[0])
            >> 1
            for i in self.indices[part]
        ]
        noise = attacks.draw_uniform_noise(seeds, self.images_RCHW.shape[1:], eps, self.norm)
        return noise.to(self.images_RCHW)

    def run_pgd(
        self,
        steps: int,
        loss: attacks.LossFn = attacks.cross_entropy,
        *,
        restarts: int = 1,
        eps: float | None = None,
    ) -> Tensor:
        """Returns the images after PGD.

        restarts: number of random starts. loss: function that PGD increases. eps: None means the
        eps of this object.
        """
        radius = self.eps if eps is None else eps
        return torch.cat(
            [
                attacks.restarted_pgd(
                    self.model,
                    self.images_RCHW[part],
                    self.labels_R[part],
                    eps=radius,
                    steps=steps,
                    starts=(self.draw_noise(part, radius, use=0, draw=r) for r in range(restarts)),
                    loss=loss,
                    norm=self.norm,
                )
                for part in self.batches()
            ]
        )

    def run_fgsm(self) -> Tensor:
        """Returns the images after FGSM, a single step."""
        return torch.cat(
            [
                attacks.fgsm(
                    self.model,
                    self.images_RCHW[part],
                    self.labels_R[part],
                    eps=self.eps,
                    norm=self.norm,
                )
                for part in self.batches()
            ]
        )
