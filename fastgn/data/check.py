"""Decodes every image of a data set, as training would, and names what is wrong with which.

    python -m fastgn.data.check DIR

DIR is whatever --data-dir takes. Exit status 1: some images would stop a run (or be replaced, with
--on-bad-image skip). What is merely odd is counted: it trains, as it is.
"""

import contextlib
import dataclasses
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a mistake is answered before the imports that take seconds
    from fastgn.extras import begin

    begin("fastgn.data.check")

from PIL import Image
from tqdm import tqdm

from fastgn.config.cli import parse_cli
from fastgn.config.groups import DatasetConfig
from fastgn.config.programs import CheckConfig
from fastgn.data.datasets import Encoded, load_dataset
from fastgn.data.images import BadImageError, decode_image, open_image
from fastgn.data.shards import Shards
from fastgn.data.torch import in_order
from fastgn.errors import UserError, escaped, print_line
from fastgn.files import check_target, write_json

TINY_PX = 32
"""A shorter side below this is worth a note."""
ORIENTATION = 0x0112
"""EXIF's tag."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """Of one image, or of a shard as a whole."""

    name: str
    problem: str | None = None
    """Its kind, where training would stop."""
    line: str = ""
    """What training would say."""
    notes: tuple[str, ...] = ()
    """What is odd, but no problem."""


@dataclasses.dataclass(frozen=True)
class Inspector:
    """Image number -> Finding."""

    split: Encoded

    def __call__(self, index: int) -> Finding:
        name = self.split.name(index)
        try:
            content = self.split.read(index)
            with warnings.catch_warnings():  # PIL's, of what is said here
                warnings.simplefilter("ignore")
                decode_image(content, name)
                return Finding(name, notes=tuple(oddities(content)))
        except BadImageError as error:
            return Finding(name, error.problem, str(error))

    def shard(self, number: int) -> Finding:
        """Of a shard as a whole."""
        assert isinstance(self.split, Shards)
        line = self.split.spoilt(number)
        name = self.split.shards[number]
        return Finding(name) if line is None else Finding(name, "spoilt shard", line)


def oddities(content: bytes) -> list[str]:
    """What makes an image that decodes unlike a photograph's plain JPEG."""
    with open_image(content) as image:
        orientation = 1
        with contextlib.suppress(Exception):  # of EXIF that PIL cannot read: nothing follows it
            orientation = image.getexif().get(ORIENTATION, 1)
        png_bits = content[24] if image.format == "PNG" else 8
        found = {
            "not JPEG": image.format not in ("JPEG", "MPO"),
            "CMYK": image.mode == "CMYK",
            "greyscale": image.mode in ("1", "L", "LA") or image.mode.startswith("I;16"),
            "16-bit": image.mode.startswith("I;16") or png_bits == 16,
            "EXIF-rotated": orientation not in (0, 1),
            "tiny": min(image.size) < TINY_PX,
            "gigantic": image.width * image.height > (Image.MAX_IMAGE_PIXELS or sys.maxsize),
        }
    return [note for note, is_so in found.items() if is_so]


NOTES = {
    "not JPEG": "decoded by PIL",
    "CMYK": "converted to RGB",
    "greyscale": "taken as RGB",
    "16-bit": "the high byte is taken",
    "EXIF-rotated": "taken as stored, not turned",
    "tiny": f"a side below {TINY_PX} px",
    "gigantic": "decoding takes seconds and gigabytes",
}
"""What becomes of the odd ones."""


def inspect(cfg: CheckConfig) -> dict[str, Any]:
    """The report, ready for JSON. Raises UserError where the data set as a whole is no such."""
    dataset = load_dataset(
        DatasetConfig(
            data="imagefolder",
            data_dir=cfg.data_dir,
            train_split=cfg.train_split,
            val_split=cfg.val_split,
        )
    )
    images: dict[str, int] = {}
    bad: list[dict[str, str]] = []
    notes: dict[str, dict[str, Any]] = defaultdict(lambda: {"count": 0, "first": []})
    for name, split in ((cfg.train_split, dataset.train), (cfg.val_split, dataset.val)):
        assert isinstance(split, Encoded)
        images[name] = len(split)
        inspector = Inspector(split)
        jobs: list[tuple[Callable[[int], Finding], range, str]] = [
            (inspector, range(len(split)), "image")
        ]
        if isinstance(split, Shards):
            jobs.append((inspector.shard, range(len(split.shards)), "shard"))
        for work, numbers, unit in jobs:
            found = in_order(work, numbers, cfg.workers, cfg.worker_timeout)
            for finding in tqdm(found, name, len(numbers), unit=unit, disable=None):
                if finding.problem is not None:
                    bad.append(
                        {"name": finding.name, "problem": finding.problem, "line": finding.line}
                    )
                for note in finding.notes:
                    notes[note]["count"] += 1
                    notes[note]["first"] += [finding.name] if len(notes[note]["first"]) < 5 else []
    return {
        "data_dir": cfg.data_dir,
        "images": images,
        "classes": len(dataset.classes),
        "bad": bad,
        "notes": dict(notes),
        "left_out": list(dataset.notes),
    }


def shown(report: dict[str, Any]) -> str:
    """The report as text."""
    images = " and ".join(f"{count} in {name}" for name, count in report["images"].items())
    lines = [f"{report['data_dir']}: {images}; {report['classes']} classes"]
    bad = report["bad"]
    kinds = [row["problem"] for row in bad]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    lines.append(f"bad: {counts}" if bad else "bad: none, every image can be read")
    lines += [f"  {row['line']}" for row in bad]
    lines += report["left_out"]
    for note, row in report["notes"].items():
        lines.append(f"{note}: {row['count']} ({NOTES[note]}), such as {row['first'][0]}")
    return "\n".join(map(escaped, lines))


def main(args: list[str] | None = None) -> int:
    """The program; returns its exit status: 1 where an image is bad, 2 for a mistake of the
    user's, said in one line."""
    try:
        args = sys.argv[1:] if args is None else args
        cfg = parse_cli(CheckConfig, args, "fastgn.data.check")
        if cfg.output:
            check_target(Path(cfg.output))
        report = inspect(cfg)
        print(shown(report))
        if cfg.output:
            write_json(Path(cfg.output), report)
            print_line(f"written: {cfg.output}", sys.stdout)
    except UserError as error:
        print(f"fastgn.data.check: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 1 if report["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
