"""Holds the configuration of a run, which is every option of ``python -m fastgn.train``.

A recipe is a TOML file with options of the command line. The command line overrides the recipe, and
the recipe overrides the defaults of the fields. This package does not import torch, which takes
seconds. So a mistake of the user is reported at once.
"""

import dataclasses
import operator
import os
import tomllib
import types
import typing
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import tomli_w
import tyro

from fastgn.config.groups import (
    ArchitectureConfig,
    AugmentationConfig,
    DatasetConfig,
    OptimizerConfig,
    RunConfig,
    StepConfig,
    brief_epochs,
)
from fastgn.errors import UserError, check, check_name, first_line, nearest, parse_number
from fastgn.files import read_text
from fastgn.objectives.options import ObjectiveConfig, find_schedule_conflict


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains an image classifier. Example: --recipe quickstart_gradnorm. To see the names that you
    can choose from, use --list with recipes, models, methods, activations or optimizers. A pattern
    may follow, as in --list models '*swin*'."""

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
        problem_and_remedy = find_schedule_conflict(
            schedule,
            f"--method {objective.method}",
            has_penalty=objective.has_penalty,
            takes_turns=objective.takes_turns,
            allows_differences=objective.allows_differences,
            ce_weight=objective.gradnorm.ce_weight,
        )
        check(problem_and_remedy is None, f"--schedule {schedule} {problem_and_remedy}")
        last = max(self.run.keep_epochs, default=1)
        check(
            last <= self.optimizer.epochs,
            f"--keep-epochs {last} is after the last epoch, --epochs {self.optimizer.epochs}: "
            f"leave {last} out, or train for more epochs",
        )

    @property
    def eval_eps(self) -> float:
        """Linf radius of PGD-10 in the evaluations during training, in 0..1 pixel units."""
        if self.run.eval_eps is not None:
            return self.run.eval_eps
        objective = self.objective
        return objective.attack.attack_eps if objective.has_attack else objective.gradnorm.eps

    @property
    def ramp_epochs(self) -> float:
        """Number of epochs in which the penalty or attack grows to full strength. It is
        --ramp-epochs, or the default if that option is None."""
        given = self.objective.ramp_epochs
        return brief_epochs(self.optimizer.epochs) if given is None else given

    def replace(self, **values: Any) -> "Config":
        """Returns a copy of the config with other values for some options.

        values: name of an option, as in a recipe -> its new value. Raises UserError if a name is
        unknown, or if a value does not fit its option.
        """
        fitting = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            check_name(name, FIELDS, f"unknown key {key!r}")
            fitting[name] = coerce(name, value)
        return replace_keys(self, fitting)

    def replace_group(self, group: str, values: dict[str, Any]) -> "Config":
        """Returns a copy of the config with other values for some options of one group.

        group: name of the group, such as "optimizer". values: name of an option -> its new value,
        which may be None.
        """
        return dataclasses.replace(
            self, **{group: dataclasses.replace(getattr(self, group), **values)}
        )

    def value(self, key: str) -> Any:
        """Returns the value of an option. key: the option's name in a recipe, such as lr."""
        return getattr(operator.attrgetter(FIELDS[key])(self), key)

    def flat(self) -> dict[str, Any]:
        """Returns a dict from the name of each option to its value. Options whose value is None are
        left out."""
        pairs = {key: self.value(key) for key in FIELDS}
        return {key: value for key, value in pairs.items() if value is not None}

    def changed(self, other: "Config", group: str) -> list[str]:
        """Returns a text such as 'epochs: 5, not 10' for each option whose value differs in the
        other config. The first value in the text is that of this config.

        --data None counts as the kind of data set that it means, so naming this kind is no change.
        group: name of a group, such as "optimizer". Only the options of this group, and of the
        groups inside it, are compared.
        """
        keys = [key for key, path in FIELDS.items() if path.split(".")[0] == group]
        mine, theirs = (c.replace_group("dataset", {"data": c.dataset.kind}) for c in (self, other))
        pairs = ((key, mine.value(key), theirs.value(key)) for key in keys)
        return [f"{key}: {ours!r}, not {theirs!r}" for key, ours, theirs in pairs if ours != theirs]

    @staticmethod
    def from_toml(text: str) -> "Config":
        """Returns the default config, changed by the options in the text of a recipe. Raises
        UserError if the text is invalid."""
        return Config().replace(**parse_toml(text))

    def to_toml(self) -> str:
        """Returns the configuration as the text of a recipe."""
        return tomli_w.dumps(
            {k: list(v) if isinstance(v, tuple) else v for k, v in self.flat().items()}
        )


def replace_keys(options: Any, values: dict[str, Any]) -> Any:
    """Returns a copy of an options dataclass with other values for some options. These options may
    belong to groups inside the dataclass. values: name of an option -> its new value."""
    changes = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = replace_keys(value, values)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(options, **changes)


def find_groups(options: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted path, such as objective.gradnorm, and the value of each options dataclass
    inside `options`. path: text that all these paths begin with."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield path + field.name, value
            yield from find_groups(value, f"{path}{field.name}.")


GROUPS: dict[str, type] = {path: type(group) for path, group in find_groups(Config())}
"""Dotted path of a group of options, such as objective.gradnorm -> dataclass of the group."""
FIELDS: dict[str, str] = {
    field.name: path
    for path, group in GROUPS.items()
    for field in dataclasses.fields(group)
    if f"{path}.{field.name}" not in GROUPS
}
"""Name of an option in a recipe -> dotted path of the group that the option belongs to."""


def coerce(name: str, value: Any) -> Any:
    """Returns a value from a recipe, converted to the type of its option. Raises UserError if the
    value does not fit this type.

    name: name of the option, which is also its key in the recipe.
    """
    hint = typing.get_type_hints(GROUPS[FIELDS[name]])[name]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    options = tuple(o for o in options if o is not type(None))
    kind = options[0]
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UserError(f"{name} = {value!r} is not valid: {nearest(str(value), choices)}")
        return value
    if origin is tuple:
        items, want = value, typing.get_args(kind)
        fits = isinstance(items, (list, tuple)) and (want[-1] is ... or len(items) == len(want))
        of_length = "" if want[-1] is ... else f" of {len(want)} values"
        check(fits, f"{name} = {value!r} should be a list{of_length}")
        return tuple(str(v) if want[0] is str else coerce_scalar(name, v, want[0]) for v in items)
    return coerce_scalar(name, value, kind)


def coerce_scalar(name: str, value: Any, kind: type) -> Any:
    """Returns a single value from a recipe, converted to type `kind`. Raises UserError if the value
    does not fit this type.

    name: key of the value in the recipe, for the error message.
    """
    if (
        issubclass(kind, float)
        and isinstance(value, (int, float, str))
        and not isinstance(value, bool)
    ):
        return parse_number(value)
    right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    check(right, f"{name} = {value!r} should be of type {kind.__name__}")
    return value


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with the package."""
    files = resources.files("fastgn").joinpath("recipes").iterdir()
    names = [f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")]
    # leave out files whose names begin with `_`, because they only hold options that recipes share
    return sorted(name for name in names if not name.startswith("_"))


def load_recipe(name_or_file: str) -> Config:
    """Returns the default config, changed by the options that a recipe sets.

    name_or_file: name of a recipe of the package, or path of a TOML file. Raises UserError if there
    is no such recipe, or if a key or a value in it is invalid.
    """
    if not name_or_file.endswith(".toml"):
        names = recipe_names()
        check_name(name_or_file, names, f"--recipe {name_or_file!r}")
    try:
        return Config().replace(**recipe_values(name_or_file))
    except UserError as error:
        raise UserError(f"--recipe {name_or_file}: {error}") from None


BASES = 8
"""Largest number of recipes that a recipe may build on. A recipe may name another one as its base,
which may itself name a base, and so on."""


def recipe_values(name_or_file: str, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns the options that a recipe sets, together with those that it takes from its base.

    The base is another recipe, which the key `base` names. It is a recipe of the package or a file,
    whose path is relative to the recipe that names it. extended_by: files of the recipes that
    extend this one, directly or indirectly. Raises UserError if a recipe extends itself, or cannot
    be read.
    """
    path, missing = Path(name_or_file), "there is no such file"
    if path.suffix != ".toml":
        path = Path(str(resources.files("fastgn").joinpath("recipes", f"{name_or_file}.toml")))
        missing = nearest(name_or_file, recipe_names())
    # os.path is used, because Path.is_file raises an OSError if the name is too long
    check(os.path.isfile(path), missing)
    path = path.resolve()
    check(path not in extended_by, "this recipe extends itself: give it another base")
    check(
        len(extended_by) <= BASES,
        f"more than {BASES} recipes extend each other in a chain: use fewer",
    )
    read = parse_toml(read_text(path))
    values = {key.replace("-", "_"): value for key, value in read.items()}
    check(
        len(values) == len(read),
        "a key is given twice, once with - and once with _: remove one of the two",
    )
    base = values.pop("base", None)
    if base is None:
        return values
    check(isinstance(base, str), f"base = {base!r} should be the name of a recipe, or a file")
    if base.endswith(".toml"):
        base = str(path.parent / base)
    try:
        return recipe_values(base, (*extended_by, path)) | values
    except UserError as error:
        raise UserError(f"base = {base!r} cannot be used: {error}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Returns the keys and values in the text of a recipe. Raises UserError if it is not TOML."""
    try:
        values = tomllib.loads(text)
        repr(values)  # raises ValueError if a number has too many digits to be printed in a message
    except (ValueError, RecursionError) as error:
        raise UserError(f"the text is not valid TOML: {first_line(error)}") from None
    check("self" not in values, "unknown key 'self'")
    return values


def initial_file(start: str) -> Path:
    """Returns the file of weights that --initial-checkpoint names.

    start: value of --initial-checkpoint, which is the file itself or the folder of a finished run.
    Raises UserError if the file does not exist. If a recipe of the package makes this file, the
    message names the recipe.
    """
    path = Path(start)
    unfinished = os.path.isdir(path)
    file = path / "model.safetensors" if unfinished else path
    if os.path.isfile(file):
        return file
    makers = [
        f"python -m fastgn.train --recipe {name}{' --resume auto' if unfinished else ''}"
        for name in recipe_names()
        if (output := load_recipe(name).run.output) and Path(output) in (path, *path.parents)
    ]
    problem = (
        "this run has not finished (no model.safetensors)"
        if unfinished
        else f"there is no such file or run{'' if path.is_absolute() else f' below {Path.cwd()}'}"
    )
    remedy = f"; make it first: {makers[0]}" if makers else ""
    raise UserError(f"--initial-checkpoint {start}: {problem}{remedy}")


def run_folder(path: Path) -> Path:
    """Returns the folder of a run.

    path: the folder itself, a file in it, or a file in its subfolder checkpoints/.
    """
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == "checkpoints" else folder
