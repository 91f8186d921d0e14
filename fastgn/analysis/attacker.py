"""Attacks a batch of images for an evaluation.

The random numbers for an image depend only on the seed and on the image's index. So the results
depend neither on the batch size nor on the number of ranks.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgn import attacks
from fastgn.attacks import Norm
from fastgn.config.programs import AUTOATTACK, AUTOATTACK_PARTS, PGD, pgd_step
from fastgn.errors import UserError
from fastgn.seeding import Stream, derive_seed

Precision = Literal["fp32", "bf16"]


@dataclasses.dataclass(frozen=True)
class Attacker:
    """Attacks images with any of the attacks that --attacks names.

    Shapes: B images, C channels, H x W pixels. Images lie in 0..1 and eps is in the same units.
    """

    norm: Norm
    """Norm in which the size of a perturbation is measured. eps is the largest size allowed."""
    seed: int
    batch_size: int
    """Number of images that AutoAttack attacks at once."""
    device: torch.device
    precision: Precision = "fp32"
    """Precision of the gradients of FGSM and PGD. Whether an attack has succeeded is always decided
    by the fp32 model."""
    compile: bool = False
    """Whether the gradients of FGSM and PGD come from the compiled model. Whether an attack has
    succeeded is always decided by the eager model."""
    compiled: dict[nn.Module, Any] = dataclasses.field(default_factory=dict, repr=False)
    """Model -> its compiled version, which later batches use again."""

    def attack(
        self,
        model: nn.Module,
        images_BCHW: Tensor,
        labels_B: Tensor,
        ids: Sequence[int],
        name: str,
        eps: float,
    ) -> Tensor:
        """Returns the attacked images.

        ids: index of each image in its split, which determines the noise that an attack draws for
        the image. name: name of the attack as in --attacks.
        """
        if name in AUTOATTACK or name in AUTOATTACK_PARTS:
            return attacks.autoattack(
                model,
                images_BCHW,
                labels_B,
                eps=eps,
                batch_size=self.batch_size,
                seed=self.seed,
                device=self.device,
                norm=self.norm,
                version=AUTOATTACK.get(name, "standard"),
                attacks=AUTOATTACK_PARTS.get(name),
            )
        judge = model
        if self.compile:
            if model not in self.compiled:
                self.compiled[model] = torch.compile(model)
            model = self.compiled[model]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            if name == "fgsm":
                return attacks.fgsm(model, images_BCHW, labels_B, eps=eps, norm=self.norm)
            match = PGD.fullmatch(name)
            assert match is not None, name
            steps, restarts, margin = int(match[1]), int(match[2] or 1), match[3]
            return attacks.restarted_pgd(
                model,
                images_BCHW,
                labels_B,
                eps=eps,
                steps=steps,
                starts=self.draw_starts(ids, images_BCHW.shape[1:], eps, restarts),
                step_size=pgd_step(match, eps),
                loss=attacks.margin_loss if margin else attacks.cross_entropy,
                norm=self.norm,
                judge=judge,
            )

    def draw_starts(
        self, ids: Sequence[int], shape: Sequence[int], eps: float, restarts: int
    ) -> Iterator[Tensor]:
        """Yields one start of PGD per restart: noise in the eps ball, which PGD adds to the images.

        ids: index of each image in its split, which determines the image's noise. shape: shape of
        one image.
        """
        for restart in range(restarts):
            seeds = [derive_seed(Stream.EVALUATION, self.seed, index, restart) for index in ids]
            yield attacks.draw_uniform_noise(seeds, shape, eps, self.norm).to(self.device)

    def find_correct(
        self,
        model: nn.Module,
        images_BCHW: Tensor,
        labels_B: Tensor,
        ids: Sequence[int],
        name: str,
        eps: float,
        clean: list[bool] | None,
    ) -> list[bool]:
        """Returns whether the model classifies each image correctly after an attack.

        Waits for the device. Raises UserError if an attacked image is farther than eps from the
        original image.

        clean: whether the model classifies each image correctly without an attack. Images that it
        classifies wrongly are not attacked. If `clean` is None, no image is attacked, and the
        result can be passed as `clean` to the calls for the other attacks. See `attack` for ids,
        name and eps.
        """
        if clean is None:
            with torch.no_grad():
                return (model(images_BCHW).argmax(1) == labels_B).tolist()
        left = [i for i, is_correct in enumerate(clean) if is_correct]
        if not left:
            return clean
        images, labels = images_BCHW[left], labels_B[left]
        attacked = self.attack(model, images, labels, [ids[i] for i in left], name, eps)
        self.check_distance(images, attacked, name, eps)
        with torch.no_grad():
            still_correct = (model(attacked).argmax(1) == labels).tolist()
        correct = list(clean)
        for i, is_correct in zip(left, still_correct, strict=True):
            correct[i] = is_correct
        return correct

    def check_distance(self, images_BCHW: Tensor, attacked: Tensor, name: str, eps: float) -> None:
        """Raises UserError if an attacked image is farther than eps from the original image."""
        added = (attacked - images_BCHW).flatten(1)
        distances = added.abs().amax(1) if self.norm == "Linf" else added.norm(dim=1)
        farthest = float(distances.max())
        if not farthest <= eps * 1.001 + 1e-6:  # written with `not` so that NaN is refused, too
            raise UserError(
                f"{name} has moved an image by {farthest:g} although eps is {eps:g}: the model's "
                "gradients may not be finite"
            )
