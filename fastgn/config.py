"""The configuration of a run: frozen dataclasses, checked at birth.

Every field is a flag of ``python -m fastgn.train`` and a key of a recipe: a recipe is a command
line written down. Later sources win: field defaults < recipe (TOML) < command line. Names are those
of timm, or of ARES for the attacks, wherever one exists.
"""

import ast
import contextlib
import dataclasses
import difflib
import io
import itertools
import math
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tomli_w
import tyro

from fastgn.objectives import METHODS, build_objective

if TYPE_CHECKING:
    Method = str
else:  # the command line's choices
    Method = Literal[tuple(METHODS)]


class UserError(ValueError):
    """A mistake of the user's: one line that names the value given and what would be right."""


def check(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def nearest(name: str, valid: Iterable[str]) -> str:
    """' Did you mean X?', or the list of what is valid when nothing is near."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"


def parse_number(text: str | float) -> float:
    """A float or a fraction such as '4/255'. Raises UserError on anything else."""
    try:
        numerator, _, denominator = str(text).partition("/")
        value = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{text!r} is not a number; write 0.0157 or 4/255") from None
    return value


Fraction = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT|N/M",
        instance_from_str=lambda args: parse_number(args[0]),
        is_instance=lambda value: isinstance(value, (int, float)),
        str_from_instance=lambda value: [str(value)],
    ),
]


Positional = tyro.conf.Positional
"""Annotated[str, Positional]: an argument without a flag."""


def check_pixels(name: str, value: float) -> None:
    """Raises UserError unless value is a distance in 0..1 pixel units."""
    check(
        math.isfinite(value) and 0 <= value <= 1,
        f"{name} {value:g} is out of range: eps counts in 0..1 pixel units, write {name} 4/255",
    )


@dataclasses.dataclass(frozen=True)
class ArchitectureConfig:
    """The network."""

    model: str = "swin_b"
    """Any timm model name, or swin_t, swin_s, swin_b, swin_l, resnet50, preact_resnet18 (CIFAR)."""
    model_kwargs: tuple[str, ...] = ()
    """Arguments of the model's constructor, each as key=value (timm's --model-kwargs)."""
    pretrained: bool = False
    """Start from timm's weights, fetched from the hub."""
    initial_checkpoint: str | None = None
    """Start from a local file (.safetensors, .pt, .pth) or from a finished run's folder."""
    activation: str | None = None
    """Replace every activation by this one (gelu, silu, relu, ..., or with a number leaky_relu:0.3,
    elu:1, softplus:10); None keeps the model's own."""
    img_size: int | None = None
    """Side of the square input in pixels; None takes the model's own."""
    num_classes: int | None = None
    """Checked against the data; None takes the data's."""
    drop: float = 0.0
    """Dropout rate of the head."""
    drop_path: float = 0.0
    """Stochastic depth rate."""
    mean: tuple[float, float, float] | None = None
    """Per-channel mean of the normalisation inside the model; None takes the model's own."""
    std: tuple[float, float, float] | None = None
    """Per-channel standard deviation of the normalisation; None takes the model's own."""

    def __post_init__(self) -> None:
        model_kwargs(self.model_kwargs)
        for name in ("drop", "drop_path"):
            value = getattr(self, name)
            check(0 <= value < 1, f"--{flag(name)} {value} is not a rate in [0, 1)")
        check(self.img_size is None or self.img_size > 0, f"--img-size {self.img_size} must be > 0")
        check(
            self.num_classes is None or self.num_classes > 1,
            f"--num-classes {self.num_classes} must be at least 2",
        )
        check(
            self.std is None or min(self.std) > 0,
            f"--std {self.std} must be positive in every channel",
        )
        check(
            not (self.pretrained and self.initial_checkpoint),
            "--pretrained and --initial-checkpoint both give the weights to start from: take one",
        )


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """The images, and how they are grouped."""

    data: Literal["digits", "cifar10", "imagefolder"] | None = None
    """None: imagefolder when --data-dir is given, else scikit-learn's embedded digits."""
    data_dir: str | None = None
    """ImageFolder tree, lists of files (train.txt, val.txt) or packed shards (fastgn.data.pack);
    CIFAR-10 as python batches, .npz or image folder (none given: downloaded)."""
    train_split: str = "train"
    """Folder or list of training images below --data-dir."""
    val_split: str = "val"
    """Folder or list of validation images below --data-dir."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """fail: stop at an image that cannot be read, and name it; skip: take the next one of the
    split, name it and count it (torch and dali loaders)."""
    loader: Literal["auto", "device", "torch", "dali"] = "auto"
    """device: the whole set as tensors on the device, augmented there; torch: PIL in worker
    processes; dali: NVIDIA DALI, which decodes and augments on the GPU where there is one. auto:
    device for digits and cifar10, torch for image folders."""
    workers: int = 4
    """Worker processes of the torch loader, for each rank; threads of dali, which has a quarter as
    many worker processes."""
    batch_size: int | None = None
    """Images a rank and micro-batch. None: 32 on CUDA, 8 on CPU."""
    grad_accum_steps: int = 1
    """Micro-batches accumulated into one update."""
    global_batch_size: int | None = None
    """Images an update over all ranks; sets grad_accum_steps, and must divide evenly."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "grad_accum_steps", "global_batch_size"):
            value = getattr(self, name)
            check(value is None or value > 0, f"--{flag(name)} {value} must be at least 1")
        check(self.workers >= 0, f"--workers {self.workers} must be at least 0")
        check(
            self.global_batch_size is None or self.grad_accum_steps == 1,
            "--global-batch-size sets --grad-accum-steps: give one of the two",
        )


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """What is done to training images. The defaults are timm's, but for mixing, which is off."""

    aa: str | None = None
    """timm's auto-augment policy, such as rand-m9-mstd0.5-inc1 (torch and dali loaders)."""
    color_jitter: float = 0.4
    """Colour jitter (torch and dali loaders; timm leaves it out where --aa is given)."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area range of the random resized crop (torch and dali loaders)."""
    train_interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """Interpolation of the random resized crop (torch and dali loaders)."""
    crop_pct: float = 0.875
    """Share of the resized image's side that the centre crop of evaluation keeps (image files)."""
    crop_padding: int | None = None
    """Random shift in pixels (device loader); None: 1/8 of the side for cifar10, 1/16 for
    digits."""
    hflip: float | None = None
    """Probability of a horizontal flip; None: 0.5, but 0 for digits."""
    reprob: float = 0.0
    """Random erasing's probability."""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """Random erasing's fill: zero, one colour, or noise in every pixel."""
    mixup: float = 0.0
    """Alpha of mixup; 0 turns it off."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 turns it off."""
    mixup_switch_prob: float = 0.5
    """Probability of cutmix where both are on."""
    smoothing: float = 0.1
    """Label smoothing."""

    def __post_init__(self) -> None:
        for name in ("reprob", "mixup_switch_prob", "hflip"):
            value = getattr(self, name)
            check(
                value is None or 0 <= value <= 1,
                f"--{flag(name)} {value} is not a probability in [0, 1]",
            )
        check(0 <= self.smoothing < 1, f"--smoothing {self.smoothing} must lie in [0, 1)")
        check(0 < self.crop_pct <= 1, f"--crop-pct {self.crop_pct} must lie in (0, 1]")
        for name in ("mixup", "cutmix", "color_jitter"):
            value = getattr(self, name)
            check(value >= 0, f"--{flag(name)} {value} must be at least 0")
        check(
            self.crop_padding is None or self.crop_padding >= 0,
            f"--crop-padding {self.crop_padding} must be at least 0",
        )
        low, high = self.scale
        check(0 < low <= high <= 1, f"--scale {low} {high} must satisfy 0 < low <= high <= 1")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised. Source of the defaults: arXiv 2409.20139, equation 2."""

    method: Method = "gradnorm"
    """natural: cross-entropy; gradnorm: plus the L1 norm of its input gradient, by double backprop;
    pgd_at: cross-entropy at PGD's images; fgsm_rs: the same after one step from a random start;
    trades: cross-entropy plus the divergence at PGD's images; edge: plus how far input gradients
    lie off the edges; pag: plus how far they point off a class's representative; gradnorm+fgsm:
    gradnorm on a share of the updates, fgsm_rs on the rest."""
    ce_weight: float = 0.8
    """gradnorm: weight of the cross-entropy."""
    gn_weight: float = 1.2
    """gradnorm: weight of the penalty."""
    gn_norm: Literal["l1", "l2", "l2_squared"] = "l1"
    """gradnorm: the norm of each image's gradient."""
    gn_of: Literal["loss", "logit"] = "loss"
    """gradnorm: whose gradient: the cross-entropy's, or the true class's logit's."""
    gn_channel_weights: tuple[float, float, float] | None = None
    """gradnorm: factors of the gradient's channels, red, green, blue; None: 1 each."""
    gn_threshold: float = 0.0
    """gradnorm: only what an image's norm exceeds this by is penalised; in normalised units, before
    eps / sigma."""
    gn_start: Fraction = 0.0
    """gradnorm: take loss and gradient at a random point, uniform within this Linf radius of the
    image in 0..1 pixel units; 0: at the image."""
    gn_share: float = 0.5
    """gradnorm+fgsm: share of the updates with the penalty, evenly spread; 1: all."""
    eps: Fraction = 4 / 255
    """gradnorm: the penalty's radius in 0..1 pixel units."""
    sigma: float = 0.225
    """gradnorm: pixel units in one normalised unit; one number for all channels, as in the
    paper."""
    ramp_epochs: float = 5.0
    """Epochs over which the penalty's weight, or the attack's step, grows linearly to its full
    value."""
    ramp_start: Fraction = 0.0
    """Share of the full value that it grows from."""
    edge_weight: float = 19.0
    """edge: weight of the penalty, at full ramp (the paper's grows from 1 to it in 200 epochs)."""
    edge_temperature: float = 0.5
    """edge: a class is drawn from softmax(logits / this)."""
    edge_sampling: Literal["hard", "relaxed"] = "hard"
    """edge: the input gradient of one drawn class, or of all, weighted by a Gumbel-softmax draw."""
    edge_map: Literal["gradient", "saliency"] = "gradient"
    """edge: the gradient's L2 norm over a pixel's channels, or its largest magnitude."""
    pag_weight: float = 15.0
    """pag: weight of the penalty (its authors' code: 1.5 times 10)."""
    pag_representative: Literal["class-mean", "nearest-neighbour", "random-image"] = "class-mean"
    """pag: what a class's gradient points to: the mean of its training images, the image's nearest
    neighbour among them (data that the device can hold), or one of them, drawn by the seed."""
    pag_images: int = 100
    """pag: image files that each class mean is taken over, drawn by the seed; of cifar10 and digits
    it is all."""
    trades_beta: float = 6.0
    """trades: weight of the divergence."""
    attack_eps: Fraction = 4 / 255
    """pgd_at, trades, fgsm_rs: Linf radius in 0..1 pixel units."""
    attack_step: Fraction | None = None
    """pgd_at, trades, fgsm_rs: step in pixel units; None: 2 eps / attack_it, for fgsm_rs
    1.25 eps."""
    attack_it: int = 3
    """pgd_at, trades: steps."""
    attack_select: Literal["last", "best", "paper"] = "last"
    """pgd_at: train on the last iterate, or on the best of all (one forward more). paper: best,
    with the extra forward on un-normalised images, as the paper's code has it."""
    attack_weight_grads: bool = False
    """pgd_at: compute, all-reduce and discard weight gradients at every attack step, as the paper's
    code does. For cost comparisons alone: the images are the same."""

    def __post_init__(self) -> None:
        check(self.method in METHODS, f"--method {self.method!r}: {nearest(self.method, METHODS)}")
        check_pixels("--eps", self.eps)
        check_pixels("--attack-eps", self.attack_eps)
        if self.attack_step is not None:
            check_pixels("--attack-step", self.attack_step)
        check(0 < self.sigma < math.inf, f"--sigma {self.sigma} must be positive and finite")
        check(self.attack_it > 0, f"--attack-it {self.attack_it} must be at least 1")
        check(self.ramp_epochs >= 0, f"--ramp-epochs {self.ramp_epochs} must be at least 0")
        for name in (
            *("ce_weight", "gn_weight", "gn_threshold"),
            *("edge_weight", "pag_weight", "trades_beta"),
        ):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"--{flag(name)} {value} must be at least 0, and finite")
        check_pixels("--gn-start", self.gn_start)
        weights = self.gn_channel_weights
        check(
            weights is None or (min(weights) >= 0 and 0 < sum(weights) < math.inf),
            f"--gn-channel-weights {' '.join(map(str, weights or ()))} must be finite and at least "
            "0, and not all 0",
        )
        check(
            0 < self.gn_share <= 1,
            f"--gn-share {self.gn_share} must lie in (0, 1]; for no penalty take --method fgsm_rs",
        )
        check(0 <= self.ramp_start <= 1, f"--ramp-start {self.ramp_start} must lie in [0, 1]")
        check(
            0 < self.edge_temperature < math.inf,
            f"--edge-temperature {self.edge_temperature} must be positive and finite",
        )
        check(self.pag_images > 0, f"--pag-images {self.pag_images} must be at least 1")
        check(
            self.method != "trades" or self.attack_select != "paper",
            "--attack-select paper is a quirk of the paper's PGD-3: with --method trades take best "
            "or last",
        )

    @property
    def gn_variant(self) -> bool:
        """Whether gradnorm's penalty is another than the L1 norm of the loss's gradient."""
        return bool(
            self.gn_norm != "l1"
            or self.gn_of != "loss"
            or self.gn_channel_weights
            or self.gn_threshold
            or self.gn_start
        )

    @property
    def step_size(self) -> float:
        """The attack's step in pixel units, the method's default filled in."""
        if self.attack_step is not None:
            return self.attack_step
        one_step = self.method in ("fgsm_rs", "gradnorm+fgsm")
        return 1.25 * self.attack_eps if one_step else 2 * self.attack_eps / self.attack_it


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step runs."""

    compile: Literal["auto", "on", "off"] = "auto"
    """One compiled graph for the whole step; off: eager double backprop. auto: on for CUDA, off on
    CPU, where a short run does not win back the time to compile."""
    schedule: Literal[
        "auto",
        "exact",
        "exact-eager",
        "finite-difference",
        "central-difference",
        "lazy",
        "subset",
    ] = "exact"
    """exact: double backprop, in one graph where compiled; exact-eager: never compiled; auto:
    exact, in micro-batches and with an activation memory budget that fit the device. Of gradnorm's
    penalty: finite-difference and central-difference approximate it without double backprop; lazy
    has it every lazy_interval-th update; subset on a share of the images."""
    fd_step: float = 1e-2
    """finite-difference, central-difference: the step h in normalised units. The larger, the nearer
    to training on FGSM's images; below 1e-2 bf16 loses the difference (1e-3 is good in fp32)."""
    lazy_interval: int = 4
    """lazy: updates from one with the penalty to the next; it is that many times as strong, which
    clip_grad undoes in part."""
    subset_fraction: float = 0.5
    """subset: share of the images with the penalty; of batch_size, a whole number of images."""
    precision: Literal["fp32", "tf32", "bf16", "bf16-pure"] = "fp32"
    """fp32; tf32 products (CUDA); bf16: autocast with fp32 weights; bf16-pure: weights and
    activations in bf16 within the step, fp32 for the weights updated and for statistics."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Replay each compiled graph as one launch, so that no slow host holds the GPU up. auto: in one
    process on CUDA; on with several has not been tried."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """triton: activations, LayerNorms and Swin's window attention by fastgn_kernels; reference: by
    PyTorch's operators. auto: triton for CUDA, reference on CPU."""
    activation_memory_budget: float = 1.0
    """Share of the activations that the compiled step keeps; the rest is recomputed in the
    backward."""
    clip_grad: float | None = None
    """Clip the gradient's global L2 norm to this."""
    train_in_eval_mode: bool = False
    """Quirk of the paper's code: train with the model in eval mode, which freezes BatchNorm."""
    accumulation: Literal["mean", "sum"] = "mean"
    """Average the micro-batches' losses, or sum them before clipping, as the paper's code does."""
    sync_micro_batches: bool = False
    """Quirk of the paper's code: synchronise the device after every micro-batch (for timing
    alone)."""

    def __post_init__(self) -> None:
        check(
            self.schedule != "exact-eager" or self.compile != "on",
            "--schedule exact-eager is never compiled: leave out --compile on, or take exact",
        )
        check(
            self.cuda_graphs != "on" or (self.compile != "off" and self.schedule != "exact-eager"),
            "--cuda-graphs on replays compiled graphs: leave out --compile off and exact-eager",
        )
        check(
            1e-6 <= self.fd_step < math.inf,
            f"--fd-step {self.fd_step} must be finite and at least 1e-6: below, fp32 rounds the "
            "difference away (1e-3 is good)",
        )
        if self.schedule == "auto":
            check(
                self.accumulation != "sum",
                "--schedule auto splits the batch itself, and --accumulation sum weighs it by its "
                "parts: use --accumulation mean, or --schedule exact",
            )
            check(
                self.activation_memory_budget == 1,
                f"--schedule auto picks the budget: leave out --activation-memory-budget "
                f"{self.activation_memory_budget}",
            )
        check(self.lazy_interval > 0, f"--lazy-interval {self.lazy_interval} must be at least 1")
        check(
            0 < self.subset_fraction <= 1,
            f"--subset-fraction {self.subset_fraction} must lie in (0, 1]",
        )
        check(
            0 < self.activation_memory_budget <= 1,
            f"--activation-memory-budget {self.activation_memory_budget} must lie in (0, 1]",
        )
        check(
            self.clip_grad is None or self.clip_grad > 0,
            f"--clip-grad {self.clip_grad} must be positive; leave it out for no clipping",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, cosine with warm-up, and the average of the weights."""

    opt: Literal["adamw", "fusedadamw"] = "adamw"
    """adamw: torch's (fused on CUDA); fusedadamw: NVIDIA apex's FusedAdam."""
    epochs: int = 100
    """Passes over the training images."""
    lr: float | None = None
    """Peak learning rate; None: lr_base * global batch / lr_base_size."""
    lr_base: float = 6.25e-4
    """Peak learning rate at a global batch of lr_base_size."""
    lr_base_size: int = 512
    """See lr_base."""
    weight_decay: float = 0.05
    """Of matrices and convolutions alone: norms, biases and relative-position tables have none."""
    opt_eps: float = 1e-8
    """AdamW's epsilon."""
    opt_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up."""
    warmup_lr: float = 1e-5
    """Learning rate at the first update."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    sched_on_updates: bool = True
    """Move the learning rate at every update; the paper's code moves it once an epoch."""
    model_ema: bool = True
    """Keep an exponential moving average of the weights in fp32; it is what is evaluated and
    exported."""
    model_ema_decay: float = 0.9998
    """Decay of the average, an update."""

    def __post_init__(self) -> None:
        check(self.epochs > 0, f"--epochs {self.epochs} must be at least 1")
        for name in ("lr", "lr_base", "lr_base_size", "opt_eps"):
            value = getattr(self, name)
            check(value is None or value > 0, f"--{flag(name)} {value} must be positive")
        for name in ("weight_decay", "warmup_epochs", "warmup_lr", "min_lr"):
            value = getattr(self, name)
            check(value >= 0, f"--{flag(name)} {value} must be at least 0")
        check(
            all(0 <= beta < 1 for beta in self.opt_betas),
            f"--opt-betas {' '.join(map(str, self.opt_betas))} must each lie in [0, 1)",
        )
        check(
            0 <= self.model_ema_decay < 1,
            f"--model-ema-decay {self.model_ema_decay} must lie in [0, 1)",
        )
        check(
            self.warmup_epochs < self.epochs,
            f"--warmup-epochs {self.warmup_epochs:g} must be fewer than --epochs {self.epochs}",
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The run itself: where, how often, on what."""

    recipe: str | None = None
    """A recipe's name (fastgn/recipes) or a TOML file; the command line overrides it."""
    output: str | None = None
    """The run's folder; None: runs/<time>-<model>-<method>."""
    resume: str | None = None
    """A run's folder or one of its checkpoints, continued exactly; 'auto': --output, if it has
    one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda where there is one, else cpu."""
    seed: int = 0
    """Of everything: all randomness is a function of (seed, step, rank) or (seed, epoch, image)."""
    max_updates: int | None = None
    """Stop after this many updates, for trials; the schedule stays that of --epochs."""
    log_interval: int = 50
    """Updates between log rows, where alone the host waits for the device."""
    checkpoint_interval: int | None = None
    """Updates between checkpoints; None: one an epoch."""
    checkpoint_hist: int = 2
    """Checkpoints kept, the best one aside."""
    eval_interval: int = 1
    """Epochs between evaluations on the fixed subset."""
    eval_images: int = 512
    """Size of the fixed validation subset; 0 turns evaluation off."""
    eval_eps: Fraction | None = None
    """Linf radius of the PGD-10 watched during training; None: the method's own radius."""
    log_wandb: bool = False
    """Log to Weights & Biases as well."""

    def __post_init__(self) -> None:
        for name in (
            "log_interval",
            "checkpoint_interval",
            "checkpoint_hist",
            "eval_interval",
            "max_updates",
        ):
            value = getattr(self, name)
            check(value is None or value > 0, f"--{flag(name)} {value} must be at least 1")
        check(self.seed >= 0, f"--seed {self.seed} must be at least 0")
        check(self.eval_images >= 0, f"--eval-images {self.eval_images} must be at least 0")
        if self.eval_eps is not None:
            check_pixels("--eval-eps", self.eval_eps)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains an image classifier; see the groups below. Example: --recipe quickstart_gradnorm"""

    architecture: tyro.conf.OmitArgPrefixes[ArchitectureConfig] = dataclasses.field(
        default_factory=ArchitectureConfig
    )
    dataset: tyro.conf.OmitArgPrefixes[DatasetConfig] = dataclasses.field(
        default_factory=DatasetConfig
    )
    augmentation: tyro.conf.OmitArgPrefixes[AugmentationConfig] = dataclasses.field(
        default_factory=AugmentationConfig
    )
    objective: tyro.conf.OmitArgPrefixes[ObjectiveConfig] = dataclasses.field(
        default_factory=ObjectiveConfig
    )
    step: tyro.conf.OmitArgPrefixes[StepConfig] = dataclasses.field(default_factory=StepConfig)
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerConfig] = dataclasses.field(
        default_factory=OptimizerConfig
    )
    run: tyro.conf.OmitArgPrefixes[RunConfig] = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        schedule, objective = self.step.schedule, self.objective
        built = build_objective(objective)
        exact = schedule in ("auto", "exact", "exact-eager")
        check(
            exact or built.needs_input_gradient,
            f"--schedule {schedule} is a way to take gradnorm's penalty, and --method "
            f"{objective.method} has none: leave it out",
        )
        check(
            exact or built.rest is None,
            f"--schedule {schedule}: --method {objective.method} takes turns already, at "
            "--gn-share; take --schedule exact, or --method gradnorm",
        )
        check(
            built.differences or schedule not in ("finite-difference", "central-difference"),
            f"--schedule {schedule} takes the L1 norm of the loss's gradient alone, and the "
            f"penalty of {objective.method} with these options is another: take --schedule exact",
        )
        check(
            schedule != "central-difference" or objective.ce_weight >= 1e-6,
            "--schedule central-difference finds its direction in the cross-entropy's sweep: give "
            "--ce-weight above 0, or finite-difference",
        )

    @property
    def eval_eps(self) -> float:
        """Linf radius of the PGD-10 watched during training, in 0..1 pixel units."""
        if self.run.eval_eps is not None:
            return self.run.eval_eps
        adversarial = build_objective(self.objective).perturb is not None
        return self.objective.attack_eps if adversarial else self.objective.eps

    def replace(self, **values: Any) -> "Config":
        """A copy with flat keys (those of recipes) replaced. Raises UserError on an unknown key."""
        groups: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            check(name in FIELDS, f"unknown key {key!r}: {nearest(name, FIELDS)}")
            groups.setdefault(FIELDS[name], {})[name] = coerce(name, value)
        return dataclasses.replace(
            self,
            **{g: dataclasses.replace(getattr(self, g), **v) for g, v in groups.items()},
        )

    def replace_group(self, group: str, values: dict[str, Any]) -> "Config":
        """A copy with fields of one group replaced, None included."""
        return dataclasses.replace(
            self, **{group: dataclasses.replace(getattr(self, group), **values)}
        )

    def flat(self) -> dict[str, Any]:
        """{key: value} over all groups, unset (None) keys left out."""
        pairs = {k: getattr(getattr(self, group), k) for k, group in FIELDS.items()}
        return {k: v for k, v in pairs.items() if v is not None}

    def changed(self, other: "Config", group: str) -> list[str]:
        """'key: ours, not theirs' for every key of a group in which two configs differ."""
        mine, theirs = getattr(self, group), getattr(other, group)
        pairs = (
            (f.name, getattr(mine, f.name), getattr(theirs, f.name))
            for f in dataclasses.fields(mine)
        )
        return [f"{name}: {ours!r}, not {there!r}" for name, ours, there in pairs if ours != there]

    @staticmethod
    def from_toml(text: str) -> "Config":
        """The defaults with a recipe's text laid over them. Raises UserError."""
        try:
            return Config().replace(**tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"not TOML: {error}") from None

    def to_toml(self) -> str:
        """The resolved config as a recipe."""
        return tomli_w.dumps(
            {k: list(v) if isinstance(v, tuple) else v for k, v in self.flat().items()}
        )


FIELDS: dict[str, str] = {
    field.name: group.name
    for group in dataclasses.fields(Config)
    for field in dataclasses.fields(group.default_factory)  # type: ignore[arg-type]
}
"""Recipe key -> the group that it belongs to."""


@dataclasses.dataclass(frozen=True)
class ForeignConfig:
    """What describes a network of which a file holds the weights alone."""

    model: str | None = None
    """timm's name of the network, where --checkpoint is a file of weights alone."""
    model_kwargs: tuple[str, ...] = ()
    """With --model: arguments of its constructor, each as key=value."""
    activation: str | None = None
    """With --model: swaps its activations, as fastgn.train does."""
    img_size: int | None = None
    """With --model: side in pixels; None: timm's."""
    mean: tuple[float, float, float] | None = None
    """With --model: normalisation; None: timm's."""
    std: tuple[float, float, float] | None = None
    """With --model: normalisation; None: timm's."""
    crop_pct: float | None = None
    """With --model: share of the resized image's side that the centre crop keeps (image files);
    None: timm's."""
    from_paper: bool = False
    """With --model: the file is one of arXiv 2409.20139's (timm 0.6's keys, the EMA's weights, a
    normalisation around the network)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(ForeignConfig):
            check(
                self.model is not None or not getattr(self, field.name),
                f"--{field.name.replace('_', '-')} describes a file of weights alone: add --model "
                "NAME, or leave it out for what fastgn.train has made",
            )


def flag(name: str) -> str:
    return name.replace("_", "-")


def coerce(name: str, value: Any) -> Any:
    """A recipe's value as its field's type. Raises UserError where it does not fit."""
    group = typing.get_type_hints(Config, include_extras=False)[FIELDS[name]]
    hint = typing.get_type_hints(group)[name]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    options = tuple(o for o in options if o is not type(None))
    kind = options[0]
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        check(value in choices, f"{name} = {value!r}: {nearest(str(value), choices)}")
        return value
    if origin is tuple:
        items, want = value, typing.get_args(kind)
        fits = isinstance(items, (list, tuple)) and (want[-1] is ... or len(items) == len(want))
        count = "" if want[-1] is ... else f" of {len(want)} values"
        check(fits, f"{name} = {value!r} should be a list{count}")
        return tuple(str(v) if want[0] is str else parse_number(v) for v in items)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return parse_number(value)
    right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    check(right, f"{name} = {value!r} should be of type {kind.__name__}")
    return value


def model_kwargs(pairs: Sequence[str]) -> dict[str, Any]:
    """('depths=(2, 2)', ...) -> {'depths': (2, 2), ...}; a value that is no literal stays a
    string."""
    out = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        check(bool(equals and key), f"--model-kwargs {pair!r} should be key=value")
        try:
            out[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[key] = value
    return out


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files("fastgn").joinpath("recipes").iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def load_recipe(name_or_file: str) -> Config:
    """The defaults with a recipe laid over them. Raises UserError: unknown name, key or value."""
    path = Path(name_or_file)
    if path.suffix == ".toml":
        check(path.is_file(), f"--recipe {name_or_file}: there is no such file")
        text = path.read_text(errors="replace")
    else:
        names = recipe_names()
        check(name_or_file in names, f"--recipe {name_or_file!r}: {nearest(name_or_file, names)}")
        text = resources.files("fastgn").joinpath("recipes", f"{name_or_file}.toml").read_text()
    try:
        return Config.from_toml(text)
    except UserError as error:
        raise UserError(f"--recipe {name_or_file}: {error}") from None


def flag_value(args: Sequence[str], name: str) -> str | None:
    """The value of --name in a command line, before it is parsed as a whole."""
    for index, arg in enumerate(args):
        if arg == f"--{name}" and index + 1 < len(args):
            return args[index + 1]
        if arg.startswith(f"--{name}="):
            return arg.partition("=")[2]
    return None


Parsed = typing.TypeVar("Parsed")


def parse_cli(kind: type[Parsed], args: Sequence[str], prog: str, default: Any = None) -> Parsed:
    """tyro's command line for a dataclass, its refusals as one line instead of a box.

    Raises UserError on whatever tyro refuses; --help exits with 0.
    """
    box = io.StringIO()
    more: dict[str, Any] = {} if default is None else {"default": default}
    more["config"] = (tyro.conf.PositionalMetavarFromFieldName,)
    helping = {"-h", "--help"} & set(args)
    try:
        with contextlib.redirect_stderr(box), columns(None if helping else 10_000):
            return tyro.cli(kind, args=list(args), prog=prog, **more)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UserError(unboxed(box.getvalue(), kind))


@contextlib.contextmanager
def columns(width: int | None) -> Iterator[None]:
    """The terminal's width as tyro sees it: a narrow box would break words in two."""
    before = os.environ.get("COLUMNS")
    if width is not None:
        os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def unboxed(text: str, kind: type) -> str:
    """What tyro says in the first part of its box, as one line."""
    # borderless and with rules of "-" where stdout's encoding is not exactly "utf-8"
    lines = [line.strip("│╭╰╮╯ ") for line in text.splitlines()][1:]
    inside = itertools.dropwhile(lambda line: not line.strip("─-"), lines)
    line = " ".join(itertools.takewhile(lambda line: line.strip("─-"), inside))
    line = re.sub(r"^Error parsing [\w.-]+: (?=--)", "", line).removeprefix("Error parsing ")
    unknown = re.match(r"Unrecognized options: (--[\w-]+)", line)
    if unknown:
        names = FIELDS if kind is Config else [f.name for f in dataclasses.fields(kind)]
        flags = [f"--{flag(name)}" for name in names]
        line = f"{unknown[1]} is unknown: {nearest(unknown[1].replace('_', '-'), flags)}"
    missing = re.match(r"Missing from [\w.]+: (.*)", line)
    if missing:
        names = re.findall(r"(?:^|\(required\) )([A-Z-]+) ", missing[1])
        line = f"missing: {' and '.join(names)} (see --help)"
    choice = re.match(r"invalid choice '(.*)' for argument '(--[\w-]+)'", line)
    if choice:
        given, name = choice.groups()
        valid = re.findall(r"'([^']*)'", line)[2:]
        line = f"{name} {given!r}: {nearest(given, valid)}"
    return line


def parse_config(args: Sequence[str] | None = None) -> Config:
    """The command line's config: recipe first, then flags. ``--resume RUN`` without a recipe starts
    from the config that RUN saved. Raises UserError."""
    args = list(sys.argv[1:] if args is None else args)
    recipe, resume = flag_value(args, "recipe"), flag_value(args, "resume")
    default = Config()
    if recipe is not None:
        default = load_recipe(recipe)
    elif resume not in (None, "auto"):
        folder = run_folder(Path(str(resume)))
        check(
            (folder / "config.toml").is_file(), f"--resume {resume}: no run there (no config.toml)"
        )
        default = load_recipe(str(folder / "config.toml")).replace(output=str(folder))
    return parse_cli(Config, args, "fastgn.train", default)


def run_folder(path: Path) -> Path:
    """The run that a path names: its folder, or a file in it or in its checkpoints/."""
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == "checkpoints" else folder
