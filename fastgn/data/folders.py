"""Finds the images of a split that is a folder with one subfolder per class.

The order is the same as in torchvision's ImageFolder: by the class's name, then by the folder's
path, then by the file's name.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastgn.errors import UserError, check

ENDINGS = frozenset(
    ".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .pnm .ppm .tga "
    ".tif .tiff .webp".split()
)
"""Endings of image files in lower case. The readers in images.FORMATS can read all of them."""
NO_CLASSES = frozenset(("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found"))
"""Names of folders that file servers and archives create, and that hold no training images."""
NAMED_REASONS = 5
"""Largest number of reasons that a message lists for leaving out files. It lists the most frequent
reasons."""


class Tree(NamedTuple):
    """The images found below a folder."""

    classes: list[str]
    """Names of the subfolders, sorted. Each subfolder is a class."""
    paths: list[str]
    labels: list[int]
    """Index of each image's class."""
    left_out: Counter[str]
    """Reason for leaving out files and folders -> number of those that were left out for it."""

    def describe_left_out(self, folder: Path) -> list[str]:
        """Returns one message about the files and folders that were left out, or no message if
        there are none."""
        if not self.left_out:
            return []
        common = self.left_out.most_common(NAMED_REASONS)
        reasons = [f"{count} {reason}" for reason, count in common]
        rest = self.left_out.total() - sum(count for _, count in common)
        reasons += [f"{rest} for other reasons"] if rest else []
        return [f"left out below {folder}: {', '.join(reasons)}"]


class Walk:
    """Walks once through a split's folders and visits each real folder once.

    Links are followed after all real folders have been visited. So if a link in one class points to
    a real folder of another class, the images in that folder belong to the other class.
    """

    def __init__(self, folder: Path, option: str) -> None:
        """Lists the folders of the classes. Raises UserError if two of them are the same folder.

        option: start of the messages, such as "--data-dir DIR".
        """
        self.option = option
        self.left_out: Counter[str] = Counter()
        self.real_root = os.path.realpath(folder)
        self.roots = [
            entry.path for entry in self.list_entries(str(folder)) if self.is_class(entry)
        ]
        self.roots.sort()
        self.seen: dict[str, str] = {}
        """Real path of a folder -> path under which it was first found."""
        for path in self.roots:
            first = self.seen.setdefault(os.path.realpath(path), path)
            check(
                first == path,
                f"{self.option}: {path} and {first} are the same folder, but would be two classes: "
                "remove the one that is a link",
            )

    def list_entries(self, folder: str) -> list[os.DirEntry[str]]:
        """Returns the sorted entries of a folder. Raises UserError if it cannot be read."""
        try:
            with os.scandir(folder) as found:
                return sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"{self.option}: {folder} cannot be read: {error.strerror or error}"
            ) from None

    def is_hidden(self, entry: os.DirEntry[str]) -> bool:
        """Returns whether an entry holds no data, judged by its name. If so, counts the entry as
        left out.

        Names of such entries begin with a dot or are listed in NO_CLASSES, such as lost+found.
        """
        hidden = entry.name.startswith(".") or entry.name in NO_CLASSES
        self.left_out["hidden"] += hidden
        return hidden

    def is_class(self, entry: os.DirEntry[str]) -> bool:
        """Returns whether an entry of the split's folder is the folder of a class. If not, counts
        the entry as left out."""
        if self.is_hidden(entry):
            return False
        folder = is_folder(entry)
        self.left_out["outside the folders of classes"] += not folder
        return folder

    def find_images(self) -> Iterator[tuple[int, str, str]]:
        """Yields (index of the class, folder, name of the file) for each image."""
        waiting, links = [*enumerate(self.roots)], list[tuple[int, str]]()
        while waiting or links:
            if not waiting:  # all real folders have been visited, so follow the next link
                number, path = links.pop(0)
                if not self.is_new(path):
                    self.left_out["linked folders that were read already"] += 1
                    continue
                waiting.append((number, path))
            number, folder = waiting.pop()
            for entry in self.list_entries(folder):
                if self.is_hidden(entry):
                    continue
                if not is_folder(entry):
                    if self.is_image(entry):
                        yield number, folder, entry.name
                elif entry.is_symlink():
                    links.append((number, entry.path))
                elif self.is_new(entry.path):
                    waiting.append((number, entry.path))
                else:
                    self.left_out["linked folders that were read already"] += 1

    def is_new(self, path: str) -> bool:
        """Returns whether a folder is new, and records it as visited. A folder is not new if it has
        been visited, or if it contains the whole split. Links may lead to such folders."""
        real = os.path.realpath(path)
        above = os.path.join(self.real_root, "").startswith(os.path.join(real, ""))
        return not above and self.seen.setdefault(real, path) == path

    def is_image(self, entry: os.DirEntry[str]) -> bool:
        """Returns whether an entry is a file whose name ends like that of an image. If not, counts
        the entry as left out."""
        ending = os.path.splitext(entry.name)[1].lower()
        if ending not in ENDINGS:
            self.left_out[f"with the ending {ending}" if ending else "without an ending"] += 1
            return False
        try:
            regular = entry.is_file()
        except OSError:
            regular = False
        self.left_out["that are no regular files, or links to nothing"] += not regular
        return regular


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # for example a link that points to itself
        return False


def find_images(folder: Path, option: str) -> Tree:
    """Finds all images of a split in the folders of its classes.

    Raises UserError if a folder cannot be read, if a class has no image, or if two classes are the
    same folder. The message begins with `option`.
    """
    walk = Walk(folder, option)
    classes = [os.path.basename(path) for path in walk.roots]
    found = sorted(walk.find_images())
    labels = [number for number, _, _ in found]
    tree = Tree(
        classes, [os.path.join(path, name) for _, path, name in found], labels, +walk.left_out
    )
    empty = sorted(set(range(len(classes))) - set(labels))
    if empty:
        names = ", ".join(classes[number] for number in empty[:5])
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        reasons = "".join(f"; {line}" for line in tree.describe_left_out(folder))
        raise UserError(
            f"{option}: {folder} has no image for the classes {names}{more}: add images, or remove "
            f"the folders{reasons}"
        )
    return tree
