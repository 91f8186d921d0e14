"""Raises and prints errors about mistakes of the user, and suggests similar names in them."""

import contextlib
import difflib
import errno
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TextIO, TypeVar

T = TypeVar("T")

SUGGESTIONS = 5
"""Largest number of similar names that a message suggests."""


class UserError(ValueError):
    """A mistake of the user. The message is one line with the given value and the remedy.

    Names of files, classes and runs may contain any character. Characters that would break the line
    or control the terminal are printed as escapes.
    """

    def __str__(self) -> str:
        # escape here, not in __init__, because torch later adds a worker's traceback to the message
        return escape(super().__str__())


def escape(text: str) -> str:
    """Returns a text in which all unprintable characters are replaced by escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def check(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_name(name: str, valid: Iterable[str], invalid_option: str) -> None:
    """Raises UserError unless a name is valid. The message suggests similar names.

    invalid_option: beginning of the message, such as "--opt 'adamx'".
    """
    if name not in valid:
        did_you_mean = nearest(name, valid)  # computed only for an invalid name, because it is slow
        raise UserError(f"{invalid_option}: {did_you_mean}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns a question that suggests similar names, or a list of the valid names if none is
    similar.

    Names that differ from `name` by a typing error, or by very little, are suggested alone.
    Otherwise names that begin with `name` come first. Names that contain or abbreviate `name` come
    next, and then names that look like it. If no name is similar and more than 60 names are valid,
    the text gives only their number.
    """
    names = sorted(set(valid))
    close = find_mistyped(name, names) or find_similar(name, names)
    if close:
        return f"did you mean {' or '.join(map(repr, close[:SUGGESTIONS]))}?"
    if len(names) > 60:
        return f"none of the {len(names)} valid names is similar"
    return f"valid: {', '.join(names)}"


def find_mistyped(name: str, names: Sequence[str]) -> list[str]:
    """Returns the names that differ from `name` by the fewest edits.

    Names that differ by more than two edits are never returned. If `name` has at most five letters,
    names that differ by more than one edit are never returned.
    """
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
    """Returns the names that are similar to `name`, the most similar first.

    If the first of them is very similar, it is returned alone.
    """
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
    """Returns a name in lower case, without a flag's leading dashes, and with - in place of _.

    Names are compared in this form.
    """
    return name.lstrip("-").lower().replace("_", "-")


def join_initials(name: str) -> str:
    """Returns the first letters of the words of a simplified name."""
    return "".join(word[0] for word in name.split("-") if word)


def count_edits(left: str, right: str) -> int:
    """Returns the number of edits that turn one text into the other.

    An edit inserts, removes or changes one letter, or swaps two neighbouring ones.
    """
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left):
        before, above, row = row, before, [i + 1]
        for j, b in enumerate(right):
            row.append(min(before[j + 1] + 1, row[j] + 1, before[j] + (a != b)))
            if i and j and (a, left[i - 1]) == (right[j - 1], b):
                row[-1] = min(row[-1], above[j - 1] + 1)
    return row[-1]


def find_duplicate(values: Iterable[T]) -> T | None:
    """Returns the first value that occurs a second time, or None if all are different."""
    seen: set[T] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def parse_number(text: str | float) -> float:
    """Returns the value of a number or of a fraction such as '4/255'.

    Raises UserError if the text is neither.
    """
    try:
        numerator, slash, denominator = str(text).partition("/")
        value = float(numerator) / float(denominator or 1)
        if slash and not (math.isfinite(float(numerator)) and math.isfinite(float(denominator))):
            raise ValueError  # without this error, the value of 4/inf would be 0
    except ZeroDivisionError:
        raise UserError(f"{text!r} divides by 0; write 0.0157 or 4/255") from None
    except ValueError:
        raise UserError(f"{text!r} is not a number; write 0.0157 or 4/255") from None
    return value


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class if the message is
    empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def print_error(line: str) -> None:
    """Prints an error message to stderr, only once even if all ranks have the error.

    The first rank prints the message at once. The other ranks wait for 10 seconds. If the first
    rank has the error too, it exits, and torchrun ends the other ranks before they print. If only
    one other rank has the error, for example an unreadable image, it prints the message after the
    wait.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)
    print_line(line)


def print_stopped(program: str, how: str = "run the same command again to continue") -> None:
    """Prints that a signal has ended a program. Only the first rank prints it.

    how: end of the line, which says what the user can do.
    """
    if os.environ.get("RANK", "0") == "0":
        print_line(f"{program}: stopped; {how}")


def print_line(line: str, file: TextIO | None = None) -> None:
    """Prints a line to stderr or to `file`. Unprintable characters are replaced by escapes.

    Does nothing if the terminal has been closed.
    """
    with tolerate_hangup():
        print(escape(line), file=file or sys.stderr, flush=True)


@contextlib.contextmanager
def tolerate_hangup() -> Iterator[None]:
    """Ignores the error that is raised if the block writes to a terminal that has been closed."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


@contextlib.contextmanager
def tolerate_failure(
    what: str, report: Callable[[str], None] | None = print_line
) -> Iterator[list[Exception]]:
    """Runs a block whose failure must not end the program, such as drawing a picture.

    If the block fails, the error is reported in one line, and added to the list that is yielded.

    what: what the block does, for the message. report: function that is called with the message.
    None means no message.
    """
    failure: list[Exception] = []
    try:
        yield failure
    except Exception as error:
        failure.append(error)
        if report is not None:
            line = f"{what} failed and is left out: {type(error).__name__}: {first_line(error)}"
            report(f"warning: {line}")
