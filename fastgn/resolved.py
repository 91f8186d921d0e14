"""Chooses a value for every option that is `auto` or None, for this machine and these data."""

import dataclasses

import torch

from fastgn import optim
from fastgn.config import Config
from fastgn.config.groups import StepConfig
from fastgn.data.datasets import Dataset
from fastgn.data.loader import batch_sizes, divide_again
from fastgn.distributed import World, count_local_ranks
from fastgn.errors import check, first_line
from fastgn.models.network import Classifier, explain_no_triton
from fastgn.objectives import Objective
from fastgn.state import TrainState
from fastgn.step.cost import count_cost
from fastgn.step.options import Quirks, StepOptions
from fastgn.step.plan import Plan, Rates, choose_plan, free_memory, measure_rates
from fastgn.step.precision import choose_short_precision, explain_unsupported
from fastgn.step.retry import out_of_memory
from fastgn.step.schedule import Schedule
from fastgn.updating import count_copied_bytes


@dataclasses.dataclass(frozen=True)
class Batching:
    """How the images of an update are divided among the ranks and into micro-batches."""

    batch_size: int
    """Number of images per micro-batch of the loader, on each rank."""
    grad_accum_steps: int
    """Number of micro-batches per update."""
    ranks: int
    """Number of ranks."""

    @property
    def global_batch(self) -> int:
        """Number of images per update over all ranks."""
        return self.batch_size * self.grad_accum_steps * self.ranks

    def count_micro_batches(self, micro_batch: int) -> int:
        """Returns the number of micro-batches per update on each rank.

        micro_batch: number of images that go through the network at once.
        """
        return self.batch_size // micro_batch * self.grad_accum_steps


@dataclasses.dataclass(frozen=True)
class Resolved(Batching):
    """Values of a run that depend on the data, the model or the machine, not only on the options.

    They are computed once, written into environment.json, and passed to everything that needs them.
    """

    data: str
    """Name of the data set."""
    classes: int
    """Number of classes."""
    img_size: int
    """Side of the network's input in pixels."""
    mean: list[float]
    """Mean of each channel, which the network subtracts from pixels in 0..1."""
    std: list[float]
    """Standard deviation of each channel, by which the network divides after subtracting the
    mean."""
    loader: str
    """Name of the loader's class."""
    micro_batch: int
    """Number of images that go through the network at once."""
    activation_memory_budget: float
    """Share of the activations that the compiled step keeps for its backward."""
    lr: float
    """Peak learning rate."""
    warmup_lr: float
    """Learning rate of the first update."""
    min_lr: float
    """Learning rate at the end of the run."""
    warmup_epochs: float
    """Number of epochs until the learning rate is at its peak."""
    ramp_epochs: float
    """Number of first epochs in which the method's penalty or attack grows to its full strength."""
    step_size: float
    """Full size of an attack step in 0..1 pixel units. It is reached after --attack-ramp-epochs."""
    eval_eps: float
    """Linf radius of the evaluation's PGD-10 in 0..1 pixel units."""
    compiled: bool
    """Whether torch.compile compiles the step."""
    cuda_graphs: bool
    """Whether CUDA graphs replay the compiled step."""
    grad_sync: str
    """How the ranks sum their gradients: flat or overlap, see --grad-sync."""
    kernels: str
    """ "triton" if the network uses the operators of fastgn_kernels, or "reference" if it uses only
    those of PyTorch."""
    device: str
    """Type of the device: cuda or cpu."""
    updates_per_epoch: int
    """Number of updates per epoch."""
    last_update: int
    """Number of updates of the whole run."""


def resolve(
    cfg: Config,
    world: World,
    dataset: Dataset,
    batching: Batching,
    model: Classifier,
    *,
    peak: float,
    loader: str,
    batches_per_epoch: int,
    kernels: str,
    planned: Plan | None,
) -> Resolved:
    """Returns the values that every `auto` and None of a configuration stands for.

    batching: how the images of an update are divided among ranks and micro-batches. peak: peak
    learning rate. loader: name of the loader's class. batches_per_epoch: number of batches per
    epoch that the loader yields on each rank. kernels: "triton" or "reference". planned: plan with
    the micro-batch that `--schedule auto` has chosen, or None with another --schedule.
    """
    warmup_lr, min_lr = cfg.optimizer.outer_rates(peak)
    updates_per_epoch = batches_per_epoch // batching.grad_accum_steps
    micro_batch = planned.micro_batch if planned is not None else batching.batch_size
    micro_batches = batching.count_micro_batches(micro_batch)
    return Resolved(
        data=dataset.name,
        classes=len(dataset.classes),
        img_size=model.img_size,
        mean=model.mean.flatten().tolist(),
        std=model.std.flatten().tolist(),
        loader=loader,
        **vars(batching),
        micro_batch=micro_batch,
        activation_memory_budget=(planned or cfg.step).activation_memory_budget,
        lr=peak,
        warmup_lr=warmup_lr,
        min_lr=min_lr,
        warmup_epochs=cfg.optimizer.warmup,
        ramp_epochs=cfg.ramp_epochs,
        step_size=cfg.objective.step_size,
        eval_eps=cfg.eval_eps,
        compiled=is_compiled(cfg.step, world.device),
        cuda_graphs=has_cuda_graphs(cfg.step, world, micro_batches),
        grad_sync=choose_grad_sync(cfg.step, world, micro_batches)[0],
        kernels=kernels,
        device=world.device.type,
        updates_per_epoch=updates_per_epoch,
        last_update=last_update_of(cfg, updates_per_epoch),
    )


def last_update_of(cfg: Config, updates_per_epoch: int) -> int:
    """Returns the number of updates of a whole run."""
    total = updates_per_epoch * cfg.optimizer.epochs
    return min(total, cfg.run.max_updates or total)


def batch_images(
    cfg: Config, dataset: Dataset, world: World, state: TrainState | None = None
) -> Batching:
    """Returns how the images of an update are divided among the ranks and into micro-batches.

    state: content of the checkpoint that the run continues, or None for a new run. If only the
    number of ranks has changed, an update keeps the number of images that it had in the
    checkpoint's run. Raises UserError if the images cannot be divided evenly.
    """
    divisor = schedule_of(cfg.step).divisor
    place = len(dataset.train), world.size, world.device
    if state is not None and keeps_global_batch(cfg, state, world.size):
        batch_size, accum = divide_again(cfg, state.global_batch, *place, divisor)
    else:
        batch_size, accum = batch_sizes(cfg, *place)
    check(
        batch_size % divisor == 0,
        f"--subset-fraction {cfg.step.subset_fraction:g} of --batch-size {batch_size} is not a "
        f"whole number of images: use a --batch-size that is a multiple of {divisor}, or another "
        "--subset-fraction",
    )
    if cfg.step.schedule == "auto":  # load all images at once, because Step divides them itself
        batch_size, accum = batch_size * accum, 1
    return Batching(batch_size, accum, world.size)


def keeps_global_batch(cfg: Config, state: TrainState, ranks: int) -> bool:
    """Returns whether a resumed run keeps the number of images per update of its checkpoint.

    It does so if the options for the batch are the same as before, or if the number of ranks has
    changed. It does not do so if --global-batch-size gives another number.
    """
    if cfg.dataset.global_batch_size not in (None, state.global_batch):
        return False
    names = "batch_size", "grad_accum_steps", "global_batch_size"
    saved = state.saved_config().dataset
    same = all(getattr(saved, name) == getattr(cfg.dataset, name) for name in names)
    return same or state.ranks not in (None, ranks)


def check_device(cfg: StepConfig, device: torch.device) -> None:
    """Raises UserError if a device cannot run the configured step."""
    reason = explain_unsupported(cfg.precision, device)
    shorter = cfg.precision != "fp16" and explain_unsupported("fp16", device) is None
    remedy = "fp16 or fp32" if shorter and device.type == "cuda" else "fp32"
    check(reason is None, f"--precision {reason}: use --precision {remedy}")
    reason = explain_no_triton(device) if device.type == "cuda" else None
    check(cfg.compile != "on" or reason is None, f"--compile on {reason}: leave --compile on out")
    check(
        cfg.cuda_graphs != "on" or device.type == "cuda",
        f"--cuda-graphs on needs a CUDA device, but this run is on {device.type}: leave "
        "--cuda-graphs out",
    )
    check(
        cfg.grad_sync != "overlap" or is_compiled(cfg, device),
        "--grad-sync overlap works only with --compile on, but this run does not compile: "
        "add --compile on, or use --grad-sync flat",
    )
    check(
        is_compiled(cfg, device) or cfg.activation_memory_budget == 1,
        f"--activation-memory-budget {cfg.activation_memory_budget} works only with --compile on, "
        "but this run does not compile: add --compile on, or leave the budget out",
    )


def is_compiled(cfg: StepConfig, device: torch.device) -> bool:
    """Returns whether the configured step is compiled on a device."""
    automatic = cfg.compile == "auto" and explain_no_triton(device) is None
    return cfg.schedule != "exact-eager" and (cfg.compile == "on" or automatic)


def has_cuda_graphs(cfg: StepConfig, world: World, micro_batches: int) -> bool:
    """Returns whether the configured step replays CUDA graphs.

    micro_batches: number of micro-batches per update on each rank.

    With --cuda-graphs auto, a step that contains collectives replays no graphs. With --cuda-graphs
    on, the all-reduces of --grad-sync overlap stay outside the graphs. The all-reduces of --sync-bn
    cannot stay outside, so a step with --sync-bn and several ranks never replays CUDA graphs.
    """
    if cfg.sync_bn and world.size > 1:
        return False
    grad_sync, _ = choose_grad_sync(cfg, world, micro_batches)
    if grad_sync == "overlap" and cfg.cuda_graphs == "auto":
        return False
    on_cuda = world.device.type == "cuda"
    return cfg.cuda_graphs != "off" and on_cuda and is_compiled(cfg, world.device)


def choose_grad_sync(cfg: StepConfig, world: World, micro_batches: int) -> tuple[str, str]:
    """Returns how the ranks sum their gradients, "flat" or "overlap", and a clause that says why.

    "auto" means "overlap" only for several machines. The links inside a machine are so fast that
    overlap saves less time than CUDA graphs. An update of several micro-batches is summed at its
    end in any case, so "auto" then means "flat", which keeps the CUDA graphs. With --cuda-graphs
    on, "auto" means "flat", because overlap together with CUDA graphs has not run on a GPU yet.

    micro_batches: number of micro-batches per update on each rank.
    """
    if world.size == 1:
        return "flat", "there is one process"
    if cfg.grad_sync != "auto":
        return cfg.grad_sync, "--grad-sync says so"
    reasons = {
        "all processes are on one machine": world.nodes == 1,
        "the step is not compiled for CUDA": world.device.type != "cuda"
        or not is_compiled(cfg, world.device),
        f"an update has {micro_batches} micro-batches": micro_batches > 1,
        f"--schedule {cfg.schedule} has several backwards": schedule_of(cfg).differences,
        "--cuda-graphs is on": cfg.cuda_graphs == "on",
    }
    for reason, holds in reasons.items():
        if holds:
            return "flat", reason
    return "overlap", f"the processes are on {world.nodes} machines"


def schedule_of(cfg: StepConfig) -> Schedule:
    """Returns the way in which the penalty is differentiated (--schedule).

    "auto" differentiates in the same way as "exact". It differs only in the size of micro-batches,
    which `make_plan` chooses.
    """
    return Schedule(
        "exact" if cfg.schedule == "auto" else cfg.schedule,
        fd_step=cfg.fd_step,
        lazy_interval=cfg.lazy_interval,
        subset_fraction=cfg.subset_fraction,
    )


def step_options(cfg: Config) -> StepOptions:
    """Returns the options of an update, as far as the configuration determines them. Options that
    depend on the device keep their defaults."""
    return StepOptions(
        schedule=schedule_of(cfg.step),
        precision=cfg.step.precision,
        grad_dtype=cfg.step.grad_dtype,
        quirks=Quirks(
            accumulation=cfg.step.accumulation,
            train_in_eval_mode=cfg.step.train_in_eval_mode,
            attack_weight_grads=cfg.objective.attack.attack_weight_grads,
            sync_micro_batches=cfg.step.sync_micro_batches,
        ),
    )


def make_plan(
    cfg: Config,
    world: World,
    model: Classifier,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    num_classes: int,
    batching: Batching,
) -> Plan | None:
    """Returns the predicted time and memory of an update, the same on all ranks.

    With `--schedule auto` the plan also chooses the micro-batch and the share of activations to
    keep. The choice is for the least free memory and the lowest speed among the ranks' devices.
    Operations are counted on the CPU, without data. If they cannot be counted, returns None.
    batching: how the images of an update are divided among ranks and micro-batches.

    With `--schedule auto`, raises UserError if no micro-batch fits into memory, or if the
    operations cannot be counted.
    """
    try:
        cost = count_cost(
            model,
            objective,
            step_options(cfg),
            batch_size=batching.batch_size,
            img_size=model.img_size,
            num_classes=num_classes,
            device_type=world.device.type,
        )
    except RuntimeError as error:  # raised if an operator needs data, so it cannot be counted
        if out_of_memory(error):
            raise
        check(
            cfg.step.schedule != "auto",
            f"--schedule auto cannot count the cost of an update of {cfg.architecture.model} "
            f"({first_line(error)}): use --schedule exact",
        )
        return None
    images = batching.batch_size * batching.grad_accum_steps
    fixed = batching.batch_size, cfg.step.activation_memory_budget
    on_cuda = world.device.type == "cuda"
    processes = 1 if on_cuda else count_local_ranks()
    # With overlap, the summed gradients need memory of their own beside the gradient buffer.
    # The plan leaves room for this memory, as if --schedule auto did not divide the batch.
    grad_sync, _ = choose_grad_sync(cfg.step, world, batching.grad_accum_steps)
    summed_bytes = cost.gradient_bytes * (grad_sync == "overlap")
    return choose_plan(
        cost,
        slowest_rates(world, cfg.step.precision),
        batch_size=images,
        free_bytes=int(world.min(free_memory(world.device) / processes)),
        state_bytes=state_bytes(cfg, model, optimizer, images) + summed_bytes,
        copied_bytes=count_copied_bytes(cfg, model, optimizer),
        held_bytes=torch.cuda.memory_allocated(world.device) if on_cuda else 0,
        compiled=is_compiled(cfg.step, world.device),
        fewest=schedule_of(cfg.step).fewest(model.fewest_images),
        short_precision=choose_short_precision(world.device),
        can_compile=not on_cuda or explain_no_triton(world.device) is None,
        fixed=fixed if cfg.step.schedule != "auto" else None,
    )


def slowest_rates(world: World, precision: str) -> Rates:
    """Measures the speed of every rank's device, and returns the slowest value of each rate.

    precision: the precision of matrix products (--precision).
    """
    flops, bytes_, launch = measure_rates(world.device, precision)
    return Rates(world.min(flops), world.min(bytes_), -world.min(-launch))


def state_bytes(
    cfg: Config,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    images: int,
) -> int:
    """Returns the number of bytes that will be allocated besides gradients and activations.

    These are the optimizer's state, and the images of this update and the next one. images: number
    of images per update on this rank.
    """
    own = optim.missing_state_bytes(cfg.optimizer, model, optimizer)
    return own + 2 * images * 3 * model.img_size**2 * 4
