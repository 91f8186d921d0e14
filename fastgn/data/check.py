"""Decodes every image of a data set as training would, and lists the images that have faults.

    python -m fastgn.data.check DIR

DIR is what --data-dir takes. Exit status 1 means that at least one image would stop a training run,
or would be replaced by another one with --on-bad-image skip. Images that are unusual but can be
used for training are counted.
"""

import contextlib
import dataclasses
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # report a mistake of the user before imports that take seconds
    from fastgn.extras import check_start

    check_start("fastgn.data.check")

from PIL import Image
from tqdm import tqdm

from fastgn.config.cli import parse_cli
from fastgn.config.groups import DatasetConfig
from fastgn.config.programs import CheckConfig
from fastgn.data.datasets import Encoded, load_dataset
from fastgn.data.images import BadImageError, decode_image, open_image
from fastgn.data.shards import Shards
from fastgn.data.torch import map_in_workers
from fastgn.errors import UserError, escape, print_line, print_stopped
from fastgn.extras import stop_on_signals
from fastgn.files import check_target, write_json

TINY_PX = 32
"""Shorter side in pixels below which an image is reported as tiny."""
ORIENTATION = 0x0112
"""Number of the EXIF tag that holds the orientation."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of checking one image, or one whole shard, which is a file of many images."""

    name: str
    problem: str | None = None
    """Kind of fault that would stop training, or None if training can use the image."""
    line: str = ""
    """Error message that training would print, or an empty text if there is no fault."""
    notes: tuple[str, ...] = ()
    """Unusual properties of the image that training can deal with. They are keys of NOTES."""


@dataclasses.dataclass(frozen=True)
class Inspector:
    """Function object that checks the image at an index. It can be sent to worker processes."""

    split: Encoded

    def __call__(self, index: int) -> Finding:
        name = self.split.name(index)
        try:
            content = self.split.read(index)
            # hide PIL's warnings, because find_oddities reports the same properties of the image
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                decode_image(content, name)
                return Finding(name, notes=tuple(find_oddities(content)))
        except BadImageError as error:
            return Finding(name, error.problem, str(error))

    def inspect_shard(self, number: int) -> Finding:
        """Checks a whole shard, a file of many images. number: index of the shard."""
        assert isinstance(self.split, Shards)
        line = self.split.find_fault(number)
        name = self.split.shards[number]
        return Finding(name) if line is None else Finding(name, "spoilt shard", line)


def find_oddities(content: bytes) -> list[str]:
    """Returns the unusual properties of an image that can be decoded, as keys of NOTES."""
    with open_image(content) as image:
        orientation = 1
        # EXIF data that PIL cannot read is no fault, because training ignores it anyway
        with contextlib.suppress(Exception):
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
    "greyscale": "converted to RGB",
    "16-bit": "only the high byte is used",
    "EXIF-rotated": "used as stored, not rotated",
    "tiny": f"one side is below {TINY_PX} px",
    "gigantic": "decoding takes seconds and gigabytes",
}
"""Unusual property of an image -> what training does with such an image."""


def inspect(cfg: CheckConfig) -> dict[str, Any]:
    """Checks all images of a data set, and returns a report that can be written as JSON.

    Raises UserError if the data set as a whole cannot be loaded.
    """
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
            jobs.append((inspector.inspect_shard, range(len(split.shards)), "shard"))
        for work, numbers, unit in jobs:
            found = map_in_workers(work, numbers, cfg.workers, cfg.worker_timeout)
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


def format_report(report: dict[str, Any]) -> str:
    """Returns the report of `inspect` as text."""
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
    return "\n".join(map(escape, lines))


def main(args: list[str] | None = None) -> int:
    """Runs the program and returns its exit status.

    1 means that an image is bad, and 2 that the user made a mistake, which is printed in one line.
    """
    try:
        args = sys.argv[1:] if args is None else args
        cfg = parse_cli(CheckConfig, args, "fastgn.data.check")
        if cfg.output:
            check_target(Path(cfg.output))
        with stop_on_signals():
            report = inspect(cfg)
        print(format_report(report))
        if cfg.output:
            write_json(Path(cfg.output), report)
            print_line(f"written: {cfg.output}", sys.stdout)
    except UserError as error:
        print(f"fastgn.data.check: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print_stopped("fastgn.data.check", "run the same command again")
        return 130
    return 1 if report["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
