"""Checks of the report of --sanity that attack the images.

Most checks compare two attacks, one of which should be at least as strong as the other. If the
attack that should be stronger is weaker, the model may hide the gradients that this attack follows.
This is called masking.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgn import attacks
from fastgn.analysis.model_checks import Check, Verdict, exceeds
from fastgn.analysis.target import STEPS, Target

RESTARTS = 5
NOISE_DRAWS = 10

AUTOATTACK_WARNINGS: dict[str, tuple[str, Verdict]] = {
    "AutoAttack: randomised": ("randomized defense", "fail"),
    "AutoAttack: probabilities": ("probability distribution", "fail"),
    "AutoAttack: dynamic": ("dynamic defense", "warn"),
}
"""Name of a check -> (words that identify a warning of pyautoattack, verdict if this warning was
given). Warnings of zero gradients are left out, because their verdict depends on the number of
images."""

GAP_RULE = "Warn above max(1 point, 1 image). Fail above max(5 points, 2 images)."


def judge_gap(images: int, total: int) -> Verdict:
    """Returns the verdict on the difference between two attacks. GAP_RULE states the limits.

    images: how many more images withstand one attack than the other. total: number of all images.
    """
    if exceeds(images, total, 5, at_least=2):
        return "fail"
    return "warn" if exceeds(images, total, 1) else "pass"


def check_larger_eps(target: Target) -> Check:
    """Checks that the accuracy under PGD falls to 0 as eps, the radius of the attack, grows."""
    # With the largest eps, attacks can turn any image into any other, so none should withstand it.
    # The largest eps is the side (Linf) or the diagonal (L2) of the cube that contains all images.
    largest = 1.0 if target.norm == "Linf" else target.images_RCHW[0].numel() ** 0.5
    radii, counts = [target.eps], [int(target.resist_pgd(20).sum())]
    while counts[-1] and radii[-1] < largest:
        radii.append(min(2 * radii[-1], largest))
        attacked = target.run_pgd(20, eps=radii[-1])
        counts.append(int(target.find_resisting(attacked).sum()))
    left, total = counts[-1], target.images
    rise = max([0, *(b - a for a, b in zip(counts, counts[1:], strict=False))])
    verdict: Verdict = "pass"
    if exceeds(left, total, 1):
        # The accuracy should have fallen to 0. The check fails above chance, and warns below it.
        # Even if an attack turns all images grey, the model is right by chance for some of them.
        verdict = "fail" if left * target.classes > total else "warn"
    if exceeds(rise, total, 1):
        verdict = "fail"
    curve = ", ".join(f"{e:.3g}: {c / total:.1%}" for e, c in zip(radii, counts, strict=True))
    return Check(
        "accuracy falls to 0",
        verdict,
        f"Accuracy under PGD-20 at each eps: {curve}. Fail if it rises by more than max(1 point, 1 "
        f"image), or if it ends above chance (1/{target.classes}). Warn if it ends above max(1 "
        "point, 1 image).",
        {"eps": radii, "accuracy_pgd20": [c / total for c in counts]},
    )


def check_more_steps(target: Target) -> Check:
    """Checks that PGD with more steps would hardly lower the accuracy any further."""
    counts = {steps: int(target.resist_pgd(steps).sum()) for steps in STEPS}
    change, total = abs(counts[STEPS[-2]] - counts[STEPS[-1]]), target.images
    accuracies = ", ".join(f"{steps}: {count / total:.1%}" for steps, count in counts.items())
    return Check(
        "more iterations",
        judge_gap(change, total),
        f"Accuracy under PGD with each number of steps: {accuracies}. This check judges the "
        f"change from {STEPS[-2]} to {STEPS[-1]} steps. {GAP_RULE}",
        {f"accuracy_pgd{steps}": count / total for steps, count in counts.items()},
    )


def check_more_restarts(target: Target) -> Check:
    """Checks that PGD with more random starts would hardly lower the accuracy any further."""
    one_R = target.resist_pgd(20)
    several_R = target.find_resisting(target.run_pgd(20, restarts=RESTARTS))
    one, several = target.accuracy(one_R), target.accuracy(several_R)
    return Check(
        "more restarts",
        judge_gap(int(one_R.sum()) - int(several_R.sum()), target.images),
        f"Accuracy under PGD-20 with 1 start: {one:.1%}; with {RESTARTS} starts: {several:.1%}. "
        f"This check judges the drop. {GAP_RULE}",
        {"accuracy_1_start": one, f"accuracy_{RESTARTS}_starts": several},
    )


def check_single_step(target: Target) -> Check:
    """Checks that PGD is at least as strong as FGSM, an attack with a single step."""
    pgd20_R, fgsm_R = target.resist_pgd(20), target.find_resisting(target.run_fgsm())
    gap = int(pgd20_R.sum()) - int(fgsm_R.sum())
    pgd, fgsm = target.accuracy(pgd20_R), target.accuracy(fgsm_R)
    return Check(
        "iterations beat one step",
        "fail" if exceeds(gap, target.images, 1) else "pass",
        f"Accuracy under PGD-20: {pgd:.1%}; under FGSM: {fgsm:.1%}. Fail if the accuracy under "
        "PGD is higher by more than max(1 point, 1 image).",
        {"accuracy_pgd20": pgd, "accuracy_fgsm": fgsm},
    )


def check_noise(target: Target) -> Check:
    """Checks that PGD is stronger than uniform noise."""
    pgd20_R = target.resist_pgd(20)
    noise_R = torch.ones_like(pgd20_R)
    for draw in range(NOISE_DRAWS):
        noisy = [
            target.images_RCHW[part] + target.draw_noise(part, target.eps, use=1, draw=draw)
            for part in target.batches()
        ]
        noise_R &= target.find_resisting(torch.cat(noisy).clamp(0, 1))
    resisting = int(noise_R.sum())
    gap = int(pgd20_R.sum()) - resisting
    verdict: Verdict = "warn" if gap >= 0 and resisting else "pass"
    if exceeds(gap, target.images, 1):
        verdict = "fail"
    pgd, noise = target.accuracy(pgd20_R), target.accuracy(noise_R)
    return Check(
        "PGD beats noise",
        verdict,
        f"Accuracy under PGD-20: {pgd:.1%}; under the worst of {NOISE_DRAWS} uniform draws: "
        f"{noise:.1%}. Warn if it is not lower under PGD-20. Fail if it is higher by more than "
        "max(1 point, 1 image).",
        {"accuracy_pgd20": pgd, "accuracy_noise": noise},
    )


def check_black_box(target: Target, square_images: int) -> Check:
    """Checks that attacks that use gradients are at least as strong as Square, which uses none.

    square_images: number of images to attack with Square, which is slow.
    """
    name = "white box beats black box"
    part = target.take_first(square_images)
    if not part.images:
        return Check(name, "warn", "Square was not run: square_images is 0.", {"square_images": 0})
    white_R = (target.resist_pgd(STEPS[-1]) & target.resist_margin_pgd)[: part.images]
    square_R = part.resist_autoattack(["square"])
    gap = int(white_R.sum()) - int(square_R.sum())
    white, square = part.accuracy(white_R), part.accuracy(square_R)
    return Check(
        name,
        "fail" if exceeds(gap, part.images, 1) else "pass",
        f"Accuracy on {part.images} images that are right without an attack: {white:.1%} under "
        f"PGD-{STEPS[-1]} (the better of cross-entropy and margin), {square:.1%} under Square. "
        "Fail if the accuracy under PGD is higher by more than max(1 point, 1 image).",
        {"square_images": part.images, "accuracy_pgd": white, "accuracy_square": square},
    )


def check_margin(target: Target) -> Check:
    """Checks that PGD on the cross-entropy is at least as strong as PGD on the margin.

    The margin is a difference between logits.
    """
    cross_entropy_R, margin_R = target.resist_pgd(STEPS[-1]), target.resist_margin_pgd
    gap = int(cross_entropy_R.sum()) - int(margin_R.sum())
    ce, margin = target.accuracy(cross_entropy_R), target.accuracy(margin_R)
    return Check(
        "cross-entropy attacks no worse than margin",
        judge_gap(gap, target.images),
        f"Accuracy under PGD-{STEPS[-1]} on the cross-entropy: {ce:.1%}; on the margin: "
        f"{margin:.1%}. If the first is higher, gradients may be masked. {GAP_RULE}",
        {"accuracy_cross_entropy": ce, "accuracy_margin": margin},
    )


def check_apgd(target: Target, apgd_images: int) -> list[Check]:
    """Checks that PGD is as strong as APGD with as many steps, and reports AutoAttack's warnings.

    APGD is AutoAttack's variant of PGD, which chooses its step size itself. apgd_images: number of
    images to attack with APGD, which is slow.
    """
    name = "cross-entropy PGD no worse than APGD"
    part = target.take_first(apgd_images)
    if not part.images:
        return [Check(name, "warn", "APGD was not run: apgd_images is 0.", {"apgd_images": 0})]
    # AutoAttack looks for zero gradients only with its DLR loss (difference of logits ratio).
    # APGD on DLR comes first, because later attacks leave out the images that it has fooled.
    # With three classes DLR may be constant, so a warning of zero gradients would mean nothing.
    has_dlr = target.classes >= 4
    with attacks.collect_autoattack_warnings() as lines:
        apgd_R = part.resist_autoattack(["apgd-dlr", "apgd-ce"] if has_dlr else ["apgd-ce"])
    pgd_R = part.find_resisting(part.run_pgd(STEPS[-1], restarts=RESTARTS))
    pgd, apgd = part.accuracy(pgd_R), part.accuracy(apgd_R)
    compared = Check(
        name,
        judge_gap(int(pgd_R.sum()) - int(apgd_R.sum()), part.images),
        f"Accuracy on {part.images} images that are right without an attack: {pgd:.1%} under "
        f"PGD-{STEPS[-1]} with {RESTARTS} starts, {apgd:.1%} under APGD on "
        f"{'DLR and ' if has_dlr else ''}cross-entropy. If the first is higher, gradients may be "
        f"masked. {GAP_RULE}",
        {"apgd_images": part.images, "accuracy_pgd": pgd, "accuracy_apgd": apgd},
    )
    return [compared, *report_autoattack_warnings(lines, part.images, has_dlr)]


def report_autoattack_warnings(lines: Sequence[str], images: int, has_dlr: bool) -> list[Check]:
    """Returns a check for each kind of warning that AutoAttack can give.

    lines: the warnings that AutoAttack gave. images: number of attacked images. has_dlr: whether
    AutoAttack used its DLR loss, without which it does not warn of zero gradients.
    """
    checks = []
    other = list(dict.fromkeys(lines))
    for name, (words, verdict) in AUTOATTACK_WARNINGS.items():
        found = [line for line in other if words in line]
        other = [line for line in other if words not in line]
        detail = (
            f"{' '.join(found) or 'AutoAttack gave no such warning.'} "
            f"Any such warning counts as a {verdict}."
        )
        checks.append(Check(name, verdict if found else "pass", detail, {"warned": bool(found)}))
    zero = [re.search(r"there are (\d+) points with zero gradient", line) for line in other]
    other = [line for line, match in zip(other, zero, strict=True) if not match]
    points = max((int(match[1]) for match in zero if match), default=0)
    if has_dlr:
        checks.append(
            Check(
                "AutoAttack: zero gradients",
                "fail" if exceeds(points, images, 1) else "warn" if points else "pass",
                f"In one run, at most {points} of {images} starting points had a gradient of 0. "
                "Warn above 0. Fail above max(1 %, 1 image).",
                {"zero_gradients": points, "apgd_images": images},
            )
        )
    else:
        checks.append(
            Check(
                "AutoAttack: zero gradients",
                "warn",
                "This was not checked, because AutoAttack checks it only with the DLR loss, which "
                "needs 4 classes.",
                {"zero_gradients": None, "apgd_images": images},
            )
        )
    return checks + [Check("AutoAttack: other", "warn", line, {"warned": True}) for line in other]


def check_precision(target: Target) -> Check:
    """Checks that the model predicts the same classes in bf16 as in fp32 for attacked images."""
    attacked: Tensor = target.attacked
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
    total = len(target.labels_R)
    accuracy = {f"accuracy_{name}": count / target.images for name, count in counts.items()}
    return Check(
        "fp32 and bf16 agree",
        "warn" if exceeds(disagree, total, 2) else "pass",
        f"{disagree} of {total} images under PGD-20 ({disagree / total:.1%}) change class. "
        f"Accuracy in fp32: {accuracy['accuracy_fp32']:.1%}; in bf16: "
        f"{accuracy['accuracy_bf16']:.1%}. Warn above max(2 %, 1 image).",
        {"disagreement_share": disagree / total, **accuracy},
    )
