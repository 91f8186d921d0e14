"""Continues a run from a checkpoint that fits it, and reports which options have changed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from fastgn import optim
from fastgn.config import Config
from fastgn.data.datasets import check_classes
from fastgn.data.identity import Identity, describe_changes
from fastgn.distributed import World
from fastgn.errors import check
from fastgn.models.network import Classifier
from fastgn.models.weights import are_finite, collect_trained_tensors, find_mismatch
from fastgn.resolved import Resolved, last_update_of
from fastgn.state import TrainState


def check_ranks(world: World, identity: Identity) -> None:
    """Raises UserError unless all ranks have the same images.

    Each rank trains on a part of the images, so all ranks must divide the same images. identity:
    digests of this rank's images.
    """
    seen = world.gather([json.dumps(identity)])
    other = next((rank for rank, data in enumerate(seen) if data != seen[0]), None)
    check(
        other is None,
        f"rank {other} sees other images than rank 0: every machine needs the same --data-dir",
    )


def check_same_run(cfg: Config, state: TrainState, classes: tuple[str, ...], images: int) -> None:
    """Raises UserError if a checkpoint belongs to another model, optimizer or list of classes.

    images: number of images per update of this run. It must be the same as in the checkpoint.
    """
    there = state.saved_config()
    mine, theirs = (
        dataclasses.replace(c, architecture=c.architecture.started()) for c in (cfg, there)
    )
    other = mine.changed(theirs, "architecture")
    check(not other, f"the checkpoint belongs to another model: {'; '.join(other)}")
    check_classes(state.classes, classes, "the checkpoint")
    check(
        state.global_batch == images,
        f"the checkpoint was made with {state.global_batch} images per update, but this run has "
        f"{images}: change --batch-size, --grad-accum-steps or the number of ranks",
    )
    check(
        there.optimizer.opt == cfg.optimizer.opt,
        f"the checkpoint was made with --opt {there.optimizer.opt}, which --opt "
        f"{cfg.optimizer.opt} cannot continue: leave --opt out, or start another run with "
        "--initial-checkpoint",
    )
    averaged = cfg.optimizer.model_ema
    check(
        averaged == (state.ema is not None),
        f"the checkpoint has {'no' if averaged else 'a'} moving average of the weights: add "
        f"{'--no-model-ema' if averaged else '--model-ema'}",
    )


def restore(
    cfg: Config,
    state: TrainState,
    path: Path,
    model: Classifier,
    ema: optim.ModelEmaV3 | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Loads a checkpoint into the model, the moving average of its weights, and the optimizer.

    ema: the moving average, or None. path: the checkpoint's file, for messages. Raises UserError if
    the checkpoint is damaged.
    """
    loaded: list[tuple[str, Any, torch.nn.Module]] = [("model", state.model, model)]
    if ema is not None:
        loaded.append(("ema", state.ema, ema.module))
    for part, weights, module in loaded:
        problem = find_mismatch(weights, module.state_dict())
        check(problem is None, f"{path} is damaged: {part}: {problem}")
        module.load_state_dict(weights)
        check(
            are_finite(collect_trained_tensors(module).values()),
            f"{path} is damaged: a weight in {part} is not finite",
        )
    # in fp16, the optimizer has no state if all updates so far were skipped
    none_made = state.loss_scale is not None and not state.optimizer["state"]
    updates = 0 if none_made else state.update
    problem = optim.load_state(cfg.optimizer, model, optimizer, state.optimizer, updates)
    check(problem is None, f"{path} is damaged: optimizer: {problem}")


def changed_data(cfg: Config, state: TrainState, identity: Identity, allowed: bool) -> list[str]:
    """Returns a list with one line that says how the images, or their order, have changed since the
    checkpoint.

    The list is empty if nothing has changed. Raises UserError if something has changed and
    `allowed` is False. identity: digests of this run's images.
    """
    changes = describe_changes(state.data, identity)
    seed = state.saved_config().run.seed
    if seed != cfg.run.seed:
        changes.append(f"--seed {seed} is now {cfg.run.seed}")
    if not changes:
        return []
    difference = f"the data is not the checkpoint's: {', '.join(changes)}"
    check(
        allowed,
        f"{difference}: give the same --data-dir and --seed, or add --allow-changed-data to "
        "continue with the new data",
    )
    return [difference]


def check_position(
    state: TrainState, path: Path, resolved: Resolved, values: int, same_data: bool
) -> None:
    """Raises UserError if a checkpoint's number of updates is impossible, or above this run's last
    update. Also raises it if the checkpoint's sums of logged values have a wrong shape.

    path: the checkpoint's file, for messages. values: number of logged values, which is the number
    of columns of state.sums. same_data: whether an epoch has as many updates as in the checkpoint's
    run.
    """
    own, update, epoch = state.saved_config(), state.update, state.epoch
    check(
        state.sums.shape == (2, values),
        f"{path} is damaged: its entry 'sums' has shape {tuple(state.sums.shape)} instead of "
        f"{(2, values)}",
    )
    check(
        epoch is None or 0 <= epoch <= own.optimizer.epochs,
        f"{path} is damaged: its epoch {epoch} is not between 0 and its own --epochs "
        f"{own.optimizer.epochs}",
    )
    if same_data:
        last = last_update_of(own, resolved.updates_per_epoch)
        here = update / resolved.updates_per_epoch
        check(
            update <= last,
            f"{path} is damaged: update {update} is after the last update of its run, {last}",
        )
        check(
            epoch is None or epoch == here,
            f"{path} is damaged: it says epoch {epoch}, but update {update} is in epoch {here:g}",
        )
    check(
        update <= resolved.last_update,
        f"nothing is left to do: {path} was saved after update {update}, and this run ends at "
        f"update {resolved.last_update}: give a higher --max-updates or --epochs, or an earlier "
        "checkpoint",
    )


def incomparable_best(cfg: Config, identity: Identity, state: TrainState) -> list[str]:
    """Returns why new accuracies cannot be compared with the best accuracy in the checkpoint.

    Each line names one change since the checkpoint. The list is empty if the accuracies can be
    compared. identity: digests of this run's images.
    """

    def judged_by(config: Config) -> dict[str, Any]:
        natural = config.objective.method == "natural"
        return {
            "--eval-images": config.run.eval_images,
            "accuracy": "clean" if natural else f"at --eval-eps {config.eval_eps}",
        }

    before, now = judged_by(state.saved_config()), judged_by(cfg)
    changes = [f"{k} {was} is now {now[k]}" for k, was in before.items() if was != now[k]]
    if describe_changes(state.data, {"validation": identity["validation"]}):
        changes.append("the validation images have changed")
    return changes


def changes_line(cfg: Config, state: TrainState, ranks: int) -> str:
    """Returns a line that says at which update a run continues, and which options have changed.

    state: content of the checkpoint. ranks: present number of ranks.
    """
    groups = ("dataset", "augmentation", "objective", "step", "optimizer")
    saved = state.saved_config()
    changes = [change for group in groups for change in cfg.changed(saved, group)]
    if state.ranks not in (None, ranks):
        changes.append(f"ranks: {ranks}, not {state.ranks}")
    return "; ".join([f"resumed at update {state.update}", *changes])
