"""Mistakes of the user: how they are raised, worded and printed."""

import contextlib
import difflib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TextIO

SUGGESTIONS = 5
"""Number of near names that a message shows."""


class UserError(ValueError):
    """A mistake of the user: one line that names the value given and what would be right.

    Names of files, classes and runs may hold anything, so characters that would break the line or
    steer the terminal are shown as their escapes.
    """

    def __str__(self) -> str:  # the argument stays as it is: torch puts a worker's traceback there
        return escaped(super().__str__())


def escaped(text: str) -> str:
    """Returns a text in which all that a terminal does not show as it is stands as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def check(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns a question with the nearest valid names, or all valid names if none is near.

    Names that a slip of the fingers explains stand alone, and so does one that is very near.
    Otherwise names that begin with the text come first, then those that contain it, or of which one
    abbreviates the other, and then those that look like it. If no name is near, and more names are
    valid than fit into a line, the text gives their number.
    """
    names = sorted(set(valid))
    close = find_mistyped(name, names) or find_similar(name, names)
    if close:
        return f"did you mean {' or '.join(map(repr, close[:SUGGESTIONS]))}?"
    if len(names) > 60:
        return f"none of the {len(names)} valid names is like it"
    return f"valid: {', '.join(names)}"


def find_mistyped(name: str, names: Sequence[str]) -> list[str]:
    """Returns the names that are the fewest edits away: at most two, or one in a short name."""
    text = simplify(name)
    allowed = 2 if len(text) > 5 else 1
    found = {
        n: count_edits(text, simplify(n))
        for n in names
        if abs(len(simplify(n)) - len(text)) <= allowed
    }
    least = min(found.values(), default=allowed + 1)
    return [n for n, count in found.items() if count == least <= allowed and least < len(text)]


def find_similar(name: str, names: Sequence[str]) -> list[str]:
    """Returns the names that are like a text, the best first; only the best if it is very near."""
    text = simplify(name)
    ratios = {n: difflib.SequenceMatcher(None, simplify(n), text).ratio() for n in names}

    def rank(n: str) -> int:
        if len(text) > 1 and simplify(n).startswith(text):
            return 0
        abbreviates = len(text) > 1 and (
            join_initials(text) == simplify(n) or join_initials(simplify(n)) == text
        )
        if abbreviates or (len(text) > 2 and text in simplify(n)):
            return 1
        return 2 if ratios[n] >= 0.6 else 3

    close = sorted((n for n in names if rank(n) < 3), key=lambda n: (rank(n), -ratios[n]))
    return close[:1] if close and ratios[close[0]] >= 0.85 else close


def simplify(name: str) -> str:
    """Returns a name as names are compared: without a flag's dashes, in small letters."""
    return name.lstrip("-").lower().replace("_", "-")


def join_initials(name: str) -> str:
    """Returns the first letters of the words of a plain name."""
    return "".join(word[0] for word in name.split("-") if word)


def count_edits(left: str, right: str) -> int:
    """Returns how many letters must be put in, left out, changed or swapped with the next to make
    one text the other."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left):
        before, above, row = row, before, [i + 1]
        for j, b in enumerate(right):
            row.append(min(before[j + 1] + 1, row[j] + 1, before[j] + (a != b)))
            if i and j and (a, left[i - 1]) == (right[j - 1], b):
                row[-1] = min(row[-1], above[j - 1] + 1)
    return row[-1]


def parse_number(text: str | float) -> float:
    """Returns the value of a number or of a fraction such as '4/255'.

    Raises UserError if the text is neither.
    """
    try:
        numerator, slash, denominator = str(text).partition("/")
        value = float(numerator) / float(denominator or 1)
        if slash and not (math.isfinite(float(numerator)) and math.isfinite(float(denominator))):
            raise ValueError  # 4/inf would be 0
    except ZeroDivisionError:
        raise UserError(f"{text!r} divides by 0; write 0.0157 or 4/255") from None
    except ValueError:
        raise UserError(f"{text!r} is not a number; write 0.0157 or 4/255") from None
    return value


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its class's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def say_error(line: str) -> None:
    """Prints a mistake to stderr, once for all ranks.

    torchrun ends every rank as soon as one has left with an error, so the first has to leave before
    the others. One that is alone in its mistake, with an image that it cannot read, outlives the
    wait and speaks for itself.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)
    print_line(line)


def print_line(line: str, file: TextIO | None = None) -> None:
    """Prints a line to stderr or to `file`, with escapes for all that a terminal would obey."""
    print(escaped(line), file=file or sys.stderr, flush=True)


@contextlib.contextmanager
def passed_over(
    what: str, report: Callable[[str], None] | None = print_line
) -> Iterator[list[Exception]]:
    """Runs something that a run or an evaluation can do without, such as a picture.

    If it fails, the error is reported in one line and is in the list that this gives.
    """
    failure: list[Exception] = []
    try:
        yield failure
    except Exception as error:
        failure.append(error)
        if report is not None:
            line = f"{what} failed and is left out: {type(error).__name__}: {first_line(error)}"
            report(f"warning: {line}")
