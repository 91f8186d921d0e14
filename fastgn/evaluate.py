"""Clean and robust accuracy of trained models, side by side.

python -m fastgn.evaluate --checkpoint runs/NAME --eps 1/255 4/255 --attacks clean pgd-20 autoattack
"""

import dataclasses
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

if __name__ == "__main__":  # before the imports that fail without it
    from fastgn.extras import need_train

    need_train("fastgn.evaluate")

from fastgn import attacks, models
from fastgn.analysis.figures import ModelView, draw_pictures
from fastgn.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    read_metadata,
    write_bytes,
    write_json,
)
from fastgn.config import (
    Config,
    Fraction,
    UserError,
    check,
    check_pixels,
    nearest,
    parse_cli,
    run_folder,
)
from fastgn.data import Subset, check_classes, load_dataset
from fastgn.distributed import World, say_error, session
from fastgn.metrics import environment
from fastgn.seeding import Stream, seed_all

ATTACKS = ("clean", "fgsm", "pgd-K", "autoattack")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Clean and robust accuracy of trained models, side by side."""

    checkpoint: tuple[str, ...] = ()
    """Runs' folders, checkpoints (.pt) or exports (.safetensors)."""
    eps: tuple[Fraction, ...] = (4 / 255,)
    """Linf radii in 0..1 pixel units."""
    attacks: tuple[str, ...] = ("clean", "pgd-20", "autoattack")
    """clean, fgsm, pgd-K (K steps of 2.5 eps / K from a uniform start), autoattack (standard)."""
    data: Literal["digits", "cifar10", "imagefolder"] | None = None
    """None: the data that the run was trained on."""
    data_dir: str | None = None
    """None: the run's own."""
    val_split: str | None = None
    """Folder or list of the images below --data-dir; None: the run's own."""
    num_images: int | None = None
    """How many validation images; None takes all. The first ones of digits and CIFAR-10; of a
    folder, which is sorted by class, evenly spaced ones."""
    batch_size: int = 360
    """Images attacked at once."""
    workers: int = 4
    """Worker processes that read image files."""
    output: str | None = None
    """The JSON file; None: evaluation.json in the first checkpoint's folder."""
    picture: str | None = None
    """Also draw images, input gradients and PGD-20 perturbations (at the last eps) into this
    PNG."""
    picture_images: int = 8
    """Rows of the picture."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda where there is one, else cpu."""
    seed: int = 0
    """Of every attack."""

    def __post_init__(self) -> None:
        check(bool(self.checkpoint), "--checkpoint is missing: name a run's folder")
        check(bool(self.eps), "--eps is empty: write --eps 4/255")
        for value in self.eps:
            check_pixels("--eps", value)
        for name in self.attacks:
            known = (
                name in ATTACKS[:2] or name == "autoattack" or re.fullmatch(r"pgd-[1-9]\d*", name)
            )
            check(bool(known), f"--attacks {name!r} is unknown: {nearest(name, ATTACKS)}")
        for field in ("num_images", "batch_size", "picture_images"):
            value = getattr(self, field)
            check(
                value is None or value > 0,
                f"--{field.replace('_', '-')} {value} must be at least 1",
            )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model and what it was trained with."""

    name: str
    model: models.Classifier
    cfg: Config
    classes: tuple[str, ...]


def load_trained(where: str, device: torch.device) -> Trained:
    """From a run's folder (its export, else its last checkpoint), a .pt or a .safetensors, ready
    for attacks: eval mode, no gradients to weights. Raises UserError."""
    path = Path(where)
    check(path.exists(), f"--checkpoint {where}: there is no such run or file")
    if path.is_dir() and (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    if path.suffix == ".safetensors":
        header = read_metadata(path)
        weights: dict[str, Tensor] = models.read_weights(path)
    else:
        header = load_checkpoint(find_checkpoint(path))
        weights = models.strip_prefixes(header["ema"] or header["model"])
    cfg = Config.from_toml(header["config"])
    architecture = dataclasses.replace(cfg.architecture, pretrained=False, initial_checkpoint=None)
    model, _ = models.build_model(architecture, len(header["classes"]))
    models.load_weights(model.backbone, weights, f"--checkpoint {where}")
    model.to(device).eval().requires_grad_(False)
    return Trained(run_folder(Path(where)).name, model, cfg, tuple(header["classes"]))


Attack = Callable[[torch.nn.Module, Tensor, Tensor], Tensor]


def attack_named(name: str, eps: float) -> Attack:
    """fgsm or pgd-K as (model, images, labels) -> attacked images."""
    if name == "fgsm":
        return partial(attacks.fgsm, eps=eps)
    steps = int(name.removeprefix("pgd-"))
    return partial(attacks.pgd, eps=eps, step_size=2.5 * eps / steps, steps=steps)


def autoattacked(
    model: models.Classifier, images: Subset, eps: float, cfg: EvaluateConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """AutoAttack's (images, labels) in batches; it wants all images at once, and gets them on the
    CPU."""
    pairs = [(x.cpu(), y.cpu()) for x, y in images]
    if not pairs:
        return
    whole, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    size, device = cfg.batch_size, images.device
    adversarial = attacks.autoattack(
        model, whole, labels, eps=eps, batch_size=size, seed=cfg.seed, device=device
    )
    for x, y in zip(adversarial.split(size), labels.split(size), strict=True):
        yield x.to(device), y.to(device)


def evaluate(trained: Trained, images: Subset, cfg: EvaluateConfig, world: World) -> dict[str, Any]:
    """One model's accuracies over all ranks, as a JSON-ready dict."""
    results = []
    for name in cfg.attacks:
        for eps in (0.0,) if name == "clean" else cfg.eps:
            seed_all(Stream.EVALUATION, cfg.seed, world.rank)
            start = time.perf_counter()
            batches: Iterable[tuple[Tensor, Tensor]] = images
            attack = None
            if name == "autoattack":
                batches = autoattacked(trained.model, images, eps, cfg)
            elif name != "clean":
                attack = attack_named(name, eps)
            correct = attacks.count_correct(trained.model, batches, attack, device=world.device)
            accuracy = int(world.sum(correct).item()) / images.size
            seconds = time.perf_counter() - start
            results.append({"attack": name, "eps": eps, "accuracy": accuracy, "seconds": seconds})
            if world.is_main:
                at = "" if name == "clean" else f" at {shown(eps)}"
                print(
                    f"{trained.name}: {name}{at} {accuracy:.1%} ({seconds:.1f} s)", file=sys.stderr
                )
    return {
        "name": trained.name,
        "model": trained.cfg.architecture.model,
        "method": trained.cfg.objective.method,
        "images": images.size,
        "subset": images.name,
        "results": results,
    }


def subset_of(trained: Trained, cfg: EvaluateConfig, world: World) -> Subset:
    """The validation images for a model. Raises UserError where their classes are not the
    model's."""
    values = {
        k: getattr(cfg, k) for k in ("data", "data_dir", "val_split") if getattr(cfg, k) is not None
    }
    source = dataclasses.replace(trained.cfg.dataset, **values)
    with world.first_alone():
        dataset = load_dataset(source)
    check_classes(trained.classes, dataset, trained.name)
    return Subset(
        dataset.val,
        cfg.num_images,
        img_size=trained.model.img_size,
        crop_pct=trained.cfg.augmentation.crop_pct,
        batch_size=cfg.batch_size,
        workers=cfg.workers,
        device=world.device,
        rank=world.rank,
        ranks=world.size,
    )


def draw(trained: list[Trained], subset: Subset, cfg: EvaluateConfig) -> bytes:
    """The picture of the first images for all models, which must take the same images."""
    sizes = {t.model.img_size for t in trained}
    check(
        len(sizes) == 1, f"--picture: the models take images of different sizes ({sorted(sizes)})"
    )
    eps, count = cfg.eps[-1], cfg.picture_images
    images, labels = next(iter(subset))
    images, labels = images[:count], labels[:count]
    views = []
    for t in trained:
        seed_all(Stream.EVALUATION, cfg.seed)
        attacked = attack_named("pgd-20", eps)(t.model, images, labels)
        with torch.no_grad():
            before, after = t.model(images).argmax(1), t.model(attacked).argmax(1)
        grad = attacks.input_gradient(t.model, images, labels).images_BCHW
        views.append(ModelView(t.name, grad, attacked, before, after))
    return draw_pictures(images, labels, views, trained[0].classes, eps)


def shown(eps: float) -> str:
    """eps as n/255 where it is one."""
    n = eps * 255
    return f"{round(n)}/255" if n >= 1 and math.isclose(n, round(n), rel_tol=1e-6) else f"{eps:g}"


def table(results: list[dict[str, Any]]) -> str:
    """The models as columns, attacks and radii as rows."""
    names = [r["name"] for r in results]
    rows = [["attack", "eps", *names]]
    for index, row in enumerate(results[0]["results"]):
        eps = "" if row["attack"] == "clean" else shown(row["eps"])
        rows.append(
            [row["attack"], eps, *(f"{r['results'][index]['accuracy']:.1%}" for r in results)]
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def run(cfg: EvaluateConfig, world: World) -> None:
    """Evaluates, prints the table, and writes the JSON and the picture. Raises UserError."""
    logger = logging.getLogger("auto-attack")
    if world.is_main and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("  autoattack: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    trained = [load_trained(where, world.device) for where in cfg.checkpoint]
    subsets = [subset_of(t, cfg, world) for t in trained]
    results = [evaluate(t, s, cfg, world) for t, s in zip(trained, subsets, strict=True)]
    if not world.is_main:
        return
    output = (
        Path(cfg.output) if cfg.output else run_folder(Path(cfg.checkpoint[0])) / "evaluation.json"
    )
    record = {"norm": "Linf", "eps_units": "0..1 pixels", "seed": cfg.seed, "ranks": world.size}
    record |= {"models": results}
    write_json(output, record | environment())
    data = f"{results[0]['subset']} validation images"
    print(
        f"\naccuracy on {data}, Linf, eps in 0..1 pixel units, seed "
        f"{cfg.seed}\n\n{table(results)}\n"
    )
    print(f"written: {output}")
    if cfg.picture:
        write_bytes(Path(cfg.picture), draw(trained, subsets[0], cfg))
        print(f"written: {cfg.picture}")


def main(args: list[str] | None = None) -> int:
    """The program; returns its exit status: 2 for a mistake of the user's, said in one line."""
    try:
        args = sys.argv[1:] if args is None else args
        cfg = parse_cli(EvaluateConfig, args, "fastgn.evaluate")
        with session(cfg.device) as world:
            run(cfg, world)
    except UserError as error:
        say_error(f"fastgn.evaluate: error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
