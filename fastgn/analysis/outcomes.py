"""Finds which images a network classifies correctly, without an attack and under each attack.

The outcomes of an attack are a text with one character per image, in the order of the images: 1 if
the image is classified correctly, otherwise 0.
"""

import functools
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastgn import attacks
from fastgn.analysis.attacker import Attacker
from fastgn.analysis.model_checks import check_model
from fastgn.analysis.parts import Parts
from fastgn.analysis.selection import name_images
from fastgn.analysis.tables import WORST, format_radius, name_attack
from fastgn.config.programs import EvaluateConfig
from fastgn.data.datasets import Arrays
from fastgn.data.subset import Subset
from fastgn.distributed import World
from fastgn.errors import print_line
from fastgn.files import parse_json
from fastgn.metrics import environment
from fastgn.progress import ProgressLines, open_bar
from fastgn.trained import Trained, hash_weights

Part = dict[str, Any]
"""Outcomes of one attack on one batch, which say what images the network classifies correctly.

Keys: row is the index of the attack, and batch the index of the batch. correct is a text with one
character per image, 1 if the image is classified correctly, otherwise 0. seconds is the duration of
the attack. warnings, a list of lines, may be missing."""


def evaluate_model(
    trained: Trained, images: Subset, cfg: EvaluateConfig, world: World, output: Path
) -> tuple[dict[str, Any], Parts]:
    """Returns one network's entry in evaluation.json, and the folder with its saved results.

    Each rank attacks every world.size-th batch. Results that a killed evaluation has saved beside
    `output` are not computed again.
    """
    todo = [("clean", 0.0)]
    todo += [(name, eps) for name in cfg.attacks if name != "clean" for eps in cfg.eps]
    inputs, method = describe_inputs(trained, images, cfg, world.device.type)
    parts = Parts(output, [inputs, method])
    own = attack_batches(trained, images, todo, parts, cfg, world)
    gathered = [
        parse_json(item, "a rank's outcomes")
        for item in world.gather([json.dumps(part) for part in own])
    ]
    warnings = {line for part in gathered for line in part.get("warnings", ())}
    for part in gathered:
        name, eps = todo[part["row"]]
        parts.mark_used(name, repr(eps), part["batch"])
    rows = make_rows(gathered, todo, len(images.indices))
    if world.is_main:
        for row in rows:
            if world.size > 1 or row["attack"] == WORST:  # one process has printed the others
                attack = name_attack(row["attack"], row["eps"])
                print_line(f"{trained.name}: {attack} {row['accuracy']:.1%}")
    if "clean" not in cfg.attacks:
        rows = rows[1:]
    entry = {
        "name": trained.name,
        "weights_sha256": hash_weights(trained.model),
        "inputs_sha256": hashlib.sha256(json.dumps(inputs).encode()).hexdigest(),
        "update": trained.update,
        "model": trained.cfg.architecture.model,
        "method": trained.cfg.objective.method if cfg.model is None else "unknown",
        "images": len(images.indices),
        "subset": images.name,
        "ids": name_images(images),
        "warnings": ([trained.unfinished] if trained.unfinished else []) + sorted(warnings),
        "results": rows,
    }
    return entry, parts


def describe_inputs(
    trained: Trained, images: Subset, cfg: EvaluateConfig, device: str
) -> tuple[list[Any], list[Any]]:
    """Returns all values that the result of an attack depends on, in two lists, ready for JSON.

    The first list says what was measured, such as digests of the weights and the images. The second
    list says how it was measured, such as the device and the batch size.
    """
    digest = hashlib.sha256()
    locate = functools.cache(os.path.realpath)  # finds out once per folder where links lead to
    for index in images.indices:
        if isinstance(images.split, Arrays):
            digest.update(images.split.images_NCHW[index].numpy().tobytes())
        else:
            path = Path(images.split.name(index))
            size = path.stat().st_size if path.is_file() else 0
            place = os.path.join(locate(path.parent), path.name)
            digest.update(b"%b %d" % (os.fsencode(place), size))
        digest.update(str(int(images.split.labels_N[index])).encode())
    model = trained.model
    inputs = [
        *(hash_weights(model), repr(trained.cfg.architecture), trained.model.crop_pct),
        *(model.mean.flatten().tolist(), model.std.flatten().tolist(), model.img_size),
        *(images.indices, digest.hexdigest(), cfg.norm, cfg.seed),
        *(cfg.attacks if cfg.successive else ()),
    ]
    versions = environment()["versions"]
    return inputs, [device, versions, images.batch_size, cfg.precision, cfg.compile]


def attack_batches(
    trained: Trained,
    images: Subset,
    todo: Sequence[tuple[str, float]],
    parts: Parts,
    cfg: EvaluateConfig,
    world: World,
) -> list[Part]:
    """Attacks this rank's batches with each attack, and returns the outcomes.

    todo: name and eps of each attack. The first entry is ("clean", 0.0), which means no attack.
    parts: results that are already saved.
    """
    order, size = images.indices, images.batch_size
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    attacker = Attacker(cfg.norm, cfg.seed, size, world.device, cfg.precision, cfg.compile)
    if world.is_main and len(batches) < world.size:
        print_line(
            f"warning: {len(order)} images in batches of {size} keep only {len(batches)} of "
            f"{world.size} processes busy: use a lower --batch-size"
        )
    own = range(world.rank, len(batches), world.size)
    done = {
        (index, batch): part
        for batch in own
        for index, (name, eps) in enumerate(todo)
        if (part := read_part(parts, index, name, eps, batch, len(batches[batch]))) is not None
    }
    left = [batch for batch in own if any((i, batch) not in done for i in range(len(todo)))]
    images.indices = [place for batch in left for place in batches[batch]]
    hidden = None if world.is_main else True
    bar = open_bar(total=len(own) * len(todo), desc=trained.name, unit="batch", disable=hidden)
    report = Report(trained.name, todo, len(own), bar, world)
    with attacks.collect_autoattack_warnings() as warned, bar:
        bar.update(len(done))
        report.print_finished(range(len(todo)), done.values())
        for batch, (x, y) in zip(left, images, strict=True):
            for index, (name, eps) in enumerate(todo):
                if (index, batch) not in done:
                    report.print_position(own.index(batch), index, done.values())
                    earlier = [0] * (index > 0)  # index 0 means no attack
                    if cfg.successive:
                        earlier += [i for i in range(1, index) if todo[i][1] == eps]
                    clean = still_correct([done[i, batch]["correct"] for i in earlier])
                    warned.clear()
                    doubts = check_model(trained.model, x, y) if index == batch == 0 else []
                    began = time.perf_counter()
                    ids = batches[batch]
                    correct = attacker.find_correct(trained.model, x, y, ids, name, eps, clean)
                    doubts += [f"AutoAttack: {line}" for line in warned]
                    part = make_part(index, batch, correct, time.perf_counter() - began, doubts)
                    parts.put(part, name, repr(eps), batch)
                    done[index, batch] = part
                    bar.update()
                    report.print_finished([index], done.values())
                at = f" {format_radius(eps)}" if eps else ""
                bar.set_postfix_str(f"{name}{at} {count_accuracy(done.values(), index):.1%}")
    images.indices = order
    return list(done.values())


class Report:
    """Prints how far the attacks on a network have come. Only the first rank prints."""

    def __init__(
        self, model: str, todo: Sequence[tuple[str, float]], batches: int, bar: tqdm, world: World
    ):
        """model: name of the network. todo: name and eps of each attack. batches: number of batches
        that this rank attacks. bar: the progress bar."""
        self.model, self.batches, self.world = model, batches, world
        self.lines = ProgressLines(bar)
        self.attacks = [name_attack(name, eps) for name, eps in todo]

    def print_finished(self, indices: Iterable[int], done: Collection[Part]) -> None:
        """Prints the accuracies under those of the attacks that are finished on all batches.

        Several ranks print nothing, because each of them has only a part of the outcomes. indices:
        indices of the attacks. done: the outcomes so far.
        """
        if self.world.size > 1:
            return
        for index in indices:
            if sum(part["row"] == index for part in done) == self.batches:
                accuracy = f"{count_accuracy(done, index):.1%}"
                self.lines.print(f"{self.model}: {self.attacks[index]} {accuracy}")

    def print_position(self, batch: int, index: int, done: Collection[Part]) -> None:
        """Prints which batch is attacked next, and with which attack, if no line was printed for a
        while.

        batch: number of earlier batches of this rank. index: index of the attack. done: the
        outcomes so far.
        """
        if self.world.is_main:
            known = any(part["row"] == index for part in done)
            so_far = f", accuracy {count_accuracy(done, index):.1%} so far" if known else ""
            self.lines.print_sometimes(
                f"{self.model}: batch {batch + 1} of {self.batches}: {self.attacks[index]}{so_far}"
            )


def still_correct(texts: Sequence[str]) -> list[bool] | None:
    """Returns for each image whether it is classified correctly under each of several attacks.
    Returns None if `texts` is empty.

    texts: the outcomes of each attack, one character for each image, "1" if it is classified
    correctly.
    """
    return [set(bits) == {"1"} for bits in zip(*texts, strict=True)] if texts else None


def read_part(
    parts: Parts, index: int, name: str, eps: float, batch: int, images: int
) -> Part | None:
    """Returns the saved outcomes of an attack on a batch. None if they are missing or invalid.

    parts: the saved results. index: index of the attack. batch: index of the batch. images: number
    of images in the batch.
    """
    part = parts.get(name, repr(eps), batch)
    if part is None or not is_valid_part(part, images):
        return None
    return part | {"row": index}


def is_valid_part(part: Part, images: int) -> bool:
    """Returns whether the saved outcomes of an attack on a batch are valid. part: the outcomes, see
    Part. images: number of images in the batch."""
    correct, seconds = part.get("correct"), part.get("seconds")
    warnings = part.get("warnings", [])
    return (
        (isinstance(correct, str) and len(correct) == images and set(correct) <= {"0", "1"})
        and (isinstance(seconds, float) and isinstance(part.get("batch"), int))
        and (isinstance(warnings, list) and all(isinstance(line, str) for line in warnings))
    )


def make_part(
    row: int, batch: int, correct: Sequence[bool], seconds: float, warnings: Sequence[str] = ()
) -> Part:
    """Returns the outcomes of one attack on one batch, as they are saved.

    row: index of the attack. batch: index of the batch. correct: whether each image is classified
    correctly. seconds: duration of the attack. warnings: lines about reasons to doubt the outcomes,
    such as AutoAttack's warnings.
    """
    bits = "".join("1" if is_correct else "0" for is_correct in correct)
    part: Part = {"row": row, "batch": batch, "correct": bits, "seconds": seconds}
    return part | ({"warnings": list(warnings)} if warnings else {})


def count_accuracy(parts: Iterable[Part], row: int) -> float:
    """Returns the accuracy under one attack, over the batches that have been attacked so far.

    parts: outcomes of all attacks on these batches. row: index of the attack.
    """
    bits = "".join(part["correct"] for part in parts if part["row"] == row)
    return bits.count("1") / max(1, len(bits))


def make_rows(
    parts: Sequence[Part], todo: Sequence[tuple[str, float]], images: int
) -> list[dict[str, Any]]:
    """Returns a dict for each attack and eps, from the outcomes on all batches of all ranks.

    Dicts for the worst cases are added, see `add_worst_case`. parts: the outcomes, see Part. todo:
    name and eps of each attack. images: number of images.
    """
    rows = []
    for index, (name, eps) in enumerate(todo):
        own = sorted((p for p in parts if p["row"] == index), key=lambda p: p["batch"])
        correct = "".join(p["correct"] for p in own)
        assert len(correct) == images, f"{name} at {eps}: {len(correct)} outcomes of {images}"
        rows.append(make_row(name, eps, correct) | {"seconds": sum(p["seconds"] for p in own)})
    return add_worst_case(rows, todo)


def add_worst_case(
    rows: list[dict[str, Any]], counted: Collection[tuple[str, float]]
) -> list[dict[str, Any]]:
    """Returns the dicts of all attacks, followed by a dict for the worst case at each eps that has
    several attacks.

    In the worst case an image is correct only if it is correct under all attacks with this eps.
    rows: a dict for each attack and eps. The eps of clean is 0. counted: name and eps of each
    attack that is taken into account.
    """
    worst = []
    for eps in sorted({eps for _, eps in counted if eps}):
        own = (row for row in rows if row["eps"] == eps)
        texts = [row["correct"] for row in own if (row["attack"], eps) in counted]
        if len(texts) > 1:
            correct = "".join(str(int(correct)) for correct in still_correct(texts) or ())
            worst.append(make_row(WORST, eps, correct))
    return [*rows, *worst]


def make_row(name: str, eps: float, correct: str) -> dict[str, Any]:
    """Returns a dict for evaluation.json with an attack, its eps, its accuracy and its outcomes.

    correct: one character per image, 1 if it is classified correctly, otherwise 0.
    """
    accuracy = correct.count("1") / max(1, len(correct))
    return {"attack": name, "eps": eps, "accuracy": accuracy, "correct": correct}
