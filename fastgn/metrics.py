"""Records a run in metrics.csv, TensorBoard and W&B, and shows its progress.

Also collects the versions and the hardware that a run's record should name.
"""

import csv
import importlib
import importlib.metadata
import io
import math
import os
import platform
import re
import secrets
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgn.config.outputs import SPOILT
from fastgn.errors import UserError, print_line, tolerate_failure
from fastgn.files import open_for_reading, write_bytes
from fastgn.progress import open_bar, print_above

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
    "loss_scale",
    "skipped_updates",
    "clean_accuracy",
    "pgd10_accuracy",
    "seconds",
)
"""Columns of metrics.csv. The columns loss, ce, penalty, grad_l1 and grad_norm are means over the
updates since the last row.

- loss: the value that is minimised.
- ce: cross-entropy.
- penalty: penalty before it is multiplied by its weight.
- grad_l1: L1 norm of the gradient of an image's loss with respect to the normalised image.
- grad_norm: L2 norm of the gradient of the parameters before clipping.
- lr: learning rate.
- ramp: strength of the penalty, or of the attack if there is no penalty, in 0..1.
- data_wait_share: share of the time that was spent waiting for images, in 0..1.
- bad_images: number of images replaced since the last row, empty if there were none.
- loss_scale: factor of the losses in fp16, empty in other precisions.
- skipped_updates: number of updates since the last row that were skipped because their gradient was
  not finite in fp16, empty in other precisions.
- clean_accuracy, pgd10_accuracy: accuracy without an attack and under PGD-10, in 0..1, always on
  the same validation images.
- seconds: time since this process opened the file."""


class Metrics:
    """Writes a run's logged values to metrics.csv, TensorBoard and W&B, and its progress to the
    terminal.

    A resumed run drops the rows of updates after its checkpoint. If something cannot be written,
    the run goes on. A line about the failure is printed, and writing is tried again later or left
    out.
    """

    LINE_S = 30.0
    """Seconds between two lines about the progress, if there is no progress bar."""

    def __init__(
        self,
        folder: Path,
        *,
        total: int,
        updates_per_epoch: int,
        start: int = 0,
        wandb_config: Mapping | None = None,
    ):
        """Opens the files. Raises UserError if the folder cannot be written to.

        total: number of updates of the run. start: number of updates that are already done.
        wandb_config: the run's options for W&B. None means not to use W&B.
        """
        self.path = folder / "metrics.csv"
        self.rows = [r for r in recover_rows(self.path) if r["update"] <= start] if start else []
        self.size: int | None = None
        """Bytes of metrics.csv after the last write. None means that all rows must be written."""
        self.write_rows()
        self.total, self.updates_per_epoch, self.update = total, updates_per_epoch, start
        self.board = self.wandb = None
        with tolerate_failure("TensorBoard"):
            self.board = open_board(folder, start)
        if wandb_config is not None:
            with tolerate_failure("W&B"):
                self.wandb = open_wandb(folder, wandb_config)
        self.began = self.said = time.perf_counter()
        self.first: tuple[int, float] | None = None
        """(number of updates done, time) after the first update of this process. Speed is measured
        from then on, because the first update may compile the step."""
        self.bar = open_bar(total=total, initial=start, unit="update", mininterval=0.5)
        self.closed = False

    def log(self, update: int, values: Mapping[str, float]) -> None:
        """Adds values to the row of an update. NaN and missing values leave their cells empty."""
        row = {k: v for k, v in values.items() if not math.isnan(v)}
        row |= {"update": update, "seconds": time.perf_counter() - self.began}
        is_new = not self.rows or self.rows[-1]["update"] != update
        self.rows += [row] if is_new else []
        self.rows[-1] |= row
        self.keep_rows(is_new)
        if self.board is not None:
            with tolerate_failure("TensorBoard", self.print) as failure:
                rows = [row]
                if not Path(self.board.log_dir).is_dir():
                    self.print(f"{self.board.log_dir} was removed, so it is written again")
                    self.board, rows = open_board(self.path.parent, 0), self.rows
                add_scalars(self.board, rows)
            self.board = None if failure else self.board
        if self.wandb is not None:
            with tolerate_failure("W&B", self.print) as failure:
                self.wandb.log(row, step=update)
            self.wandb = None if failure else self.wandb
        shown: dict[str, str] = {
            k: f"{row[k]:.4g}" for k in ("loss", "ce", "penalty", "grad_l1") if k in row
        }
        if "images_per_s" in row:
            shown["img/s"] = f"{row['images_per_s']:.0f}"
        if row.get("skipped_updates"):
            shown["skipped"] = f"{row['skipped_updates']:.0f}"
        if shown:
            epoch = {"epoch": f"{self.update / self.updates_per_epoch:.3g}"}
            self.bar.set_postfix(epoch | shown, refresh=False)
            self.print_progress(": " + ", ".join(f"{k} {v}" for k, v in shown.items()))

    def keep_rows(self, is_new: bool) -> None:
        """Appends the last row to metrics.csv.

        is_new: whether the last row is not in the file yet. If it is False, or if another program
        has changed the file, all rows are written again instead.
        """
        size = self.path.stat().st_size if self.path.is_file() else None
        changed = self.size is not None and size != self.size
        with tolerate_failure(
            "metrics.csv", self.print if self.size is not None else None
        ) as failure:
            if is_new and size == self.size is not None:
                with open(self.path, "ab") as file:
                    file.write(render(self.rows[-1:], header=False))
                self.size = self.path.stat().st_size
            else:
                self.write_rows()
        if failure:
            self.size = None
        elif changed:
            self.print(f"{self.path} was removed or changed, so all of its rows are written again")

    def write_rows(self) -> None:
        """Writes all rows to metrics.csv."""
        write_bytes(self.path, render(self.rows))
        self.size = self.path.stat().st_size

    def advance(self) -> None:
        """Adds one to the number of updates done, and shows this number. Does not wait for the
        device."""
        self.update += 1
        self.bar.update(1)
        now = time.perf_counter()
        if self.first is None:
            self.first = self.update, now
            self.print_progress(f": the first update took {spell_time(now - self.began)}")
        elif now - self.said > self.LINE_S:
            self.print_progress()

    def print_progress(self, text: str = "") -> None:
        """Prints a line about the progress of the run, if there is no progress bar.

        text: end of the line, such as the logged values.
        """
        if not self.bar.disable:
            return
        self.said = time.perf_counter()
        parts = [f"update {self.update}/{self.total}"]
        per_epoch = self.updates_per_epoch
        parts.append(f"epoch {self.update / per_epoch:.3g}/{self.total / per_epoch:.3g}")
        if self.first is not None and self.update > self.first[0]:
            update_s = (self.said - self.first[1]) / (self.update - self.first[0])
            parts.append(f"{spell_time(update_s)} per update")
            parts.append(f"{spell_time(update_s * (self.total - self.update))} left")
        self.print(", ".join(parts) + text)

    def print(self, line: str) -> None:
        """Prints a line above the progress bar, with control characters escaped."""
        print_above(self.bar, line)

    def close(self) -> None:
        """Closes the progress bar, TensorBoard and W&B, and writes metrics.csv if it is not up to
        date."""
        if self.closed:
            return
        self.closed = True
        if self.size is None or not self.path.is_file():
            self.keep_rows(is_new=False)
        self.bar.close()
        if self.board is not None:
            with tolerate_failure("TensorBoard"):
                self.board.close()
        if self.wandb is not None:
            with tolerate_failure("W&B"):
                self.wandb.finish()


def spell_time(seconds: float) -> str:
    """Returns a duration as text, such as 0.21 s, 45 s, 3 min 20 s or 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def open_board(folder: Path, start: int) -> Any:
    """Returns a TensorBoard writer for a run's folder.

    An earlier process of the run may have written values for updates after `start`. They are
    dropped.
    """
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else 0)


def add_scalars(board: Any, rows: list[dict[str, float]]) -> None:
    """Adds rows of metrics.csv to TensorBoard, with one curve per column."""
    for row in rows:
        for key, value in row.items():
            if key != "update":
                board.add_scalar(key, value, row["update"])
    board.flush()  # write the rows now, because the folder may be removed later


def open_wandb(folder: Path, config: Mapping) -> Any:
    """Returns the W&B run that belongs to a run's folder.

    If the folder holds the id of a W&B run, that run is continued. Otherwise a new one begins.
    """
    path = folder / "wandb_id.txt"
    known = path.read_text(errors="replace").strip() if path.is_file() else ""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", known):
        known = secrets.token_hex(8)
        write_bytes(path, f"{known}\n")
    options = {"project": "fastgn", "name": folder.name, "dir": str(folder)}
    return find_wandb().init(**options, id=known, resume="allow", config=dict(config))


def render(rows: list[dict[str, Any]], header: bool = True) -> bytes:
    """Returns rows of metrics.csv as the bytes that are written into the file.

    header: whether to begin with a line that has the names of the columns.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return out.getvalue().encode()


def read_rows(path: Path) -> list[dict[str, float]]:
    """Returns the rows of metrics.csv. Lines that are not rows are left out, see `parse_rows`.

    Raises UserError if the file cannot be read.
    """
    return parse_rows(read_content(path))[0]


def recover_rows(path: Path) -> list[dict[str, float]]:
    """Returns the rows of metrics.csv for a run that continues and writes the file again.

    If some lines are not valid rows, they are left out and a message is printed. A copy of the old
    file is then kept in the same folder. Raises UserError if the file cannot be read.
    """
    content = read_content(path)
    rows, spoilt = parse_rows(content)
    if spoilt:
        write_bytes(path.with_name(SPOILT), content)
        what = (
            "1 line is not a whole row and is"
            if spoilt == 1
            else f"{spoilt} lines are not whole rows and are"
        )
        print_line(f"{path}: {what} left out; the old file was copied to {SPOILT} beside it")
    return rows


def read_content(path: Path) -> bytes:
    """Returns the bytes of a file, or no bytes if the file does not exist."""
    if not path.exists():
        return b""
    with open_for_reading(path) as file:
        return file.read()


def parse_rows(content: bytes) -> tuple[list[dict[str, float]], int]:
    """Returns the rows of metrics.csv, one per update, and the number of lines that are not rows.

    A row is a dict {column: value} without the empty cells. A last line without a line break was
    cut short when the process was killed. It is neither returned nor counted. Older versions of
    fastgn wrote two rows for an update with an evaluation. Two such rows are merged.
    """
    header, *lines = content.decode("utf-8-sig", errors="replace").split("\n")[:-1] or [""]
    columns = header.rstrip("\r").split(",")
    rows: list[dict[str, float]] = []
    spoilt = 0
    for line in lines:
        row = parse_row(columns, line.rstrip("\r").split(","))
        if row is None:
            spoilt += 1
        elif rows and rows[-1]["update"] == row["update"]:
            rows[-1] |= row
        else:
            rows.append(row)
    return rows, spoilt


def parse_row(columns: list[str], cells: list[str]) -> dict[str, float] | None:
    """Returns one line of metrics.csv as {column: value}, or None if the line is not a valid row.

    columns: names of the columns, from the first line of the file. cells: texts in this line.
    """
    named = dict(zip(columns, cells, strict=False))
    if not len(named) == len(columns) == len(cells) or not named.keys() <= set(COLUMNS):
        return None
    try:
        row = {column: float(cell) for column, cell in named.items() if cell}
        update = int(named["update"])
    except (KeyError, ValueError):
        return None
    return row | {"update": update} if update >= 0 else None


def find_wandb() -> Any:
    """Returns the package wandb. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError("--log-wandb needs the package wandb: run pip install wandb") from None


def environment() -> dict[str, Any]:
    """Returns a dict with the keys versions (of Python and packages), commit and hardware.

    It is saved with the results of a run or of a measurement.
    """
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
    """Returns the name of the CPU's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """Returns the hash of the git commit of fastgn's code, with '-dirty' if files have changed.

    Returns None if the code is not in a git checkout.
    """
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
