"""The options of all programs except fastgn.train, and the names of the attacks."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastgn.config import run_folder
from fastgn.config.groups import CROP, MEAN, STD
from fastgn.config.outputs import check_outside_data, check_written
from fastgn.errors import UserError, check, find_duplicate, nearest, parse_number
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
"""Marks an option as an argument without a flag, as in Annotated[str, Positional]."""
EVALUATION_EPS = Range(0, 1e4, above=True, hint="pixels are in 0..1, so write 4/255")
"""Range of --eps, the radius of the attacks. A radius in the L2 norm may be above 1."""
AUTOATTACK: dict[str, Literal["standard", "plus", "rand"]] = {
    "autoattack": "standard",
    "autoattack-plus": "plus",
    "autoattack-rand": "rand",
}
"""Name of an attack -> version of AutoAttack that it runs."""
AUTOATTACK_PARTS = {
    **{name: (name,) for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")},
    "apgd-ce+t": ("apgd-ce", "apgd-t"),
}
"""Name of an attack -> parts of AutoAttack that it runs one after the other. Each part attacks only
the images that are still classified correctly."""
NAMES = (
    *("clean", "fgsm", "pgd-K", "pgd-KxR", "pgd-K-margin", "pgd-K@STEP"),
    *AUTOATTACK,
    *AUTOATTACK_PARTS,
)
"""Names that --attacks takes. K, R and STEP stand for numbers."""
PGD = re.compile(r"pgd-([1-9]\d*)(?:x([1-9]\d*))?(-margin)?(?:@(.+))?")
"""Pattern of PGD's names, such as pgd-20x5-margin@1/255. Its groups are the number of steps, the
number of starts, -margin, and the size of a step."""
PGD_STEPS = Range(1, 100_000)
PGD_RESTARTS = Range(1, 10_000)


def check_attack(name: str) -> None:
    """Raises UserError, which suggests similar names, if there is no attack with this name."""
    if name in NAMES and not name.startswith("pgd"):
        return
    match = PGD.fullmatch(name)
    if not match:
        written = re.fullmatch(r"pgd[-_ ]*([1-9]\d*)", name, re.IGNORECASE)
        hint = f"did you mean 'pgd-{written[1]}'?" if written else nearest(name, NAMES)
        raise UserError(f"--attacks {name!r} is unknown: {hint}")
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
            f"--attacks {name!r}: the step after @ must be a positive number, as in "
            "pgd-100@1/255, or a part of eps, as in pgd-100@eps/4"
        )


def pgd_step(match: re.Match[str], eps: float) -> float:
    """Returns the size of a step of PGD, in the same units as eps.

    The name of the attack gives the size after an @, as a number or as eps/NUMBER. Without an @,
    the size is 2.5 eps / steps. Raises UserError if the text after @ is neither. match: result of
    matching the name with the pattern PGD.
    """
    text = match[4]
    if text is None:
        return 2.5 * eps / int(match[1])
    if text.startswith("eps/"):
        return eps * parse_number(f"1/{text.removeprefix('eps/')}")
    return parse_number(text)


@dataclasses.dataclass(frozen=True)
class BareWeightsConfig(Options):
    """Describes the network if --checkpoint is a file that holds only weights."""

    model: str | None = None
    """Name of the network in timm. It is needed if --checkpoint is a file that holds only
    weights."""
    model_kwargs: tuple[str, ...] = ()
    """With --model: arguments of the network's constructor, each written as key=value."""
    activation: str | None = None
    """With --model: activation that replaces every activation of the network, as in
    fastgn.train."""
    img_size: Annotated[int | None, Range(1, 4096)] = None
    """With --model: width and height of the input in pixels. None means timm's value."""
    mean: Annotated[tuple[float, float, float] | None, MEAN] = None
    """With --model: mean of the normalisation for each channel. None means timm's values."""
    std: Annotated[tuple[float, float, float] | None, STD] = None
    """With --model: standard deviation of the normalisation for each channel. None means timm's
    values."""
    crop_pct: Annotated[float | None, CROP] = None
    """With --model: share of the resized image's side that the centre crop keeps, if the images are
    files. None means timm's value."""
    from_paper: bool = False
    """With --model: read a file that the authors of arXiv 2409.20139 have published. Such a file
    has the keys of timm 0.6, averaged weights, and a normalisation around the network."""
    adapt_weights: bool = False
    """With --model: resize the position embeddings in the file to the network's image size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(BareWeightsConfig):
            check(
                self.model is not None or not getattr(self, field.name),
                f"--{format_flag(field.name)} describes a file that holds only weights: add "
                f"--model NAME, or leave --{format_flag(field.name)} out for a run of fastgn.train",
            )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(BareWeightsConfig):
    """Measures the clean and robust accuracy of trained models, side by side."""

    checkpoint: Annotated[tuple[str, ...], PATH] = ()
    """Networks to evaluate: folders of runs, checkpoints (.pt) or exports (.safetensors) of
    fastgn.train. With --model, files of weights whose keys are timm's."""
    norm: Literal["Linf", "L2"] = "Linf"
    """Norm in which --eps limits the size of a perturbation."""
    eps: Annotated[tuple[float, ...], EVALUATION_EPS] = (4 / 255,)
    """Largest perturbations of the attacks (radii), in 0..1 pixel units, such as 4/255."""
    attacks: tuple[str, ...] = ("clean", "pgd-20", "autoattack")
    """Attacks to run. clean: no attack. fgsm: one step of length eps. pgd-K: PGD with K steps of
    2.5 eps / K from a random start. pgd-KxR: the same from R random starts. pgd-K-margin: PGD on
    the margin of the logits instead of the cross-entropy. pgd-K@STEP: PGD with K steps of length
    STEP, such as 1/255 or eps/4. autoattack, autoattack-plus, autoattack-rand: versions of
    AutoAttack. apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square: parts of AutoAttack. apgd-ce+t:
    apgd-ce, then apgd-t."""
    successive: bool = False
    """For each radius of --eps, attack only the images that are still classified correctly after
    all earlier attacks in --attacks. The accuracy under an attack then counts the images that
    resist this attack and all earlier ones."""
    data: Literal["digits", "cifar10", "imagefolder"] | None = None
    """Kind of data set. None means the kind that the run was trained on."""
    data_dir: Annotated[str | None, PATH] = None
    """Folder or file of the data. None means the data that the run was trained on."""
    val_split: Annotated[str | None, PATH] = None
    """Name of the folder in --data-dir that holds the images. If a list in --data-dir names the
    images, this is the list's name without .txt. None means the validation images of the run."""
    num_images: Annotated[int | None, IMAGES] = None
    """Number of validation images. They are the first ones, or evenly spaced ones if the images are
    sorted by class, as in a folder. None means all."""
    image_list: Annotated[str | None, PATH] = None
    """Images to use, instead of --num-images. robustbench-imagenet: the 5,000 images of ImageNet's
    validation set that RobustBench uses. Otherwise a text file that names one image per line, by
    its index (from 0) or by the end of its path."""
    batch_size: Annotated[int | None, BATCH] = None
    """Number of images that a process attacks at once. The process saves the results after each
    such batch. None means at most 360, chosen so that all processes have equal work."""
    workers: Annotated[int, WORKERS] = 4
    """Number of worker processes that read image files."""
    worker_timeout: Annotated[float, WORKER_TIMEOUT] = 600.0
    """Seconds without a result from the worker processes after which the program ends."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the gradients of FGSM and PGD. Whether an attack has succeeded is always decided
    in fp32."""
    compile: bool = False
    """Compile the network for the gradients of FGSM and PGD. Compiling takes about a minute, so it
    pays off only for many images."""
    output: Annotated[str | None, PATH] = None
    """JSON file to write. None means evaluation.json in the folder of the first checkpoint. Results
    of an earlier evaluation in this file are kept."""
    report: Annotated[str | None, PATH] = None
    """Also write all results into this HTML file."""
    statistics: bool = False
    """Also compute the statistics of the input gradients that table 1 of arXiv 2409.20139 has. Also
    measure how linear the loss is within a radius, the last value of --eps. If --checkpoint is a
    run's folder, also compute the norm of the input gradient for each checkpoint in that folder."""
    sanity: bool = False
    """Also check whether the measured robust accuracies can be believed (a sanity report). The
    attacks in these checks use the last value of --eps as their radius."""
    analysis_images: Annotated[int, BATCH] = 256
    """Number of images for --statistics and --sanity, evenly spaced among the evaluated images."""
    curve: Annotated[str | None, PATH] = None
    """Also draw the accuracy under the last of --attacks against eps, into this PNG file."""
    picture: Annotated[str | None, PATH] = None
    """Also draw images, their input gradients, and their perturbations by PGD-20 into this PNG
    file. The radius of PGD-20 is the last value of --eps."""
    picture_images: Annotated[int, Range(1, 1000)] = 8
    """Number of images in --picture."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on. auto: cuda if there is one, otherwise cpu."""
    rank_timeout: Annotated[float, MINUTES] = 5.0
    """Minutes without a sign of life from one of torchrun's processes after which the job ends."""
    seed: Annotated[int, SEED] = 0
    """Seed for the random numbers of all attacks."""

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
            twice = find_duplicate(values)
            check(twice is None, f"--{field} has the value {twice} twice: leave one out")
        check(
            self.norm == "Linf" or not self.statistics,
            "--statistics supports only --norm Linf: remove --statistics or use --norm Linf",
        )
        read = [("--image-list", self.image_list), ("--data-dir", self.data_dir)]
        read += [("--checkpoint", path) for path in self.checkpoint]
        check_written(self.written, read)
        check_outside_data(self.written, self.data_dir, (self.val_split or "val",))
        check(
            self.curve is None or (len(self.eps) > 1 and self.attacks[-1:] not in ((), ("clean",))),
            "--curve draws the accuracy under the last of --attacks at each --eps: end --attacks "
            "with an attack, not with clean, and give at least 2 values of --eps",
        )
        check(
            self.image_list is None or self.num_images is None,
            "--image-list and --num-images both choose the images: leave one out",
        )
        check(
            self.model is None or self.data is not None or self.data_dir is not None,
            "--model: the file of weights does not say on which data it was trained: add "
            "--data-dir DIR or --data NAME",
        )

    @property
    def written(self) -> dict[str, str | None]:
        """Option -> name of the file that it writes, or None if the option is not given."""
        output = self.output or str(run_folder(Path(self.checkpoint[0])) / "evaluation.json")
        more = {"--report": self.report, "--curve": self.curve, "--picture": self.picture}
        return {"--output": output} | more


@dataclasses.dataclass(frozen=True)
class ExportConfig(BareWeightsConfig):
    """Writes a trained model as files that need only torch and timm. Also writes an entry for
    RobustBench."""

    checkpoint: Annotated[str, PATH] = ""
    """Network to export: the folder of a run, a checkpoint (.pt) or an export (.safetensors) of
    fastgn.train. With --model, a file of weights whose keys are timm's."""
    robustbench: Annotated[str, PATH] = ""
    """Folder for weights.safetensors, weights.pt, model.py and model_info.json."""
    threat: Literal["Linf", "L2"] = "Linf"
    """Norm in which --eps is measured."""
    eps: Annotated[float, EVALUATION_EPS] = 4 / 255
    """Largest perturbation of the attacks, in 0..1 pixel units, such as 4/255."""
    dataset: Literal["cifar10", "imagenet"] | None = None
    """Data set as RobustBench names it. None means the data of the run, if it is cifar10 or
    imagenet."""
    evaluation: Annotated[str | None, PATH] = None
    """Result of fastgn.evaluate (evaluation.json), from which the entry takes its accuracies. None
    leaves the accuracies empty."""
    name: str | None = None
    """Title of the entry. RobustBench uses the title of the paper. None means the name of the
    run."""
    link: str | None = None
    """Address of the paper or of the code."""
    authors: str | None = None
    """Names of the authors, separated by commas."""
    venue: str | None = None
    """Where and when the paper was published."""
    architecture: str | None = None
    """Name of the network on the leaderboard, such as Swin-B. None means the run's --model."""
    additional_data: bool | None = None
    """Whether images or labels from outside the data set were used for training. None means false
    for a run that began with random weights, and unknown (null) for other runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.model is None or self.dataset is not None,
            "--model: the file of weights does not say on which data it was trained: add --dataset "
            "imagenet or --dataset cifar10",
        )
        check(bool(self.checkpoint), "--checkpoint is missing: name a run's folder")
        check(bool(self.robustbench), "--robustbench is missing: name the folder to write")
        if self.threat == "Linf":
            check_pixels("--eps", self.eps)


@dataclasses.dataclass(frozen=True)
class SweepConfig(Options):
    """Tunes options of a recipe with Optuna. Each trial is a run of fastgn.train."""

    recipe: Annotated[str, PATH] = "quickstart_gradnorm"
    """Name or TOML file of the recipe that every trial starts from."""
    space: tuple[str, ...] = ()
    """Options to tune and the values to try: FIELD=LOW:HIGH, FIELD=LOW:HIGH:log (logarithmic
    scale), or FIELD=A,B,C."""
    set: tuple[str, ...] = ()
    """Options that differ from the recipe in every trial, each written as FIELD=VALUE."""
    trials: Annotated[int, Range(1, 1_000_000)] = 30
    """Total number of trials, including those that are already in the study."""
    study: Annotated[str, PATH] = "runs/sweep.db"
    """SQLite file of the study, whose name ends in .db. The results (.json, .png, _best.toml) and a
    folder with the trials' runs are written beside it."""
    objective: Literal["robust", "pareto"] = "robust"
    """What to maximise. robust: the accuracy under PGD-10 of trials that reach --clean-floor. Poor
    trials are stopped early. pareto: the accuracy under PGD-10 and the clean accuracy, both at
    once. No trial is stopped early, because Optuna cannot judge it by two values."""
    clean_floor: Annotated[float, PROBABILITY] = 0.0
    """Lowest acceptable clean accuracy (0..1). A trial below it cannot be the best. With
    --objective robust, such a trial is also worse than every trial that reaches the floor."""
    prune: bool = True
    """Stop a trial early if it is worse than the median of the other trials at the same epoch. This
    has no effect with --objective pareto."""
    startup_trials: Annotated[int, Range(1, 1_000_000)] = 5
    """Number of trials with random values at the beginning. None of them is stopped early."""
    seed: Annotated[int, SEED] = 0
    """Seed for the values that Optuna chooses. The runs use the option seed of the recipe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.space), "--space is empty: write --space gn_weight=0.1:10:log")
        # with another ending, the study could overwrite a file beside it, such as NAME.json
        check(
            self.database.suffix == ".db",
            f"--study {self.study} must end in .db: write {self.database.with_suffix('.db')}",
        )
        check(
            not set("?#%") & set(self.study),
            f"--study {self.study}: the name of a database must not have ?, # or %: choose "
            "another name",
        )
        for path in self.written:
            check_written({f"--study {self.study}: its file": path}, [("--recipe", self.recipe)])

    @property
    def database(self) -> Path:
        """Path of the file of --study, with .db added if its name has no ending."""
        path = Path(self.study)
        return path if path.suffix else path.with_name(f"{path.name}.db")

    @property
    def written(self) -> tuple[Path, ...]:
        """Paths of the study's file, and of the files that the program writes beside it."""
        path = self.database
        beside = (f"{path.stem}.json", f"{path.stem}.png", f"{path.stem}_best.toml")
        return path, *(path.with_name(name) for name in beside)


@dataclasses.dataclass(frozen=True)
class PackConfig(Options):
    """Packs images into WebDataset shards with an index. If the packing is interrupted, run the
    same command again to continue."""

    source: Annotated[str, Positional, PATH]
    """The images to pack: folders, lists of files or shards, as for --data-dir of fastgn.train."""
    output: Annotated[str, Positional, PATH]
    """Folder for the shards. Give it to --data-dir afterwards."""
    short_side: Annotated[int | None, Range(1, 65_000)] = None
    """Images whose shorter side is longer than this number of pixels are resized to it (bicubic)
    and stored as JPEG. The files of other images stay as they are. None means that no image is
    resized."""
    quality: Annotated[int, Range(1, 100)] = 90
    """JPEG quality of the images that are resized."""
    shard_size: Annotated[int, IMAGES] = 10_000
    """Number of images per shard."""
    workers: Annotated[int, WORKERS] = 4
    """Number of worker processes that decode and encode images."""
    worker_timeout: Annotated[float, WORKER_TIMEOUT] = 600.0
    """Seconds without a result from the worker processes after which the program ends."""
    train_split: Annotated[str, PATH] = "train"
    """Name of the folder in SOURCE that holds the training images. If a list in SOURCE names the
    training images, this is the list's name without .txt."""
    val_split: Annotated[str, PATH] = "val"
    """Name of the folder in SOURCE that holds the validation images. If a list in SOURCE names the
    validation images, this is the list's name without .txt."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """What to do with an image that cannot be read. fail: stop. skip: leave it out."""


@dataclasses.dataclass(frozen=True)
class CheckConfig(Options):
    """Decodes every image of a data set and names those that cannot be read. The exit status is 1
    if an image cannot be read."""

    data_dir: Annotated[str, Positional, PATH]
    """The images: folders, lists of files or shards, as for --data-dir of fastgn.train."""
    workers: Annotated[int, WORKERS] = 4
    """Number of worker processes that decode images."""
    worker_timeout: Annotated[float, WORKER_TIMEOUT] = 600.0
    """Seconds without a result from the worker processes after which the program ends."""
    train_split: Annotated[str, PATH] = "train"
    """Name of the folder in DATA-DIR that holds the training images. If a list in DATA-DIR names
    the training images, this is the list's name without .txt."""
    val_split: Annotated[str, PATH] = "val"
    """Name of the folder in DATA-DIR that holds the validation images. If a list in DATA-DIR names
    the validation images, this is the list's name without .txt."""
    output: Annotated[str | None, PATH] = None
    """Also write the result into this JSON file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        written = {"--output": self.output}
        check_written(written, [("DATA-DIR", self.data_dir)])
        check_outside_data(written, self.data_dir, (self.train_split, self.val_split))
