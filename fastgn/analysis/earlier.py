"""Keeps the results of an earlier evaluation, whose file a new evaluation is about to replace.

Results for the same inputs (weights, images, norm and seed) are added to the new record. If the
file holds other results, it gets another name.
"""

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgn.analysis.outcomes import add_worst_case
from fastgn.analysis.tables import WORST, name_attack
from fastgn.errors import UserError
from fastgn.files import read_json

ANALYSES = {"statistics": dict, "norm_by_epoch": list, "sanity": list}
"""Keys of --statistics and --sanity in a network's entry in evaluation.json -> type of the
value."""
CONDITIONS = ("ranks", "batch_size", "precision", "compile", "versions", "commit", "hardware")
"""Keys in evaluation.json that say how the outcomes were measured. An outcome that an earlier
evaluation measured in another way has these keys of its own."""


def keep_earlier(output: Path, record: dict[str, Any]) -> list[str]:
    """Saves the results in `output` before a new record replaces this file.

    Results for the same inputs are added to the new record, except for attacks that the new record
    has itself. The worst case is computed again, over the attacks that all networks have. If the
    file holds anything else, it is renamed, for example to evaluation.1.json. Returns lines that
    say what was done.

    output: JSON file to write, which need not exist yet. record: content for this file. Raises
    UserError if the file cannot be renamed.
    """
    if not output.is_file() or not output.stat().st_size:
        return []
    try:
        earlier = read_json(output)
    except UserError:
        earlier = None
    entries = earlier.get("models") if isinstance(earlier, dict) else None
    all_kept = isinstance(entries, list)
    lines = []
    for old in entries if isinstance(entries, list) else ():
        same = [entry for entry in record["models"] if is_same(old, entry)]
        all_kept &= bool(same)
        conditions = {k: earlier.get(k) for k in CONDITIONS if earlier.get(k) != record[k]}
        for entry in same:
            names = merge(entry, old, conditions)
            if names:
                lines.append(f"{entry['name']}: kept from {output}: {', '.join(names)}")
    counted = set.intersection(*(set(map(name_row, e["results"])) for e in record["models"]))
    for entry in record["models"]:
        rows = [row for row in entry["results"] if row["attack"] != WORST]
        entry["results"] = add_worst_case(rows, {key for key in counted if key[0] != WORST})
    if not all_kept:
        aside = rename_aside(output)
        lines.append(f"{output} held other results: they are in {aside} now")
    return lines


def is_same(old: Any, entry: Mapping[str, Any]) -> bool:
    """Returns whether an entry of an earlier evaluation is valid and has the inputs of a new one.

    old, entry: a network's entries in the earlier and in the new evaluation.json.
    """

    def is_valid_row(row: Any) -> bool:
        return (
            (isinstance(row, dict) and isinstance(row.get("attack"), str))
            and (isinstance(row.get("eps"), float) and isinstance(row.get("accuracy"), float))
            and isinstance(row.get("correct"), str)
            and (len(row["correct"]) == entry["images"] and set(row["correct"]) <= {"0", "1"})
        )

    return (
        (isinstance(old, dict) and old.get("inputs_sha256") == entry["inputs_sha256"])
        and (isinstance(old.get("results"), list) and all(map(is_valid_row, old["results"])))
        and isinstance(old.get("warnings"), list)
        and all(isinstance(line, str) for line in old["warnings"])
        and all(isinstance(old.get(key, kind()), kind) for key, kind in ANALYSES.items())
    )


def merge(
    entry: dict[str, Any], old: Mapping[str, Any], conditions: Mapping[str, Any]
) -> list[str]:
    """Adds to a network's entry the results that only its earlier entry has.

    Returns the names of the added results. Worst cases are not added.

    entry: the new entry, which is changed. old: the earlier entry. conditions: values of the keys
    in CONDITIONS that differ in the earlier evaluation.
    """
    known = {name_row(row) for row in entry["results"]}
    kept = [
        {**row, **conditions, **{k: row[k] for k in CONDITIONS if k in row}}
        for row in old["results"]
        if row["attack"] != WORST and name_row(row) not in known
    ]
    entry["results"] = sorted([*entry["results"], *kept], key=lambda row: row["attack"] != "clean")
    entry["warnings"] += [line for line in old["warnings"] if line not in entry["warnings"]]
    analyses = [key for key in ANALYSES if key in old and key not in entry]
    entry |= {key: old[key] for key in analyses}
    return [*(name_attack(row["attack"], row["eps"]) for row in kept), *analyses]


def name_row(row: Mapping[str, Any]) -> tuple[str, float]:
    """Returns the attack and the eps of a row of results."""
    return row["attack"], row["eps"]


def rename_aside(path: Path) -> Path:
    """Renames a file to the first free name with a number, such as evaluation.1.json.

    Returns the new path. Raises UserError if the file cannot be renamed.
    """
    names = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    try:
        path.rename(aside)
    except OSError as error:
        raise UserError(f"{path} cannot be renamed to {aside.name}: {error.strerror}") from None
    return aside
