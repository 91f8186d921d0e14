"""The class Run, with which the training loop updates, logs, evaluates and saves a network."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fastgn import optim
from fastgn.checkpoint import Checkpoints
from fastgn.config import Config
from fastgn.data.batch import Batch, Loader
from fastgn.data.identity import Identity
from fastgn.data.subset import Subset
from fastgn.distributed import World
from fastgn.errors import UserError
from fastgn.fields import format_number
from fastgn.loss_scale import EXHAUSTED, judge_values
from fastgn.metrics import Metrics
from fastgn.models.network import Classifier
from fastgn.models.weights import are_finite, collect_trained_tensors
from fastgn.resolved import Resolved
from fastgn.seeding import Stream, seed_all
from fastgn.slow_ranks import SlowRanks
from fastgn.state import TrainState
from fastgn.step.double_backward import describe_compilations
from fastgn.step.plan import Plan
from fastgn.step.retry import RetryingStep
from fastgn.step.step import Step
from fastgn.trouble import Watch, describe_bad_gradient, describe_not_finite
from fastgn.updating import Updater
from fastgn.validation import choose_attacks, count_correct

SUMS = ("loss", "ce", "penalty", "grad_l1", "grad_norm")
"""Names of the values that are summed on the device between two rows of metrics.csv."""


@dataclasses.dataclass
class Run:
    """Everything that the training loop needs, and how far the training has come."""

    cfg: Config
    resolved: Resolved
    """Values that were chosen for the options of `cfg` that are `auto` or None."""
    world: World
    folder: Path
    """The run's folder."""
    model: Classifier
    step: Step
    optimizer: torch.optim.Optimizer
    ema: optim.ModelEmaV3 | None
    """The exponential moving average of the weights. None means that the run keeps none."""
    loader: Loader
    """Loader of the training images."""
    subset: Subset | None
    """The validation images of each evaluation. None means that the run does not evaluate."""
    classes: tuple[str, ...]
    """Names of the classes in the order of the network's outputs."""
    data: Identity
    """Digests that identify the run's images. Checkpoints contain them."""
    plan: Plan | None = None
    """Predicted time and memory of an update. None once the measured cost has been printed."""
    on_evaluation: "Callable[[Run], None] | None" = None
    """Called after each evaluation. An exception that it raises ends the run."""
    metrics: Metrics | None = None
    """Log of the run. None on all ranks but the first."""
    update: int = 0
    """Number of updates done."""
    best: float = -1.0
    """Best accuracy so far, in 0..1. It is the accuracy under PGD-10, or without an attack if the
    method is natural. -1 means that there was no evaluation yet."""
    is_best: bool = False
    """Whether the current weights have the best accuracy."""
    accuracy: dict[str, float] = dataclasses.field(default_factory=dict)
    """Accuracies of the last evaluation, in 0..1."""
    evaluation_pending: bool = False
    """Whether the evaluation after the last update is still to be made."""

    def __post_init__(self) -> None:
        device = self.world.device
        reserve_bytes = 0  # nothing on CPUs, where reserved memory takes no room until it is used
        if device.type == "cuda":
            optimizer = self.cfg.optimizer, self.model, self.optimizer
            reserve_bytes = optim.missing_state_bytes(*optimizer)
        self.compute_gradients = RetryingStep(self.step, self.print, reserve_bytes)
        """Computes the gradients of an update with `step`, in smaller micro-batches if the device
        runs out of memory."""
        self.updater = Updater(self.cfg, self.model, self.ema, self.compute_gradients)
        self.slow_ranks = SlowRanks(self.world, self.compute_gradients.waits, self.print)
        self.checkpoints = Checkpoints(self.folder, self.cfg.run.checkpoint_hist)
        # whatever ends the run, its folder stays locked until the last file is written
        self.world.held.callback(self.checkpoints.close)
        self.ramp = torch.zeros((), device=device)
        """Factor of the method's penalty, in 0..1. It is a tensor, because changing a number would
        recompile the step."""
        self.attack_ramp = torch.ones((), device=device)
        """Step size of the attack as a share of its full size. It is a tensor, because changing a
        number would recompile the step."""
        self.sums = torch.zeros(2, len(SUMS), device=device)
        """The first row has the sum of each value of SUMS since the last row of metrics.csv. The
        second row has the number of updates that had this value. With --schedule lazy, not all
        updates have a penalty."""
        self.bad_update = torch.full((), -1, device=device)
        """Index of the first update whose loss or gradient was not finite. -1 means none."""
        self.reset_clock()
        self.named_bad: set[str] = set()
        """Lines about unreadable images that have been printed."""
        self.watch = Watch()
        self.first_s: float | None = None
        """Seconds that the host spent on this process's first update, which compiles the step."""

    def reset_clock(self) -> None:
        """Begins the measurements for the next row of metrics.csv."""
        self.sums.zero_()
        self.summed = 0
        """Number of updates whose values have been added to `sums`."""
        self.resumed = 0
        """Number of updates in `summed` that an earlier process made before the run was resumed."""
        self.waited = 0.0
        """Seconds that the loop has waited for images since the last row of metrics.csv."""
        self.began = time.perf_counter()
        self.steady = (self.began, 0.0, 0)
        """(time, value of `waited`, value of `summed`) at the moment from which speed is measured.

        This is the end of the process's first update, which may compile the step.
        """

    def continue_from(self, state: TrainState) -> None:
        """Takes the progress of the run from a checkpoint. `resume.restore` loads its weights."""
        self.update, self.best, self.accuracy = state.update, state.best, state.accuracy
        self.evaluation_pending = state.evaluation_pending and self.subset is not None
        self.sums += state.sums.to(self.world.device)
        if self.step.loss_scale is not None and state.loss_scale is not None:
            self.step.loss_scale.load(state.loss_scale.to(self.world.device))
        self.summed = self.resumed = state.summed
        if self.world.is_main:
            self.loader.bad_images += state.bad_images

    def state(self, sums: Tensor, bad_images: list[str]) -> TrainState:
        """Returns the content of a checkpoint for the present state of the run.

        sums: `self.sums`, averaged over all ranks. bad_images: lines about bad images, from all
        ranks.
        """
        scale = self.step.loss_scale
        return TrainState(
            update=self.update,
            epoch=self.update / self.resolved.updates_per_epoch,
            best=self.best,
            accuracy=self.accuracy,
            evaluation_pending=self.evaluation_pending,
            sums=sums,
            summed=self.summed,
            bad_images=bad_images,
            model=self.model.state_dict(),
            ema=self.ema.module.state_dict() if self.ema is not None else None,
            optimizer=self.optimizer.state_dict(),
            loss_scale=scale.state() if scale is not None else None,
            global_batch=self.resolved.global_batch,
            ranks=self.world.size,
            config=self.cfg.to_toml(),
            classes=list(self.classes),
            data=self.data,
        )

    @property
    def images_at_a_time(self) -> int:
        """Number of images that go through the network at once in a training step."""
        return self.step.micro_batch or self.resolved.batch_size

    @property
    def evaluated_model(self) -> Classifier:
        """The model that is evaluated and exported. Its weights are the moving average of the
        weights if the run keeps one, otherwise the weights themselves."""
        return self.model if self.ema is None else cast(Classifier, self.ema.module)

    def updates_of(self, epoch: int) -> Iterator[list[Batch]]:
        """Yields one list of micro-batches for each remaining update of an epoch.

        Also adds the time that it waits for images to `waited`. epoch: index of the epoch, from 0.
        """
        accumulated = self.resolved.grad_accum_steps
        first = (self.update - epoch * self.resolved.updates_per_epoch) * accumulated
        batches = self.loader.epoch(epoch, first)
        while True:
            start = time.perf_counter()
            group = list(islice(batches, accumulated))
            self.waited += time.perf_counter() - start
            if not group:
                return
            yield group

    def apply_gradients(self, lr: float) -> Tensor:
        """Updates the weights and their moving average. Returns the L2 norm of the gradient before
        clipping. See Updater. lr: learning rate of the update."""
        return self.updater(self.optimizer, lr, self.update + 1)

    def accumulate(self, row: Tensor) -> None:
        """Adds the logged values of an update to `sums`.

        Also records the first update whose loss or gradient was not finite. In fp16, such an update
        is skipped and left out of the sums. It is recorded only if the scale of the losses has
        fallen to the smallest one. Does not wait for the device. row: the update's loss, ce,
        penalty, grad_l1 and grad_norm, on the device.
        """
        row, bad = judge_values(row, self.step.loss_scale)
        present = ~row.isnan()
        self.sums += torch.stack([row.where(present, 0), present.to(row.dtype)])
        self.summed += 1
        if self.first_s is None:
            now = time.perf_counter()
            self.first_s = now - self.began
            self.steady = (now, self.waited, self.summed)
        unseen = self.bad_update < 0
        self.bad_update = torch.where(unseen & bad, self.update, self.bad_update)
        if self.metrics is not None:
            self.metrics.advance()

    def check_finite(self) -> None:
        """Raises UserError if a loss or gradient was not finite. Waits for the device."""
        bad = int(self.world.read(self.bad_update))
        if bad >= 0:
            what = f"the loss or gradient of update {bad}"
            raise self.not_finite(f"{what}, {EXHAUSTED}," if self.step.loss_scale else what)

    def check_weights(self) -> None:
        """Raises UserError if a weight, or its moving average, is not finite on any rank. Waits for
        the device."""
        modules = [self.model] if self.ema is None else [self.model, self.ema.module]
        sound = all(are_finite(collect_trained_tensors(module).values()) for module in modules)
        if self.world.any(not sound):
            raise self.not_finite(f"a weight after update {self.update}")

    def check_first(self, batches: list[Batch]) -> None:
        """Raises UserError if a gradient of the process's first update is not finite.

        Called before the weights are updated. They are still finite then, so the layer at fault can
        be found. In fp16, the update will be skipped instead, if the scale of the losses can still
        be halved. Waits for the device. batches: the images and targets of the update.
        """
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if bool(torch.nn.utils.get_total_norm(grads).isfinite()):
            return
        scale = self.step.loss_scale
        if scale is not None and scale.can_shrink_again():
            return
        first = EXHAUSTED if scale else "the first one since the start of this process"
        seed_all(Stream.STEP, self.cfg.run.seed, self.update, self.world.rank)
        found = self.step.diagnose(batches, self.ramp, self.update, self.attack_ramp)
        named = self.world.gather([found] if found is not None else [])
        cause = named[0] if named else "every layer alone is finite, so their sum is too large"
        what, differences = f"update {self.update + 1}, {first},", self.step.objective.differences
        raise UserError(describe_bad_gradient(what, cause, self.cfg.step.precision, differences))

    def not_finite(self, what: str) -> UserError:
        """Returns the UserError for a value that is not finite.

        what: text that names the value, such as "a weight after update 3".
        """
        penalised = self.step.objective.needs_input_gradient
        last = self.last_checkpoint("the last good checkpoint")
        return UserError(describe_not_finite(what, last, self.cfg.step.precision, penalised))

    def last_checkpoint(self, name: str) -> str:
        """Returns a clause for a message that says where the last checkpoint is.

        name: words for the checkpoint in the clause, such as "the last checkpoint".
        """
        self.checkpoints.settle()
        last = self.checkpoints.last()
        return f"{name} is {last}" if last else "no checkpoint was written before"

    def at_border(self) -> bool:
        """Returns whether an epoch or the whole run ends after the present update."""
        at_end = self.update == self.resolved.last_update
        return at_end or self.update % self.resolved.updates_per_epoch == 0

    def evaluation_due(self) -> bool:
        """Returns whether to evaluate after this update, because an epoch or the run ends."""
        if self.subset is None or not self.at_border():
            return False
        epoch = self.update // self.resolved.updates_per_epoch
        at_end = self.update == self.resolved.last_update
        return at_end or epoch % self.cfg.run.eval_interval == 0

    def kept_epoch(self) -> int | None:
        """Returns the number of the epoch that ends now if --keep-epochs names it, else None."""
        epoch, rest = divmod(self.update, self.resolved.updates_per_epoch)
        return epoch if rest == 0 and epoch in self.cfg.run.keep_epochs else None

    def is_done(self) -> bool:
        """Returns whether the last update is done and needs no further evaluation."""
        return self.update == self.resolved.last_update and not self.evaluation_pending

    def checkpoint_due(self) -> bool:
        """Returns whether to write a checkpoint after this update."""
        if self.is_best:  # save as best.pt before the next update changes the evaluated weights
            return True
        if self.update == self.resolved.last_update or self.kept_epoch() is not None:
            return True
        interval = self.cfg.run.checkpoint_interval
        return self.at_border() if interval is None else self.update % interval == 0

    def log(self, lr: float, ramp: float) -> None:
        """Writes a row of metrics.csv with the means of the logged values since the last row. Waits
        for the device.

        lr: learning rate of the last update. ramp: factor of the penalty or attack, in 0..1.
        """
        self.check_finite()
        if not self.summed:
            return
        sums, counts = self.world.sum(self.sums.clone())
        means = (sums / counts).tolist()
        bad = self.report_bad_images(self.loader, "training")
        self.slow_ranks.check(time.perf_counter() - self.steady[0])
        seconds = time.perf_counter() - self.began
        images = self.resolved.global_batch * (self.summed - self.resumed)
        scale = self.step.loss_scale
        if self.metrics is not None:
            self.metrics.log(
                self.update,
                dict(zip(SUMS, means, strict=True))
                | {
                    "epoch": self.update / self.resolved.updates_per_epoch,
                    "lr": lr,
                    "ramp": ramp,
                    "images_per_s": images / seconds,
                    "data_wait_share": self.waited / seconds,
                    **({"bad_images": bad} if bad else {}),
                    **(scale.columns(self.summed, counts[0] / self.world.size) if scale else {}),
                },
            )
            self.report_cost()
        self.reset_clock()

    def bad_images(self, source: Loader | Subset) -> list[str]:
        """Returns a line for each image that cannot be read and was replaced on any rank since the
        last call of `report_bad_images`.

        Does not wait for the devices. source: the loader of training images, or the validation
        images.
        """
        if self.cfg.dataset.on_bad_image == "fail":
            return []
        return self.world.gather(source.bad_images)

    def report_bad_images(self, source: Loader | Subset, kind: str) -> int:
        """Returns how many images that cannot be read were replaced since the last call.

        If some of them were not reported before, prints this number and the first few names.
        source: the loader of training images, or the validation images. kind: "training" or
        "validation".
        """
        bad = self.bad_images(source)
        source.bad_images.clear()
        new = [line for line in dict.fromkeys(bad) if line not in self.named_bad]
        self.named_bad |= set(new)
        if new:
            more = f"; {len(new) - 3} more, see fastgn.data.check" if len(new) > 3 else ""
            self.print(f"bad {kind} images, replaced {len(bad)} times: {'; '.join(new[:3])}{more}")
        return len(bad)

    def report_cost(self) -> None:
        """Prints the measured time and memory of an update beside the predicted ones, only once in
        a run.

        Call this when the host has just waited for the device, because the time is measured on the
        host.
        """
        began, waited, summed = self.steady
        if self.plan is None or self.summed == summed:
            return
        device = self.world.device
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        seconds = time.perf_counter() - began - (self.waited - waited)
        measured = seconds / (self.summed - summed)
        self.print(f"the first update took {self.first_s:.3g} s ({describe_compilations()})")
        self.print(self.plan.measured(peak, measured))
        self.plan = None

    def evaluate(self, is_signalled: Callable[[], bool]) -> None:
        """Measures clean and PGD-10 accuracy on the validation images. Waits for the device.

        If a signal ends the evaluation, it has no result, and `evaluation_pending` stays True.
        is_signalled: function that returns whether a signal has asked this rank to stop.
        """
        if self.subset is None:
            return
        self.evaluated_model.eval()
        eps = self.cfg.eval_eps
        # use at most as many images at once as training, which may have run out of memory before
        self.subset.batch_size = min(self.subset.batch_size, self.images_at_a_time)
        at = self.cfg, self.update - 1, self.resolved.updates_per_epoch
        full_strength = optim.compute_attack_ramp(*at) == 1
        tried = choose_attacks(eps, fgsm=self.cfg.objective.single_step and full_strength)
        counts = count_correct(
            self.evaluated_model, self.subset, tried, self.cfg.run.seed, self.world, is_signalled
        )
        if counts is None:
            return
        self.evaluation_pending = False
        clean, robust, *fgsm = (self.world.sum(counts) / self.subset.size).tolist()
        self.accuracy = {"clean_accuracy": clean, "pgd10_accuracy": robust}
        score = clean if self.cfg.objective.method == "natural" else robust
        self.is_best = score > self.best
        self.best = max(score, self.best)
        if self.metrics is not None:
            epoch = self.update / self.resolved.updates_per_epoch
            self.metrics.log(self.update, {"epoch": epoch, **self.accuracy})
            self.metrics.print(
                f"epoch {epoch:g}: clean {clean:.1%}, PGD-10 at {format_number(eps)} {robust:.1%} "
                f"({self.subset.name})"
            )
            rows = self.metrics.path if self.step.objective.differences else None
            for line in self.watch.find(rows, robust, *fgsm):
                self.metrics.print(line)
        self.report_bad_images(self.subset, "validation")
        self.reset_clock()
        if self.on_evaluation is not None:
            self.on_evaluation(self)

    def save(self) -> None:
        """Saves a checkpoint, on the first rank. Waits for the device.

        The ranks wait only until the run's state is copied to the host's memory. Then a thread
        writes the file while training goes on.
        """
        self.check_finite()
        self.check_weights()
        sums = self.world.sum(self.sums.clone()) / self.world.size
        bad = self.bad_images(self.loader)  # unreadable images since the last row of metrics.csv
        if self.world.is_main:
            state = self.state(sums, bad)
            self.checkpoints.save_later(state, best=self.is_best, keep_epoch=self.kept_epoch())
        self.is_best = False
        self.world.barrier()

    def print(self, line: str) -> None:
        """Prints a line, on the first rank."""
        if self.metrics is not None:
            self.metrics.print(line)
