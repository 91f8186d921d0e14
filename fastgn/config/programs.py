"""The options of the other programs: evaluate, export, sweep, data.pack and data.check."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastgn.config import run_folder
from fastgn.config.groups import CROP, MEAN, STD
from fastgn.config.outputs import check_outside_data, check_written
from fastgn.errors import UserError, check, nearest, parse_number
from fastgn.fields import (
    BATCH,
    IMAGES,
    MINUTES,
    PATH,
    PROBABILITY,
    SEED,
    WORKER_TIMEOUT,
    WORKERS,
    Options,
    Range,
    check_pixels,
    format_flag,
)

Positional = tyro.conf.Positional
"""Annotated[str, Positional]: an argument without a flag."""
EVALUATION_EPS = Range(0, 1e4, above=True, hint="eps counts in 0..1 pixel units, write 4/255")
"""Radii in the L2 norm may exceed 1."""
AUTOATTACK: dict[str, Literal["standard", "plus", "rand"]] = {
    "autoattack": "standard",
    "autoattack-plus": "plus",
    "autoattack-rand": "rand",
}
AUTOATTACK_PARTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
"""AutoAttack's attacks one by one."""
NAMES = (
    "clean",
    "fgsm",
    "pgd-K",
    "pgd-KxR",
    "pgd-K-margin",
    "pgd-K@STEP",
    *AUTOATTACK,
    *AUTOATTACK_PARTS,
)
PGD = re.compile(r"pgd-([1-9]\d*)(?:x([1-9]\d*))?(-margin)?(?:@(.+))?")
PGD_STEPS = Range(1, 100_000)
PGD_RESTARTS = Range(1, 10_000)


def check_attack(name: str) -> None:
    """Raises UserError with the nearest name if there is no such attack."""
    if name in NAMES and not name.startswith("pgd"):
        return
    match = PGD.fullmatch(name)
    if not match:
        raise UserError(f"--attacks {name!r} is unknown: {nearest(name, NAMES)}")
    for text, allowed, what in ((match[1], PGD_STEPS, "steps"), (match[2], PGD_RESTARTS, "starts")):
        check(
            text is None or (len(text) < 10 and int(text) in allowed),
            f"--attacks {name!r}: the number of {what} must be {allowed}",
        )
    try:
        valid = 0 < pgd_step(match, 1.0) < math.inf
    except UserError:
        valid = False
    if not valid:
        raise UserError(
            f"--attacks {name!r}: the step after @ should be a positive number, as in "
            "pgd-100@1/255, or a part of eps, as in pgd-100@eps/4"
        )


def pgd_step(match: re.Match[str], eps: float) -> float:
    """Returns PGD's step, in eps's units: the one after @, or 2.5 eps over the number of steps.
    Raises UserError if the text after @ is not a number."""
    text = match[4]
    if text is None:
        return 2.5 * eps / int(match[1])
    if text.startswith("eps/"):
        return eps * parse_number(f"1/{text.removeprefix('eps/')}")
    return parse_number(text)


@dataclasses.dataclass(frozen=True)
class BareWeightsConfig(Options):
    """Describes a network if a file holds only its weights."""

    model: str | None = None
    """timm's name of the network, needed if --checkpoint is a file of weights alone."""
    model_kwargs: tuple[str, ...] = ()
    """With --model: arguments of the network's constructor, each as key=value."""
    activation: str | None = None
    """With --model: activation that replaces all of the network's, as in fastgn.train."""
    img_size: Annotated[int | None, Range(1, 4096)] = None
    """With --model: side of the square input in pixels. None means timm's."""
    mean: Annotated[tuple[float, float, float] | None, MEAN] = None
    """With --model: mean of the normalisation for each channel. None means timm's."""
    std: Annotated[tuple[float, float, float] | None, STD] = None
    """With --model: standard deviation of the normalisation for each channel. None means timm's."""
    crop_pct: Annotated[float | None, CROP] = None
    """With --model: share of the resized image's side that the centre crop keeps (image files).
    None means timm's."""
    from_paper: bool = False
    """With --model: the file is one of arXiv 2409.20139's (timm 0.6's keys, the EMA's weights, a
    normalisation around the network)."""
    adapt_weights: bool = False
    """With --model: resize the file's position tables to the network's image size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(BareWeightsConfig):
            check(
                self.model is not None or not getattr(self, field.name),
                f"--{format_flag(field.name)} describes a file of weights alone: add --model NAME, "
                "or leave it out for what fastgn.train has made",
            )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(BareWeightsConfig):
    """Clean and robust accuracy of trained models, side by side."""

    checkpoint: Annotated[tuple[str, ...], PATH] = ()
    """Runs' folders, checkpoints (.pt) or exports (.safetensors) of fastgn.train; with --model, any
    file of weights in timm's keys."""
    norm: Literal["Linf", "L2"] = "Linf"
    """Norm of the perturbation, which eps bounds."""
    eps: Annotated[tuple[float, ...], EVALUATION_EPS] = (4 / 255,)
    """Radii of the attacks in 0..1 pixel units."""
    attacks: tuple[str, ...] = ("clean", "pgd-20", "autoattack")
    """Attacks to run: clean, fgsm, pgd-K (K steps of 2.5 eps / K from a uniform start),
    pgd-KxR (R starts), pgd-K-margin (on the margin in place of the cross-entropy), pgd-K@STEP
    (the step itself, such as 1/255, or a part of eps, such as eps/4), autoattack (standard),
    autoattack-plus, autoattack-rand, or one of AutoAttack's: apgd-ce, apgd-dlr, apgd-t, fab,
    fab-t, square."""
    data: Literal["digits", "cifar10", "imagefolder"] | None = None
    """Kind of data set. None means that of the run's training."""
    data_dir: Annotated[str | None, PATH] = None
    """Folder or file of the data. None means that of the run."""
    val_split: Annotated[str | None, PATH] = None
    """Folder or list of the images below --data-dir. None means that of the run."""
    num_images: Annotated[int | None, IMAGES] = None
    """Number of validation images. They are the first ones, or evenly spaced ones if the split is
    sorted by class, as a folder is. None means all."""
    image_list: Annotated[str | None, PATH] = None
    """List of the images, in place of --num-images: robustbench-imagenet (its 5,000 of ImageNet's
    validation set), or a file with the number of an image, or the end of its path, in each line."""
    batch_size: Annotated[int | None, BATCH] = None
    """Images that one rank attacks at once, whose outcomes are saved together. None means at most
    360, chosen so that all ranks have equal work."""
    workers: Annotated[int, WORKERS] = 4
    """Worker processes that read image files."""
    worker_timeout: Annotated[float, WORKER_TIMEOUT] = 600.0
    """Seconds to wait for what the worker processes make, before the program ends."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the gradients of FGSM and PGD. The verdict is always the fp32 model's."""
    compile: bool = False
    """Compile the network for FGSM's and PGD's gradients. Compiling takes about a minute, which
    pays off only for many images."""
    output: Annotated[str | None, PATH] = None
    """The JSON file to write. None means evaluation.json in the first checkpoint's folder."""
    report: Annotated[str | None, PATH] = None
    """Also write all results as one HTML page."""
    statistics: bool = False
    """Also compute gradient statistics at the last eps: the paper's table 1 and local linearity. If
    --checkpoint is a run's folder, also compute the norm at each of its checkpoints."""
    sanity: bool = False
    """Also make the sanity report at the last eps, which says whether the attacks can be
    believed."""
    analysis_images: Annotated[int, BATCH] = 256
    """Number of images, evenly spaced, for --statistics and --sanity."""
    curve: Annotated[str | None, PATH] = None
    """Also draw accuracy against eps, under the last of the attacks, into this PNG."""
    picture: Annotated[str | None, PATH] = None
    """Also draw images, input gradients and PGD-20 perturbations (at the last eps) into this
    PNG."""
    picture_images: Annotated[int, Range(1, 1000)] = 8
    """Number of rows of --picture."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on. auto: cuda if there is one, else cpu."""
    rank_timeout: Annotated[float, MINUTES] = 5.0
    """Minutes without a sign of life from one of torchrun's ranks, after which the job ends."""
    seed: Annotated[int, SEED] = 0
    """Seed of every attack."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.checkpoint), "--checkpoint is missing: name a run's folder")
        check(bool(self.eps), "--eps is empty: write --eps 4/255")
        if self.norm == "Linf":
            for value in self.eps:
                check_pixels("--eps", value)
        check(bool(self.attacks), "--attacks is empty: write --attacks clean pgd-20")
        for name in self.attacks:
            check_attack(name)
        for field, values in (("attacks", self.attacks), ("eps", self.eps)):
            check(len(set(values)) == len(values), f"--{field} names one twice")
        check(
            self.norm == "Linf" or not self.statistics,
            "--statistics supports only --norm Linf: leave it out with --norm L2",
        )
        read = [("--image-list", self.image_list), ("--data-dir", self.data_dir)]
        read += [("--checkpoint", path) for path in self.checkpoint]
        check_written(self.written, read)
        check_outside_data(self.written, self.data_dir, (self.val_split or "val",))
        check(
            self.curve is None or (len(self.eps) > 1 and self.attacks[-1:] not in ((), ("clean",))),
            "--curve draws the last of the --attacks over several --eps: give at least 2",
        )
        check(
            self.image_list is None or self.num_images is None,
            "--image-list and --num-images both say which images: leave one out",
        )
        check(
            self.model is None or self.data is not None or self.data_dir is not None,
            "--model: the file says nothing of its data: add --data-dir DIR or --data",
        )

    @property
    def written(self) -> dict[str, str | None]:
        """Option -> the file that it writes."""
        output = self.output or str(run_folder(Path(self.checkpoint[0])) / "evaluation.json")
        more = {"--report": self.report, "--curve": self.curve, "--picture": self.picture}
        return {"--output": output} | more


@dataclasses.dataclass(frozen=True)
class ExportConfig(BareWeightsConfig):
    """A trained model as files that need torch and timm alone, with RobustBench's record of it."""

    checkpoint: Annotated[str, PATH] = ""
    """A run's folder, a checkpoint (.pt) or an export (.safetensors); with --model, any file of
    weights in timm's keys."""
    robustbench: Annotated[str, PATH] = ""
    """Folder to write weights.safetensors, weights.pt, model.py and model_info.json into."""
    threat: Literal["Linf", "L2"] = "Linf"
    """The norm that --eps is measured in."""
    eps: Annotated[float, EVALUATION_EPS] = 4 / 255
    """The threat's radius in 0..1 pixel units."""
    dataset: Literal["cifar10", "imagenet"] | None = None
    """RobustBench's name of the data. None means the run's data, if that is one of these."""
    evaluation: Annotated[str | None, PATH] = None
    """An evaluation.json of fastgn.evaluate that has the accuracies. None leaves them null."""
    name: str | None = None
    """Title of the entry, which for RobustBench is the paper's. None means the run's name."""
    link: str | None = None
    """Address of the paper or of the code."""
    authors: str | None = None
    """Names of the authors, with commas between."""
    venue: str | None = None
    """Where and when the paper was published."""
    architecture: str | None = None
    """The network as the leaderboard should call it, such as Swin-B. None means --model of the
    run."""
    additional_data: bool | None = None
    """Whether other images or labels than the data set's were used. None means false for a
    run from scratch, and null for others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.model is None or self.dataset is not None,
            "--model: the file says nothing of its data: add --dataset imagenet or cifar10",
        )
        check(bool(self.checkpoint), "--checkpoint is missing: name a run's folder")
        check(bool(self.robustbench), "--robustbench is missing: name the folder to write")
        if self.threat == "Linf":
            check_pixels("--eps", self.eps)


@dataclasses.dataclass(frozen=True)
class SweepConfig(Options):
    """Tunes a recipe's fields with Optuna, by fastgn.train's own runs."""

    recipe: Annotated[str, PATH] = "quickstart_gradnorm"
    """Name of a recipe, or a TOML file, from which every trial starts."""
    space: tuple[str, ...] = ()
    """Values to try, each as FIELD=LOW:HIGH, FIELD=LOW:HIGH:log, or FIELD=A,B,C."""
    set: tuple[str, ...] = ()
    """Fields that differ from the recipe in every trial, each as FIELD=VALUE."""
    trials: Annotated[int, Range(1, 1_000_000)] = 30
    """Total number of trials. Those already in the study count."""
    study: Annotated[str, PATH] = "runs/sweep.db"
    """The study's SQLite file, whose name ends in .db; beside it go .json, .png, _best.toml and the
    folder of the trials' runs."""
    objective: Literal["robust", "pareto"] = "robust"
    """What to optimise. robust: the accuracy under PGD-10, above --clean-floor; poor trials
    are pruned. pareto: that and the clean accuracy together; Optuna cannot prune with two
    objectives."""
    clean_floor: Annotated[float, PROBABILITY] = 0.0
    """Lowest clean accuracy (0..1). robust: a trial below it counts as worse than any above
    it; pareto: a trial below it cannot be the best."""
    prune: bool = True
    """robust: stop a trial that is worse than the median of the others at the same epoch."""
    startup_trials: Annotated[int, Range(1, 1_000_000)] = 5
    """Number of trials with random values at the beginning, of which none is pruned."""
    seed: Annotated[int, SEED] = 0
    """Seed of Optuna's choices. Each run has its own, the field `seed`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.space), "--space is empty: write --space gn_weight=0.1:10:log")
        # the sweep's other files are named after the study: no other ending may meet them
        check(
            self.database.suffix == ".db",
            f"--study {self.study} should end in .db: write {self.database.with_suffix('.db')}",
        )
        check(
            not set("?#%") & set(self.study),
            f"--study {self.study}: a database's name has no ?, # or %: choose another name",
        )
        for path in self.written:
            check_written({f"--study {self.study}: its file": path}, [("--recipe", self.recipe)])

    @property
    def database(self) -> Path:
        """The study's file: --study, with .db added if it has no ending."""
        path = Path(self.study)
        return path if path.suffix else path.with_name(f"{path.name}.db")

    @property
    def written(self) -> tuple[Path, ...]:
        """The study's file, and those that are written beside it."""
        path = self.database
        beside = (f"{path.stem}.json", f"{path.stem}.png", f"{path.stem}_best.toml")
        return path, *(path.with_name(name) for name in beside)


@dataclasses.dataclass(frozen=True)
class PackConfig(Options):
    """Packs images into WebDataset shards with an index; stopped, the same command goes on."""

    source: Annotated[str, Positional, PATH]
    """Image folders, lists of files or shards: whatever --data-dir takes."""
    output: Annotated[str, Positional, PATH]
    """The folder for the shards; a --data-dir afterwards."""
    short_side: Annotated[int | None, Range(1, 65_000)] = None
    """Resize larger images to this shorter side in pixels (bicubic) and store them as JPEG. The
    bytes of all others stay as they are. None means that all do."""
    quality: Annotated[int, Range(1, 100)] = 90
    """JPEG quality of resized images."""
    shard_size: Annotated[int, IMAGES] = 10_000
    """Images per shard."""
    workers: Annotated[int, WORKERS] = 4
    """Worker processes that decode and encode."""
    worker_timeout: Annotated[float, WORKER_TIMEOUT] = 600.0
    """Seconds to wait for what the worker processes make, before the program ends."""
    train_split: Annotated[str, PATH] = "train"
    """Folder or list of training images below SOURCE."""
    val_split: Annotated[str, PATH] = "val"
    """Folder or list of validation images below SOURCE."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """fail: stop at an image that cannot be read; skip: leave it out."""


@dataclasses.dataclass(frozen=True)
class CheckConfig(Options):
    """Decodes every image of a data set and names the bad ones. The exit status is 1 if it
    finds one."""

    data_dir: Annotated[str, Positional, PATH]
    """Image folders, lists of files or shards: whatever --data-dir takes."""
    workers: Annotated[int, WORKERS] = 4
    """Worker processes that decode."""
    worker_timeout: Annotated[float, WORKER_TIMEOUT] = 600.0
    """Seconds to wait for what the worker processes make, before the program ends."""
    train_split: Annotated[str, PATH] = "train"
    """Folder or list of training images."""
    val_split: Annotated[str, PATH] = "val"
    """Folder or list of validation images."""
    output: Annotated[str | None, PATH] = None
    """Also write the report into this JSON file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        written = {"--output": self.output}
        check_written(written, [("DATA-DIR", self.data_dir)])
        check_outside_data(written, self.data_dir, (self.train_split, self.val_split))
