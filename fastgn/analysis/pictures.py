"""The pictures and the report of an evaluation, drawn from its record and its networks."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastgn import attacks
from fastgn.analysis.attacker import Attacker
from fastgn.analysis.figures import (
    ModelView,
    draw_gradient_histograms,
    draw_norm_against_epoch,
    draw_pictures,
    draw_robust_curve,
)
from fastgn.analysis.report import html_report
from fastgn.analysis.selection import take_evenly_spaced
from fastgn.config.programs import EvaluateConfig
from fastgn.data.subset import Subset
from fastgn.errors import print_line, tolerate_failure
from fastgn.files import write_bytes
from fastgn.trained import Trained

Entry = dict[str, Any]
"""One network's entry in evaluation.json."""


def write_pictures(
    trained: Sequence[Trained], images: Subset, record: dict[str, Any], cfg: EvaluateConfig
) -> None:
    """Writes the files that --curve, --picture and --report ask for.

    If a file cannot be made, it is left out and a line is printed. record: content of
    evaluation.json.
    """
    entries = record["models"]

    def make_report() -> str:
        title = f"Robustness of {', '.join(t.name for t in trained)}"
        return html_report(record, draw_for_report(trained, images, entries, cfg), title=title)

    for path, make in (
        (cfg.curve, lambda: draw_curve(entries, cfg.attacks[-1], cfg.norm)),
        (cfg.picture, lambda: draw_attacked_images(trained, images, cfg)),
        (cfg.report, make_report),
    ):
        if path:
            with tolerate_failure(path) as failure:
                write_bytes(Path(path), make())
            if not failure:
                print_line(f"written: {path}", sys.stdout)


def draw_curve(entries: Sequence[Entry], attack: str, norm: str) -> bytes:
    """Returns a PNG that shows the accuracy of all networks against eps under one attack.

    It also shows their accuracy without an attack. entries: the networks' entries in
    evaluation.json. attack: name of the attack. norm: norm in which eps is measured.
    """
    rows = {
        entry["name"]: [row for row in entry["results"] if row["attack"] in ("clean", attack)]
        for entry in entries
    }
    return draw_robust_curve(rows, entries[0]["subset"], attack, norm)


def draw_attacked_images(trained: Sequence[Trained], images: Subset, cfg: EvaluateConfig) -> bytes:
    """Returns a PNG of some images, their gradients and their PGD-20 perturbations.

    All networks must take images of the same size.
    """
    eps, subset = cfg.eps[-1], take_evenly_spaced(images, cfg.picture_images)
    images_BCHW, labels_B = (torch.cat(parts) for parts in zip(*subset, strict=True))
    views = []
    for t in trained:
        attacker = Attacker(cfg.norm, cfg.seed, len(images_BCHW), images_BCHW.device)
        attacked = attacker.attack(t.model, images_BCHW, labels_B, subset.indices, "pgd-20", eps)
        with torch.no_grad():
            before, after = t.model(images_BCHW).argmax(1), t.model(attacked).argmax(1)
        grad_BCHW = attacks.input_gradient(t.model, images_BCHW, labels_B).images_BCHW
        views.append(ModelView(t.name, grad_BCHW, attacked, before, after))
    return draw_pictures(images_BCHW, labels_B, views, trained[0].classes, eps)


def draw_for_report(
    trained: Sequence[Trained], images: Subset, entries: Sequence[Entry], cfg: EvaluateConfig
) -> dict[str, bytes]:
    """Returns a dict from the caption of each picture of the HTML report to the picture as a PNG.

    A picture that has nothing to show, or that cannot be drawn, is missing.
    """
    pictures = {}
    if len(cfg.eps) > 1:
        for attack in cfg.attacks:
            if attack != "clean":
                caption = f"Accuracy against eps under {attack}"
                with tolerate_failure(caption):
                    pictures[caption] = draw_curve(entries, attack, cfg.norm)
    norms = {e["name"]: e["statistics"]["l1"] for e in entries if "statistics" in e}
    if norms:
        caption = "L1 norm of the input gradient, image by image"
        with tolerate_failure(caption):
            pictures[caption] = draw_gradient_histograms(norms)
    by_epoch = {
        e["name"]: e["norm_by_epoch"] for e in entries if len(e.get("norm_by_epoch", ())) > 1
    }
    if by_epoch:
        caption = "Mean L1 norm of the input gradient against epoch"
        with tolerate_failure(caption):
            pictures[caption] = draw_norm_against_epoch(by_epoch)
    if len({t.model.img_size for t in trained}) == 1:
        caption = "Images, input gradients and PGD-20 perturbations"
        with tolerate_failure(caption):
            pictures[caption] = draw_attacked_images(trained, images, cfg)
    return pictures
