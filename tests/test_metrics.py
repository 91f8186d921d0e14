"""A run's rows and progress: whole whatever happens to the files, and never the end of a run."""

import contextlib
import fcntl
import os
import pty
import re
import shutil
import struct
import sys
import termios
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.runs import tiny_run

from fastgn import finish, metrics, train
from fastgn.config.outputs import RUN_FILES, SPOILT
from fastgn.errors import UserError
from fastgn.metrics import COLUMNS, Metrics, read_rows, spell_time


class FakeWandb(types.ModuleType):
    """What the trainer calls of W&B, noted down; one of its calls may fail."""

    def __init__(self, broken: str = "") -> None:
        super().__init__("wandb")
        self.broken = broken
        self.begun: list[dict[str, Any]] = []
        self.steps: list[int] = []
        self.finished = 0

    def fail(self, call: str) -> None:
        if call == self.broken:
            raise ConnectionError(f"{call} did not reach the server\nsecond line")

    def init(self, **options: Any) -> "FakeWandb":
        self.fail("init")
        self.begun.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.fail("log")
        self.steps.append(step)

    def finish(self) -> None:
        self.fail("finish")
        self.finished += 1


def opened(folder: Path, start: int = 0, **more: Any) -> Metrics:
    return Metrics(folder, total=100, updates_per_epoch=10, start=start, **more)


def updates(folder: Path) -> list[float]:
    return [row["update"] for row in read_rows(folder / "metrics.csv")]


def test_an_evaluation_joins_the_row_of_its_update(tmp_path: Path) -> None:
    log = opened(tmp_path)
    for update in (5, 10, 15):
        log.log(update, {"epoch": update / 10, "loss": 2.0})
        if update == 10:
            log.log(update, {"epoch": 1.0, "clean_accuracy": 0.5})
            (five, ten) = read_rows(tmp_path / "metrics.csv")
            assert five.keys() == {"update", "epoch", "loss", "seconds"}
            assert ten["loss"] == 2.0 and ten["clean_accuracy"] == 0.5
    log.close()
    assert updates(tmp_path) == [5, 10, 15]
    log = opened(tmp_path, start=10)
    log.log(10, {"pgd10_accuracy": 0.25})
    log.close()
    (_, ten) = read_rows(tmp_path / "metrics.csv")
    assert (ten["loss"], ten["clean_accuracy"], ten["pgd10_accuracy"]) == (2.0, 0.5, 0.25)


def test_rows_of_older_files_are_joined(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    rows = [{"update": 3, "loss": 1.5}, {"update": 3, "clean_accuracy": 0.5}]
    file.write_bytes(metrics.render([row | {"seconds": 1.0} for row in rows]))
    assert read_rows(file) == [{"update": 3, "loss": 1.5, "clean_accuracy": 0.5, "seconds": 1.0}]


GOOD = [{"update": update, "loss": 1.5, "seconds": 2.0} for update in (1, 2, 3)]
"""Rows of a run that goes on from update 3."""


def resume(folder: Path, content: bytes) -> list[float]:
    """Returns the updates that a run of update 3 has in its metrics.csv after another one, and
    checks that a file with other lines is kept as it was."""
    file = folder / "metrics.csv"
    file.write_bytes(content)
    log = opened(folder, start=3)
    log.log(4, {"loss": 1.0})
    log.close()
    if (folder / SPOILT).exists():
        assert (folder / SPOILT).read_bytes() == content
    assert file.read_bytes() == metrics.render(read_rows(file))
    return updates(folder)


ROW = b"3" + b"," * (len(COLUMNS) - 1) + b"2.0"
HEADER = ",".join(COLUMNS).encode()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"\xff" + ROW, "1 line is not a whole row and is"),
        (b"nan" + ROW[1:], "1 line is not a whole row and is"),
        (b"inf" + ROW[1:], "1 line is not a whole row and is"),
        (b"-1" + ROW[1:], "1 line is not a whole row and is"),
        (b"2.5" + ROW[1:], "1 line is not a whole row and is"),
        (b"9" * 5000 + ROW[1:], "1 line is not a whole row and is"),
        (ROW + b"x" * 200_000, "1 line is not a whole row and is"),
        (ROW + b",1", "1 line is not a whole row and is"),
        (b'"', "1 line is not a whole row and is"),
        (b"\0\r\n\x1b[2J", "2 lines are not whole rows and are"),
    ],
)
def test_lines_that_are_no_rows_are_left_out_and_kept_aside(
    line: bytes, what: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    head, *rows = metrics.render(GOOD).splitlines(keepends=True)
    assert resume(tmp_path, b"".join([head, rows[0], line, b"\r\n", *rows[1:]])) == [1, 2, 3, 4]
    said = capsys.readouterr().err.splitlines()[0]
    file = tmp_path / "metrics.csv"
    assert said == f"{file}: {what} left out; the old file was copied to {SPOILT} beside it"
    assert (tmp_path / SPOILT).exists()


@pytest.mark.parametrize("header", [b"", b"loss,seconds", HEADER + b",x", HEADER + b",update"])
def test_a_file_without_our_columns_has_no_rows(header: bytes, tmp_path: Path) -> None:
    body = metrics.render(GOOD, header=False)
    assert resume(tmp_path, header + b"\r\n" + body) == [4]
    assert (tmp_path / SPOILT).exists()


def test_what_a_kill_has_cut_short_is_left_out_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = metrics.render(GOOD)
    for size in range(len(content)):
        (tmp_path / "metrics.csv").write_bytes(content[:size])
        whole = max(content[:size].count(b"\n") - 1, 0)
        rows = metrics.recover_rows(tmp_path / "metrics.csv")
        assert [row["update"] for row in rows] == [1, 2, 3][:whole]
    assert not (tmp_path / SPOILT).exists()
    assert "left out" not in capsys.readouterr().err


def test_metrics_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.csv")  # would be waited for
    with pytest.raises(UserError, match=r"metrics\.csv cannot be read: it is not a file$"):
        opened(tmp_path, start=3)


texts = st.lists(
    st.sampled_from(
        [*(n.encode() for n in COLUMNS), HEADER, ROW, b",", b"\r\n", b"\n", b'"', b"nan", b"inf"]
    )
    | st.integers().map(lambda n: str(n).encode())
    | st.binary(max_size=4),
    max_size=30,
).map(b"".join)


@given(start=st.sampled_from([b"", HEADER + b"\r\n", metrics.render(GOOD)]), text=texts)
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_file_is_read_as_rows(start: bytes, text: bytes, tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_bytes(start + text)
    rows = read_rows(file)
    assert all(row.keys() <= set(COLUMNS) and type(row["update"]) is int for row in rows)
    if start.endswith(b"2\r\n"):
        assert [row["update"] for row in rows][:3] == [1, 2, 3]
    file.write_bytes(metrics.render(rows))
    assert len(read_rows(file)) == len(rows)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


@pytest.mark.parametrize("change", [Path.unlink, cut, lambda file: shutil.rmtree(file.parent)])
def test_a_changed_file_is_written_again(
    change: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Removed or cut short while the run goes on, or its whole folder removed."""
    folder = tmp_path / "run"
    folder.mkdir()
    log = opened(folder)
    for update in range(1, 5):
        if update == 3:
            change(folder / "metrics.csv")
        log.log(update, {"loss": 1.0})
    assert updates(folder) == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("was removed or changed") == 1
    (folder / "metrics.csv").unlink()
    log.close()
    assert updates(folder) == [1, 2, 3, 4]
    assert list((folder / "tensorboard").iterdir())


def test_what_cannot_be_written_is_said_once_and_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    log = opened(tmp_path)
    log.log(1, {"loss": 1.0})
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(metrics, "write_bytes", full)
        patch.setattr(metrics, "open", full, raising=False)
        for update in (2, 3):
            log.log(update, {"loss": 1.0})
    said = capsys.readouterr().err
    assert said.count("warning: metrics.csv failed") == 1 and "No space left" in said
    log.log(4, {"loss": 1.0})
    log.close()
    assert updates(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("where", ["made", "used"])
def test_a_tensorboard_that_fails_is_left_out(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if where == "made":
        (tmp_path / "tensorboard").touch()
    log = opened(tmp_path)
    if where == "used":
        monkeypatch.setattr(type(log.board), "add_scalar", lambda *_: 1 / 0)
    for update in (1, 2):
        log.log(update, {"loss": 1.0})
    log.close()
    assert capsys.readouterr().err.count("warning: TensorBoard failed and is left out") == 1
    assert updates(tmp_path) == [1, 2]


def test_a_resumed_run_goes_on_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 5):
        log = opened(tmp_path / "run", start, wandb_config={"seed": 1})
        log.log(start + 1, {"loss": 1.0})
        log.close()
    opened(tmp_path / "other", wandb_config={}).close()
    assert {p.name for p in (tmp_path / "run").iterdir() if p.is_file()} <= set(RUN_FILES)
    first, second, other = wandb.begun
    assert first == second and first["resume"] == "allow" and first["id"] != other["id"]
    assert wandb.steps == [1, 6] and wandb.finished == 3
    (tmp_path / "run" / "wandb_id.txt").write_text("../no id\n")
    opened(tmp_path / "run", wandb_config={}).close()
    assert re.fullmatch(r"\w{16}", wandb.begun[-1]["id"])


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_wandb_that_fails_is_left_out(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(call))
    log = opened(tmp_path, wandb_config={})
    for update in (1, 2):
        log.log(update, {"loss": 1.0})
    log.close()
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said == [
        f"warning: W&B failed and is left out: ConnectionError: {call} did not reach the server"
    ]
    assert updates(tmp_path) == [1, 2]


def test_progress_has_total_epoch_rate_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """From the first update on, and at least every 30 seconds, though no row is due."""
    clock = [1000.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    log = opened(tmp_path)
    for update in range(1, 21):
        clock[0] += 60.0 if update == 1 else 4.0
        log.advance()
        if update == 20:
            log.log(20, {"loss": 1.25, "images_per_s": 12.4})
    log.close()
    assert capsys.readouterr().err.splitlines() == [
        "update 1/100, epoch 0.1/10: the first update took 1 min 0 s",
        "update 9/100, epoch 0.9/10, 4 s per update, 6 min 4 s left",
        "update 17/100, epoch 1.7/10, 4 s per update, 5 min 32 s left",
        "update 20/100, epoch 2/10, 4 s per update, 5 min 20 s left: loss 1.25, img/s 12",
    ]


@pytest.mark.parametrize("size", [(0, 0), (0, 100), (30, 100)])
def test_a_terminal_shows_a_bar(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that does not know how large it is."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    with open(its, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        log = opened(tmp_path)
        log.advance()
        log.log(1, {"loss": 1.25})
        log.bar.refresh()
        log.close()
    shown = b""
    with contextlib.suppress(OSError):  # the end
        while part := os.read(ours, 10_000):
            shown += part
    os.close(ours)
    assert b"1/100" in shown and b"epoch=0.1" in shown and b"update 1/100" not in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (9.5, "9.5 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s")]
    + [(7500, "2 h 5 min")],
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert spell_time(seconds) == text


# ----------------------------------------------------------------------------------- whole runs


def finished(folder: Path, capsys: pytest.CaptureFixture, *more: str) -> str:
    """The last line of a run that ends well."""
    assert train.main(tiny_run(folder, "--max-updates", "2", "--eval-images", "0", *more)) == 0
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.curves
def test_a_dollar_in_a_runs_name_is_no_formula(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    line = finished(tmp_path / "_$x_\\frac{$", capsys)
    assert line.endswith(": model.safetensors, config.json, summary.json, curves.png, metrics.csv")


@pytest.mark.curves
def test_a_finished_run_names_only_files_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A picture that fails is passed over; a metrics.csv that was removed is there again."""
    folder, draw = tmp_path / "run", finish.draw_curves

    def remove_and_draw(*args: Any, **options: Any) -> bytes:
        (folder / "metrics.csv").unlink()
        (folder / "config.toml").unlink()
        with contextlib.suppress(TypeError):
            draw(*args, **options)
        raise ValueError("no such font\nin two lines")

    monkeypatch.setattr(finish, "draw_curves", remove_and_draw)
    assert finished(folder, capsys).endswith(
        ": model.safetensors, config.json, summary.json, metrics.csv"
    )
    assert updates(folder) == [2] and (folder / "config.toml").is_file()
    (folder / "model.safetensors").unlink()
    assert train.main(["--resume", str(folder)]) == 0
    said = capsys.readouterr().err
    assert "warning: curves.png failed and is left out: ValueError: no such font\n" in said
