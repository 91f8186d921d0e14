"""Whether a robust accuracy can be believed: the sanity checks of Carlini et al. 2019 (arXiv
1902.06705), "On evaluating adversarial robustness", on one page.

Gradient-norm regularisation lowers the very gradient that cross-entropy attacks follow, so a model
that merely hides it must not pass for robust. No check proves robustness; a failed one disproves
the evaluation.

Shapes: B images, C channels, H x W pixels, K classes. Images lie in 0..1, eps is in the same units.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastgn import attacks
from fastgn.errors import check

Verdict = Literal["pass", "warn", "fail"]

STEPS = (10, 20, 50, 100)
RESTARTS = 5
NOISE_DRAWS = 10
VANISHED_L1 = 1e-12
FEW_IMAGES = 100
"""Below it one image is more than one point of accuracy."""

AUTOATTACK_WARNINGS: dict[str, tuple[str, Verdict]] = {
    "AutoAttack: randomised": ("randomized defense", "fail"),
    "AutoAttack: probabilities": ("probability distribution", "fail"),
    "AutoAttack: dynamic": ("dynamic defense", "warn"),
}
"""Check -> words of pyautoattack's warning and what it is worth; zero gradients are counted."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    verdict: Verdict
    detail: str
    """One line: the numbers, and above what the verdict changes."""
    numbers: dict[str, Any]
    """The same for a program: shares in 0..1 (accuracy_*, *_share), counts, eps in 0..1 pixels; it
    is JSON as it stands."""


Keep = Callable[[str, Callable[[], list[Check]]], list[Check]]
STAGES = (
    *("model", "radii", "iterations", "restarts", "single step"),
    *("noise", "black box", "margin", "APGD", "precision"),
)
"""Parts that the report is made of, each of a check or a few."""


def sanity_report(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    eps: float,
    seed: int,
    batch_size: int,
    norm: attacks.Norm = "Linf",
    square_images: int = 64,
    apgd_images: int = 32,
    keep: Keep | None = None,
) -> list[Check]:
    """The checks of Carlini et al. 2019 (arXiv 1902.06705, section 5), in the order of the page.

    model: returns fp32 logits, B x K. It is attacked in evaluation mode; what was in training mode
    is put back. images: fp32 in 0..1 and labels: int64, both on the model's device.

    A PGD start depends on (seed, image's index, restart) alone: batch_size is no part of the
    result, but for rounding and for AutoAttack's own draws. The images that are misclassified
    without an attack are not attacked; they count as lost in every accuracy.

    square_images, apgd_images: how many of the correctly classified images Square (5000 queries
    each, Andriushchenko et al. 2020) and APGD (5 restarts of 100 steps, on DLR and cross-entropy,
    Croce & Hein 2020) attack; 0 leaves the attack out, and the page says so.

    keep: called with the name of each of STAGES in turn and what makes its checks; returns them,
    made now or in an earlier call. None makes them all.

    A gap counts above max(1 point, 1 image); the severe ones fail above max(5 points, 2 images).

    Raises UserError for no images, lengths that differ, pixels outside 0..1 or eps <= 0.
    """
    check(len(images_BCHW) > 0, "no images to check; give at least one, better 1000")
    check(
        len(images_BCHW) == len(labels_B),
        f"{len(images_BCHW)} images but {len(labels_B)} labels; give one label an image",
    )
    check(
        bool((images_BCHW >= 0).all() and (images_BCHW <= 1).all()),
        "images reach outside 0..1; normalisation belongs into the model",
    )
    check(eps > 0, f"eps is {eps}; give a radius above 0 in 0..1 pixel units")
    check(batch_size > 0, f"batch_size is {batch_size}; give 1 or more")
    training = sum(module.training for module in model.modules())
    keep = keep or (lambda _, make: make())
    with _evaluation_mode(model):
        right_B, classes = _clean(model, images_BCHW, labels_B, batch_size)
        checks = keep(
            "model",
            lambda: [
                _mode(training),
                *_outputs(model, images_BCHW[:batch_size]),
                _clean_accuracy(right_B, classes),
                _vanished(model, images_BCHW, labels_B, batch_size),
            ],
        )
        vanished = checks[-1]
        if not right_B.any() or vanished.numbers["vanished_share"] is None:
            return checks  # nothing to attack, or no gradient to attack it with
        target = _Target(
            model,
            images_BCHW[right_B],
            labels_B[right_B],
            right_B.nonzero().flatten().tolist(),
            images=len(right_B),
            classes=classes,
            eps=eps,
            seed=seed,
            batch_size=batch_size,
            norm=norm,
        )
        stages: dict[str, Callable[[], list[Check]]] = {
            "radii": lambda: [_falls_with_eps(target, target.stand(20))],
            "iterations": lambda: [_iterations(target, {k: target.stand(k) for k in STEPS})],
            "restarts": lambda: [_restarts(target, target.stand(20))],
            "single step": lambda: [_single_step(target, target.stand(20))],
            "noise": lambda: [_noise(target, target.stand(20))],
            "black box": lambda: [
                _black_box(target, target.stand(STEPS[-1]) & target.stand_margin, square_images)
            ],
            "margin": lambda: [_margin(target, target.stand(STEPS[-1]), target.stand_margin)],
            "APGD": lambda: _apgd(target, apgd_images),
            "precision": lambda: [_precision(target, target.attacked)],
        }
        assert STAGES == ("model", *stages)
        for name, make in stages.items():
            checks += keep(name, make)
    return checks


def page(checks: Sequence[Check], title: str) -> str:
    """The report as plain text: the title, a count of the verdicts and a line a check."""
    count = {v: sum(c.verdict == v for c in checks) for v in ("fail", "warn", "pass")}
    width = max((len(c.name) for c in checks), default=0)
    return "\n".join(
        [
            title,
            ", ".join(f"{number} {verdict}" for verdict, number in count.items())
            + "; checks after Carlini et al. 2019 (arXiv 1902.06705)",
            "",
            *(f"{c.verdict.upper()}  {c.name:<{width}}  {c.detail}" for c in checks),
            "",
        ]
    )


# ------------------------------------------------------------------------------ the attacked images


@dataclasses.dataclass(frozen=True)
class _Target:
    """The R images that are right without an attack, and how they are attacked."""

    model: nn.Module
    images_RCHW: Tensor
    labels_R: Tensor
    indices: Sequence[int]
    """Each one's place among all images: its noise depends on it."""
    images: int
    """All of them: what an accuracy is a share of."""
    classes: int
    eps: float
    seed: int
    batch_size: int
    norm: attacks.Norm
    known: dict[int, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False)
    """Number of PGD's steps -> which images withstand it, of those that `stand` was asked for."""

    @functools.cached_property
    def attacked(self) -> Tensor:
        """The images under PGD-20."""
        return self.pgd(20)

    @functools.cached_property
    def stand_margin(self) -> Tensor:
        """Which images withstand PGD on the margin."""
        return self.withstood(self.pgd(STEPS[-1], attacks.margin))

    def stand(self, steps: int) -> Tensor:
        """Returns which images withstand PGD; several checks ask for the same."""
        if steps not in self.known:
            self.known[steps] = self.withstood(self.attacked if steps == 20 else self.pgd(steps))
        return self.known[steps]

    def first(self, number: int) -> "_Target":
        """The first of its images, as if there were no others."""
        part = min(number, len(self.labels_R))
        return dataclasses.replace(
            self,
            images_RCHW=self.images_RCHW[:part],
            labels_R=self.labels_R[:part],
            indices=self.indices[:part],
            images=part,
        )

    def batches(self) -> Iterator[slice]:
        for low in range(0, len(self.labels_R), self.batch_size):
            yield slice(low, low + self.batch_size)

    def noise(self, part: slice, eps: float, *, use: int, draw: int) -> Tensor:
        """Uniform in the ball; use: 0 starts of PGD, 1 noise as an attack."""
        seeds = [
            int(np.random.SeedSequence([self.seed, use, i, draw]).generate_state(1, np.uint64)[0])
            >> 1
            for i in self.indices[part]
        ]
        noise = attacks.uniform_noise(seeds, self.images_RCHW.shape[1:], eps, self.norm)
        return noise.to(self.images_RCHW)

    def pgd(
        self,
        steps: int,
        loss: attacks.LossFn = attacks.cross_entropy,
        *,
        restarts: int = 1,
        eps: float | None = None,
    ) -> Tensor:
        """The adversarial images."""
        radius = self.eps if eps is None else eps
        return torch.cat(
            [
                attacks.restarted_pgd(
                    self.model,
                    self.images_RCHW[part],
                    self.labels_R[part],
                    eps=radius,
                    steps=steps,
                    starts=(self.noise(part, radius, use=0, draw=r) for r in range(restarts)),
                    loss=loss,
                    norm=self.norm,
                )
                for part in self.batches()
            ]
        )

    def withstood(self, adversarial_RCHW: Tensor) -> Tensor:
        """bool R, on the CPU."""
        with torch.no_grad():
            predicted = [self.model(adversarial_RCHW[p]).argmax(1) for p in self.batches()]
        return (torch.cat(predicted) == self.labels_R).cpu()

    def autoattack(self, names: Sequence[str]) -> Tensor:
        """bool R: withstood the named attacks; the generators are left as they were."""
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
        return self.withstood(adversarial)

    def share(self, withstood_R: Tensor) -> float:
        return int(withstood_R.sum()) / self.images


def _above(images: int, of: int, points: float, at_least: int = 1) -> bool:
    """Whether a count of images is above max(points, at_least images)."""
    return images > max(points / 100 * of, at_least)


def _gap(images: int, of: int) -> Verdict:
    if _above(images, of, 5, at_least=2):
        return "fail"
    return "warn" if _above(images, of, 1) else "pass"


GAP_RULE = "warn above max(1 point, 1 image), fail above max(5 points, 2 images)"


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# ----------------------------------------------------------------------------- the model by itself


def _mode(training: int) -> Check:
    return Check(
        "evaluation mode",
        "fail" if training else "pass",
        f"{training} modules were in training mode (dropout, batch statistics); fail above 0",
        {"training_modules": training},
    )


def _outputs(model: nn.Module, images_BCHW: Tensor) -> list[Check]:
    with torch.no_grad():
        outputs = torch.stack([model(images_BCHW).double() for _ in range(5)])
    first = outputs[0]
    broken = int((~outputs.isfinite()).sum())
    # 1e-4: softmax in half precision misses 1 by more than fp32 does
    probable = bool((first >= 0).all() and ((first.sum(1) - 1).abs() < 1e-4).all())
    logits = Check(
        "outputs are logits",
        "fail" if probable or broken else "pass",
        f"range {float(first.min()):.3g} to {float(first.max()):.3g}, {broken} not finite"
        + (", every row non-negative with sum 1: probabilities" if probable else "")
        + "; fail for probabilities or any that is not finite",
        {"probabilities": probable, "not_finite": broken},
    )
    # relative, as pyautoattack has it: kernels with atomics differ in the last bits
    apart = (outputs - first).norm(dim=2) / first.norm(dim=1).clamp_min(1e-10)
    spread = float(apart.amax()) if not broken else 0.0
    moved = int((outputs.argmax(2) != first.argmax(1)).any(0).sum())
    same = Check(
        "deterministic",
        "fail" if spread > 1e-4 or moved else "pass",
        f"5 forwards differ by {spread:.2g} of the logits' norm, {moved} of {len(first)} classes "
        "change; fail above 1e-4 or 0",
        {"relative_spread": spread, "changed_classes": moved},
    )
    return [logits, same]


def _clean(
    model: nn.Module, images_BCHW: Tensor, labels_B: Tensor, batch_size: int
) -> tuple[Tensor, int]:
    with torch.no_grad():
        logits_BK = torch.cat([model(images) for images in images_BCHW.split(batch_size)])
    return logits_BK.argmax(1) == labels_B, logits_BK.shape[1]


def _clean_accuracy(right_B: Tensor, classes: int) -> Check:
    images, right = len(right_B), int(right_B.sum())
    chance = right * classes <= images
    return Check(
        "clean accuracy",
        "fail" if chance else "warn" if images < FEW_IMAGES else "pass",
        f"{right / images:.1%} ({right} of {images}); fail at or below chance (1/{classes}), "
        f"warn under {FEW_IMAGES} images (one is more than a point)",
        {"accuracy_clean": right / images, "images": images, "classes": classes},
    )


def _vanished(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor, batch_size: int) -> Check:
    norms = []
    try:
        for images, labels in zip(
            images_BCHW.split(batch_size), labels_B.split(batch_size), strict=True
        ):
            grad = attacks.input_gradient(model, images, labels).images_BCHW
            norms.append(grad.double().abs().flatten(1).sum(1))
    except RuntimeError as error:
        if not re.search("does not require grad|not have been used in the graph", str(error)):
            raise
        return Check(
            "gradients reach the images",
            "fail",
            "the outputs are cut off from the images (detach, no_grad); no attack was run",
            {"vanished_share": None},
        )
    norm_B = torch.cat(norms)
    # written so that a gradient that is not a number counts as vanished
    vanished, images = int((~(norm_B >= VANISHED_L1)).sum()), len(norm_B)
    verdict: Verdict = "fail" if _above(vanished, images, 1) else "warn" if vanished else "pass"
    return Check(
        "gradients reach the images",
        verdict,
        f"{vanished} of {images} images ({vanished / images:.1%}) with a cross-entropy gradient "
        f"below {VANISHED_L1:g} in L1, median {float(norm_B.median()):.3g}; warn above 0, "
        "fail above max(1 %, 1 image)",
        {"vanished_share": vanished / images, "images": images},
    )


# ------------------------------------------------------------------------------- under the attacks


def _falls_with_eps(target: _Target, pgd20_R: Tensor) -> Check:
    # at the largest every image can become every other: the cube's side, or its diagonal
    largest = 1.0 if target.norm == "Linf" else target.images_RCHW[0].numel() ** 0.5
    radii, counts = [target.eps], [int(pgd20_R.sum())]
    while counts[-1] and radii[-1] < largest:
        radii.append(min(2 * radii[-1], largest))
        counts.append(int(target.withstood(target.pgd(20, eps=radii[-1])).sum()))
    left, of = counts[-1], target.images
    rise = max([0, *(b - a for a, b in zip(counts, counts[1:], strict=False))])
    verdict: Verdict = "pass"
    if _above(left, of, 1):
        # an image made grey still leaves a guess
        verdict = "fail" if left * target.classes > of else "warn"
    if _above(rise, of, 1):
        verdict = "fail"
    curve = ", ".join(f"{e:.3g}: {c / of:.1%}" for e, c in zip(radii, counts, strict=True))
    return Check(
        "accuracy falls to 0",
        verdict,
        f"PGD-20 at eps {curve}; fail when it rises by, or warn when it ends, above max(1 point, "
        f"1 image), fail when it ends above chance (1/{target.classes})",
        {"eps": radii, "accuracy_pgd20": [c / of for c in counts]},
    )


def _iterations(target: _Target, by_steps: dict[int, Tensor]) -> Check:
    counts = {steps: int(withstood.sum()) for steps, withstood in by_steps.items()}
    change = abs(counts[STEPS[-2]] - counts[STEPS[-1]])
    of = target.images
    return Check(
        "more iterations",
        _gap(change, of),
        "PGD-"
        + ", ".join(f"{steps}: {count / of:.1%}" for steps, count in counts.items())
        + f"; the last doubling's change: {GAP_RULE}",
        {f"accuracy_pgd{steps}": count / of for steps, count in counts.items()},
    )


def _restarts(target: _Target, pgd20_R: Tensor) -> Check:
    restarted = target.withstood(target.pgd(20, restarts=RESTARTS))
    one, five = target.share(pgd20_R), target.share(restarted)
    return Check(
        "more restarts",
        _gap(int(pgd20_R.sum()) - int(restarted.sum()), target.images),
        f"PGD-20 with 1 start {one:.1%}, with {RESTARTS} {five:.1%}; drop: {GAP_RULE}",
        {"accuracy_1_start": one, f"accuracy_{RESTARTS}_starts": five},
    )


def _single_step(target: _Target, pgd20_R: Tensor) -> Check:
    attacked = torch.cat(
        [
            attacks.fgsm(
                target.model,
                target.images_RCHW[part],
                target.labels_R[part],
                eps=target.eps,
                norm=target.norm,
            )
            for part in target.batches()
        ]
    )
    fgsm_R = target.withstood(attacked)
    worse = int(pgd20_R.sum()) - int(fgsm_R.sum())
    pgd, fgsm = target.share(pgd20_R), target.share(fgsm_R)
    return Check(
        "iterations beat one step",
        "fail" if _above(worse, target.images, 1) else "pass",
        f"PGD-20 {pgd:.1%}, FGSM {fgsm:.1%}; fail when PGD's is higher by above "
        "max(1 point, 1 image)",
        {"accuracy_pgd20": pgd, "accuracy_fgsm": fgsm},
    )


def _noise(target: _Target, pgd20_R: Tensor) -> Check:
    noise_R = torch.ones_like(pgd20_R)
    for draw in range(NOISE_DRAWS):
        noisy = [
            target.images_RCHW[part] + target.noise(part, target.eps, use=1, draw=draw)
            for part in target.batches()
        ]
        noise_R &= target.withstood(torch.cat(noisy).clamp(0, 1))
    withstood = int(noise_R.sum())
    worse = int(pgd20_R.sum()) - withstood
    verdict: Verdict = "warn" if worse >= 0 and withstood else "pass"
    if _above(worse, target.images, 1):
        verdict = "fail"
    pgd, noise = target.share(pgd20_R), target.share(noise_R)
    return Check(
        "PGD beats noise",
        verdict,
        f"PGD-20 {pgd:.1%}, worst of {NOISE_DRAWS} uniform draws {noise:.1%}; warn when PGD's is "
        "no lower, fail when higher by above max(1 point, 1 image)",
        {"accuracy_pgd20": pgd, "accuracy_noise": noise},
    )


def _black_box(target: _Target, white_box_R: Tensor, square_images: int) -> Check:
    name = "white box beats black box"
    part = target.first(square_images)
    if not part.images:
        return Check(name, "warn", "Square not run: square_images is 0", {"square_images": 0})
    square_R = part.autoattack(["square"])
    white_R = white_box_R[: part.images]
    worse = int(white_R.sum()) - int(square_R.sum())
    white, square = part.share(white_R), part.share(square_R)
    return Check(
        name,
        "fail" if _above(worse, part.images, 1) else "pass",
        f"of {part.images} images right without an attack PGD-{STEPS[-1]} on the better of "
        f"cross-entropy and margin leaves {white:.1%}, Square {square:.1%}; fail when PGD's is "
        "higher by above max(1 point, 1 image)",
        {"square_images": part.images, "accuracy_pgd": white, "accuracy_square": square},
    )


def _margin(target: _Target, cross_entropy_R: Tensor, margin_R: Tensor) -> Check:
    gap = int(cross_entropy_R.sum()) - int(margin_R.sum())
    ce, margin = target.share(cross_entropy_R), target.share(margin_R)
    return Check(
        "cross-entropy attacks no worse than margin",
        _gap(gap, target.images),
        f"PGD-{STEPS[-1]} on cross-entropy {ce:.1%}, on the margin {margin:.1%}; possible masking: "
        f"{GAP_RULE}",
        {"accuracy_cross_entropy": ce, "accuracy_margin": margin},
    )


def _apgd(target: _Target, apgd_images: int) -> list[Check]:
    """APGD against PGD of as many steps, and what AutoAttack itself warned of."""
    name = "cross-entropy PGD no worse than APGD"
    part = target.first(apgd_images)
    if not part.images:
        return [Check(name, "warn", "APGD not run: apgd_images is 0", {"apgd_images": 0})]
    # DLR first: AutoAttack looks for zero gradients there alone. With three classes DLR is constant
    # for an image whose label comes last, and the warning means nothing.
    dlr = target.classes >= 4
    with attacks.autoattack_warnings() as lines:
        apgd_R = part.autoattack(["apgd-dlr", "apgd-ce"] if dlr else ["apgd-ce"])
    pgd_R = part.withstood(part.pgd(STEPS[-1], restarts=RESTARTS))
    pgd, apgd = part.share(pgd_R), part.share(apgd_R)
    compared = Check(
        name,
        _gap(int(pgd_R.sum()) - int(apgd_R.sum()), part.images),
        f"of {part.images} images right without an attack PGD-{STEPS[-1]} with {RESTARTS} starts "
        f"leaves {pgd:.1%}, APGD on {'DLR and ' if dlr else ''}cross-entropy {apgd:.1%}; "
        f"possible masking: {GAP_RULE}",
        {"apgd_images": part.images, "accuracy_pgd": pgd, "accuracy_apgd": apgd},
    )
    return [compared, *_warned(lines, part.images, dlr)]


def _warned(lines: Sequence[str], images: int, dlr: bool) -> list[Check]:
    checks = []
    other = list(dict.fromkeys(lines))
    for name, (words, verdict) in AUTOATTACK_WARNINGS.items():
        found = [line for line in other if words in line]
        other = [line for line in other if words not in line]
        detail = " ".join(found) or "no such warning"
        checks.append(
            Check(
                name,
                verdict if found else "pass",
                f"{detail}; {verdict} when warned",
                {"warned": bool(found)},
            )
        )
    zero = [re.search(r"there are (\d+) points with zero gradient", line) for line in other]
    other = [line for line, match in zip(other, zero, strict=True) if not match]
    points = max((int(match[1]) for match in zero if match), default=0)
    if dlr:
        severe = _above(points, images, 1)
        checks.append(
            Check(
                "AutoAttack: zero gradients",
                "fail" if severe else "warn" if points else "pass",
                f"up to {points} of {images} starting points in one run; warn above 0, fail above "
                "max(1 %, 1 image)",
                {"zero_gradients": points, "apgd_images": images},
            )
        )
    else:
        checks.append(
            Check(
                "AutoAttack: zero gradients",
                "warn",
                "not looked for: its check needs DLR, which needs 4 classes",
                {"zero_gradients": None, "apgd_images": images},
            )
        )
    return checks + [Check("AutoAttack: other", "warn", line, {"warned": True}) for line in other]


def _precision(target: _Target, attacked: Tensor) -> Check:
    disagree = 0
    counts = {"fp32": 0, "bf16": 0}
    for part in target.batches():
        with torch.no_grad():
            fp32 = target.model(attacked[part]).argmax(1)
            with torch.autocast(attacked.device.type, dtype=torch.bfloat16):
                bf16 = target.model(attacked[part]).argmax(1)
        disagree += int((fp32 != bf16).sum())
        counts["fp32"] += int((fp32 == target.labels_R[part]).sum())
        counts["bf16"] += int((bf16 == target.labels_R[part]).sum())
    of = len(target.labels_R)
    accuracy = {f"accuracy_{name}": count / target.images for name, count in counts.items()}
    return Check(
        "fp32 and bf16 agree",
        "warn" if _above(disagree, of, 2) else "pass",
        f"{disagree} of {of} images under PGD-20 ({disagree / of:.1%}) change class; accuracy fp32 "
        f"{accuracy['accuracy_fp32']:.1%}, bf16 {accuracy['accuracy_bf16']:.1%}; warn above "
        "max(2 %, 1 image)",
        {"disagreement_share": disagree / of, **accuracy},
    )
