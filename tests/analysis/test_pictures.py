"""What is drawn: names of any characters, ticks that can be read, frames with a legend."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from fastgn.analysis import canvas, figures, pareto
from fastgn.analysis.canvas import shorten, to_png

NAMES = (
    "$x_",
    r"\frac{$ a^{b}$ %s {}",
    "_hidden",
    "\x1b[31mred\x07, two\nlines\r\t, half \udcff of a pair, \U0001f600",
    "long " * 60,
    "",
)
ROWS = [{"eps": e / 255, "accuracy": 0.8 - 0.1 * e} for e in range(4)]


def view(name: str, clean: tuple[int, ...], attacked: tuple[int, ...]) -> figures.ModelView:
    images = torch.rand(len(clean), 3, 8, 8)
    predicted = torch.tensor(clean), torch.tensor(attacked)
    return figures.ModelView(name, images - 0.5, images, *predicted)


def pictures(name: str, classes: tuple[str, ...] = ("a", "b")) -> dict[str, Callable[[], bytes]]:
    """Every kind of figure of the package, with a name wherever one is shown."""
    rows = [{"epoch": 1.0, "loss": 2.0, "grad_l1": 3.0}, {"epoch": 2.0, "loss": math.inf}]
    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    trials = [{"number": 0, "clean": 0.5, "robust": 0.25}]
    return {
        "curves": lambda: figures.draw_curves(rows, name),
        "pictures": lambda: figures.draw_pictures(
            images, labels, [view(name, (0, 1), (1, 1))], classes, 0.1
        ),
        "curve": lambda: figures.draw_robust_curve({name: ROWS}, name, name),
        "histograms": lambda: figures.draw_gradient_histograms({name: [0.0, 1.0, 2.0]}),
        "epochs": lambda: figures.draw_norm_against_epoch({name: [(0, 1.0), (1, 0.0)]}),
        "pareto": lambda: pareto.draw_pareto(trials, 0, name),
    }


@pytest.mark.parametrize("kind", pictures(""))
@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_drawn(kind: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pictures(name, (name, "b"))[kind]().startswith(b"\x89PNG")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.text(st.characters(), max_size=300))
def test_any_text_can_be_drawn(text: str) -> None:
    figure = Figure(figsize=(2, 1))
    figure.text(0, 0, text)
    figure.text(0, 0, shorten(text))
    assert to_png(figure).startswith(b"\x89PNG")
    assert len(shorten(text)) <= 41 and "\n" not in shorten(text)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn, so that their parts can be asked for."""
    found: list[Figure] = []

    def keep(figure: Figure, dpi: int = 110) -> bytes:
        found.append(figure)
        return to_png(figure, dpi)

    for module in (figures, pareto):
        monkeypatch.setattr(module, "to_png", keep)
    return found


def test_every_run_is_in_the_legend(drawn: list[Figure]) -> None:
    for kind in ("curve", "histograms", "epochs"):
        pictures("_hidden")[kind]()
        (legend,) = [axes.get_legend() for axes in drawn[-1].axes]
        assert legend is not None and "_hidden" in legend.get_texts()[0].get_text()


RANGES = [(1, 1), (19.9, 20), (3, 30), (0.7, 900), (1e-12, 1e3), (1e-30, 1e30), (150, 220)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_logarithmic_ticks_can_be_read(low: float, high: float, drawn: list[Figure]) -> None:
    """At least two of them, as plain numbers, none over another."""
    figures.draw_gradient_histograms({"a": [low, high]})
    figures.draw_norm_against_epoch({"a": [(0, low), (1, high)]})
    for figure, name in zip(drawn, ("x", "y"), strict=True):
        axis = getattr(figure.axes[0], f"{name}axis")
        ends = sorted(getattr(figure.axes[0], f"get_{name}lim")())
        labels = [
            t.label1
            for t in (*axis.get_major_ticks(), *axis.get_minor_ticks())
            if t.label1.get_text() and ends[0] <= t.get_loc() <= ends[1]
        ]
        assert len(labels) >= 2
        for label in labels:
            place = label.get_position()["xy".index(name)]
            assert math.isclose(float(label.get_text()), place, rel_tol=1e-5)
        boxes = [label.get_window_extent() for label in labels]
        assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_a_norm_that_hardly_changes_looks_flat(drawn: list[Figure]) -> None:
    """Of its panel, a change by 2 % takes less than a twentieth."""
    figures.draw_norm_against_epoch({"a": [(0, 20.0), (1, 19.6)]})
    figures.draw_curves([{"epoch": i, "grad_l1": 20 - 0.4 * i} for i in (0, 1)], "a")
    for axes in (drawn[0].axes[0], drawn[1].axes[1]):
        box = axes.get_window_extent()
        (_, above), (_, below) = axes.transData.transform([(0, 20.0), (1, 19.6)])
        assert box.y0 < below < above < box.y1 and above - below < box.height / 20


def test_frames_say_what_the_attack_has_changed(drawn: list[Figure]) -> None:
    """An image that was wrong before the attack is no success of the attack."""
    images, labels = torch.rand(3, 3, 8, 8), torch.tensor([0, 0, 0])
    figures.draw_pictures(images, labels, [view("m", (0, 0, 1), (0, 1, 1))], ("a", "b"), 0.1)
    frames = [axes.spines["left"].get_edgecolor()[:3] for axes in drawn[0].axes[4::5]]
    colours = (figures.GREEN, figures.RED, figures.GREY)
    assert frames == [tuple(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)) for c in colours]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [*figures.FRAMES.values()]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_accuracies_of_a_sweep_stay_within_their_axes(value: float, drawn: list[Figure]) -> None:
    pareto.draw_pareto([{"number": 0, "clean": value, "robust": value}], 0, "study")
    for ends in (drawn[0].axes[0].get_xlim(), drawn[0].axes[0].get_ylim()):
        assert 0 <= ends[0] < ends[1] <= 1 and ends[0] <= value <= ends[1]


def test_a_users_settings_of_matplotlib_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """LaTeX is not asked for text, though a matplotlibrc says so."""
    monkeypatch.setitem(canvas.matplotlib.rcParams, "text.usetex", True)
    assert pictures("$a")["curves"]().startswith(b"\x89PNG")
