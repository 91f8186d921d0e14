"""The search space of a sweep, which consists of trials. A trial is one training run.

--space names fields of the configuration, such as lr, and the values that trials may give them.
--set gives a field the same value in all trials.
"""

import contextlib
import dataclasses
import math
from typing import Any

from fastgn.config import FIELDS, Config, load_recipe
from fastgn.config.programs import SweepConfig
from fastgn.errors import UserError, check, find_duplicate, nearest, parse_number

NOT_SWEPT = ("recipe", "output", "resume", "device", "data", "data_dir", "log_wandb")
"""Fields that --space may not vary, because trials could not be compared or could not run."""


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One field of --space and the values that trials may give it: a range or a list of choices."""

    name: str
    """Name of the field."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    """Whether values are drawn on a logarithmic scale."""
    whole: bool = False
    """Whether values are whole numbers."""
    choices: tuple[Any, ...] = ()
    """The values if they are a list. Empty if they are a range."""

    def suggest(self, trial: Any) -> Any:
        """Returns the value that Optuna chooses for a trial."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)


def make_base_config(cfg: SweepConfig) -> Config:
    """Returns the configuration that all trials share.

    Raises UserError if the recipe or a value of --set is invalid.
    """
    base = load_recipe(cfg.recipe)
    pairs = [split_assignment("--set", text) for text in cfg.set]
    try:
        base = base.replace(**{name: parse_value(value) for name, value in pairs})
    except UserError as error:
        raise UserError(f"--set {' '.join(cfg.set)}: {error}") from None
    base = base.replace_group("run", {"output": None, "resume": None})
    check(
        base.run.eval_images > 0,
        "trials are judged by their accuracy on validation images, but the recipe has "
        "--eval-images 0: add --set eval_images=1000",
    )
    return base


def parse_space(cfg: SweepConfig, base: Config) -> list[Dimension]:
    """Returns the dimensions of --space, which are fields and the values that they may have.

    Raises UserError if a dimension is invalid, or if trials that differ in it could not be
    compared.
    """
    space = [parse_dimension(text, base) for text in cfg.space]
    names = [d.name for d in space]
    twice = find_duplicate(names)
    check(twice is None, f"--space has the field {twice} twice: leave one out")
    judges = {"eval_images", "eval_eps", "eval_interval"} & set(names)
    check(
        not judges,
        f"--space {' '.join(sorted(judges))}: trials can only be compared if this has the same "
        "value in all of them: use --set instead of --space",
    )
    radii = {"eps", "attack_eps", "method"} & set(names)
    check(
        not radii or base.run.eval_eps is not None,
        f"--space {' '.join(sorted(radii))} changes the radius eps at which the accuracy of trials "
        "is measured: add --set eval_eps=0.0157",
    )
    return space


def parse_dimension(text: str, base: Config) -> Dimension:
    """Returns the dimension that one text of --space describes.

    Raises UserError if the field is unknown, or if a value is not allowed for the field.
    """
    name, value = split_assignment("--space", text)
    if ":" not in value:
        choices = tuple(parse_value(v) for v in value.split(","))
        check(
            len(set(choices)) == len(choices) > 1,
            f"--space {text}: write FIELD=LOW:HIGH, or FIELD=A,B with at least 2 different choices",
        )
        for choice in choices:
            check_value(base, name, choice)
        return Dimension(name, choices=choices)
    low, high, *rest = value.split(":")
    check(rest in ([], ["log"]), f"--space {text}: write FIELD=LOW:HIGH or FIELD=LOW:HIGH:log")
    try:
        ends = parse_number(low), parse_number(high)
    except UserError as error:
        raise UserError(f"--space {text}: {error}") from None
    check(
        ends[0] < ends[1] and all(map(math.isfinite, ends)),
        f"--space {text}: {low} must be below {high}",
    )
    check(
        not rest or ends[0] > 0,
        f"--space {text}: a logarithmic range must begin above 0, not at {low}",
    )
    numbers = [int(e) if e.is_integer() else e for e in ends]
    whole = is_whole_field(base, name)
    check(
        not whole or all(isinstance(n, int) for n in numbers),
        f"--space {text}: {name} takes only whole numbers",
    )
    for end in numbers:
        check_value(base, name, end)
    return Dimension(name, *ends, log=bool(rest), whole=whole)


def split_assignment(flag: str, text: str) -> tuple[str, str]:
    """Returns the name of the field and the value in FIELD=VALUE.

    Raises UserError, which names the flag, if the text has another form.
    """
    name, equals, value = text.partition("=")
    name = name.replace("-", "_")
    check(bool(equals and value), f"{flag} {text!r} must have the form FIELD=VALUE")
    if name not in FIELDS:
        raise UserError(f"{flag} {text}: unknown field {name!r}, {nearest(name, FIELDS)}")
    check(
        flag != "--space" or name not in NOT_SWEPT,
        f"{flag} {text}: {name} is not a field that can be tuned",
    )
    return name, value


def parse_value(text: str) -> Any:
    """Returns the value that a text stands for: a boolean, a number or a string.

    The text is written as in a TOML recipe, except that strings have no quotes.
    """
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def check_value(base: Config, name: str, value: Any) -> None:
    """Raises UserError if a field of the base configuration may not have a value.

    name: name of the field.
    """
    try:
        base.replace(**{name: value})
    except UserError as error:
        raise UserError(f"--space {name}={value}: {error}") from None


def is_whole_field(base: Config, name: str) -> bool:
    """Returns whether a field takes only whole numbers."""
    try:
        base.replace(**{name: 1.5})
    except UserError as error:
        return "of type int" in str(error)
    return False
