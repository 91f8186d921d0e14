"""Trains an image classifier, robustly by default (gradient-norm regularisation, arXiv 2409.20139).

    python -m fastgn.train --recipe quickstart_gradnorm
    torchrun --nproc-per-node 8 -m fastgn.train --recipe swin_b_gradnorm --data-dir IMAGENET
    python -m fastgn.train --resume runs/NAME

The loop is `train`; `build` makes what it runs on.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":  # a mistake is answered before the imports that take seconds
    from fastgn.extras import begin

    begin("fastgn.train")

import torch
from torch import Tensor

from fastgn import attacks, models, optim
from fastgn.analysis.figures import draw_curves
from fastgn.checkpoint import (
    Checkpoints,
    export_weights,
    find_checkpoint,
    load_checkpoint,
)
from fastgn.config import Config, initial_file
from fastgn.config.cli import parse_config
from fastgn.config.groups import StepConfig
from fastgn.config.outputs import RUN_FILES, check_outside_data, holds_run
from fastgn.data.batch import Batch, Loader, worker_death
from fastgn.data.datasets import Dataset, check_classes, load_dataset
from fastgn.data.identity import Identity, changes_since, identity_of
from fastgn.data.loader import batch_sizes, build_loader
from fastgn.data.representatives import class_representatives
from fastgn.data.subset import Subset
from fastgn.distributed import World, has_agent_store, remembered, restarts, session
from fastgn.errors import UserError, check, passed_over, say_error
from fastgn.files import check_target, write_bytes, write_json
from fastgn.hub import timm_config
from fastgn.lock import lock_folder, remove_leftovers
from fastgn.metrics import Metrics, environment, find_wandb
from fastgn.objectives import Representatives, build_objective, piecewise_linear_warning
from fastgn.seeding import Stream, seed_all
from fastgn.step.cost import step_cost
from fastgn.step.diagnosis import missing_derivative
from fastgn.step.double_backward import compilations
from fastgn.step.plan import Plan, Rates, device_rates, free_memory, plan
from fastgn.step.precision import unsupported
from fastgn.step.retry import out_of_memory
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step
from fastgn.weights import are_finite, changed_by_training, mismatch

SUMS = ("loss", "ce", "penalty", "grad_l1", "grad_norm")
"""What is summed on the device between log rows."""


def train(run: "Run") -> None:
    """The loop. The host waits for the device in `log`, `evaluate` and `save` alone, and after the
    first update."""
    cfg, world = run.cfg, run.world
    with Interrupt() as interrupt:
        while run.update < run.last_update:
            epoch = run.update // run.updates_per_epoch
            for batches in run.updates_of(epoch):
                seed_all(Stream.STEP, cfg.run.seed, run.update, world.rank)
                lr = optim.lr_at(cfg.optimizer, run.update, run.updates_per_epoch, run.peak_lr)
                at = cfg, run.update, run.updates_per_epoch
                ramp, attack_ramp = optim.ramp_at(*at), optim.attack_ramp_at(*at)

                run.ramp.fill_(ramp)
                run.attack_ramp.fill_(attack_ramp)
                loss = run.step(batches, run.ramp, run.update, run.attack_ramp)
                if run.first_s is None:
                    run.check_first(batches)
                grad_norm = run.apply_gradients(lr)
                run.update += 1
                run.accumulate(torch.stack([*loss, grad_norm]))

                border = run.at_border()
                if border or run.update % cfg.run.log_interval == 0:
                    run.log(lr, ramp if cfg.objective.has_penalty else attack_ramp)
                if border and run.evaluation_due():
                    run.evaluate()
                # last, so that a checkpoint lacks nothing of what its update had to do
                stopped = world.any(interrupt.signal is not None)
                if stopped or run.checkpoint_due():
                    run.save()
                if stopped or run.update == run.last_update:
                    break
            if stopped and run.update < run.last_update:
                run.say(f"stopped at update {run.update}; continue with --resume {run.folder}")
                return
        run.finish()


@dataclasses.dataclass
class Run:
    """What the loop runs on, and what it has reached."""

    cfg: Config
    world: World
    folder: Path
    model: models.Classifier
    step: Step
    optimizer: torch.optim.Optimizer
    ema: optim.ModelEmaV3 | None
    loader: Loader
    subset: Subset | None
    classes: tuple[str, ...]
    data: Identity
    """What tells the images from others, for the checkpoints."""
    checkpoints: Checkpoints
    batch_size: int
    grad_accum_steps: int
    updates_per_epoch: int
    last_update: int
    peak_lr: float
    ramp: Tensor
    """The penalty's strength as a tensor, so that its change recompiles nothing."""
    metrics: Metrics | None = None
    """None on all ranks but the first."""
    update: int = 0
    """Updates done."""
    best: float = -1.0
    """Best accuracy on the subset so far: under PGD-10, or clean for the natural method."""
    is_best: bool = False
    """Whether the weights of this moment are the best."""
    accuracy: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of the last evaluation."""
    on_evaluation: Callable[["Run"], None] | None = None
    """Called after each evaluation; what it raises ends the run."""
    plan: Plan | None = None
    """What an update was predicted to cost; None once the measured cost has been said."""

    def __post_init__(self) -> None:
        device = self.world.device
        self.sums = torch.zeros(2, len(SUMS), device=device)
        """Of the values, and of how many updates had one: a lazy schedule's penalty has gaps."""
        self.bad_update = torch.full((), -1, device=device)
        self.attack_ramp = torch.ones_like(self.ramp)
        """The attack's step as a share of its full size, a tensor for the same reason."""
        self.reset_clock()
        self.named_bad: set[str] = set()
        self.first_s: float | None = None
        """Of the first update, which compiles; the host's, which waits for nothing else."""

    def reset_clock(self) -> None:
        self.sums.zero_()
        self.summed = self.resumed = 0
        """Updates in the sums, and of those how many another process has made."""
        self.waited = 0.0
        self.began = time.perf_counter()
        self.steady = (self.began, 0.0, 0)
        """(time, waited, summed) of when updates began to take what they take."""

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.grad_accum_steps * self.world.size

    @property
    def images_at_a_time(self) -> int:
        """That go through the network in a training step."""
        return self.step.micro_batch or self.batch_size

    @property
    def evaluated_model(self) -> models.Classifier:
        """The average where there is one: what is evaluated and exported."""
        return self.model if self.ema is None else cast(models.Classifier, self.ema.module)

    def updates_of(self, epoch: int) -> Iterator[list[Batch]]:
        """The epoch's remaining micro-batches, an update's at a time; the wait for them is
        timed."""
        first = (self.update - epoch * self.updates_per_epoch) * self.grad_accum_steps
        batches = self.loader.epoch(epoch, first)
        while True:
            start = time.perf_counter()
            group = list(islice(batches, self.grad_accum_steps))
            self.waited += time.perf_counter() - start
            if not group:
                return
            yield group

    def apply_gradients(self, lr: float) -> Tensor:
        """Clip, update, average; returns the gradient's norm before clipping. No host sync."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(
            [p.grad for p in parameters if p.grad is not None]
        )
        if self.cfg.step.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.cfg.step.clip_grad, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()  # sets to None; apex's takes no argument
        if self.ema is not None:
            optim.update_average(self.cfg.optimizer, self.ema, self.model, self.update + 1)
        return grad_norm

    def accumulate(self, row: Tensor) -> None:
        """Adds to the sums, and notes the first update that was not finite; all on the device."""
        there = ~row.isnan()
        self.sums += torch.stack([row.where(there, 0), there.to(row.dtype)])
        self.summed += 1
        if self.first_s is None:
            now = time.perf_counter()
            self.first_s = now - self.began
            self.steady = (now, self.waited, self.summed)
        finite = torch.isfinite(row[0]) & torch.isfinite(row[-1])
        unseen = self.bad_update < 0
        self.bad_update = torch.where(unseen & ~finite, self.update, self.bad_update)
        if self.metrics is not None:
            self.metrics.advance()

    def check_finite(self) -> None:
        """Raises UserError once an update was not finite. A host sync."""
        bad = int(self.bad_update.item())
        if bad >= 0:
            raise self.not_finite(f"the loss or gradient of update {bad}")

    def check_weights(self) -> None:
        """Raises UserError if a weight or an average is not finite, on any rank. A host sync."""
        modules = [self.model] if self.ema is None else [self.model, self.ema.module]
        sound = all(are_finite(changed_by_training(module).values()) for module in modules)
        if self.world.any(not sound):
            raise self.not_finite(f"a weight after update {self.update}")

    def not_finite(self, what: str) -> UserError:
        """Returns the mistake of a run whose numbers have overflowed."""
        last = self.checkpoints.last()
        good = f"the last good checkpoint is {last}" if last else "no checkpoint had been written"
        tries = ["a lower --lr", "--clip-grad 1.0"]
        if self.cfg.step.precision != "fp32":
            tries.append("--precision fp32")
        if self.step.objective.needs_input_gradient:
            tries.append("a longer --ramp-epochs")
        return UserError(f"{what} is not finite; {good}; try {', '.join(tries)}")

    def check_first(self, batches: list[Batch]) -> None:
        """Raises UserError if a gradient of the process's first update is not finite.

        The weights are still sound then, so that the layer at fault can be found. A host sync.
        """
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if bool(torch.nn.utils.get_total_norm(grads).isfinite()):
            return
        seed_all(Stream.STEP, self.cfg.run.seed, self.update, self.world.rank)
        found = self.step.diagnose(batches, self.ramp, self.update, self.attack_ramp)
        named = self.world.gather([found] if found is not None else [])
        what = named[0] if named else "no layer alone is at fault, so their sum is too large"
        tries = ["another --model or --initial-checkpoint"]
        if self.step.objective.differences:
            tries.insert(0, "--schedule finite-difference")
        if self.cfg.step.precision != "fp32":
            tries.insert(0, "--precision fp32")
        raise UserError(
            f"the gradient of update {self.update + 1}, the first one here, is not finite: {what}; "
            f"try {' or '.join(tries)}"
        )

    def at_border(self) -> bool:
        """Whether an epoch or the run ends here."""
        return self.update % self.updates_per_epoch == 0 or self.update == self.last_update

    def evaluation_due(self) -> bool:
        """At a border."""
        epoch = self.update // self.updates_per_epoch
        return epoch % self.cfg.run.eval_interval == 0 or self.update == self.last_update

    def kept_epoch(self) -> int | None:
        """Returns the epoch that ends here if its checkpoint is to be kept for good."""
        epoch, rest = divmod(self.update, self.updates_per_epoch)
        return epoch if rest == 0 and epoch in self.cfg.run.keep_epochs else None

    def checkpoint_due(self) -> bool:
        if self.is_best or self.update == self.last_update:  # best.pt holds what was evaluated
            return True
        if self.kept_epoch() is not None:
            return True
        interval = self.cfg.run.checkpoint_interval
        return self.at_border() if interval is None else self.update % interval == 0

    def log(self, lr: float, ramp: float) -> None:
        """A row of means since the last one. A host sync."""
        self.check_finite()
        if not self.summed:
            return
        sums, counts = self.world.sum(self.sums.clone())
        means = (sums / counts).tolist()
        bad = self.say_bad(self.loader, "training")
        seconds = time.perf_counter() - self.began
        if self.metrics is not None:
            self.metrics.log(
                self.update,
                dict(zip(SUMS, means, strict=True))
                | {
                    "epoch": self.update / self.updates_per_epoch,
                    "lr": lr,
                    "ramp": ramp,
                    "images_per_s": self.global_batch * (self.summed - self.resumed) / seconds,
                    "data_wait_share": self.waited / seconds,
                    **({"bad_images": bad} if bad else {}),
                },
            )
            self.say_cost()
        self.reset_clock()

    def bad_images(self, source: Loader | Subset) -> list[str]:
        """A line for each that a source has replaced on any rank since say_bad. Host to host."""
        if self.cfg.dataset.on_bad_image == "fail":
            return []
        return self.world.gather(source.bad_images)

    def say_bad(self, source: Loader | Subset, kind: str) -> int:
        """How many images a source has replaced since the last call; says so, and names the first
        few, where some had not been met before."""
        bad = self.bad_images(source)
        source.bad_images.clear()
        new = [line for line in dict.fromkeys(bad) if line not in self.named_bad]
        self.named_bad |= set(new)
        if new:
            more = f"; {len(new) - 3} more, see fastgn.data.check" if len(new) > 3 else ""
            self.say(f"bad {kind} images, replaced {len(bad)} times: {'; '.join(new[:3])}{more}")
        return len(bad)

    def say_cost(self) -> None:
        """The measured cost beside the predicted, once; after a host sync."""
        began, waited, summed = self.steady
        if self.plan is None or self.summed == summed:
            return
        device = self.world.device
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        seconds = time.perf_counter() - began - (self.waited - waited)
        measured = seconds / (self.summed - summed)
        self.say(f"first update {self.first_s:.3g} s ({compilations()})")
        self.say(self.plan.measured(peak, measured))
        self.plan = None

    def evaluate(self) -> None:
        """Clean and PGD-10 accuracy on the fixed subset, over all ranks. A host sync."""
        if self.subset is None:
            return
        model, eps = self.evaluated_model.eval(), self.cfg.eval_eps
        for buffer in model.buffers():  # BatchNorm's are each rank's own; the first's are saved
            self.world.broadcast(buffer)
        # where a training step of more did not fit
        self.subset.batch_size = min(self.subset.batch_size, self.images_at_a_time)
        while (counts := self.count_correct(self.subset)) is None:
            self.subset.batch_size //= 2
        clean, robust = (self.world.sum(counts) / self.subset.size).tolist()
        self.accuracy = {"clean_accuracy": clean, "pgd10_accuracy": robust}
        score = clean if self.cfg.objective.method == "natural" else robust
        self.is_best = score > self.best
        self.best = max(score, self.best)
        if self.metrics is not None:
            epoch = self.update / self.updates_per_epoch
            self.metrics.log(self.update, {"epoch": epoch, **self.accuracy})
            self.metrics.print(
                f"epoch {epoch:g}: clean {clean:.1%}, PGD-10 at {eps:.4g} {robust:.1%} "
                f"({self.subset.name})"
            )
        self.say_bad(self.subset, "validation")
        self.reset_clock()
        if self.on_evaluation is not None:
            self.on_evaluation(self)

    def count_correct(self, subset: Subset) -> Tensor | None:
        """This rank's images classified correctly, clean and under PGD-10; None where so many at a
        time do not fit the device."""
        model, eps, device = self.evaluated_model, self.cfg.eval_eps, self.world.device
        pgd = partial(attacks.pgd, eps=eps, step_size=eps / 4, steps=10)
        seed_all(Stream.EVALUATION, self.cfg.run.seed, self.world.rank)
        try:
            clean = attacks.count_correct(model, subset, device=device)
            return torch.stack([clean, attacks.count_correct(model, subset, pgd, device=device)])
        except RuntimeError as error:
            if not out_of_memory(error) or subset.batch_size == 1:
                raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def save(self) -> None:
        """A checkpoint, by the first rank. A host sync."""
        self.check_finite()
        self.check_weights()
        sums = self.world.sum(self.sums.clone()) / self.world.size
        bad = self.bad_images(self.loader)  # since the last row, as the sums
        if self.world.is_main:
            self.checkpoints.save(
                {
                    "update": self.update,
                    "epoch": self.update / self.updates_per_epoch,
                    "best": self.best,
                    "accuracy": self.accuracy,
                    "sums": sums,
                    "summed": self.summed,
                    "bad_images": bad,
                    "model": self.model.state_dict(),
                    "ema": self.ema.module.state_dict() if self.ema is not None else None,
                    "optimizer": self.optimizer.state_dict(),
                    "global_batch": self.global_batch,
                    "ranks": self.world.size,
                    "config": self.cfg.to_toml(),
                    "classes": list(self.classes),
                    "data": self.data,
                },
                self.update,
                best=self.is_best,
                keep_epoch=self.kept_epoch(),
            )
        self.is_best = False
        self.world.barrier()

    def finish(self) -> None:
        """The export, the summary and the curves."""
        if not self.world.is_main:
            return
        backbone = self.evaluated_model.backbone
        metadata = {
            "config": self.cfg.to_toml(),
            "classes": list(self.classes),
            "update": self.update,
        }
        export_weights(self.folder / "model.safetensors", backbone.state_dict(), metadata)
        with passed_over("config.json for timm", self.say):  # such as a network out of memory
            try:
                config = timm_config(
                    self.cfg.architecture, backbone.state_dict(), self.classes, self.model.crop_pct
                )
                write_json(self.folder / "config.json", config)
            except UserError as reason:
                self.say(f"no config.json for timm: {reason}")
        summary = {"updates": self.update, "global_batch": self.global_batch, "best": self.best}
        if self.ema is not None:
            share = optim.initial_share(self.cfg.optimizer, self.update)
            summary["initial_weights_in_average"] = share
        write_json(self.folder / "summary.json", summary | self.accuracy | environment())
        if self.metrics is not None:
            with passed_over("curves.png", self.say):
                picture = draw_curves(self.metrics.rows, title=self.folder.name)
                write_bytes(self.folder / "curves.png", picture)
            self.metrics.close()
        accuracy = ", ".join(f"{k.replace('_', ' ')} {v:.1%}" for k, v in self.accuracy.items())
        if not (self.folder / "config.toml").is_file():
            self.say(f"{self.folder / 'config.toml'} was removed: it is written again")
            write_bytes(self.folder / "config.toml", self.cfg.to_toml())
        names = ("model.safetensors", "config.json", "summary.json", "curves.png", "metrics.csv")
        there = [name for name in names if (self.folder / name).is_file()]
        self.say(
            f"finished: {self.update} updates, {accuracy or 'not evaluated'} -> {self.folder}: "
            f"{', '.join(there)}"
        )
        self.say_share("holds", self.update)

    def say_share(self, holds: str, updates: int) -> None:
        """Says how much of the initial weights is left in their average after some updates, if it
        is enough to lower its accuracy."""
        if self.ema is None:
            return
        share = optim.initial_share(self.cfg.optimizer, updates)
        if share > 0.03:
            self.say(
                f"warning: after {updates} updates the average of the weights, which is evaluated "
                f"and exported, {holds} {share:.0%} of the initial weights: use --model-ema-warmup "
                f"or a lower --model-ema-decay"
            )

    def say(self, line: str) -> None:
        if self.metrics is not None:
            self.metrics.print(line)


def build(cfg: Config, world: World) -> Run:
    """Everything that the loop needs, checked, cheap checks first. Raises UserError."""
    models.check_name(cfg.architecture)
    kernels = models.kernels_for(cfg.step.kernels, world.device)
    reason = unsupported(cfg.step.precision, world.device)
    check(reason is None, f"--precision {reason}: use --precision fp32")
    check(
        cfg.step.cuda_graphs != "on" or world.device.type == "cuda",
        f"--cuda-graphs on needs a CUDA device, and this run is on {world.device.type}: leave it "
        "out",
    )
    compiled, budget = is_compiled(cfg.step, world.device), cfg.step.activation_memory_budget
    check(
        compiled or budget == 1,
        f"--activation-memory-budget {budget} works only with --compile on, and this step "
        "is eager: add --compile on, or leave it out",
    )
    optim.check_optimizer(cfg.optimizer, world.device)
    if cfg.run.log_wandb:
        find_wandb()
    folder, source, state = open_run(cfg, world)
    if cfg.architecture.initial_checkpoint and state is None:  # a resumed run needs it no more
        initial_file(cfg.architecture.initial_checkpoint)
    allow_changed_data = cfg.run.allow_changed_data
    # config.toml is a recipe: one that resumes would write into this run from another --output
    cfg = cfg.replace_group("run", {"resume": None, "allow_changed_data": False})
    with world.first_alone():
        dataset = load_dataset(cfg.dataset)
    identity = identity_of(dataset)
    check_ranks(world, identity)
    batch_size, accum = batch_sizes(cfg, len(dataset.train), world.size, world.device)
    peak = optim.peak_lr(cfg.optimizer, batch_size * accum * world.size)
    divisor = schedule_of(cfg.step).divisor
    check(
        batch_size % divisor == 0,
        f"--subset-fraction {cfg.step.subset_fraction:g} of --batch-size {batch_size} is no whole "
        f"number of images: take a multiple of {divisor}, or another fraction",
    )
    if cfg.step.schedule == "auto":  # the step splits it: the data do not depend on the plan
        batch_size, accum = batch_size * accum, 1
    architecture = cfg.architecture
    if state is not None:  # its weights come from the checkpoint
        architecture = architecture.started()
    seed_all(Stream.STEP, cfg.run.seed)
    model, report = models.build_model(architecture, len(dataset.classes), kernels)
    if not cfg.step.train_in_eval_mode:
        models.check_batch(model, architecture, batch_size)
    model.crop_pct = cfg.augmentation.crop_pct or model.crop_pct
    cfg = cfg.replace(crop_pct=model.crop_pct)  # what the run records, for its evaluations
    model.to(world.device)
    notes = list(dataset.notes)
    loader = build_loader(
        cfg,
        dataset,
        img_size=model.img_size,
        mean=model.mean,
        std=model.std,
        batch_size=batch_size,
        grad_accum_steps=accum,
        rank=world.rank,
        ranks=world.size,
        device=world.device,
        compiled=compiled,
        agree=world.any,
        notes=notes,
    )
    optimizer = optim.build_optimizer(cfg.optimizer, model, peak)
    ema = optim.build_average(cfg.optimizer, model)
    if state is not None:
        whole = batch_size * accum * world.size
        restore(cfg, state, dataset, model, ema, optimizer, whole, str(source))
        changes = changed_data(cfg, state, identity, allow_changed_data)
        notes += changes
    representatives = None
    if cfg.objective.method == "pag":
        representatives = Representatives(
            *class_representatives(
                cfg,
                dataset,
                img_size=model.img_size,
                crop_pct=model.crop_pct,
                batch_size=batch_size,
                device=world.device,
            )
        )
    planned = None
    if cfg.step.schedule == "auto" or world.device.type == "cuda":
        try:
            planned = make_plan(
                cfg,
                world,
                model,
                optimizer,
                len(dataset.classes),
                batch_size,
                accum,
                representatives,
            )
        except RuntimeError as error:  # an operator that cannot be counted without data
            if out_of_memory(error):
                raise
            check(
                cfg.step.schedule != "auto",
                f"--schedule auto cannot count {cfg.architecture.model}'s step "
                f"({models.first_line(error)}): use --schedule exact",
            )
    automatic = planned if cfg.step.schedule == "auto" else None
    subset = None
    if cfg.run.eval_images:
        subset = Subset(
            dataset.val,
            cfg.run.eval_images,
            img_size=model.img_size,
            crop_pct=model.crop_pct,
            batch_size=automatic.micro_batch if automatic is not None else batch_size,
            workers=cfg.dataset.workers,
            worker_timeout=cfg.dataset.worker_timeout,
            device=world.device,
            rank=world.rank,
            ranks=world.size,
            skip=cfg.dataset.on_bad_image == "skip",
        )
    step = Step(
        model,
        build_objective(cfg.objective, representatives),
        schedule=schedule_of(cfg.step),
        compile=compiled,
        precision=cfg.step.precision,
        activation_memory_budget=(automatic or cfg.step).activation_memory_budget,
        micro_batch=automatic.micro_batch if automatic is not None else None,
        cuda_graphs=has_cuda_graphs(cfg.step, world),
        accumulation=cfg.step.accumulation,
        train_in_eval_mode=cfg.step.train_in_eval_mode,
        attack_weight_grads=cfg.objective.attack_weight_grads,
        sync_micro_batches=cfg.step.sync_micro_batches,
        distributed=world.size > 1,
        agree=world.any,
    )
    updates_per_epoch = loader.batches_per_epoch // accum
    run = Run(
        cfg=cfg,
        world=world,
        folder=folder,
        model=model,
        step=step,
        optimizer=optimizer,
        ema=ema,
        loader=loader,
        subset=subset,
        classes=dataset.classes,
        data=identity,
        checkpoints=Checkpoints(folder, cfg.run.checkpoint_hist),
        batch_size=batch_size,
        grad_accum_steps=accum,
        updates_per_epoch=updates_per_epoch,
        last_update=last_update_of(cfg, updates_per_epoch),
        peak_lr=peak,
        ramp=torch.zeros((), device=world.device),
        update=state["update"] if state is not None else 0,
        best=state["best"] if state is not None else -1.0,
        accuracy=state["accuracy"] if state is not None else {},
        plan=planned,
    )
    step.report = run.say
    if state is not None:
        check(
            state["sums"].shape == run.sums.shape,
            f"{source} is damaged: sums: {tuple(state['sums'].shape)} in place of "
            f"{tuple(run.sums.shape)}",
        )
        check_position(run, source, state, same_data=not changes)
        notes += forget_best(run, state)
        run.sums += state["sums"].to(world.device)
        run.summed = run.resumed = state["summed"]
        if world.is_main:
            loader.bad_images += state["bad_images"]
    if world.is_main:  # after all checks: a refused --resume leaves the run as it was
        warmup_lr, min_lr = cfg.optimizer.outer_rates(run.peak_lr)
        # what config.toml leaves to the data, the model, the machine and the method
        resolved = {
            "data": dataset.name,
            "classes": len(dataset.classes),
            "img_size": model.img_size,
            "mean": model.mean.flatten().tolist(),
            "std": model.std.flatten().tolist(),
            "loader": type(loader).__name__,
            "batch_size": batch_size,
            "grad_accum_steps": accum,
            "micro_batch": step.micro_batch or batch_size,
            "activation_memory_budget": (automatic or cfg.step).activation_memory_budget,
            "ranks": world.size,
            "lr": run.peak_lr,
            "warmup_lr": warmup_lr,
            "min_lr": min_lr,
            "warmup_epochs": cfg.optimizer.warmup,
            "ramp_epochs": cfg.ramp_epochs,
            "step_size": cfg.objective.step_size,
            "eval_eps": cfg.eval_eps,
            "compiled": compiled,
            "kernels": kernels,
            "device": world.device.type,
        }
        write_json(folder / "environment.json", environment() | {"resolved": resolved})
        write_bytes(folder / "config.toml", cfg.to_toml())
        run.metrics = Metrics(
            folder,
            total=run.last_update,
            updates_per_epoch=updates_per_epoch,
            start=run.update,
            wandb_config=cfg.flat() if cfg.run.log_wandb else None,
        )
        announce(run, report, dataset.name, compiled, state, notes)
    return run


def last_update_of(cfg: Config, updates_per_epoch: int) -> int:
    """Returns the number of updates of a whole run."""
    total = updates_per_epoch * cfg.optimizer.epochs
    return min(total, cfg.run.max_updates or total)


def check_position(run: Run, path: Path | None, state: dict[str, Any], same_data: bool) -> None:
    """Raises UserError if a checkpoint's update or epoch is none of its own run, or is after the
    end of this one.

    same_data: whether its epochs are as long as this run's.
    """
    own, update, epoch = Config.from_toml(state["config"]), run.update, state["epoch"]
    check(
        epoch is None or 0 <= epoch <= own.optimizer.epochs,
        f"{path} is damaged: epoch {epoch} is not within its --epochs {own.optimizer.epochs}",
    )
    if same_data:
        last, here = last_update_of(own, run.updates_per_epoch), update / run.updates_per_epoch
        check(update <= last, f"{path} is damaged: update {update} is after its run's last, {last}")
        check(
            epoch is None or epoch == here,
            f"{path} is damaged: epoch {epoch} is not that of update {update}, which is {here:g}",
        )
    check(
        update <= run.last_update,
        f"nothing is left to do: {path} is of update {update}, and this run ends at update "
        f"{run.last_update}: give a higher --max-updates or --epochs, or an earlier checkpoint",
    )


def forget_best(run: Run, state: dict[str, Any]) -> list[str]:
    """Forgets the best accuracy so far if the next evaluation cannot be compared with it. Returns
    a line that says so, if it does."""

    def judged_by(cfg: Config, data: Identity | None) -> dict[str, Any]:
        natural = cfg.objective.method == "natural"
        return {
            "--eval-images": cfg.run.eval_images,
            "accuracy": "clean" if natural else f"at --eval-eps {cfg.eval_eps}",
            "validation images": (data or {}).get("validation"),
        }

    if run.subset is None or run.best < 0 or run.update == run.last_update:
        return []
    before = judged_by(Config.from_toml(state["config"]), state["data"])
    now = judged_by(run.cfg, run.data)
    changes = [
        f"other {name}" if isinstance(now[name], dict) else f"{name} {was} is now {now[name]}"
        for name, was in before.items()
        if was != now[name]
    ]
    if not changes:
        return []
    run.best = -1.0
    return [f"best.pt is chosen anew from here on: {', '.join(changes)}"]


def is_compiled(cfg: StepConfig, device: torch.device) -> bool:
    """Whether the configured step is compiled on a device."""
    automatic = cfg.compile == "auto" and device.type == "cuda"
    return cfg.schedule != "exact-eager" and (cfg.compile == "on" or automatic)


def has_cuda_graphs(cfg: StepConfig, world: World) -> bool:
    """Whether the configured step replays CUDA graphs."""
    wanted = cfg.cuda_graphs == "on" or (cfg.cuda_graphs == "auto" and world.size == 1)
    return wanted and world.device.type == "cuda" and is_compiled(cfg, world.device)


def schedule_of(cfg: StepConfig) -> Schedule:
    """The configured schedule; `auto` plans how an exact one fits the device."""
    return Schedule(
        "exact" if cfg.schedule == "auto" else cfg.schedule,
        fd_step=cfg.fd_step,
        lazy_interval=cfg.lazy_interval,
        subset_fraction=cfg.subset_fraction,
    )


def make_plan(
    cfg: Config,
    world: World,
    model: models.Classifier,
    optimizer: torch.optim.Optimizer,
    num_classes: int,
    batch_size: int,
    accum: int,
    representatives: Representatives | None = None,
) -> Plan:
    """What an update costs, predicted; for `auto`, with the micro-batch and budget to run it with.
    The same on all ranks: that of the device with the least memory, at the slowest rates. Raises
    UserError where nothing fits."""
    if representatives is not None:  # the step is counted on the CPU, and on no data
        images, labels = representatives
        representatives = Representatives(
            torch.empty_like(images, device="cpu"),
            None if labels is None else torch.empty_like(labels, device="cpu"),
        )
    objective, schedule, device = (
        build_objective(cfg.objective, representatives),
        schedule_of(cfg.step),
        world.device,
    )
    cost = step_cost(
        model,
        objective,
        schedule,
        batch_size=batch_size,
        img_size=model.img_size,
        num_classes=num_classes,
        precision=cfg.step.precision,
        attack_weight_grads=cfg.objective.attack_weight_grads,
        device_type=device.type,
    )
    flops, bytes_, launch = device_rates(device, cfg.step.precision)
    rates = Rates(world.least(flops), world.least(bytes_), -world.least(-launch))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # the optimizer's; copies of the gradients by DistributedDataParallel and by CUDA graphs; the
    # images, and those of the next update
    state_bytes = 0 if optimizer.state else optim.state_bytes(cfg.optimizer, model)
    state_bytes += ((world.size > 1) + has_cuda_graphs(cfg.step, world)) * trained
    state_bytes += 2 * batch_size * accum * 3 * model.img_size**2 * 4
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    fixed = None
    if cfg.step.schedule != "auto":
        fixed = batch_size, cfg.step.activation_memory_budget
    return plan(
        cost,
        rates,
        batch_size=batch_size * accum,
        free_bytes=int(world.least(free_memory(device) / ranks_here)),
        state_bytes=state_bytes,
        held_bytes=torch.cuda.memory_allocated(device) if device.type == "cuda" else 0,
        compiled=is_compiled(cfg.step, device),
        fixed=fixed,
    )


def announce(
    run: Run,
    report: models.ModelReport,
    data: str,
    compiled: bool,
    state: dict[str, Any] | None,
    notes: list[str],
) -> None:
    """Says what is about to run, in a few lines. notes: lines about the images and the loader."""
    cfg, size = run.cfg, run.model.img_size
    for line in report.lines(cfg.architecture):
        run.say(line)
    if cfg.dataset.data is None and cfg.dataset.data_dir is None:
        run.say(f"no --data-dir: training on scikit-learn's embedded digits at {size} px")
    run.say(
        f"{cfg.objective.method} on {data} at {size} px, {run.world.size} x "
        f"{run.world.device.type}, {cfg.step.precision}, {'compiled' if compiled else 'eager'}"
        f"{', CUDA graphs' if has_cuda_graphs(cfg.step, run.world) else ''}: "
        f"{run.last_update} updates of {run.batch_size} images x {run.grad_accum_steps} "
        f"accumulated x {run.world.size} ranks, peak lr {run.peak_lr:.3g} -> {run.folder}"
    )
    for line in notes:
        run.say(line)
    if state is not None:
        groups = ("dataset", "augmentation", "objective", "step", "optimizer")
        there = Config.from_toml(state["config"])
        changes = [change for group in groups for change in cfg.changed(there, group)]
        if state["ranks"] not in (None, run.world.size):
            changes.append(f"ranks: {run.world.size}, not {state['ranks']}")
        run.say("; ".join([f"resumed at update {run.update}", *changes]))
    for line in run.plan.lines() if run.plan is not None else []:
        run.say(line)
    if compiled:
        run.say("the first update compiles the step: seconds to minutes, then cached on disk")
    if cfg.step.schedule == "lazy" and cfg.step.clip_grad is not None:
        run.say(
            f"warning: --clip-grad {cfg.step.clip_grad:g} takes from the updates with the penalty "
            f"what makes it {cfg.step.lazy_interval} times as strong"
        )
    run.say_share("will hold", run.last_update)
    if cfg.optimizer.warmup >= cfg.optimizer.epochs:
        run.say(
            f"warning: --warmup-epochs {cfg.optimizer.warmup:g} does not end before the run: the "
            "learning rate never reaches its peak"
        )
    if cfg.ramp_epochs > cfg.optimizer.epochs:
        full = optim.ramp_at(cfg, run.last_update, run.updates_per_epoch)
        run.say(
            f"warning: --ramp-epochs {cfg.ramp_epochs:g} is longer than the run: the strength of "
            f"{cfg.objective.method} ends at {full:.2g} of the full one"
        )
    warning = piecewise_linear_warning(cfg.objective, report.piecewise_linear)
    if warning:
        run.say(f"warning: {warning}")


def open_run(cfg: Config, world: World) -> tuple[Path, Path | None, dict[str, Any] | None]:
    """Returns the run's folder, which only this run may write to from here on, and the checkpoint
    and its state to continue from if any.

    Raises UserError if another process writes there, or if a run is there that is not continued.
    """
    found = choose_folder(cfg, world) if world.is_main else None
    folder, path = world.share(found)
    return folder, path, load_checkpoint(path) if path is not None else None


def choose_folder(cfg: Config, world: World) -> tuple[Path, Path | None]:
    """Returns the run's folder, locked, and the checkpoint to continue from. Only the first rank
    looks: another one could find it later, and with one checkpoint more."""
    name = cfg.run.output or (
        f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{cfg.architecture.model}-{cfg.objective.method}"
    )
    restarted = restarts() > 0
    check(
        not restarted or cfg.run.output is not None or has_agent_store(),
        "a rank that is started again finds its run only if --output names the run's folder",
    )
    folder = Path(name if cfg.run.output is not None else remembered("output", name))
    if cfg.run.resume not in (None, "auto"):
        find_checkpoint(Path(cfg.run.resume))  # before a folder is made for nothing
    flag = "--output" if cfg.run.resume in (None, "auto") else "--resume"
    splits = cfg.dataset.train_split, cfg.dataset.val_split
    check_outside_data({flag: folder}, cfg.dataset.data_dir, splits)
    world.held.enter_context(lock_folder(folder, f"{flag} {folder}"))
    for file in (*RUN_FILES, "checkpoints/best.pt"):
        check_target(folder / file)
    checkpoints = Checkpoints(folder, 1)
    remove_leftovers(folder, RUN_FILES)
    checkpoints.remove_leftovers()
    there = found = checkpoints.last()
    continues = restarted
    if cfg.run.resume == "auto":
        check(cfg.run.output is not None, "--resume auto needs --output, the run's folder")
        continues = True
    elif cfg.run.resume is not None:
        found = find_checkpoint(Path(cfg.run.resume))
        continues |= folder.resolve() in found.resolve().parents
    check(
        continues or (there is None and not (folder / "model.safetensors").exists()),
        f"--output {folder} holds a run already: --resume {folder} continues it, another "
        "--output starts a new one",
    )
    config = folder / "config.toml"
    check(  # each run writes environment.json before
        not config.exists() or holds_run(folder) or (folder / "environment.json").exists(),
        f"--output {folder} would overwrite {config}, which no run has made: give another --output",
    )
    return folder, found


def restore(
    cfg: Config,
    state: dict[str, Any],
    dataset: Dataset,
    model: models.Classifier,
    ema: optim.ModelEmaV3 | None,
    optimizer: torch.optim.Optimizer,
    global_batch: int,
    where: str,
) -> None:
    """Loads a checkpoint, the file `where`, into what was built. Raises UserError if it is another
    model's or run's."""
    there = Config.from_toml(state["config"])
    mine, theirs = (
        dataclasses.replace(c, architecture=c.architecture.started()) for c in (cfg, there)
    )
    other = mine.changed(theirs, "architecture")
    check(not other, f"the checkpoint is of another model: {'; '.join(other)}")
    check_classes(state["classes"], dataset.classes, "the checkpoint")
    check(
        state["global_batch"] == global_batch,
        f"the checkpoint was made with a global batch of {state['global_batch']}, this run has "
        f"{global_batch}: set --batch-size, --grad-accum-steps and the ranks so that it is the "
        "same",
    )
    check(
        there.optimizer.opt == cfg.optimizer.opt,
        f"the checkpoint is of --opt {there.optimizer.opt}, whose state --opt {cfg.optimizer.opt} "
        "cannot continue: leave out --opt, or start another run by --initial-checkpoint",
    )
    check(
        (ema is None) == (state["ema"] is None),
        f"the checkpoint has {'no ' if ema is not None else 'an '}average of the weights: add "
        f"{'--no-model-ema' if ema is not None else '--model-ema'}",
    )
    averaged = [("ema", ema.module)] if ema is not None else []
    for key, module in [("model", model), *averaged]:
        problem = mismatch(state[key], module.state_dict())
        check(problem is None, f"{where} is damaged: {key}: {problem}")
        module.load_state_dict(state[key])
        check(
            are_finite(changed_by_training(module).values()),
            f"{where} is damaged: {key}: a weight is not finite",
        )
    problem = optim.load_state(cfg.optimizer, model, optimizer, state["optimizer"], state["update"])
    check(problem is None, f"{where} is damaged: optimizer: {problem}")


def changed_data(
    cfg: Config, state: dict[str, Any], identity: Identity, allowed: bool
) -> list[str]:
    """Returns a line about what of the images and of their order is not the checkpoint's, if there
    is anything. Raises UserError unless that is allowed."""
    changes = changes_since(state["data"], identity)
    seed = Config.from_toml(state["config"]).run.seed
    if seed != cfg.run.seed:
        changes.append(f"--seed {seed} is now {cfg.run.seed}")
    if not changes:
        return []
    line = f"other data than the checkpoint's: {', '.join(changes)}"
    check(
        allowed,
        f"{line}: give the same --data-dir and --seed, or add --allow-changed-data to go on with "
        "these",
    )
    return [line]


def check_ranks(world: World, identity: Identity) -> None:
    """Raises UserError unless all ranks see the same images: each takes its part of one list."""
    seen = world.gather([json.dumps(identity)])
    other = next((rank for rank, data in enumerate(seen) if data != seen[0]), None)
    check(
        other is None,
        f"rank {other} sees other images than rank 0: every machine needs the same --data-dir",
    )


class Interrupt:
    """Notes SIGINT and SIGTERM, so that the loop can save and leave; one more than REPEAT_S later
    ends it at once."""

    REPEAT_S = 1.0
    """torchrun passes on the signal that a terminal or scheduler has sent to all processes."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.noted_s = 0.0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self.noted_s = number, now
        elif now - self.noted_s > self.REPEAT_S:
            self.restore()
            signal.raise_signal(number)

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exc: object) -> None:
        self.restore()


def keep_compiled() -> None:
    """Lets the next run find what torch.compile makes, also on another day: PyTorch's own place for
    it is the temporary folder."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = root / "fastgn" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # what lies in it is run: refused where it is another user's
    except (OSError, RuntimeError):  # no home, or none to write to
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def too_large(run: Run | None) -> str:
    """What to do about a step that does not fit, even after its micro-batch was halved."""
    if run is None:
        return "out of memory before the first update: the weights and their optimizer do not fit"
    last = run.checkpoints.last()
    tries = ["--schedule auto"]
    if is_compiled(run.cfg.step, run.world.device):
        tries.append("--activation-memory-budget 0.5")
    return (
        f"out of memory at update {run.update + 1} with {run.images_at_a_time} images at a time; "
        f"{f'the last checkpoint is {last}' if last else 'no checkpoint had been written'}; "
        f"try {' or '.join(tries)}"
    )


def not_differentiable(cfg: Config, operator: str) -> str:
    """Returns the line for a network with an operator that has no second derivative."""
    method = cfg.objective.method
    tries = ["another --model"]
    if build_objective(cfg.objective).differences:
        tries.insert(0, "--schedule finite-difference")
    return (
        f"--model {cfg.architecture.model} calls {operator}, which has no second derivative, and "
        f"--method {method} with --schedule {cfg.step.schedule} needs one: try "
        f"{' or '.join(tries)}"
    )


def main(args: list[str] | None = None) -> int:
    """The program; returns its exit status: 2 for a mistake of the user's, said in one line."""
    run: Run | None = None
    keep_compiled()
    try:
        cfg = parse_config(args)
        with session(cfg.run.device, rank_timeout=cfg.run.rank_timeout) as world:
            run = build(cfg, world)
            train(run)
    except (UserError, RuntimeError) as error:
        line: UserError | str | None
        if isinstance(error, UserError):
            line = error
        elif out_of_memory(error):
            line = too_large(run)
        elif run is not None and (operator := missing_derivative(error)) is not None:
            line = not_differentiable(run.cfg, operator)
        else:  # torch notices a worker's death wherever the main process happens to be
            line = worker_death(error)
        if line is None:
            raise
        if run is not None and run.metrics is not None:
            run.metrics.close()
        say_error(f"fastgn.train: error: {line}")
        return 2
    except KeyboardInterrupt:  # before the first update, or the second time
        return 130
    if run.metrics is not None:
        run.metrics.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
