"""Shows the progress of a program, as a bar on a terminal and as lines in a log file."""

import os
import sys
import time
from typing import Any

from tqdm import tqdm

from fastgn.errors import escape, print_line, tolerate_hangup


def open_bar(**options: Any) -> tqdm:
    """Returns a progress bar on stderr, which is shown only if stderr is a terminal.

    Some terminals, such as those of containers, report a size of 0, with which tqdm would show
    nothing. In such a terminal the bar is 80 columns wide.
    """
    try:
        known = min(os.get_terminal_size(sys.stderr.fileno())) > 0
    except (OSError, ValueError, AttributeError):  # no terminal
        known = False
    shape = {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}
    return tqdm(**{"disable": None} | shape | options)


def print_above(bar: tqdm, line: str) -> None:
    """Prints a line to stderr, above the progress bar if the bar is shown. Control characters are
    escaped."""
    if bar.disable:
        print_line(line)
        return
    with tolerate_hangup():
        bar.write(escape(line), file=sys.stderr)


class ProgressLines:
    """Prints lines about the progress of a program whose progress bar may not be shown.

    The bar is not shown if stderr is no terminal, as in the log file of a batch job.
    """

    PERIOD_S = 60.0
    """Shortest time in seconds from any line to a line that `print_sometimes` prints."""

    def __init__(self, bar: tqdm):
        """bar: the progress bar."""
        self.bar = bar
        self.said = time.monotonic()
        """Time when the last line was printed, or when this object was made."""

    def print(self, line: str) -> None:
        """Prints a line."""
        print_above(self.bar, line)
        self.said = time.monotonic()

    def print_sometimes(self, line: str) -> None:
        """Prints a line, except if the bar is shown or the last line is less than PERIOD_S old."""
        if self.bar.disable and time.monotonic() - self.said >= self.PERIOD_S:
            self.print(line)
