"""Functions that all figures share: they save a figure, shorten names and set up an axis."""

import io
import math
import warnings
from collections.abc import Iterable
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fastgn.errors import escape


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    """Returns a figure as a PNG.

    All texts are drawn exactly as they are written. Names of runs and classes may contain `$`,
    which would begin a formula in matplotlib.
    """
    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_usetex(False)
        text.set_text("\n".join(map(escape, text.get_text().split("\n"))))
    out = io.BytesIO()
    plain = matplotlib.rc_context({"text.parse_math": False, "text.usetex": False})
    with plain, warnings.catch_warnings():
        # a character that the font lacks, such as an emoji, is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # by this entry fastgn later recognises its own figures, which it may overwrite
        figure.savefig(out, format="png", dpi=dpi, metadata={"Software": "fastgn"})
    return out.getvalue()


def shorten(name: str, limit: int = 40) -> str:
    """Returns a name on one line, without its middle part if it is longer than `limit` characters.

    A leading underscore gets a space before it, because matplotlib leaves labels that begin with
    an underscore out of legends.
    """
    name = escape(name).strip() or "unnamed"
    if len(name) > limit:
        head = limit // 2
        name = f"{name[:head]}…{name[head + 1 - limit :]}"
    return f" {name}" if name.startswith("_") else name


def log_axis(axes: Axes, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """Makes one axis logarithmic, with limits around the values and plain numbers at the ticks.

    The limits are at least a factor of 10 apart, so that values which hardly differ look as if
    they hardly differ. Values that are not above 0 or not finite cannot be drawn and are ignored.
    """
    shown = [v for v in values if 0 < v < math.inf] or [1.0]
    middle = math.sqrt(min(shown)) * math.sqrt(max(shown))
    low = min(min(shown) / 1.1, middle / math.sqrt(10))
    high = max(max(shown) * 1.1, middle * math.sqrt(10))
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}lim": (low, high)})
    axes.set(**{f"{which}scale": "log"})
    steps = (1, 2, 5) if high / low <= 1000 else (1,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
