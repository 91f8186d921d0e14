"""Makes Markdown tables, and the cells and notes that several benchmarks use in them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Record = dict[str, Any]
Row = Mapping[str, Any]

ATTACKS = {
    **{"autoattack": "AutoAttack", "pgd-20": "PGD-20"},
    **{"apgd-ce": "APGD-CE", "apgd-t": "APGD-T", "apgd-ce+t": "APGD-CE+T"},
}
"""Name of an attack in the JSON records -> its name in the Markdown tables."""


Column = str | Callable[[Row], str] | Sequence[str]
"""Column of a table: its cells, or how to make a cell from a row (see `make_cell`)."""


def make_cell(row: Row, column: str | Callable[[Row], str]) -> str:
    """Returns the text of a cell of a table.

    column: function that makes the cell from the row, or a text with keys and the format of a
    number. With "launches/count:.0f", the cell is row["launches"]["count"] in the format ".0f". It
    is "" if that is missing or None, and mean ± standard deviation if it is a `timing.summary`.
    """
    if callable(column):
        return column(row)
    keys, _, form = column.partition(":")
    value: Any = row
    for key in keys.split("/"):
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        return plus_minus(value, form)
    return "" if value is None else format(value, form)


def make_table(rows: Sequence[Row], columns: Mapping[str, Column]) -> str:
    """Returns a Markdown table. A column whose cells are all empty is left out.

    columns: heading -> cells of the column, or how to make them from a row (see `make_cell`).
    """
    cells = {
        name: [make_cell(row, column) for row in rows]
        if callable(column) or isinstance(column, str)
        else list(column)
        for name, column in columns.items()
    }
    filled = {name: column for name, column in cells.items() if any(column)}
    lines = [f"| {' | '.join(filled)} |", f"| {' | '.join('---' for _ in filled)} |"]
    lines += [f"| {' | '.join(line)} |" for line in zip(*filled.values(), strict=True)]
    return "\n".join(lines)


def with_notes(table: str, record: Record, *notes: str) -> str:
    """Adds a line of notes to a Markdown table, with PyTorch's version and the record's name."""
    source = f"torch {record['versions']['torch']} (`benchmarks/results/{record['file']}`)."
    return f"{table}\n\n{'; '.join([*notes, source])}"


def device(record: Record, cpu: str = "CPU") -> str:
    """Returns the name of the GPU that a JSON record was measured on, or `cpu` without a GPU."""
    return record["device"].replace("cpu", cpu)


def plus_minus(value: Row | None, form: str) -> str:
    """Returns "mean ± standard deviation" of measurements as text, or "" if value is None.

    value: dict from `timing.summary`. form: format of both numbers, such as ".1f".
    """
    return f"{value['mean']:{form}} ± {value['std']:{form}}" if value else ""


def percent(value: Row | None) -> str:
    """Returns an accuracy in percent as text, with the standard deviation for several seeds.

    value: statistics over the seeds from `timing.summary`, or None for an empty text.
    """
    if value is None:
        return ""
    text = f"{100 * value['mean']:.1f}"
    return f"{text} ± {100 * value['std']:.1f}" if value["n"] > 1 else text


def accuracy_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Returns the accuracy columns of a table: heading -> one cell for each of `rows`.

    There is a column for each attack and eps. Clean accuracy and AutoAttack come first.
    """
    order = {"clean": 0, "autoattack": 1}
    keys = {(order.get(a["attack"], 2), a["attack"], a["eps"]) for r in rows for a in r["accuracy"]}
    columns = {}
    for _, attack, eps in sorted(keys):
        found = [{(a["attack"], a["eps"]): a["accuracy"] for a in r["accuracy"]} for r in rows]
        name = ATTACKS.get(attack, attack)
        heading = f"{name} {eps:.4g}" if eps else f"{name}, %"
        columns[heading] = [percent(accuracy.get((attack, eps))) for accuracy in found]
    return columns


def over_seeds(count: int) -> str:
    """Returns a sentence that says over how many seeds the numbers of a table are means."""
    return f"{count} seeds, mean ± deviation" if count > 1 else "1 seed"
