"""Reads lists of images. Each line is `path label`, and a label is the name or the index of a
class."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastgn.errors import UserError, check, find_duplicate
from fastgn.files import open_regular


class Listed(NamedTuple):
    """The images of a list."""

    classes: tuple[str, ...]
    paths: list[str]
    labels: list[int]
    """Index of each image's class."""
    notes: list[str]
    """Messages about images that the list names more than once."""


class Row(NamedTuple):
    """One line of a list."""

    number: int
    """Number of the line, counted from 1."""
    name: str
    """Path of the image, relative to the data set's folder."""
    label: str


def read_list(root: Path, path: Path, known: tuple[str, ...] | None) -> Listed:
    """Reads a list of images whose paths are relative to `root`.

    The classes are the lines of root/classes.txt. Without that file the classes are `known`, those
    of the training images. If `known` is None, the classes are the sorted labels of the list. But
    if all labels are numbers, the classes are 0, 1, ..., as many as there are different labels.

    Raises UserError, which names file and line, if a line or a label is not valid, or if an image
    does not exist.
    """
    rows: list[Row] = []
    for number, line in enumerate(read_lines(path), 1):
        parts = line.rsplit(maxsplit=1)
        check(len(parts) != 1, f"{path}, line {number}: {line!r} has no label: write `path label`")
        if parts:
            rows.append(Row(number, *parts))
    check(bool(rows), f"{path} lists no images: write `path label` on each line")
    classes, known_by = find_classes(root, path, rows, known)
    numbers = read_labels(path, rows, classes, known_by)
    check_images_exist(root, path, rows)
    paths = [str(root / row.name) for row in rows]
    labels = [numbers[row.label] for row in rows]
    return Listed(classes, paths, labels, find_repeated(path, rows, paths, labels))


def read_lines(path: Path, who: str | None = None) -> list[str]:
    """Returns a text file's lines.

    Raises UserError if the file cannot be read. The message begins with `who`, or with the file's
    name.
    """
    who = who or str(path)
    try:
        with open_regular(path) as file:
            content = file.read()
    except (OSError, ValueError) as error:  # ValueError means that no file can have this name
        raise UserError(
            f"{who} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    check(
        not content.startswith((b"\xff\xfe", b"\xfe\xff")),
        f"{who} is text in UTF-16: save it as UTF-8",
    )
    # names of files may be in another encoding than UTF-8
    return content.decode("utf-8-sig", errors="surrogateescape").split("\n")


def find_classes(
    root: Path, path: Path, rows: Sequence[Row], known: tuple[str, ...] | None
) -> tuple[tuple[str, ...], str]:
    """Returns the classes of a list, and a text for messages that says where they come from.

    root, known: see `read_list`. path, rows: the list and its lines.

    Raises UserError if classes.txt names a class twice.
    """
    classes_file = root / "classes.txt"
    labels = {row.label for row in rows}
    if classes_file.exists():
        classes = tuple(line.strip() for line in read_lines(classes_file) if line.strip())
        twice = find_duplicate(classes)
        check(
            twice is None,
            f"{classes_file} has the class {twice} twice: remove one of the two lines",
        )
        return classes, str(classes_file)
    if known is not None:
        return known, "the training images"
    if all(label.lstrip("-").isdecimal() for label in labels):
        return tuple(map(str, range(len(labels)))), "the list, which has as many labels"
    return tuple(sorted(labels)), str(path)


def read_labels(
    path: Path, rows: Sequence[Row], classes: Sequence[str], known_by: str
) -> dict[str, int]:
    """Returns a dict from each label to the index of its class. All labels of a list must be names,
    or all must be numbers.

    path, rows: the list and its lines. known_by: text that says where the classes come from, for
    messages. Raises UserError, which names the line, if a label is neither a name nor a number of a
    class, or if the list uses both.
    """
    by_name = {name: index for index, name in enumerate(classes)}
    by_number = {str(index): index for index in range(len(classes))}
    for row in rows:
        check(
            row.label in by_name or row.label in by_number,
            f"{path}, line {row.number}: label {row.label} is none of the {len(classes)} classes "
            f"of {known_by}: write a number from 0 to {len(classes) - 1}, or a class's name",
        )
    unnamed = next((row for row in rows if row.label not in by_name), None)
    if unnamed is None:
        return by_name
    named = next((row for row in rows if row.label in by_name), None)
    digits = next((name for name in classes if name.isdecimal()), None)
    check(
        named is None,
        f"{path}, line {unnamed.number}: label {unnamed.label} is the number of a class, but line "
        f"{named.number if named else 0} has a class's name ({named.label if named else ''}): "
        "write all labels as names",
    )
    check(
        digits is None,
        f"{path}, line {unnamed.number}: no class has the name {unnamed.label}. Labels are not "
        f"read as numbers, because one class has the name {digits}: write all labels as names",
    )
    return by_number


def check_images_exist(root: Path, path: Path, rows: Sequence[Row]) -> None:
    """Raises UserError, which names the line, if an image of a list does not exist.

    root: folder of the data set. path, rows: the list and its lines.
    """
    below: dict[str, set[str]] = {}
    for row in rows:
        folder, base = os.path.split(root / row.name)
        if folder not in below:  # list each folder once, because a check of each file takes minutes
            try:
                below[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            except OSError as error:
                raise UserError(
                    f"{path}, line {row.number}: {folder} cannot be read: {error.strerror or error}"
                ) from None
        check(base in below[folder], f"{path}, line {row.number}: no such file: {root / row.name}")


def find_repeated(
    path: Path, rows: Sequence[Row], paths: Sequence[str], labels: Sequence[int]
) -> list[str]:
    """Returns one message about the images that the list names more than once, or no message if
    there are none.

    path, rows: the list and its lines. paths, labels: path and class of the image on each line.

    Raises UserError, which names both lines, if such an image has two labels.
    """
    first: dict[str, int] = {}
    repeated: list[int] = []
    for index, name in enumerate(paths):
        before = first.setdefault(name, index)
        if before == index:
            continue
        repeated.append(index)
        check(
            labels[before] == labels[index],
            f"{path}, line {rows[index].number}: {name} has label {rows[index].label}, but in line "
            f"{rows[before].number} it has {rows[before].label}",
        )
    if not repeated:
        return []
    example = repeated[0]
    return [
        f"{path} lists {len(repeated)} of {len(rows)} images more than once, such as "
        f"{paths[example]} in lines {rows[first[paths[example]]].number} and {rows[example].number}"
    ]
