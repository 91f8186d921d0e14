"""Measures the clean and robust accuracy of trained models, side by side.

python -m fastgn.evaluate --checkpoint runs/NAME --eps 1/255 4/255 --attacks clean pgd-20 autoattack
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # report a mistake of the user before imports that take seconds
    from fastgn.extras import check_start

    check_start("fastgn.evaluate")

import torch
from torch import Tensor

from fastgn import attacks
from fastgn.analysis.earlier import keep_earlier
from fastgn.analysis.model_checks import Check
from fastgn.analysis.outcomes import evaluate_model
from fastgn.analysis.parts import Parts
from fastgn.analysis.pictures import write_pictures
from fastgn.analysis.sanity import STAGES, format_checks, make_sanity_report
from fastgn.analysis.selection import (
    choose_dataset,
    describe_images,
    locate_images,
    select_images,
    take_evenly_spaced,
)
from fastgn.analysis.statistics import gradient_statistics
from fastgn.analysis.tables import format_accuracies
from fastgn.checkpoint import Checkpoints, load_checkpoint
from fastgn.config import Config
from fastgn.config.cli import parse_cli
from fastgn.config.outputs import check_outside_data
from fastgn.config.programs import AUTOATTACK, EvaluateConfig
from fastgn.data.datasets import load_validation
from fastgn.data.subset import Subset
from fastgn.distributed import World, session
from fastgn.errors import UserError, check, escape, print_error, print_line, print_stopped
from fastgn.extras import stop_on_signals
from fastgn.files import check_target, write_json
from fastgn.lock import lock_file
from fastgn.metrics import environment
from fastgn.models.weights import load_weights
from fastgn.progress import ProgressLines, open_bar
from fastgn.step.precision import explain_unsupported
from fastgn.step.retry import out_of_memory
from fastgn.trained import Trained, load_bare_weights, load_trained


def run(cfg: EvaluateConfig, world: World) -> None:
    """Evaluates the models, prints the table, and writes the JSON, the pictures and the report.

    Raises UserError if the options, the models or the images do not fit together.
    """
    check(
        world.size == 1 or not (cfg.statistics or cfg.sanity),
        "--statistics and --sanity run in one process: start python without torchrun for them",
    )
    reason = explain_unsupported(cfg.precision, world.device)
    check(reason is None, f"--precision {reason}: use --precision fp32")
    silence_autoattack()
    output, *_ = targets = [Path(path) for path in cfg.written.values() if path is not None]
    for target in targets:
        check_target(target)
        if world.is_main:
            world.held.enter_context(lock_file(target, str(target)))
    trained, subsets = load_models(cfg, world)
    batch_size = subsets[0].batch_size
    entries, saved = [], []
    with refuse_out_of_memory(batch_size):
        for where, t, subset in zip(cfg.checkpoint, trained, subsets, strict=True):
            entry, parts = evaluate_model(t, subset, cfg, world, output)
            saved.append(parts)
            entries.append(entry | {"checkpoint": where})
    if not world.is_main:
        return
    record: dict[str, Any] = {
        "norm": cfg.norm,
        "eps_units": "0..1 pixels",
        "seed": cfg.seed,
        "ranks": world.size,
        "batch_size": batch_size,
        "precision": cfg.precision,
        "compile": cfg.compile,
        "successive": cfg.successive,
        "models": entries,
        **environment(),
    }
    kept = keep_earlier(output, record)
    write_json(output, record)  # save the accuracies now, because the analyses may take long
    print_results(entries, cfg)
    for line in kept:
        print_line(line, sys.stdout)
    print_line(f"written: {output}", sys.stdout)
    if cfg.statistics or cfg.sanity:
        with refuse_out_of_memory(batch_size):
            for where, t, subset, entry, parts in zip(
                cfg.checkpoint, trained, subsets, entries, saved, strict=True
            ):
                entry.update(analyse_model(where, t, subset, cfg, parts))
                write_json(output, record)
        print_line(f"written: {output}, with the analyses", sys.stdout)
    for parts in saved:
        parts.remove()
    write_pictures(trained, subsets[0], record, cfg)


def silence_autoattack() -> None:
    """Keeps AutoAttack's progress and warnings off the terminal. evaluation.json lists the
    warnings."""
    logger = logging.getLogger("auto-attack")
    logger.propagate = False
    logger.setLevel(logging.WARNING)


def load_models(cfg: EvaluateConfig, world: World) -> tuple[list[Trained], list[Subset]]:
    """Returns each model of --checkpoint, and the validation images for it.

    Raises UserError if the models cannot be compared on the same images.
    """
    with world.run_first_rank_first():
        if cfg.model is None:
            trained = []
            for where in cfg.checkpoint:
                trained.append(load_trained(where, world.device))
                # check now, because reading the images may take long
                check_few_classes(len(trained[-1].classes), cfg.attacks)
        else:
            _, classes = load_validation(choose_dataset(Config(), cfg))
            check_few_classes(len(classes), cfg.attacks)
            trained = [
                load_bare_weights(where, cfg, classes, world.device) for where in cfg.checkpoint
            ]
        trained = make_names_unique(trained, cfg.checkpoint)
        subsets = [select_images(t, cfg, world.device, world.size) for t in trained]
    sources = [choose_dataset(t.cfg, cfg) for t in trained]
    for where, source in zip(cfg.checkpoint, sources, strict=True):
        check(
            locate_images(source) == locate_images(sources[0]),
            f"the checkpoints were trained on different data ({cfg.checkpoint[0]}: "
            f"{describe_images(sources[0])}; {where}: {describe_images(source)}): name one data "
            "set with --data, --data-dir and --val-split, or evaluate each checkpoint by itself",
        )
    splits = sources[0].train_split, sources[0].val_split
    check_outside_data(cfg.written, sources[0].data_dir, splits)
    sizes = sorted({t.model.img_size for t in trained})
    check(
        cfg.picture is None or len(sizes) == 1,
        f"--picture needs models that take images of one size, but these take {sizes}: leave "
        "--picture out, or evaluate each checkpoint by itself",
    )
    batch_size = min(subset.batch_size for subset in subsets)
    for subset in subsets:  # all models use one batch size, which evaluation.json names once
        subset.batch_size = batch_size
    return trained, subsets


def make_names_unique(trained: Sequence[Trained], checkpoints: Sequence[str]) -> list[Trained]:
    """Returns the models, renamed so that no two of them have the same name.

    Models that have the same name get their paths as names. checkpoints: path of each model.
    """
    names = [t.name for t in trained]
    return [
        dataclasses.replace(t, name=escape(where)) if names.count(t.name) > 1 else t
        for t, where in zip(trained, checkpoints, strict=True)
    ]


def check_few_classes(classes: int, names: Sequence[str]) -> None:
    """Raises UserError if an attack uses AutoAttack's DLR loss and there are too few classes.

    The DLR loss needs the third or fourth best logit. names: names of the attacks.
    """
    needy = [n for n in names if n in ("apgd-dlr", "apgd-t", "apgd-ce+t", *AUTOATTACK)]
    check(
        classes >= 4 or not needy,
        f"--attacks {' '.join(needy)} uses the DLR loss, which needs at least 4 classes, but the "
        f"data has {classes}: use --attacks clean pgd-20 apgd-ce fab square --successive",
    )


@contextlib.contextmanager
def refuse_out_of_memory(batch_size: int) -> Iterator[None]:
    """Raises UserError if the block runs out of memory. The message suggests a batch size below
    `batch_size`."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"out of memory with {batch_size} images at once: use a lower --batch-size"
        ) from None


def print_results(entries: Sequence[dict[str, Any]], cfg: EvaluateConfig) -> None:
    """Prints the table of the models' accuracies, and the warnings of their evaluations."""
    print(
        f"\naccuracy on {entries[0]['subset']} validation images, {cfg.norm}, eps in 0..1 pixel "
        f"units, seed {cfg.seed}\n\n{format_accuracies(entries)}\n"
    )
    for entry in entries:
        for line in entry["warnings"]:
            print_line(f"warning: {entry['name']}: {line}", sys.stdout)


def analyse_model(
    where: str, trained: Trained, images: Subset, cfg: EvaluateConfig, parts: Parts
) -> dict[str, Any]:
    """Returns what --statistics and --sanity add to a model's entry in evaluation.json.

    Each result is saved as soon as it is known. Results that a killed evaluation has saved are not
    computed again. where: value of --checkpoint for this model. images: the validation images.
    parts: the results that are saved already.
    """
    subset = take_evenly_spaced(images, cfg.analysis_images)
    eps, ids = cfg.eps[-1], subset.indices
    paths = Checkpoints(Path(where), 1).all() if cfg.statistics and Path(where).is_dir() else []
    total = cfg.statistics * (1 + len(paths)) + cfg.sanity * len(STAGES)
    print_line(f"{trained.name}: analysing {len(ids)} images")
    batches = list(subset)
    found: dict[str, Any] = {}
    with open_bar(total=total, desc=f"{trained.name}: analysis", unit="part") as bar:
        lines, numbers = ProgressLines(bar), itertools.count(1)

        def compute_once(compute: Callable[[], Any], *key: object) -> Any:
            bar.set_postfix_str(str(key[0]))
            part = f"analysis {next(numbers)} of {total}: {' '.join(map(str, key[:2]))}"
            lines.print_sometimes(f"{trained.name}: {part}")
            result = parts.compute_once(compute, *key, repr(eps), len(ids))
            bar.update()
            return result

        if cfg.statistics:
            found["statistics"] = compute_once(
                lambda: gradient_statistics(
                    trained.model, batches, eps=eps, seed=cfg.seed, ids=ids
                ),
                "statistics",
            )
            norms = []
            for path in paths:
                file = path.stat()
                key = ("norm", path.stem, file.st_mtime_ns, file.st_size)
                measure = functools.partial(measure_checkpoint, path, trained, batches)
                norms.append(compute_once(measure, *key))
            found["norm_by_epoch"] = [norm for norm in norms if norm is not None]
        if cfg.sanity:

            def keep(name: str, compute: Callable[[], list[Check]]) -> list[Check]:
                fields = compute_once(
                    lambda: [dataclasses.asdict(c) for c in compute()], "sanity", name
                )
                return [Check(**values) for values in fields]

            images_BCHW, labels_B = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
            checks = make_sanity_report(
                trained.model,
                images_BCHW,
                labels_B,
                eps=eps,
                seed=cfg.seed,
                batch_size=subset.batch_size,
                norm=cfg.norm,
                keep=keep,
            )
            found["sanity"] = [dataclasses.asdict(c) for c in checks]
    if cfg.sanity:
        print(format_checks(checks, f"{trained.name}: can the attacks be believed?"))
    return found


def measure_checkpoint(
    path: Path, trained: Trained, batches: Sequence[tuple[Tensor, Tensor]]
) -> list[float] | None:
    """Returns [epoch of a checkpoint, mean L1 norm of its network's input gradient].

    If the checkpoint holds a moving average of the weights, the averaged weights are used. Returns
    None if the checkpoint does not say its epoch, because an older version of fastgn wrote it.
    """
    state = load_checkpoint(path)
    if state.epoch is None:
        return None
    model = copy.deepcopy(trained.model)
    load_weights(model, state.ema or state.model, str(path))
    norms = [
        attacks.input_gradient(model, x, y).images_BCHW.abs().flatten(1).sum(1) for x, y in batches
    ]
    return [state.epoch, float(torch.cat(norms).mean())]


def main(args: list[str] | None = None) -> int:
    """Runs the program and returns its exit status, which is 2 after a mistake of the user."""
    try:
        args = sys.argv[1:] if args is None else args
        cfg = parse_cli(EvaluateConfig, args, "fastgn.evaluate")
        # a collective may take a week, because a rank that has finished waits for the slowest rank
        week = timedelta(days=7)
        with (
            stop_on_signals(),
            session(cfg.device, rank_timeout=cfg.rank_timeout, meeting_timeout=week) as world,
        ):
            run(cfg, world)
    except UserError as error:
        print_error(f"fastgn.evaluate: error: {error}")
        return 2
    except KeyboardInterrupt:
        print_stopped("fastgn.evaluate")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
