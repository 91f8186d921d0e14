"""Clean and robust accuracy of trained models, side by side.

python -m fastgn.evaluate --checkpoint runs/NAME --eps 1/255 4/255 --attacks clean pgd-20 autoattack
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a mistake is answered before the imports that take seconds
    from fastgn.extras import begin

    begin("fastgn.evaluate")

import torch
from torch import Tensor

from fastgn import attacks, data
from fastgn.analysis.figures import (
    ModelView,
    draw_gradient_histograms,
    draw_norm_against_epoch,
    draw_pictures,
    draw_robust_curve,
)
from fastgn.analysis.outcomes import Attacker, Parts, is_part, rows_of, timed_part, trust
from fastgn.analysis.report import html_report, radius
from fastgn.analysis.sanity import STAGES, Check, page, sanity_report
from fastgn.analysis.statistics import gradient_statistics
from fastgn.checkpoint import Checkpoints, find_checkpoint, load_checkpoint
from fastgn.config import Config, run_folder
from fastgn.config.cli import parse_cli
from fastgn.config.groups import DatasetConfig
from fastgn.config.outputs import check_outside_data
from fastgn.config.programs import AUTOATTACK, EvaluateConfig, ForeignConfig
from fastgn.data.datasets import Arrays, check_classes, load_validation
from fastgn.data.lists import read_lines
from fastgn.data.subset import Subset, images_at_once
from fastgn.distributed import World, session
from fastgn.errors import UserError, check, escaped, passed_over, print_line, say_error
from fastgn.files import check_target, parse_json, write_bytes, write_json
from fastgn.lock import lock_file
from fastgn.metrics import environment, open_bar
from fastgn.models import network
from fastgn.models.network import Classifier
from fastgn.models.weights import load_weights, read_weights
from fastgn.step.retry import out_of_memory
from fastgn.trained import read_saved


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model and what it was trained with."""

    name: str
    model: Classifier
    cfg: Config
    classes: tuple[str, ...]
    update: int | None = None
    """Updates of the run that the weights have; None if the file does not say."""
    unfinished: str | None = None
    """How far the run had come, in a line, if the weights are not those of its end."""


def load_foreign(
    where: str, cfg: ForeignConfig, classes: tuple[str, ...], device: torch.device
) -> Trained:
    """A file of weights in timm's keys for the network that --model names. Raises UserError."""
    assert cfg.model is not None
    path = Path(where)
    check(path.is_file(), f"--checkpoint {where}: there is no such file")
    there = Config().replace(model=cfg.model)
    values = {k: getattr(cfg, k) for k in ("activation", "img_size", "mean", "std", "model_kwargs")}
    there = there.replace(**{k: v for k, v in values.items() if v is not None})
    weights = read_weights(path, paper=cfg.from_paper)
    model, _ = network.build_model(there.architecture, len(classes))
    adapted = load_weights(model, weights, f"--checkpoint {where}", adapt=cfg.adapt_weights)
    check(
        not adapted.anew,
        f"--checkpoint {where} has another number of classes than the data: {adapted}",
    )
    if adapted:
        print_line(f"{where}: {adapted}")
    model.to(device).eval().requires_grad_(False)
    model.crop_pct = cfg.crop_pct or model.crop_pct
    there = there.replace(crop_pct=model.crop_pct)
    return Trained(escaped(path.stem), model, there, classes)


def load_trained(where: str, device: torch.device) -> Trained:
    """From a run's folder (its export, else its last checkpoint), a .pt or a .safetensors, ready
    for attacks: eval mode, no gradients to weights. Raises UserError."""
    path = Path(where)
    check(path.exists(), f"--checkpoint {where}: there is no such run or file")
    if path.is_dir() and (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    saved = read_saved(
        path if path.suffix == ".safetensors" else find_checkpoint(path, "--checkpoint")
    )
    try:
        model, _ = network.build_model(saved.config.architecture.started(), len(saved.classes))
    except UserError as error:
        raise UserError(f"--checkpoint {where}: {error}") from None
    load_weights(model, saved.weights, f"--checkpoint {where}")
    model.crop_pct = saved.config.augmentation.crop_pct or model.crop_pct
    model.to(device).eval().requires_grad_(False)
    name = escaped(run_folder(Path(where)).name)
    update, unfinished = saved.update, saved.unfinished
    last = Checkpoints(Path(where), 1).last() if Path(where).is_dir() else None
    if last is not None and update is not None and int(last.stem.split("_")[1]) > update:
        unfinished = f"these are the weights of update {update}; the run has gone on to {last}"
    return Trained(name, model, saved.config, saved.classes, update, unfinished)


def source_of(trained: Config, cfg: EvaluateConfig) -> DatasetConfig:
    """The run's data, but for what the command line says."""
    values = {
        k: getattr(cfg, k) for k in ("data", "data_dir", "val_split") if getattr(cfg, k) is not None
    }
    return dataclasses.replace(trained.dataset, **values)


def subset_of(
    trained: Trained, cfg: EvaluateConfig, device: torch.device, ranks: int = 1
) -> Subset:
    """Returns the validation images for a model, in batches for so many ranks. Raises UserError if
    their classes are not the model's."""
    val, classes = load_validation(source_of(trained.cfg, cfg))
    check_classes(trained.classes, classes, trained.name)
    subset = Subset(
        val,
        cfg.num_images,
        img_size=trained.model.img_size,
        crop_pct=trained.model.crop_pct,
        batch_size=cfg.batch_size or 1,
        workers=cfg.workers,
        worker_timeout=cfg.worker_timeout,
        device=device,
        chosen=listed(cfg.image_list, val) if cfg.image_list else None,
    )
    if cfg.batch_size is None:
        subset.batch_size = images_at_once(subset.size, ranks, subset.img_size, device)
    return subset


def listed(name: str, split: Any) -> list[int]:
    """The places in a split that --image-list names. Raises UserError."""
    if name == "robustbench-imagenet":
        numbers = (Path(data.__file__).parent / "robustbench_imagenet.txt").read_text().split()
        lines = [f"ILSVRC2012_val_{int(n):08d}.JPEG" for n in numbers]
    else:
        lines = [line.strip() for line in read_lines(Path(name), f"--image-list {name}")]
        lines = [line for line in lines if line]
    places: dict[str, list[int]] = {}
    if not isinstance(split, Arrays):
        for index in range(len(split)):
            parts = split.name(index).split("/")
            for k in range(len(parts)):
                places.setdefault("/".join(parts[k:]), []).append(index)
    chosen = []
    for line in lines:
        found = places.get(line, [])
        if not found and line.isdecimal() and int(line) < len(split):
            found = [int(line)]
        check(bool(found), f"--image-list {name}: no validation image is called {line}")
        check(
            len(found) == 1,
            f"--image-list {name}: {len(found)} validation images are called {line}; write more "
            "of the path",
        )
        chosen += found
    check(bool(chosen), f"--image-list {name} is empty")
    check(len(set(chosen)) == len(chosen), f"--image-list {name} names an image twice")
    return chosen


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def decides(trained: Trained, images: Subset, cfg: EvaluateConfig, device: str) -> list[Any]:
    """All that outcomes depend on, but for the attacks: as JSON."""
    digest = hashlib.sha256()
    for index in images.indices:
        if isinstance(images.split, Arrays):
            digest.update(images.split.images_NCHW[index].numpy().tobytes())
        else:
            path = Path(images.split.name(index))
            size = path.stat().st_size if path.is_file() else 0
            digest.update(b"%b %d" % (os.fsencode(path), size))
        digest.update(str(int(images.split.labels_N[index])).encode())
    model = trained.model
    return [
        *(weights_hash(model), repr(trained.cfg.architecture), trained.model.crop_pct),
        *(model.mean.flatten().tolist(), model.std.flatten().tolist(), model.img_size),
        *(images.indices, digest.hexdigest(), device, environment()["versions"]),
        *(cfg.norm, cfg.seed, images.batch_size, cfg.precision, cfg.compile),
    ]


def evaluate(
    trained: Trained, images: Subset, cfg: EvaluateConfig, world: World, output: Path
) -> tuple[dict[str, Any], Parts]:
    """One model's outcomes over all ranks, as a JSON-ready dict: each rank takes every
    world.size-th batch. What a killed run has saved beside `output`, in the parts, is not done
    again."""
    order, size = images.indices, images.batch_size
    pairs = [("clean", 0.0)]
    pairs += [(name, eps) for name in cfg.attacks if name != "clean" for eps in cfg.eps]
    parts = Parts(output, decides(trained, images, cfg, world.device.type))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    attacker = Attacker(cfg.norm, cfg.seed, size, world.device, cfg.precision, cfg.compile)
    if world.is_main and len(batches) < world.size:
        print_line(
            f"warning: {len(order)} images are {len(batches)} batches of {size} for {world.size} "
            "processes: the others have nothing to do; lower --batch-size"
        )

    def key(pair: tuple[str, float], batch: int) -> tuple[object, ...]:
        return pair[0], repr(pair[1]), batch

    done: dict[tuple[int, int], dict[str, Any]] = {}
    mine = range(world.rank, len(batches), world.size)
    for batch in mine:
        for index, pair in enumerate(pairs):
            part = parts.get(*key(pair, batch))
            if part is not None and is_part(part, len(batches[batch])):
                done[index, batch] = part | {"row": index}
    left = [b for b in mine if any((i, b) not in done for i in range(len(pairs)))]
    images.indices = [place for batch in left for place in batches[batch]]
    total = len(mine) * len(pairs)
    hidden = None if world.is_main else True
    with (
        attacks.autoattack_warnings() as warned,
        open_bar(total=total, desc=trained.name, unit="batch", disable=hidden) as bar,
    ):
        bar.update(len(done))
        for batch, (x, y) in zip(left, images, strict=True):
            clean: list[bool] | None = None
            for index, pair in enumerate(pairs):
                if (index, batch) not in done:
                    warned.clear()
                    doubts = trust(trained.model, x, y) if index == batch == 0 else []
                    began = time.perf_counter()
                    right = attacker.correct(trained.model, x, y, batches[batch], *pair, clean)
                    doubts += [f"AutoAttack: {line}" for line in warned]
                    part = timed_part(index, batch, right, began, doubts)
                    parts.put(part, *key(pair, batch))
                    done[index, batch] = part
                    bar.update()
                if index == 0:
                    clean = [bit == "1" for bit in done[0, batch]["correct"]]
                bar.set_postfix_str(so_far(done, pairs, index))
    images.indices = order
    gathered = [
        parse_json(item, "a rank's outcomes")
        for item in world.gather([json.dumps(p) for p in done.values()])
    ]
    warnings = {line for part in gathered for line in part.get("warnings", ())}
    rows = rows_of(gathered, pairs, len(order))
    if world.is_main:
        for row in rows:
            at = "" if row["attack"] == "clean" else f" at {radius(row['eps'])}"
            print_line(f"{trained.name}: {row['attack']}{at} {row['accuracy']:.1%}")
    if "clean" not in cfg.attacks:
        rows = rows[1:]
    result = {
        "name": trained.name,
        "weights_sha256": weights_hash(trained.model),
        "update": trained.update,
        "model": trained.cfg.architecture.model,
        "method": trained.cfg.objective.method if cfg.model is None else "unknown",
        "images": len(order),
        "subset": images.name,
        "ids": names_of(images),
        "warnings": ([trained.unfinished] if trained.unfinished else []) + sorted(warnings),
        "results": rows,
    }
    return result, parts


def so_far(
    done: dict[tuple[int, int], dict[str, Any]], pairs: list[tuple[str, float]], index: int
) -> str:
    """The accuracy of an attack on this rank's batches until now."""
    bits = "".join(part["correct"] for (row, _), part in done.items() if row == index)
    name, eps = pairs[index]
    return f"{name}{f' {radius(eps)}' if eps else ''} {bits.count('1') / max(1, len(bits)):.1%}"


def names_of(images: Subset) -> list[str] | list[int]:
    """What each image is called: its place in an array, a file's last two parts of a path."""
    if isinstance(images.split, Arrays):
        return list(images.indices)
    return ["/".join(images.split.name(i).split("/")[-2:]) for i in images.indices]


def draw(trained: list[Trained], subset: Subset, cfg: EvaluateConfig) -> bytes:
    """The picture of the first images for all models, which must take the same images."""
    eps, subset = cfg.eps[-1], some(subset, cfg.picture_images)
    images, labels = (torch.cat(parts) for parts in zip(*subset, strict=True))
    views = []
    for t in trained:
        attacker = Attacker(cfg.norm, cfg.seed, len(images), images.device)
        attacked = attacker(t.model, images, labels, subset.indices, "pgd-20", eps)
        with torch.no_grad():
            before, after = t.model(images).argmax(1), t.model(attacked).argmax(1)
        grad = attacks.input_gradient(t.model, images, labels).images_BCHW
        views.append(ModelView(t.name, grad, attacked, before, after))
    return draw_pictures(images, labels, views, trained[0].classes, eps)


def table(results: list[dict[str, Any]]) -> str:
    """The models as columns, attacks and radii as rows."""
    names = [r["name"] for r in results]
    rows = [["attack", "eps", *names]]
    for index, row in enumerate(results[0]["results"]):
        eps = "" if row["attack"] == "clean" else radius(row["eps"])
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


def some(subset: Subset, count: int) -> Subset:
    """At most `count` of the images, evenly spaced: a folder's are sorted by class."""
    fewer = copy.copy(subset)
    total = len(subset.indices)
    count = min(count, total)
    fewer.indices = [subset.indices[i * total // count] for i in range(count)]
    return fewer


def norm_at(path: Path, trained: Trained, batches: list[tuple[Tensor, Tensor]]) -> Any:
    """Returns [epoch, mean L1 norm of the input gradient] of a checkpoint, by the weights that it
    would export; None if an older version has made it."""
    state = load_checkpoint(path)
    if state.epoch is None:
        return None
    model = copy.deepcopy(trained.model)
    load_weights(model, state.ema or state.model, str(path))
    norms = [
        attacks.input_gradient(model, x, y).images_BCHW.abs().flatten(1).sum(1) for x, y in batches
    ]
    return [state.epoch, float(torch.cat(norms).mean())]


def analyse(
    where: str, trained: Trained, subset: Subset, cfg: EvaluateConfig, parts: Parts
) -> dict[str, Any]:
    """Returns what --statistics and --sanity ask for. Each part of it is kept as it ends, and what
    an evaluation that was killed has kept is not made again."""
    size, subset = subset.batch_size, some(subset, cfg.analysis_images)
    eps, ids = cfg.eps[-1], subset.indices
    paths = Checkpoints(Path(where), 1).all() if cfg.statistics and Path(where).is_dir() else []
    total = cfg.statistics * (1 + len(paths)) + cfg.sanity * len(STAGES)
    out: dict[str, Any] = {}
    if not total:
        return out
    print_line(f"{trained.name}: analysing {len(ids)} images")
    batches = list(subset)
    with open_bar(total=total, desc=f"{trained.name}: analysis", unit="part") as bar:

        def made(make: Callable[[], Any], *key: object) -> Any:
            bar.set_postfix_str(str(key[0]))
            part = parts.made(make, *key, repr(eps), len(ids))
            bar.update()
            return part

        if cfg.statistics:
            out["statistics"] = made(
                lambda: gradient_statistics(
                    trained.model, batches, eps=eps, seed=cfg.seed, ids=ids
                ),
                "statistics",
            )
            norms = []
            for path in paths:
                file = path.stat()
                key = ("norm", path.stem, file.st_mtime_ns, file.st_size)
                norms.append(made(functools.partial(norm_at, path, trained, batches), *key))
            out["norm_by_epoch"] = [norm for norm in norms if norm is not None]
        if cfg.sanity:

            def keep(name: str, make: Callable[[], list[Check]]) -> list[Check]:
                found = made(lambda: [dataclasses.asdict(c) for c in make()], "sanity", name)
                return [Check(**fields) for fields in found]

            images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
            checks = sanity_report(
                trained.model,
                images,
                labels,
                eps=eps,
                seed=cfg.seed,
                batch_size=size,
                norm=cfg.norm,
                keep=keep,
            )
            out["sanity"] = [dataclasses.asdict(c) for c in checks]
    if cfg.sanity:
        print(page(checks, f"{trained.name}: can the attacks be believed?"))
    return out


def check_few_classes(classes: int, names: tuple[str, ...]) -> None:
    """Raises UserError: AutoAttack's DLR losses need a third or fourth best logit."""
    needy = [n for n in names if n in ("apgd-dlr", "apgd-t", *AUTOATTACK)]
    check(
        classes >= 4 or not needy,
        f"--attacks {' '.join(needy)}: its DLR loss needs 4 classes, the data has {classes}; take "
        "apgd-ce, fab, square and pgd-K-margin",
    )


def with_own_names(trained: list[Trained], checkpoints: tuple[str, ...]) -> list[Trained]:
    """Models of one name by their whole paths."""
    names = [t.name for t in trained]
    return [
        dataclasses.replace(t, name=escaped(where)) if names.count(t.name) > 1 else t
        for t, where in zip(trained, checkpoints, strict=True)
    ]


def run(cfg: EvaluateConfig, world: World) -> None:
    """Evaluates, prints the table, and writes the JSON, the picture and the report. Raises
    UserError."""
    check(
        world.size == 1 or not (cfg.statistics or cfg.sanity),
        "--statistics and --sanity run in one process: leave torchrun out for them",
    )
    logger = logging.getLogger("auto-attack")
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    output, *_ = targets = [Path(path) for path in cfg.written.values() if path is not None]
    for target in targets:
        check_target(target)
        if world.is_main:
            world.held.enter_context(lock_file(target, str(target)))
    with world.first_alone():
        classes = load_validation(source_of(Config(), cfg))[1] if cfg.model is not None else ()
        trained = [
            load_foreign(where, cfg, classes, world.device)
            if cfg.model is not None
            else load_trained(where, world.device)
            for where in cfg.checkpoint
        ]
        trained = with_own_names(trained, cfg.checkpoint)
        subsets = [subset_of(t, cfg, world.device, world.size) for t in trained]
    sources = {(x.data, x.data_dir, x.val_split) for x in (source_of(t.cfg, cfg) for t in trained)}
    check(
        len(sources) == 1,
        "the checkpoints were trained on different data: name one by --data or --data-dir, or "
        "evaluate them one by one",
    )
    source = source_of(trained[0].cfg, cfg)
    check_outside_data(cfg.written, source.data_dir, (source.train_split, source.val_split))
    check_few_classes(len(trained[0].classes), cfg.attacks)
    sizes = sorted({t.model.img_size for t in trained})
    check(
        cfg.picture is None or len(sizes) == 1,
        f"--picture: the models take images of different sizes ({sizes})",
    )
    size = min(subset.batch_size for subset in subsets)
    for subset in subsets:  # the same for all models, so that the record has one
        subset.batch_size = size
    results, saved = [], []
    with room_for(size):
        for where, t, subset in zip(cfg.checkpoint, trained, subsets, strict=True):
            result, parts = evaluate(t, subset, cfg, world, output)
            saved.append(parts)
            results.append(result | {"checkpoint": where})
    if not world.is_main:
        return
    record: dict[str, Any] = {"norm": cfg.norm, "eps_units": "0..1 pixels", "seed": cfg.seed}
    record |= {"ranks": world.size}
    record |= {"batch_size": size, "precision": cfg.precision, "models": results}
    record |= environment()
    write_json(output, record)  # before the analyses, which may take as long again
    images = f"{results[0]['subset']} validation images"
    print(
        f"\naccuracy on {images}, {cfg.norm}, eps in 0..1 pixel units, seed "
        f"{cfg.seed}\n\n{table(results)}\n"
    )
    for result in results:
        for line in result["warnings"]:
            print_line(f"warning: {result['name']}: {line}", sys.stdout)
    print_line(f"written: {output}", sys.stdout)
    if cfg.statistics or cfg.sanity:
        with room_for(size):
            for index, where in enumerate(cfg.checkpoint):
                analysis = analyse(where, trained[index], subsets[index], cfg, saved[index])
                results[index].update(analysis)
                write_json(output, record)
        print_line(f"written: {output}, with the analyses", sys.stdout)
    for parts in saved:
        parts.remove()
    draw_all(trained, subsets[0], record, cfg)


@contextlib.contextmanager
def room_for(batch_size: int) -> Iterator[None]:
    """Raises UserError if so many images at once do not fit the device."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"out of memory with {batch_size} images at once: add a lower --batch-size"
        ) from None


def draw_all(
    trained: list[Trained], subset: Subset, record: dict[str, Any], cfg: EvaluateConfig
) -> None:
    """Writes the curve, the picture and the report that were asked for; one that fails is said and
    passed over."""
    results = record["models"]

    def report() -> str:
        title = f"Robustness of {', '.join(t.name for t in trained)}"
        return html_report(record, pictures_of(trained, subset, results, cfg), title=title)

    for path, make in (
        (cfg.curve, lambda: curve_of(results, cfg.attacks[-1], cfg.norm)),
        (cfg.picture, lambda: draw(trained, subset, cfg)),
        (cfg.report, report),
    ):
        if path:
            with passed_over(path) as failure:
                write_bytes(Path(path), make())
            if not failure:
                print_line(f"written: {path}", sys.stdout)


def curve_of(results: list[dict[str, Any]], name: str, norm: str) -> bytes:
    """All models' accuracies against eps under an attack, and without one."""
    rows = {r["name"]: [x for x in r["results"] if x["attack"] in ("clean", name)] for r in results}
    return draw_robust_curve(rows, results[0]["subset"], name, norm)


def pictures_of(
    trained: list[Trained], subset: Subset, results: list[dict[str, Any]], cfg: EvaluateConfig
) -> dict[str, bytes]:
    """Caption -> PNG, for the report."""
    out = {}
    if len(cfg.eps) > 1:
        for name in cfg.attacks:
            if name != "clean":
                caption = f"Accuracy against eps under {name}"
                with passed_over(caption):
                    out[caption] = curve_of(results, name, cfg.norm)
    norms = {r["name"]: r["statistics"]["l1"] for r in results if "statistics" in r}
    if norms:
        caption = "L1 norm of the input gradient, image by image"
        with passed_over(caption):
            out[caption] = draw_gradient_histograms(norms)
    by_epoch = {
        r["name"]: r["norm_by_epoch"] for r in results if len(r.get("norm_by_epoch", ())) > 1
    }
    if by_epoch:
        caption = "Mean L1 norm of the input gradient against epoch"
        with passed_over(caption):
            out[caption] = draw_norm_against_epoch(by_epoch)
    if len({t.model.img_size for t in trained}) == 1:
        caption = "Images, input gradients and PGD-20 perturbations"
        with passed_over(caption):
            out[caption] = draw(trained, subset, cfg)
    return out


def main(args: list[str] | None = None) -> int:
    """The program; returns its exit status: 2 for a mistake of the user's, said in one line."""
    try:
        args = sys.argv[1:] if args is None else args
        cfg = parse_cli(EvaluateConfig, args, "fastgn.evaluate")
        # ranks meet when the slowest has attacked its last batch
        week = timedelta(days=7)
        with session(cfg.device, rank_timeout=cfg.rank_timeout, meeting_timeout=week) as world:
            run(cfg, world)
    except UserError as error:
        say_error(f"fastgn.evaluate: error: {error}")
        return 2
    except KeyboardInterrupt:
        say_error("fastgn.evaluate: stopped; run the same command again to continue")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
