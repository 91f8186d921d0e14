"""Mistakes of the user: how they are raised, worded and printed."""

import difflib
import os
import sys
import time
from collections.abc import Iterable

SUGGESTIONS = 5
"""Number of near names that a message shows."""


class UserError(ValueError):
    """A mistake of the user: one line that names the value given and what would be right."""


def check(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns a question with the nearest valid names, or all valid names if none is near.

    If one name is very near, it is the only one. If no name is near, and more names are valid than
    fit into a line, the text gives their number.
    """
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    close = close or difflib.get_close_matches(name, names, n=SUGGESTIONS, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    if len(names) > 60:
        return f"none of the {len(names)} valid names is like it"
    return f"valid: {', '.join(names)}"


def parse_number(text: str | float) -> float:
    """Returns the value of a number or of a fraction such as '4/255'.

    Raises UserError if the text is neither.
    """
    try:
        numerator, _, denominator = str(text).partition("/")
        value = float(numerator) / float(denominator or 1)
    except ZeroDivisionError:
        raise UserError(f"{text!r} divides by 0; write 0.0157 or 4/255") from None
    except ValueError:
        raise UserError(f"{text!r} is not a number; write 0.0157 or 4/255") from None
    return value


def say_error(line: str) -> None:
    """Prints a mistake to stderr, once for all ranks.

    torchrun ends every rank as soon as one has left with an error, so the first has to leave before
    the others. One that is alone in its mistake, with an image that it cannot read, outlives the
    wait and speaks for itself.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)
    print(line, file=sys.stderr, flush=True)
