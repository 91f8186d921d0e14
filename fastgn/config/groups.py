"""The groups of options of a training run. Each is a frozen dataclass that checks its values.

Every field is a flag of ``python -m fastgn.train`` and a key of a recipe. An option that timm also
has is named as in timm. An option of attacks that the library ARES also has is named as there.
"""

import dataclasses
from typing import Annotated, Literal

from fastgn.config.pairs import model_kwargs
from fastgn.config.policy import check_policy
from fastgn.errors import check
from fastgn.fields import (
    BATCH,
    EPOCHS,
    IMAGES,
    MINUTES,
    PATH,
    PIXELS,
    PROBABILITY,
    RATE,
    SEED,
    WORKER_TIMEOUT,
    WORKERS,
    Options,
    Range,
    format_flag,
    format_number,
)

MEAN = Range(-10, 10)
STD = Range(1e-3, 1e3)
CROP = Range(0.05, 1)
"""Range of the share of an image's side that a centre crop keeps."""
UPDATES = Range(1, 2**40)
LEARNING_RATE = Range(0, 10, above=True)
OUTER_RATE = Range(0, 10)
"""Range of the learning rate at the beginning and at the end of a run."""
FD_STEP = Range(1e-6, 10, hint="below 1e-6 fp32 rounds the difference away; 1e-3 is good")


@dataclasses.dataclass(frozen=True)
class ArchitectureConfig(Options):
    """Options of the network and its initial weights."""

    model: str = "swin_b"
    """Name of the network. It is one of timm's names, or swin_t, swin_s, swin_b, swin_l, resnet50,
    preact_resnet18 (CIFAR)."""
    model_kwargs: tuple[str, ...] = ()
    """Arguments of the model's constructor, each as key=value (timm's --model-kwargs)."""
    pretrained: bool = False
    """Start from timm's pretrained weights, which are downloaded from the Hugging Face hub."""
    initial_checkpoint: Annotated[str | None, PATH] = None
    """Start from the weights in a local file (.safetensors, .pt, .pth) or in the folder of a
    finished run."""
    adapt_weights: bool = False
    """Change initial weights that do not fit the network. Position embeddings are resized to the
    image size. A classifier head for another number of classes is replaced by a random one."""
    activation: str | None = None
    """Activation that replaces all activations of the network, such as gelu, silu or relu. A number
    may follow some names, as in leaky_relu:0.3, elu:1 or softplus:10. None means the model's own
    activations."""
    img_size: Annotated[int | None, Range(1, 4096)] = None
    """Side of the square input in pixels. None means the model's own size."""
    num_classes: Annotated[int | None, Range(2, 1_000_000)] = None
    """Number of classes. It must equal the number of classes in the data. None means the number in
    the data."""
    drop: Annotated[float, RATE] = 0.0
    """Dropout rate of the classifier head."""
    drop_path: Annotated[float, RATE] = 0.0
    """Rate of stochastic depth, the share of residual branches that training leaves out."""
    mean: Annotated[tuple[float, float, float] | None, MEAN] = None
    """Mean of each channel for the normalisation inside the model. None means the model's own."""
    std: Annotated[tuple[float, float, float] | None, STD] = None
    """Standard deviation of each channel for the normalisation inside the model. None means the
    model's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        model_kwargs(self.model_kwargs)
        check(
            not (self.pretrained and self.initial_checkpoint),
            "--pretrained and --initial-checkpoint both give the weights to start from: use one",
        )

    def started(self) -> "ArchitectureConfig":
        """Returns a copy in which the options about initial weights have their defaults."""
        return dataclasses.replace(
            self, pretrained=False, initial_checkpoint=None, adapt_weights=False
        )


@dataclasses.dataclass(frozen=True)
class DatasetConfig(Options):
    """Options of the images, their loader, and the sizes of batches."""

    data: Literal["digits", "cifar10", "imagefolder"] | None = None
    """Kind of data set. None means imagefolder if --data-dir is given, else the small data set of
    digits that comes with scikit-learn."""
    data_dir: Annotated[str | None, PATH] = None
    """Folder of the data. It holds a folder per split and class (as for ImageFolder), lists of
    files (train.txt, val.txt) or packed shards (fastgn.data.pack). For CIFAR-10 it may also be a
    folder with its authors' python batches, or an .npz file. If None, CIFAR-10 is downloaded."""
    train_split: Annotated[str, PATH] = "train"
    """Name of the folder in --data-dir that holds the training images. If a list in --data-dir
    names the training images, this is the list's name without .txt."""
    val_split: Annotated[str, PATH] = "val"
    """Name of the folder in --data-dir that holds the validation images. If a list in --data-dir
    names the validation images, this is the list's name without .txt."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """What to do with an image that cannot be read. fail: stop and name it. skip: take the next
    image of the split instead, and name and count the bad one (torch and dali loaders)."""
    loader: Literal["auto", "device", "torch", "dali"] = "auto"
    """Loader of the training images. device: keep all images as tensors on the device and augment
    them there. torch: use PIL in worker processes. dali: use NVIDIA DALI, which decodes and
    augments on the GPU if there is one. auto: device for digits and cifar10. For image folders on a
    GPU, auto is dali if it is installed and its first batch is the same as torch's. Otherwise it is
    torch."""
    workers: Annotated[int, WORKERS] = 4
    """Number of worker processes of the torch loader, per rank. The dali loader uses this number of
    threads, and a quarter as many worker processes."""
    worker_timeout: Annotated[float, WORKER_TIMEOUT] = 600.0
    """Seconds without a batch from the worker processes after which the run ends. The processes may
    be stuck because a disk or the network no longer answers."""
    batch_size: Annotated[int | None, BATCH] = None
    """Number of images per rank and micro-batch. None means 32 on CUDA and 8 on CPU."""
    grad_accum_steps: Annotated[int, BATCH] = 1
    """Number of micro-batches per rank whose gradients are accumulated into one update."""
    global_batch_size: Annotated[int | None, IMAGES] = None
    """Number of images per update over all ranks. It sets --grad-accum-steps, and must be a
    multiple of --batch-size times the number of ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.global_batch_size is None or self.grad_accum_steps == 1,
            "--global-batch-size sets --grad-accum-steps: give one of the two",
        )

    @property
    def kind(self) -> Literal["digits", "cifar10", "imagefolder"]:
        """The kind of data set that is loaded. It is the value of --data, or what None means."""
        return self.data or ("imagefolder" if self.data_dir else "digits")


@dataclasses.dataclass(frozen=True)
class AugmentationConfig(Options):
    """How training images are augmented. The defaults are those of timm's training script, except
    that the random crop is always resized bicubically."""

    aa: str | None = None
    """timm's auto-augment policy, such as rand-m9-mstd0.5-inc1 (torch and dali loaders)."""
    color_jitter: Annotated[float, Range(0, 10)] = 0.4
    """Strength of the colour jitter (torch and dali loaders). If --aa is given, timm leaves the
    jitter out."""
    scale: Annotated[tuple[float, float], Range(0, 1, above=True)] = (0.08, 1.0)
    """Smallest and largest share of the image's area that the random resized crop takes (torch and
    dali loaders)."""
    train_interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """Interpolation of the random resized crop (torch and dali loaders)."""
    crop_pct: Annotated[float | None, CROP] = None
    """Share of the resized image's side that the centre crop of evaluation keeps (for image files).
    None means the model's own share."""
    crop_padding: Annotated[int | None, Range(0, 4096)] = None
    """Largest random shift of an image in pixels (device loader). None means 1/8 of the side for
    cifar10, and 1/16 for digits."""
    hflip: Annotated[float | None, PROBABILITY] = None
    """Probability of a horizontal flip. None means 0.5, but 0 for digits."""
    reprob: Annotated[float, PROBABILITY] = 0.0
    """Probability of random erasing."""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """Content of the box that random erasing erases. const: zeros. rand: one random colour. pixel:
    noise in every pixel."""
    mixup: Annotated[float, Range(0, 100)] = 0.0
    """Alpha of mixup, the parameter of its beta distribution. 0 turns mixup off."""
    cutmix: Annotated[float, Range(0, 100)] = 0.0
    """Alpha of cutmix, the parameter of its beta distribution. 0 turns cutmix off."""
    mixup_switch_prob: Annotated[float, PROBABILITY] = 0.5
    """Probability that a batch gets cutmix instead of mixup, if both are on."""
    smoothing: Annotated[float, RATE] = 0.1
    """Strength of label smoothing, the share of a target that is spread evenly over all classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.scale
        check(low <= high, f"--scale {low} {high}: give the smaller share first")
        for name in ("mixup", "cutmix"):  # NumPy's beta distribution gives NaN if alpha is tiny
            value = getattr(self, name)
            check(
                value == 0 or value >= 1e-3,
                f"--{name} {format_number(value)} is too small as alpha of a beta distribution: "
                f"use at least 0.001, or 0 to turn --{name} off",
            )
        if self.aa is not None:
            check_policy(self.aa)


ScheduleKind = Literal[
    "exact", "exact-eager", "finite-difference", "central-difference", "lazy", "subset"
]
Precision = Literal["fp32", "tf32", "bf16", "bf16-pure", "fp16", "fp16-pure"]


@dataclasses.dataclass(frozen=True)
class StepConfig(Options):
    """How an update is computed."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Whether to use torch.compile. on: compile the whole step into one graph. off: run it eagerly.
    auto: on for CUDA from compute capability 7.0, and off on CPU, because compiling on the CPU
    takes longer than it saves in a short run."""
    schedule: Literal["auto", ScheduleKind] = "exact"
    """Way to compute the penalty. exact: double backprop, in one graph if compiled. exact-eager:
    the same, but never compiled. auto: exact, with micro-batches and an activation memory budget
    that fit the device. finite-difference, central-difference: approximate gradnorm's penalty
    without double backprop. lazy: compute the penalty only at every lazy_interval-th update.
    subset: compute it on a share of the images."""
    fd_step: Annotated[float, FD_STEP] = 1e-2
    """With --schedule finite-difference or central-difference: length h of the step from an image
    to the shifted image whose loss is compared. It is measured in pixels after the images'
    normalisation. The larger h is, the more the result is like training on FGSM's images. In bf16,
    the difference is lost in rounding if h is below 1e-2. In fp32, 1e-3 is good."""
    lazy_interval: Annotated[int, Range(1, 1_000_000)] = 4
    """With --schedule lazy: the penalty is computed once in this many updates. To make up for that,
    it is multiplied by this number. Clipping (--clip-grad) partly undoes the multiplication."""
    subset_fraction: Annotated[float, Range(0, 1, above=True)] = 0.5
    """With --schedule subset: share of the images that have the penalty. This share of --batch-size
    must be a whole number of images."""
    precision: Precision = "fp32"
    """Precision of the training step. fp32: all in fp32. tf32: fp32 with matrix products in tf32
    (CUDA). bf16: autocast with fp32 weights. bf16-pure: weights and activations in bf16 within the
    step, but fp32 for the updated weights and for statistics. fp16, fp16-pure: the same in fp16,
    with loss scaling. Updates whose gradients overflow are skipped."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Launch each compiled graph as a whole (CUDA graphs), so that the GPU does not wait for a slow
    host. auto: on for CUDA, except with --grad-sync overlap. on: also with overlap. The all-reduces
    then divide the update into parts, and each part is one CUDA graph."""
    grad_sync: Literal["auto", "flat", "overlap"] = "auto"
    """When to sum the gradients of several processes. flat: after the backward. overlap: during the
    backward, which needs a compiled step. If memory runs out in such a backward, the run ends.
    auto: overlap if the run has several machines, one micro-batch per update and no --cuda-graphs
    on, otherwise flat."""
    grad_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are sent between processes. bf16 halves the number of bytes."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Kernels of the network. triton: activations, LayerNorms and Swin's window attention with
    fastgn_kernels. reference: PyTorch's operators. auto: triton for CUDA from compute capability
    7.0, otherwise reference."""
    activation_memory_budget: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Share of the activations that the compiled step keeps. The backward recomputes the rest."""
    clip_grad: Annotated[
        float | None, Range(0.0, 1e9, above=True, hint="leave it out for no clipping")
    ] = None
    """Clip the gradient's global L2 norm to this value. None means no clipping."""
    sync_bn: bool = False
    """Compute BatchNorm's statistics over the images of all ranks, also in double backprop. If off,
    each rank uses only its own images. With several ranks, this option turns CUDA graphs off."""
    train_in_eval_mode: bool = False
    """Train with the model in eval mode, which freezes BatchNorm, as the code of arXiv
    2409.20139 does."""
    accumulation: Literal["mean", "sum"] = "mean"
    """mean: average the losses of an update's micro-batches. sum: add them up, so that the gradient
    is larger when it is clipped. The code of arXiv 2409.20139 adds them up."""
    sync_micro_batches: bool = False
    """Wait for the device after every micro-batch, as the code of arXiv 2409.20139 does. Use this
    option only to compare times."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.schedule != "exact-eager" or self.compile != "on",
            "--schedule exact-eager is never compiled: leave out --compile on, or use --schedule "
            "exact",
        )
        check(
            self.cuda_graphs != "on" or (self.compile != "off" and self.schedule != "exact-eager"),
            "--cuda-graphs on needs a compiled step: leave out --compile off and --schedule "
            "exact-eager",
        )
        check(
            self.cuda_graphs != "on" or not self.sync_bn,
            "--cuda-graphs on cannot replay what --sync-bn sends between ranks: leave out one of "
            "the two",
        )
        if self.grad_sync == "overlap":
            check(
                self.compile != "off" and self.schedule != "exact-eager",
                "--grad-sync overlap needs a compiled step: leave out --compile off and "
                "exact-eager, or use --grad-sync flat",
            )
            check(
                self.schedule not in ("finite-difference", "central-difference"),
                f"--schedule {self.schedule} has several backwards, and --grad-sync overlap "
                "supports one: use --grad-sync flat",
            )
        if self.schedule == "auto":
            check(
                self.accumulation != "sum",
                "--schedule auto chooses the micro-batches, and with --accumulation sum the loss "
                "grows with their number: use --accumulation mean, or --schedule exact",
            )
            check(
                self.activation_memory_budget == 1,
                f"--schedule auto chooses the activation memory budget itself: leave out "
                f"--activation-memory-budget {self.activation_memory_budget}",
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Options):
    """Options of the optimizer, its learning rate, and the moving average of the weights."""

    opt: str = "adamw"
    """Name of one of timm's optimizers, such as adamw, sgd (with Nesterov's momentum),
    momentum or lion. fusedadamw and similar names need NVIDIA's package apex."""
    epochs: Annotated[int, Range(1, 100_000)] = 100
    """Number of passes over the training images."""
    lr: Annotated[float | None, LEARNING_RATE] = None
    """Peak learning rate. None means lr_base * images per update / lr_base_size."""
    lr_base: Annotated[float, LEARNING_RATE] = 6.25e-4
    """Peak learning rate if an update has lr_base_size images."""
    lr_base_size: Annotated[int, IMAGES] = 512
    """Number of images per update at which --lr-base is the peak learning rate."""
    weight_decay: Annotated[float, Range(0, 100)] = 0.05
    """Weight decay of matrices and convolutions. The weights of normalisation layers, biases and
    relative-position tables have none."""
    opt_eps: Annotated[float | None, Range(0, 1, above=True)] = None
    """Epsilon of the optimizer. None means its own default (adamw: 1e-8)."""
    opt_betas: Annotated[tuple[float, ...] | None, RATE] = None
    """Betas of the optimizer. None means its own defaults (adamw: 0.9 0.999)."""
    momentum: Annotated[float | None, RATE] = None
    """Momentum of sgd and similar optimizers. None means 0.9."""
    warmup_epochs: Annotated[float | None, EPOCHS] = None
    """Epochs of linear warm-up. None means 5, but at most a tenth of --epochs."""
    warmup_lr: Annotated[float | None, OUTER_RATE] = None
    """Learning rate at the first update. None means 1e-5, but at most a 50th of the peak."""
    min_lr: Annotated[float | None, OUTER_RATE] = None
    """Learning rate at the end of the run. None means 1e-5, but at most a 50th of the peak."""
    sched_on_updates: bool = True
    """Change the learning rate at every update. The code of arXiv 2409.20139 changes it once an
    epoch."""
    model_ema: bool = True
    """Keep an exponential moving average of the weights in fp32. This average is then evaluated and
    exported instead of the weights themselves."""
    model_ema_decay: Annotated[float, RATE] = 0.9998
    """Decay of the weights' exponential moving average at each update."""
    model_ema_warmup: bool = True
    """Let the decay of the weights' moving average grow to --model-ema-decay, as timm does. A short
    run then forgets its initial weights. If off, the decay is the same at every update, as in the
    code of arXiv 2409.20139."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr is not None:
            self.check_peak(self.lr)

    @property
    def warmup(self) -> float:
        """Number of epochs of linear warm-up. It is --warmup-epochs, or the default if that option
        is None."""
        return brief_epochs(self.epochs) if self.warmup_epochs is None else self.warmup_epochs

    def outer_rates(self, peak: float) -> tuple[float, float]:
        """Returns the learning rates at the first update and at the end of the cosine decay. peak:
        the peak learning rate."""
        default = min(1e-5, peak / 50)
        start = default if self.warmup_lr is None else self.warmup_lr
        return start, default if self.min_lr is None else self.min_lr

    def check_peak(self, peak: float) -> None:
        """Raises UserError if a peak learning rate is out of range, or below a given --warmup-lr or
        --min-lr."""
        rate_text = (
            f"--lr {format_number(self.lr)}"
            if self.lr is not None
            else f"the peak learning rate {peak:.3g} (--lr-base {format_number(self.lr_base)} "
            f"times the images per update, over --lr-base-size {self.lr_base_size})"
        )
        check(peak in LEARNING_RATE, f"{rate_text} is out of range: it must be {LEARNING_RATE}")
        for name in ("min_lr", "warmup_lr"):
            value = getattr(self, name)
            check(
                value is None or value <= peak or (name == "warmup_lr" and not self.warmup),
                f"--{format_flag(name)} {format_number(value or 0)} is above {rate_text}: leave "
                f"--{format_flag(name)} out, or give a higher --lr",
            )


@dataclasses.dataclass(frozen=True)
class RunConfig(Options):
    """Options of the run, such as its folder, device and seed, and how often it logs and saves."""

    recipe: Annotated[str | None, PATH] = None
    """Name of a recipe (fastgn/recipes), or a TOML file. Flags on the command line override it."""
    output: Annotated[str | None, PATH] = None
    """Folder for the run's files. None means runs/<time>-<model>-<method>."""
    resume: Annotated[str | None, PATH] = None
    """Continue a run exactly, from its folder or from one of its checkpoints. 'auto' means the
    folder of --output, if it has a checkpoint."""
    allow_changed_data: bool = False
    """Continue a run even if its images, their labels or --seed have changed since the
    checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on. auto: cuda if there is one, else cpu."""
    rank_timeout: Annotated[float, MINUTES] = 5.0
    """Minutes without a sign of life from one of torchrun's ranks, after which the job ends."""
    seed: Annotated[int, SEED] = 0
    """Seed of all randomness. All random numbers depend only on (seed, step, rank) or (seed, epoch,
    image)."""
    max_updates: Annotated[int | None, UPDATES] = None
    """Stop after this many updates, for example to try a run out. The learning rate still follows
    --epochs."""
    log_interval: Annotated[int, UPDATES] = 50
    """Number of updates between two rows of metrics.csv. Logging a row makes the host wait for the
    device."""
    checkpoint_interval: Annotated[int | None, UPDATES] = None
    """Number of updates between checkpoints. None means one checkpoint per epoch."""
    checkpoint_hist: Annotated[int, Range(1, 1_000_000)] = 2
    """Number of newest checkpoints to keep, besides the best one and those of --keep-epochs."""
    keep_epochs: Annotated[tuple[int, ...], Range(1, 100_000)] = ()
    """Keep the checkpoints at the end of these epochs for good, as checkpoints/epoch_0050.pt, so
    that other runs can start from them (--initial-checkpoint)."""
    eval_interval: Annotated[int, Range(1, 100_000)] = 1
    """Number of epochs between two evaluations. All evaluations use the same validation images."""
    eval_images: Annotated[int, Range(0, 2**31 - 1)] = 512
    """Number of validation images in each evaluation. 0 turns evaluation off."""
    eval_eps: Annotated[float | None, PIXELS] = None
    """Linf radius of PGD-10 in the evaluations during training, in 0..1 pixel units. None means the
    method's own radius."""
    log_wandb: bool = False
    """Log to Weights & Biases as well."""


def brief_epochs(epochs: int) -> float:
    """Returns the default number of epochs in which the learning rate warms up, and in which the
    penalty or attack grows to full strength. It is 5 as in arXiv 2409.20139, but at most a tenth of
    the run's epochs."""
    return min(5.0, epochs / 10)
