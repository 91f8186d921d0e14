"""Allowed values for the fields of an options dataclass: ranges of numbers, texts, paths.

A numeric field declares its range beside its default, and the range is checked automatically:

    epochs: Annotated[int, Range(1, 100_000)] = 100
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from fastgn.errors import check


@dataclasses.dataclass(frozen=True)
class Range:
    """Smallest and largest value of a numeric option. NaN and infinity are never allowed."""

    low: float
    high: float
    above: bool = False
    """Whether `low` itself is excluded."""
    below: bool = False
    """Whether `high` itself is excluded."""
    hint: str = ""
    """Text that is appended to the message about a value out of range."""

    def __post_init__(self) -> None:
        assert -math.inf < self.low < self.high < math.inf, "both ends of a range are finite"

    def __contains__(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {format_number(self.low)}"
        return f"{low} and {'below' if self.below else 'at most'} {format_number(self.high)}"


PROBABILITY = Range(0, 1)
"""Range of a probability."""
RATE = Range(0, 1, below=True)
"""Range of a share that is below 1, such as a dropout rate."""
PIXELS = Range(0, 1, hint="pixels are in 0..1, so write 4/255")
"""Range of a distance between images whose pixels lie in 0..1."""
WEIGHT = Range(0, 1e6)
"""Range of the factor of a term of the loss."""
EPOCHS = Range(0, 100_000)
SEED = Range(0, 2**63 - 1)
"""Range of a seed."""
IMAGES = Range(1, 2**31 - 1)
"""Range of a number of images in a data set."""
BATCH = Range(1, 2**20)
"""Range of a number of images that are in memory at once."""
WORKERS = Range(0, 1024)
"""Range of a number of worker processes."""
MINUTES = Range(0, 10_000, above=True)
"""Range of a waiting time in minutes."""
WORKER_TIMEOUT = Range(0.1, 604_800)
"""Range of a waiting time in seconds, up to a week."""


@dataclasses.dataclass(frozen=True)
class PathRule:
    """Limits on the text of a path that hold on every file system."""

    part_bytes: int = 255
    """Largest number of bytes in one name of the path."""
    whole_bytes: int = 4095
    """Largest number of bytes in the whole path."""

    def find_fault(self, text: str) -> str | None:
        """Returns what is wrong with a path, or None."""
        try:
            content = text.encode()
        except UnicodeEncodeError:
            return "it is not UTF-8"
        if b"\0" in content:
            return "it contains a null character"
        if max(map(len, content.split(b"/"))) > self.part_bytes:
            return f"no name in it may be longer than {self.part_bytes} bytes"
        if len(content) > self.whole_bytes:
            return f"it must be at most {self.whole_bytes} bytes long"
        return None


PATH = PathRule()
"""Marks an option as a file or a folder, as in Annotated[str, PATH]."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Base class for a group of options. It checks numbers, paths and texts."""

    def __post_init__(self) -> None:
        """Raises UserError if a number is out of its field's range, a path is not valid, or a text
        is empty."""
        kind: Any = type(self)  # Any, because mypy does not know that this class can be hashed
        for name, allowed in find_ranges(kind).items():
            for value in iterate_numbers(getattr(self, name)):
                given = f"--{format_flag(name)} {format_number(value)}"
                hint = f": {allowed.hint}" if allowed.hint else ""
                check(value in allowed, f"{given} is out of range: it must be {allowed}{hint}")
        # an empty text, such as from --output "$UNSET", must not be taken for the default
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            empty = value == "" and field.default != ""
            check(
                not (empty or (isinstance(value, tuple) and "" in value)),
                f"--{format_flag(field.name)} has an empty value: give a value, or leave the flag "
                "out",
            )
        for name in find_paths(kind):
            value = getattr(self, name)
            for text in value if isinstance(value, tuple) else (value,):
                if text is not None:
                    check_path(f"--{format_flag(name)}", text)


def check_path(name: str, text: str) -> None:
    """Raises UserError unless a text can be a path.

    name: what the message calls the path, such as a flag.
    """
    reason = PATH.find_fault(text)
    shown = repr(text) if len(text) < 60 else f"{text[:40]!r}..."
    check(reason is None, f"{name} {shown} is not a valid path: {reason}")


def check_pixels(name: str, value: float) -> None:
    """Raises UserError unless a distance fits images whose pixels lie in 0..1.

    name: what the message calls the distance, such as a flag.
    """
    check(
        value in PIXELS,
        f"{name} {format_number(value)} is out of range: it must be {PIXELS}: {PIXELS.hint}",
    )


@functools.cache
def find_ranges(kind: Any) -> dict[str, Range]:
    """Returns the range of each numeric field of an options dataclass.

    Raises AssertionError if a numeric field has no range, because nothing would check its values.
    """
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        parts = list(iterate_annotations(hint))
        allowed = [part for part in parts if isinstance(part, Range)]
        numeric = bool({int, float} & {p for p in parts if isinstance(p, type)})
        assert len(allowed) == numeric, f"{kind.__name__}.{name} needs one Range, not {allowed}"
        if allowed:
            found[name] = allowed[0]
    return found


@functools.cache
def find_paths(kind: Any) -> list[str]:
    """Returns the names of an options dataclass's fields that are files or folders."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return [name for name, hint in hints.items() if PATH in iterate_annotations(hint)]


@functools.cache
def find_lists(kind: Any) -> list[str]:
    """Returns the names of an options dataclass's fields that hold any number of values.

    Includes the fields of dataclasses that are themselves fields of the options dataclass.
    """
    found = []
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        parts = list(iterate_annotations(hint))
        found += [name] if ... in parts else []
        groups = [p for p in parts if isinstance(p, type) and dataclasses.is_dataclass(p)]
        found += [n for group in groups for n in find_lists(group)]
    return found


def iterate_annotations(hint: Any) -> Iterator[Any]:
    """Yields the plain types in a type hint, and the metadata of Annotated, such as a Range."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        yield from hint.__metadata__
        yield from iterate_annotations(hint.__origin__)
    elif origin in (typing.Union, types.UnionType, tuple):
        for argument in typing.get_args(hint):
            yield from iterate_annotations(argument)
    else:
        yield hint


def iterate_numbers(value: Any) -> Iterator[float]:
    """Yields the value if it is a number, or the numbers in the value if it is a tuple."""
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            yield item


def format_number(value: float) -> str:
    """Returns a number as a user would write it, such as 4/255 for 0.01568627450980392."""
    if isinstance(value, float) and 0 < abs(value) <= 1 and len(f"{value:g}") > 5:
        for denominator in (255, 510):
            numerator = value * denominator
            if abs(numerator - round(numerator)) < 1e-9:
                return f"{round(numerator)}/{denominator}"
    if isinstance(value, float) and value.is_integer():
        return str(int(value)) if abs(value) < 1e6 else f"{value:g}"
    return str(value)


def format_flag(name: str) -> str:
    """Returns the name of a field as it is written in its flag, with dashes."""
    return name.replace("_", "-")
