"""Command lines that train for a few seconds, and what the programs print and write."""

import itertools
from collections.abc import Sequence
from pathlib import Path

TINY_SWIN = (
    *("--model", "swin_t", "--img-size", "16", "--model-kwargs", "patch_size=4", "embed_dim=8"),
    *("depths=(1, 1)", "num_heads=(1, 2)", "window_size=2", "--data", "digits"),
)
"""Arguments for a Swin with about 5,000 weights, whose first stage has shifted windows."""


def tiny_run(output: Path, *more: str) -> list[str]:
    """Returns arguments for fastgn.train that train on digits for a few seconds.

    One epoch has 29 updates of 48 images.
    """
    fixed = ("--batch-size", "48", "--epochs", "1", "--warmup-epochs", "0", "--eval-images", "48")
    swin = without(TINY_SWIN, "--model-kwargs") if "--model-kwargs" in more else TINY_SWIN
    return [*swin, *fixed, "--lr", "0.003", "--output", str(output), *more]


def without(args: Sequence[str], flag: str) -> list[str]:
    """Returns a command line without a flag and its values: a list may be given once alone."""
    start = args.index(flag)
    rest = itertools.dropwhile(lambda arg: not arg.startswith("--"), args[start + 1 :])
    return [*args[:start], *rest]


TINY_MODEL = TINY_SWIN[: TINY_SWIN.index("--data")]


def folder_run(data: Path, output: Path, *more: str) -> list[str]:
    """Returns arguments for fastgn.train that train for one epoch on a folder of images."""
    fixed = ("--data-dir", str(data), "--workers", "0", "--batch-size", "4", "--epochs", "1")
    fixed += ("--warmup-epochs", "0", "--output", str(output))
    return [*TINY_MODEL, *fixed, *more]


def error_line(stderr: str, program: str) -> str:
    """Returns the one line with which a program has refused, checked to be its last output."""
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    found = [line for line in lines if line.startswith(f"{program}: error: ")]
    assert len(found) == 1, stderr
    assert lines[-1] == found[0], "the error has more than one line, or something follows it"
    return found[0].removeprefix(f"{program}: error: ")


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the relative path and the content of each file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
