"""Watching a run: the progress bar, metrics.csv, TensorBoard, W&B, and what the run ran on."""

import contextlib
import csv
import importlib
import importlib.metadata
import io
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastgn.checkpoint import write_bytes
from fastgn.errors import UserError

COLUMNS = (
    "update",
    "epoch",
    "loss",
    "ce",
    "penalty",
    "grad_l1",
    "grad_norm",
    "lr",
    "ramp",
    "images_per_s",
    "data_wait_share",
    "bad_images",
    "clean_accuracy",
    "pgd10_accuracy",
    "seconds",
)
"""Of metrics.csv. grad_l1: mean L1 norm of an image's input gradient in normalised units;
grad_norm: L2 norm of the parameters' gradient before clipping; bad_images: replaced since the last
row, where there were any; accuracies in 0..1, on the fixed subset; seconds since the process
began."""


class Metrics:
    """Rows to a run's metrics.csv and TensorBoard (and W&B), and a progress bar on a terminal.

    A resumed run drops the rows that its checkpoint had not reached.
    """

    def __init__(
        self, folder: Path, *, total: int, start: int = 0, wandb_config: Mapping | None = None
    ):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.csv"
        rows = [r for r in read_rows(self.path) if r["update"] <= start] if start else []
        write_bytes(self.path, render(rows))
        self.file = open(self.path, "a", newline="")
        self.board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=start + 1 if start else 0
        )
        self.wandb = None
        if wandb_config is not None:
            options = {"project": "fastgn", "name": folder.name, "dir": str(folder)}
            self.wandb = find_wandb().init(**options, config=dict(wandb_config))
        self.began = time.perf_counter()
        self.bar = tqdm(
            total=total,
            initial=start,
            unit="update",
            disable=None,
            dynamic_ncols=True,
            mininterval=0.5,
        )
        self.closed = False

    def log(self, update: int, values: Mapping[str, float]) -> None:
        """One row; NaN and absent values stay empty."""
        row = {k: v for k, v in values.items() if not math.isnan(v)}
        row |= {"update": update, "seconds": time.perf_counter() - self.began}
        try:
            self.file.write(render([row], header=False).decode())
            self.file.flush()
            for key, value in row.items():
                if key != "update":
                    self.board.add_scalar(key, value, update)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from None
        if self.wandb is not None:
            self.wandb.log(row, step=update)
        shown: dict[str, str] = {
            k: f"{row[k]:.4g}" for k in ("loss", "ce", "penalty", "grad_l1") if k in row
        }
        if "images_per_s" in row:
            shown["img/s"] = f"{row['images_per_s']:.0f}"
        if shown:
            self.bar.set_postfix(shown, refresh=False)
        if self.bar.disable and shown:
            self.print(f"update {update}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))

    def advance(self) -> None:
        self.bar.update(1)

    def print(self, line: str) -> None:
        """A line above the bar."""
        self.bar.write(line, file=sys.stderr) if not self.bar.disable else print(
            line, file=sys.stderr
        )

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.bar.close()
            for out in (self.file, self.board):
                with contextlib.suppress(OSError):  # a full disk: `log` or a checkpoint has said so
                    out.close()
            if self.wandb is not None:
                self.wandb.finish()


def render(rows: list[dict[str, Any]], header: bool = True) -> bytes:
    """Rows as CSV with COLUMNS."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return out.getvalue().encode()


def read_rows(path: Path) -> list[dict[str, float]]:
    """metrics.csv's rows; empty cells are absent. A last line cut short by a kill is dropped."""
    rows: list[dict[str, float]] = []
    if not path.is_file():
        return rows
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if None in row.values() or row.get("seconds") == "":
                continue
            try:
                values = {k: float(v) for k, v in row.items() if v}
            except (TypeError, ValueError):
                continue
            values["update"] = int(values["update"])
            rows.append(values)
    return rows


def find_wandb() -> Any:
    """The package. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError("--log-wandb needs the package wandb: pip install wandb") from None


def environment() -> dict[str, Any]:
    """Versions, commit and hardware, for a run's or a measurement's record."""
    names = (
        *("fastgn", "torch", "torchvision", "timm", "triton", "numpy", "pillow", "scikit-learn"),
        "pyautoattack",
    )
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    hardware: dict[str, Any] = {"cpu": cpu_name(), "cpu_count": os.cpu_count()}
    if torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        hardware["cuda"] = torch.version.cuda
    return {"versions": versions, "commit": commit(), "hardware": hardware}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, with '-dirty' when it has changes; None outside a checkout."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None
