"""Builds a Run from a configuration. A Run holds everything that the training loop works on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fastgn import optim
from fastgn.config import Config, initial_file
from fastgn.data.batch import Loader
from fastgn.data.cores import count_cores
from fastgn.data.datasets import Dataset, load_dataset
from fastgn.data.identity import describe_dataset
from fastgn.data.loader import build_loader
from fastgn.data.representatives import compute_representatives
from fastgn.data.subset import Subset
from fastgn.distributed import World, count_local_ranks
from fastgn.errors import check
from fastgn.files import remove_file, write_bytes, write_json
from fastgn.finish import warn_of_initial_weights
from fastgn.folder import open_run
from fastgn.metrics import Metrics, environment, find_wandb
from fastgn.models import create, network
from fastgn.models.network import Classifier, ModelReport
from fastgn.models.sync_batch_norm import has_collectives, sync_batch_norms
from fastgn.objectives import (
    METHODS,
    Objective,
    Representatives,
    build_objective,
    piecewise_linear_warning,
)
from fastgn.resolved import (
    Batching,
    Resolved,
    batch_images,
    check_device,
    choose_grad_sync,
    is_compiled,
    make_plan,
    resolve,
    schedule_of,
    step_options,
)
from fastgn.resume import (
    changed_data,
    changes_line,
    check_position,
    check_ranks,
    check_same_run,
    incomparable_best,
    restore,
)
from fastgn.run import SUMS, Run
from fastgn.seeding import Stream, seed_all
from fastgn.state import TrainState
from fastgn.step.step import Step


def build(cfg: Config, world: World, on_evaluation: Callable[[Run], None] | None = None) -> Run:
    """Returns a Run, which holds everything that the training loop needs.

    Quick checks come first, so that most mistakes of the user are reported at once.

    on_evaluation: function that is called after each evaluation. An exception that it raises ends
    the run. Raises UserError if the run cannot start, and then leaves its folder unchanged.
    """
    kernels = check_options(cfg, world.device)
    folder, path, state = open_run(cfg, world)
    # a run that continues from a checkpoint does not read the file of --initial-checkpoint
    if cfg.architecture.initial_checkpoint and state is None:
        initial_file(cfg.architecture.initial_checkpoint)
    allow_changed_data = cfg.run.allow_changed_data
    # drop these options, because config.toml may be the recipe of a new run, which must not resume
    cfg = cfg.replace_group("run", {"resume": None, "allow_changed_data": False})
    with world.run_first_rank_first():
        dataset = load_dataset(cfg.dataset)
    identity = describe_dataset(dataset)
    check_ranks(world, identity)
    batching = batch_images(cfg, dataset, world, state)
    peak = optim.compute_peak_lr(cfg.optimizer, batching.global_batch)
    cfg, model, report = build_model(
        cfg, dataset, batching, kernels, world, resumed=state is not None
    )
    notes = list(dataset.notes)
    loader = make_loader(cfg, dataset, model, batching, world, notes)
    optimizer = optim.build_optimizer(cfg.optimizer, model, peak)
    ema = optim.build_average(cfg.optimizer, model)
    changes: list[str] = []
    if state is not None and path is not None:
        check_same_run(cfg, state, dataset.classes, batching.global_batch)
        restore(cfg, state, path, model, ema, optimizer)
        changes = changed_data(cfg, state, identity, allow_changed_data)
    objective, without_data = build_objectives(cfg, dataset, model, batching, world)
    planned = None
    if cfg.step.schedule == "auto" or world.device.type == "cuda":
        classes = len(dataset.classes)
        planned = make_plan(cfg, world, model, without_data, optimizer, classes, batching)
    resolved = resolve(
        cfg,
        world,
        dataset,
        batching,
        model,
        peak=peak,
        loader=type(loader).__name__,
        batches_per_epoch=loader.batches_per_epoch,
        kernels=kernels,
        planned=planned if cfg.step.schedule == "auto" else None,
    )
    run = Run(
        cfg=cfg,
        resolved=resolved,
        world=world,
        folder=folder,
        model=model,
        step=make_step(cfg, resolved, world, model, objective),
        optimizer=optimizer,
        ema=ema,
        loader=loader,
        subset=make_subset(cfg, dataset, model, resolved, world),
        classes=dataset.classes,
        data=identity,
        plan=planned,
        on_evaluation=on_evaluation,
    )
    if state is not None and path is not None:
        check_position(state, path, resolved, len(SUMS), same_data=not changes)
        run.continue_from(state)
        notes += [*changes, *forget_best(run, state)]
    if world.is_main:
        begin_records(run)
        announce(run, report, notes, state)
    return run


def check_options(cfg: Config, device: torch.device) -> str:
    """Raises UserError if the model's name, the device, the optimizer or W&B cannot be used.

    Returns "triton" or "reference", the operators that the network will use.
    """
    create.check_name(cfg.architecture)
    kernels = network.choose_kernels(cfg.step.kernels, device)
    check_device(cfg.step, device)
    optim.check_optimizer(cfg.optimizer, device)
    if cfg.run.log_wandb:
        find_wandb()
    return kernels


def build_model(
    cfg: Config, dataset: Dataset, batching: Batching, kernels: str, world: World, resumed: bool
) -> tuple[Config, Classifier, ModelReport]:
    """Returns the configuration, the network on its device, and a report about the network.

    The network's crop_pct is written into the configuration, for later evaluations of the run.
    batching: how the images of an update are divided among ranks and micro-batches. kernels:
    "triton" or "reference". resumed: whether the weights will come from a checkpoint of the run.
    """
    architecture = cfg.architecture.started() if resumed else cfg.architecture
    seed_all(Stream.STEP, cfg.run.seed)
    model, report = network.build_model(architecture, len(dataset.classes), kernels)
    if not cfg.step.train_in_eval_mode:
        together = world.size if cfg.step.sync_bn else 1
        classes = len(dataset.classes)
        model.fewest_images = network.find_smallest_batch(model, architecture, classes, together)
    if cfg.step.sync_bn:
        check(
            sync_batch_norms(model, 1 if cfg.step.train_in_eval_mode else world.size) > 0,
            f"--sync-bn: --model {architecture.model} has no BatchNorm: leave --sync-bn out",
        )
    check_batch(cfg, model, batching)
    model.crop_pct = cfg.augmentation.crop_pct or model.crop_pct
    model.to(world.device)
    return cfg.replace(crop_pct=model.crop_pct), model, report


def check_batch(cfg: Config, model: Classifier, batching: Batching) -> None:
    """Raises UserError if BatchNorm would get fewer images than it needs."""
    schedule = schedule_of(cfg.step)
    fewest = schedule.fewest(model.fewest_images)
    subset_share = f" and --subset-fraction {schedule.subset_fraction:g}"
    check(
        batching.batch_size >= fewest,
        f"--batch-size {batching.batch_size}{subset_share * (schedule.kind == 'subset')}: "
        f"BatchNorm in --model {cfg.architecture.model} at {model.img_size} px gets one value per "
        f"channel from one image and has no variance to divide by: use --batch-size {fewest} or "
        "more",
    )


def make_loader(
    cfg: Config,
    dataset: Dataset,
    model: Classifier,
    batching: Batching,
    world: World,
    notes: list[str],
) -> Loader:
    """Returns the loader of the training images.

    batching: how the images of an update are divided among ranks and micro-batches. notes: list to
    which the function adds lines for the user.
    """
    return build_loader(
        cfg,
        dataset,
        img_size=model.img_size,
        mean=model.mean,
        std=model.std,
        batch_size=batching.batch_size,
        grad_accum_steps=batching.grad_accum_steps,
        rank=world.rank,
        ranks=world.size,
        device=world.device,
        compiled=is_compiled(cfg.step, world.device),
        agree=world.any,
        notes=notes,
    )


def build_objectives(
    cfg: Config, dataset: Dataset, model: Classifier, batching: Batching, world: World
) -> tuple[Objective, Objective]:
    """Returns the objective that is minimised, and a copy of it without data.

    Some methods compare training images with images that represent the classes. Their objective
    holds these images as tensors. In the copy, these tensors are on the CPU and their values are
    not set. The copy serves to count the operations of an update.

    batching: how the images of an update are divided among ranks and micro-batches.
    """
    if not METHODS[cfg.objective.method].needs_representatives:
        objective = build_objective(cfg.objective)
        return objective, objective
    images, labels = compute_representatives(
        cfg,
        dataset,
        img_size=model.img_size,
        crop_pct=model.crop_pct,
        batch_size=batching.batch_size,
        device=world.device,
    )
    empty = Representatives(
        torch.empty_like(images, device="cpu"),
        None if labels is None else torch.empty_like(labels, device="cpu"),
    )
    both = Representatives(images, labels), empty
    with_data, without_data = (build_objective(cfg.objective, r) for r in both)
    return with_data, without_data


def make_step(
    cfg: Config, resolved: Resolved, world: World, model: Classifier, objective: Objective
) -> Step:
    """Returns the object that computes the gradients of an update, with the configured options."""
    options = dataclasses.replace(
        step_options(cfg),
        compile=resolved.compiled,
        activation_memory_budget=resolved.activation_memory_budget,
        micro_batch=resolved.micro_batch if cfg.step.schedule == "auto" else None,
        fewest=schedule_of(cfg.step).fewest(model.fewest_images),
        cuda_graphs=resolved.cuda_graphs,
        grad_sync=resolved.grad_sync,
        communicates=has_collectives(model),
    )
    # copy the weights of the first rank to all ranks, which may have read different files
    for tensor in model.state_dict().values():
        world.broadcast(tensor)
    return Step(model, objective, options, ranks=world)


def make_subset(
    cfg: Config, dataset: Dataset, model: Classifier, resolved: Resolved, world: World
) -> Subset | None:
    """Returns the validation images of each evaluation, or None if the run does not evaluate."""
    if not cfg.run.eval_images:
        return None
    return Subset(
        dataset.val,
        cfg.run.eval_images,
        img_size=model.img_size,
        crop_pct=model.crop_pct,
        batch_size=resolved.micro_batch,
        workers=cfg.dataset.workers,
        worker_timeout=cfg.dataset.worker_timeout,
        device=world.device,
        rank=world.rank,
        ranks=world.size,
        skip=cfg.dataset.on_bad_image == "skip",
    )


def forget_best(run: Run, state: TrainState) -> list[str]:
    """Forgets the best accuracy so far if new accuracies cannot be compared with it.

    In this case returns one line that says so, otherwise no line. state: content of the checkpoint
    that the run continues.
    """
    if run.subset is None or run.best < 0 or run.is_done():
        return []
    changes = incomparable_best(run.cfg, run.data, state)
    if not changes:
        return []
    run.best = -1.0
    return [f"best.pt is chosen anew from here on, because {', '.join(changes)}"]


def begin_records(run: Run) -> None:
    """Writes environment.json and config.toml, and opens the run's metrics.

    If the run is not done, also removes an older summary.json, because this file shows
    that a run is done.
    """
    resolved: dict[str, Any] = vars(run.resolved)
    if not run.is_done():
        remove_file(run.folder / "summary.json")
    write_json(run.folder / "environment.json", environment() | {"resolved": resolved})
    write_bytes(run.folder / "config.toml", run.cfg.to_toml())
    run.metrics = Metrics(
        run.folder,
        total=run.resolved.last_update,
        updates_per_epoch=run.resolved.updates_per_epoch,
        start=run.update,
        wandb_config=run.cfg.flat() if run.cfg.run.log_wandb else None,
    )


def announce(run: Run, report: ModelReport, notes: list[str], state: TrainState | None) -> None:
    """Prints what is about to run, in a few lines.

    report: what was done to the model. notes: lines about the images and the loader. state: content
    of the checkpoint that the run continues, or None for a new run.
    """
    cfg, resolved = run.cfg, run.resolved
    for line in report.format_lines(cfg.architecture):
        run.print(line)
    if cfg.dataset.data is None and cfg.dataset.data_dir is None:
        size = resolved.img_size
        run.print(f"no --data-dir: training on the digits that scikit-learn contains, at {size} px")
    run.print(
        f"{cfg.objective.method} on {resolved.data} at {resolved.img_size} px, {resolved.ranks} x "
        f"{resolved.device}, {cfg.step.precision}, {'compiled' if resolved.compiled else 'eager'}"
        f"{', CUDA graphs' if resolved.cuda_graphs else ''}: {resolved.last_update} updates of "
        f"{resolved.batch_size} images x {resolved.grad_accum_steps} accumulated x "
        f"{resolved.ranks} processes, peak lr {resolved.lr:.3g} -> {run.folder}"
    )
    if state is None:
        notes = optim.describe_low_lr(cfg.optimizer, resolved.global_batch) + notes
    if resolved.ranks > 1:
        micro_batches = resolved.count_micro_batches(resolved.micro_batch)
        grad_sync, reason = choose_grad_sync(cfg.step, run.world, micro_batches)
        run.print(f"--grad-sync {grad_sync}, because {reason}")
    for line in notes:
        run.print(line)
    if state is not None:
        run.print(changes_line(cfg, state, resolved.ranks))
        if run.is_done():
            run.print(
                "all updates of this run are done, so only the files of its end are written again: "
                "to train longer, give a higher --epochs or --max-updates"
            )
    for line in run.plan.lines() if run.plan is not None else []:
        run.print(line)
    if resolved.compiled:
        run.print("the first update compiles the step, which can take minutes; later runs reuse it")
    warn(run, report)


def warn(run: Run, report: ModelReport) -> None:
    """Prints a warning for each option that does little or nothing in this run.

    The cause is another option or the network. report: what was done to the model.
    """
    cfg = run.cfg
    if cfg.step.schedule == "lazy" and cfg.step.clip_grad is not None:
        run.print(
            f"warning: --schedule lazy makes the penalty {cfg.step.lazy_interval} times as strong, "
            f"but --clip-grad {cfg.step.clip_grad:g} also limits the gradient of these updates"
        )
    if run.resolved.grad_sync == "overlap" and cfg.step.cuda_graphs == "auto":
        run.print(
            "--grad-sync overlap runs without CUDA graphs: if the GPU waits for a slow CPU, try "
            "--grad-sync flat, which uses CUDA graphs"
        )
    if cfg.step.sync_bn and cfg.step.train_in_eval_mode:
        run.print(
            "warning: --sync-bn does nothing with --train-in-eval-mode, because BatchNorm then "
            "uses its stored statistics"
        )
    warn_of_initial_weights(run, "will hold", run.resolved.last_update)
    if cfg.optimizer.warmup >= cfg.optimizer.epochs:
        run.print(
            f"warning: --warmup-epochs {cfg.optimizer.warmup:g} does not end before the run: the "
            "learning rate never reaches its peak"
        )
    if cfg.ramp_epochs > cfg.optimizer.epochs:
        full = optim.compute_ramp(cfg, run.resolved.last_update, run.resolved.updates_per_epoch)
        run.print(
            f"warning: --ramp-epochs {cfg.ramp_epochs:g} is longer than the run: the strength of "
            f"{cfg.objective.method} reaches only {full:.2g} of its full value"
        )
    if run.resolved.loader != "DeviceLoader":  # DeviceLoader has no workers
        warn_of_workers(run, count_local_ranks(), count_cores())
    warning = piecewise_linear_warning(cfg.objective, report.piecewise_linear)
    if warning:
        run.print(f"warning: {warning}")


def warn_of_workers(run: Run, ranks: int, cores: int) -> None:
    """Prints a warning if the ranks on this machine together have more loader workers than the
    job may use cores.

    Each rank alone has at most as many workers as there are cores. ranks: number of ranks on this
    machine. cores: number of its CPU cores that the job may use.
    """
    workers = run.cfg.dataset.workers
    if ranks * min(workers, cores) > cores:
        run.print(
            f"warning: {ranks} ranks on this machine x --workers {workers} are more than the "
            f"{cores} cores of the job, and slow each other down: use --workers "
            f"{max(1, cores // ranks)}"
        )
