"""Turns an evaluation into one HTML file with tables, pictures and warnings.

The HTML file needs no other file. This module turns the record of an evaluation into texts. The
template report.html.jinja lays out the texts, and escapes every one of them.
"""

import base64
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from fastgn.analysis.tables import WORST, format_radius, wilson_interval
from fastgn.errors import check

NORMS = {"Linf": "L∞", "L2": "L2", "L1": "L1"}
VERDICTS = ("pass", "warn", "fail")
MISSING = "–"
"""Text of a cell without a value."""
COLOURS = ("red", "green", "blue")
LABELS = {
    "images": "images analysed",
    "eps": "ε",
    "misclassified": "images that are wrong without an attack",
    "l1_mean": "mean L1 norm",
    "l1_mean_pgd10_fails": "mean L1 norm of images that withstand PGD-10",
    "l1_mean_pgd10_succeeds": "mean L1 norm of the other images",
    "pgd10_fails": "images that withstand PGD-10",
    "pgd10_succeeds": "images that do not withstand PGD-10",
    "l1_quantiles 0": "smallest L1 norm",
    **{f"l1_quantiles {q}": f"L1 norm that {q} % of the images are below" for q in (5, 25, 75, 95)},
    "l1_quantiles 50": "median L1 norm",
    "l1_quantiles 100": "largest L1 norm",
    **{f"channel_l1_mean {i}": f"mean L1 norm in {c}" for i, c in enumerate(COLOURS)},
    **{
        f"channel_signed_mean {i}": f"mean sum of the gradient in {c}"
        for i, c in enumerate(COLOURS)
    },
    "edge_correlation_mean": "mean correlation of the gradient's magnitude with the edges",
    "linearity uniform error": "error of the linear loss at random points (nats)",
    "linearity uniform relative_error": "error at random points / mean change of the loss there",
    "linearity pgd10 error": "error of the linear loss at PGD-10's points (nats)",
    "linearity pgd10 relative_error": "error at PGD-10's points / mean change of the loss there",
    "cpu_count": "CPU cores",
    "gpus": "GPUs",
    "cuda": "CUDA",
    "batch_size": "images attacked at once",
    "ranks": "processes",
}
"""Key in evaluation.json -> the words that a reader of the HTML report sees for it."""
ONE_PER_IMAGE = ("l1", "channel_l1", "edge_correlation")
"""Keys of statistics that are lists with one entry per image, which the report leaves out."""

Record = Mapping[str, Any]
"""Content of evaluation.json, or a part of it."""
Key = tuple[str, ...]
"""Texts in the first columns of a table's row. They are the name of a statistic, or an attack and
its eps."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table of numbers."""

    text: str = MISSING
    interval: str = ""
    """The confidence interval, in small type below the text."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table of numbers, with a cell per model."""

    key: Key
    cells: Sequence[Cell]
    is_worst: bool = False
    """Whether the row holds the worst case over all attacks."""


@dataclasses.dataclass(frozen=True)
class Head:
    """Head of the column that shows one model's values."""

    name: str
    kinds: Sequence[str] = ()
    """Name of the network and of the training method, in small type below the model's name."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of numbers with a column per model."""

    keys: Sequence[str]
    """Heads of the first columns, which name what each row shows."""
    models: Sequence[Head]
    rows: Sequence[Row]


@dataclasses.dataclass(frozen=True)
class SanityGroup:
    """The sanity checks of one model."""

    name: str
    """Name of the model."""
    counts: str
    """The number of checks with each verdict, such as "9 pass, 1 warn"."""
    checks: Sequence[Record]
    """One dict per check, with its verdict, name and detail."""


def html_report(record: Record, pictures: Mapping[str, bytes], *, title: str) -> str:
    """Returns an evaluation as one HTML file without scripts and without requests.

    Sections for which the record has no values are left out. A dash stands for a value that only
    other models have. Raises UserError if the record holds no models.

    record: the content of evaluation.json. pictures: caption -> PNG.
    """
    models = record.get("models", ())
    check(bool(models), "the evaluation holds no models: there is nothing to report")
    page = load_template().render(
        title=title,
        facts=list_facts(record, models),
        links=list_links(models),
        norm=name_norm(record),
        accuracy=tabulate_accuracies(models),
        statistics=tabulate_statistics(models),
        sanity=group_checks(models),
        pictures=[(caption, base64.b64encode(png).decode()) for caption, png in pictures.items()],
        warnings=[(m["name"], text) for m in models for text in m.get("warnings") or ()],
        about=list_conditions(record, models),
    )
    # a file name may hold half a surrogate pair, which UTF-8 cannot encode
    return page.encode(errors="replace").decode()


def load_template() -> jinja2.Template:
    """Returns the template of the report, which escapes every value."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["VERDICTS"] = VERDICTS
    return environment.get_template("report.html.jinja")


# ------------------------------------------------------------------------------- sections


def list_facts(record: Record, models: Sequence[Record]) -> list[tuple[str, str]]:
    """Returns the names and values of the facts that the page begins with, such as the norm and the
    number of images. models: the models' entries in evaluation.json."""
    radii = {r["eps"] for m in models for r in m["results"] if r["eps"]}
    units = record.get("eps_units", "0..1 pixels")
    facts = {
        "Images": "; ".join(remove_duplicates(m["subset"] for m in models)),
        "Number of images": ", ".join(remove_duplicates(str(m["images"]) for m in models)),
        "Norm": name_norm(record),
        f"ε in {units}": ", ".join(map(format_radius, sorted(radii))),
        "Seed": str(record.get("seed", "")),
    }
    return [(name, text) for name, text in facts.items() if text]


def list_links(models: Sequence[Record]) -> list[tuple[str, str]]:
    """Returns (section of the report, text of a link to it) for failed checks and warnings.

    The page begins with these links, because a reader should see them first. models: the models'
    entries in evaluation.json.
    """
    failed = sum(c["verdict"] == "fail" for m in models for c in m.get("sanity") or ())
    warned = sum(len(m.get("warnings") or ()) for m in models)
    links = []
    if failed:
        links.append(("sanity", f"{count_noun(failed, 'sanity check')} failed"))
    if warned:
        links.append(("warnings", count_noun(warned, "warning")))
    return links


def tabulate_accuracies(models: Sequence[Record]) -> Table:
    """Returns the table of accuracies, with a column for each model and a row for each attack and
    eps. models: the models' entries in evaluation.json."""
    columns: list[dict[Key, Cell]] = []
    worst: set[Key] = set()
    for model in models:
        column: dict[Key, Cell] = {}
        for result in model["results"]:
            is_clean = result["attack"] == "clean"
            key = (result["attack"], "" if is_clean else format_radius(result["eps"]))
            column[key] = format_accuracy(result["accuracy"], model["images"])
            if result["attack"] == WORST:
                worst.add(key)
        columns.append(column)
    # rows of the worst case come last, even after attacks that only a later model has
    keys = sorted(
        remove_duplicates(key for c in columns for key in c), key=lambda key: key in worst
    )
    heads = [Head(m["name"], [str(m[k]) for k in ("model", "method") if m.get(k)]) for m in models]
    return Table(("attack", "ε"), heads, make_rows(keys, columns, worst))


def tabulate_statistics(models: Sequence[Record]) -> Table:
    """Returns the table of gradient statistics, with a column for each model and a row for each
    statistic. models: the models' entries in evaluation.json."""
    columns: list[dict[Key, Cell]] = [
        {
            (label(key),): Cell(format_value(item))
            for key, item in flatten(model.get("statistics") or {})
            if item is None or isinstance(item, (str, bool, int, float))
        }
        for model in models
    ]
    keys = remove_duplicates(key for column in columns for key in column)
    return Table(("statistic",), [Head(m["name"]) for m in models], make_rows(keys, columns))


def make_rows(
    keys: Iterable[Key], columns: Sequence[Mapping[Key, Cell]], worst: Iterable[Key] = ()
) -> list[Row]:
    """Returns a table row for each key, with a cell from each column.

    columns: for each model, key -> cell. worst: keys of the rows that hold a worst case.
    """
    return [Row(key, [c.get(key, Cell()) for c in columns], key in set(worst)) for key in keys]


def flatten(values: Record) -> Iterator[tuple[str, Any]]:
    """Yields (key, value) for all values in nested dicts.

    The keys of the nesting levels are joined by spaces. Lists with more than 4 entries, and lists
    with one entry per image, are left out.
    """
    for key, item in values.items():
        if isinstance(item, Mapping):
            yield from flatten({f"{key} {inner}": x for inner, x in item.items()})
        elif isinstance(item, Sequence) and not isinstance(item, str):
            if len(item) <= 4 and key not in ONE_PER_IMAGE:
                yield from ((f"{key} {i}", x) for i, x in enumerate(item))
        else:
            yield key, item


def group_checks(models: Sequence[Record]) -> list[SanityGroup]:
    """Returns the sanity checks of each model for which --sanity was used."""
    groups = []
    for model in models:
        checks = model.get("sanity") or ()
        if checks:
            counts = Counter(c["verdict"] for c in checks)
            text = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v])
            groups.append(SanityGroup(model["name"], text, checks))
    return groups


def list_conditions(record: Record, models: Sequence[Record]) -> list[tuple[str, str]]:
    """Returns the names and values of the conditions of the measurement, such as versions."""
    seconds = sum(r.get("seconds") or 0 for m in models for r in m["results"])
    versions = record.get("versions") or {}
    facts: dict[str, Any] = {
        "commit": record.get("commit"),
        **(record.get("hardware") or {}),
        "batch_size": record.get("batch_size"),
        "ranks": record.get("ranks"),
        "seconds of attacks": f"{seconds:,.1f}" if seconds else None,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [(label(k), join_counted(v)) for k, v in facts.items() if v not in (None, "", [])]


# ------------------------------------------------------------------------------- texts


def format_accuracy(accuracy: float | None, images: int) -> Cell:
    """Returns an accuracy in per cent with its Wilson interval."""
    if accuracy is None:
        return Cell()
    low, high = wilson_interval(accuracy, images)
    return Cell(f"{accuracy:.1%}", f"{low * 100:.1f}–{high * 100:.1f}")


def format_value(item: str | bool | int | float | None) -> str:
    """Returns a value of a statistic as text."""
    if item is None:
        return MISSING
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, str):
        return item
    return f"{item:.4g}" if item % 1 else f"{item:,.0f}"


def name_norm(record: Record) -> str:
    """Returns the norm of the attacks as text for the reader, such as L∞."""
    name = str(record.get("norm", "Linf"))
    return NORMS.get(name, name)


def label(key: str) -> str:
    """Returns the words that the report shows for a key. If LABELS does not have the key, it is
    spelled out, such as mean L1 for mean_l1."""
    upper = {"l1": "L1", "l2": "L2", "linf": "L∞", "cpu": "CPU"}
    spelled = " ".join(upper.get(word, word) for word in key.replace("_", " ").split())
    return LABELS.get(key, spelled)


def join_counted(item: Any) -> str:
    """Returns a value as text. Equal entries of a list are counted, as in 8 × NVIDIA H100."""
    if not isinstance(item, (list, tuple)):
        return str(item)
    counts = Counter(map(str, item)).items()
    return ", ".join(text if count == 1 else f"{count} × {text}" for text, count in counts)


def count_noun(count: int, noun: str) -> str:
    """Returns a number with its noun, in the plural if need be."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def remove_duplicates(items: Iterable[Any]) -> list[Any]:
    """Returns the different items, in the order in which they first occur."""
    return list(dict.fromkeys(items))
