"""Which images a model gets right, attacked or not: image by image, saved as it goes.

A batch of the list is attacked by itself, and what is drawn for an image depends on the seed and
the image alone. So any number of ranks gives the same outcomes, and a run that was killed goes on.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import torch
from torch import Tensor, nn

from fastgn import attacks
from fastgn.attacks import Norm
from fastgn.config.programs import AUTOATTACK, PARTS, PGD, pgd_step
from fastgn.errors import UserError
from fastgn.files import read_json, write_json
from fastgn.seeding import Stream, derive

WORST = "worst case"
Precision = Literal["fp32", "bf16"]


@dataclasses.dataclass(frozen=True)
class Attacker:
    """How images are attacked."""

    norm: Norm
    seed: int
    batch_size: int
    device: torch.device
    precision: Precision = "fp32"
    """Of the gradients of FGSM and PGD; what counts is the fp32 model's verdict, always."""
    compile: bool = False
    """Whether FGSM's and PGD's gradients are the compiled model's; the verdict is not."""
    compiled: dict[nn.Module, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __call__(
        self,
        model: nn.Module,
        images_BCHW: Tensor,
        labels_B: Tensor,
        ids: Sequence[int],
        name: str,
        eps: float,
    ) -> Tensor:
        """The attacked images. ids: their places in the split, which seed what is drawn."""
        if name in AUTOATTACK or name in PARTS:
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
                attacks=[name] if name in PARTS else None,
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
            starts = (self.noise(ids, images_BCHW.shape[1:], eps, r) for r in range(restarts))
            return attacks.restarted_pgd(
                model,
                images_BCHW,
                labels_B,
                eps=eps,
                steps=steps,
                starts=starts,
                step_size=pgd_step(match, eps),
                loss=attacks.margin if margin else attacks.cross_entropy,
                norm=self.norm,
                judge=judge,
            )

    def noise(self, ids: Sequence[int], shape: Sequence[int], eps: float, restart: int) -> Tensor:
        seeds = [derive(Stream.EVALUATION, self.seed, index, restart) for index in ids]
        return attacks.uniform_noise(seeds, shape, eps, self.norm).to(self.device)

    def correct(
        self,
        model: nn.Module,
        images_BCHW: Tensor,
        labels_B: Tensor,
        ids: Sequence[int],
        name: str,
        eps: float,
        clean: list[bool] | None,
    ) -> list[bool]:
        """Whether each image is classified rightly after the attack; waits for the device.

        clean: the same without an attack. What is wrong already is not attacked, and neither name
        nor eps matter where clean is None.
        """
        if clean is None:
            with torch.no_grad():
                return (model(images_BCHW).argmax(1) == labels_B).tolist()
        left = [i for i, right in enumerate(clean) if right]
        if not left:
            return clean
        images, labels = images_BCHW[left], labels_B[left]
        attacked = self(model, images, labels, [ids[i] for i in left], name, eps)
        added = (attacked - images).flatten(1)
        size = added.abs().amax(1) if self.norm == "Linf" else added.norm(dim=1)
        if not float(size.max()) <= eps * 1.001 + 1e-6:
            raise UserError(
                f"{name} has moved an image by {float(size.max()):g} with eps {eps:g}: the model's "
                "gradients may not be finite"
            )
        with torch.no_grad():
            right = model(attacked).argmax(1) == labels
        out = list(clean)
        for i, still in zip(left, right.tolist(), strict=True):
            out[i] = still
        return out


class Parts:
    """Results of batches and analyses, saved one by one beside the output until the evaluation
    ends."""

    KEPT_S = 7 * 86400
    """Seconds after which parts that nobody has added to are those of an abandoned evaluation."""

    def __init__(self, output: Path, what: Any):
        """what: all that the outcomes depend on, as JSON; another one has another folder."""
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = output.with_name(f".{output.stem}.{digest}.parts")

    def path(self, *key: object) -> Path:
        return self.folder / (quote("_".join(map(str, key)), safe="@") + ".json")

    def get(self, *key: object) -> dict[str, Any] | None:
        try:
            part = read_json(self.path(*key))
        except UserError:
            return None
        return part if isinstance(part, dict) else None

    def put(self, part: dict[str, Any], *key: object) -> None:
        write_json(self.path(*key), part)

    def made(self, make: Callable[[], Any], *key: object) -> Any:
        """Returns what `make` returned in an earlier call of this evaluation, else calls it and
        keeps what it returns: anything that JSON can hold."""
        part = self.get(*key)
        if part is None or "made" not in part:
            part = {"made": make()}
            self.put(part, *key)
        return part["made"]

    def remove(self) -> None:
        """Removes these parts, and those of abandoned evaluations of the same output."""
        shutil.rmtree(self.folder, ignore_errors=True)
        name = self.folder.name.split(".")
        for other in self.folder.parent.glob(".*.parts"):
            same = re.fullmatch(r"[0-9a-f]{16}", other.name.split(".")[-2])
            if not same or other.name.split(".")[:-2] != name[:-2]:
                continue
            with contextlib.suppress(OSError):  # gone already
                if time.time() - other.stat().st_mtime > self.KEPT_S:
                    shutil.rmtree(other, ignore_errors=True)


def rows_of(
    parts: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, float]], images: int
) -> list[dict[str, Any]]:
    """A row for each (attack, eps), from all batches' parts, and one of the worst case for each eps
    that more than one attack had.

    A part is {"row": index into pairs, "batch": int, "correct": "0101...", "seconds": float}.
    """
    rows = []
    for index, (name, eps) in enumerate(pairs):
        mine = sorted((p for p in parts if p["row"] == index), key=lambda p: p["batch"])
        correct = "".join(p["correct"] for p in mine)
        assert len(correct) == images, f"{name} at {eps}: {len(correct)} outcomes of {images}"
        seconds = sum(p["seconds"] for p in mine)
        rows.append(row(name, eps, correct) | {"seconds": seconds})
    for eps in sorted({eps for _, eps in pairs if eps}):
        there = [r["correct"] for r in rows if r["eps"] == eps]
        if len(there) > 1:
            worst = "".join(
                "1" if set(column) == {"1"} else "0" for column in zip(*there, strict=True)
            )
            rows.append(row(WORST, eps, worst))
    return rows


def is_part(part: dict[str, Any] | None, images: int) -> bool:
    """Whether a saved part is valid for a batch of this size."""
    if part is None:
        return False
    correct, seconds = part.get("correct"), part.get("seconds")
    warnings = part.get("warnings", [])
    return (
        (isinstance(correct, str) and len(correct) == images and set(correct) <= {"0", "1"})
        and (isinstance(seconds, float) and isinstance(part.get("batch"), int))
        and (isinstance(warnings, list) and all(isinstance(line, str) for line in warnings))
    )


def row(name: str, eps: float, correct: str) -> dict[str, Any]:
    accuracy = correct.count("1") / max(1, len(correct))
    return {"attack": name, "eps": eps, "accuracy": accuracy, "correct": correct}


def timed_part(
    index: int, batch: int, correct: list[bool], began: float, warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """See rows_of."""
    bits = "".join("1" if right else "0" for right in correct)
    seconds = time.perf_counter() - began
    return {"row": index, "batch": batch, "correct": bits, "seconds": seconds} | (
        {"warnings": list(warnings)} if warnings else {}
    )


def trust(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> list[str]:
    """What makes a model's figures doubtful, from one batch. Raises UserError where they would mean
    nothing: a model in train mode, probabilities for logits, an output that is not finite or
    another one each time."""
    if any(module.training for module in model.modules()):
        raise UserError("the model is in train mode: call eval() first")
    with torch.no_grad():
        first, second = model(images_BCHW), model(images_BCHW)
    if not bool(torch.isfinite(first).all()):
        raise UserError("the model's logits are not finite on clean images")
    if bool((first >= 0).all()) and bool(((first.sum(1) - 1).abs() < 1e-4).all()):
        raise UserError(
            "the model gives probabilities: their softmax hides gradients from attacks; take "
            "its last softmax off"
        )
    if float((first - second).abs().max()) > 1e-3 * max(1.0, float(first.abs().max())):
        raise UserError(
            "the model gives other logits for the same images each time: attacks on one draw say "
            "nothing of the next"
        )
    grad_BCHW = attacks.input_gradient(model, images_BCHW, labels_B).images_BCHW
    if not bool(torch.isfinite(grad_BCHW).all()):
        raise UserError("the gradients with respect to clean images are not finite")
    found = []
    if not bool(grad_BCHW.any()):
        found.append("no gradient reaches the images: attacks that need one say nothing")
    num, classes = first.shape
    accuracy = float((first.argmax(1) == labels_B).float().mean())
    chance = 1 / classes + 2 * (1 / classes * (1 - 1 / classes) / num) ** 0.5
    if num >= 32 and accuracy < chance:
        found.append(
            f"{accuracy:.1%} of the first {num} clean images are right, hardly more than by "
            "chance: are the normalisation (--mean, --std) and the classes the model's own?"
        )
    return found
