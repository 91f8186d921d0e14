"""A signal at any moment of a program's life: a line, nothing half-written, and the same command
goes on. What a signal does between two updates is in test_resume.py."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.marks import first_is_quick
from support.runs import tiny_run
from support.states import differences, last_state, trained_state

from fastgn import evaluate, export, extras, finish, interrupt, setup, train
from fastgn.checkpoint import Checkpoints
from fastgn.data import check, pack
from fastgn.metrics import read_rows

SHORT = ("--max-updates", "4", "--checkpoint-interval", "2", "--log-interval", "2")
NUMBERS = pytest.mark.parametrize("number", extras.STOPS)
TWO = pytest.mark.parametrize("number", first_is_quick([signal.SIGTERM, signal.SIGINT]))
"""Of tests that take long: one list serves all signals."""
CONTINUE = "run the same command again to continue"


def signalled(function: Callable[..., Any], *numbers: int) -> Callable[..., Any]:
    """Returns the function, during whose call signals arrive."""

    def call(*args: Any, **options: Any) -> Any:
        for number in numbers:
            signal.raise_signal(number)
        return function(*args, **options)

    return call


def half_written(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.suffix == ".tmp" or p.name.endswith(".lock")]


@pytest.fixture(autouse=True)
def heeded_signals() -> Iterator[None]:
    """`nohup` and a shell's background jobs ignore some, which fastgn then leaves ignored."""
    ignored = [n for n in extras.STOPS if signal.getsignal(n) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert train.main(tiny_run(folder, *SHORT)) == 0
    return folder


@NUMBERS
@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_a_signal_during_the_imports(program: str, number: int, tmp_path: Path) -> None:
    args = ["--checkpoint", str(tmp_path)]  # a path that exists, or it would be refused at once
    if program == "train":
        args = tiny_run(tmp_path / "run")
    code = (  # a parent in the background ignores SIGINT or SIGHUP, and so would its child
        f"import os, signal, sys; signal.signal({int(number)}, signal.SIG_DFL); "
        f"os.execv(sys.executable, [sys.executable, '-m', 'fastgn.{program}', *sys.argv[1:]])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 400
    while "libtorch" not in maps.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=400)
    assert (process.returncode, said.decode()) == (
        128 + number,
        f"fastgn.{program}: stopped; {CONTINUE}\n",
    )
    assert not list(tmp_path.iterdir())


PLACES: dict[str, tuple[str, bool]] = {
    "the data are read": ("load_dataset", False),
    "the network is built": ("check_ranks", False),
    "the optimizer is made": ("Step", False),
    "the run's files are there": ("announce", True),
}
"""Where a signal finds a run that starts -> what is called next, whether its folder is there."""


@TWO
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_before_the_first_update(
    place: str,
    number: int,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    function, written = PLACES[place]
    before = [signal.getsignal(n) for n in extras.STOPS]
    with monkeypatch.context() as patch:
        patch.setattr(setup, function, signalled(getattr(setup, function), number))
        assert train.main(tiny_run(folder, *SHORT)) == 130
    line = "fastgn.train: stopped; run the same command again"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert folder.exists() == written and half_written(tmp_path) == []
    assert [signal.getsignal(n) for n in extras.STOPS] == before
    if place == "the run's files are there":
        assert train.main(tiny_run(folder, *SHORT)) == 0
        assert differences(trained_state(folder), trained_state(unbroken)) == []


FINISH = {
    "the last checkpoint": (Checkpoints, "save_later", 2),
    "the export": (finish, "export_weights", 4),
    "the summary": (finish, "draw_curves", 4),
}
"""Where a signal finds a run that ends -> the owner and name of what is called, and the update of
the checkpoint that is there."""


@TWO
@pytest.mark.parametrize("place", FINISH)
def test_a_signal_while_a_run_finishes(
    place: str,
    number: int,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is left is soon done, and is done. A later second signal ends it at once."""
    owner, name, saved = FINISH[place]
    original = getattr(owner, name)

    def at_the_end(*numbers: int) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            last = name != "save_later" or args[1].update == 4
            return (signalled(original, *numbers) if last else original)(*args, **options)

        return call

    patient, hasty = tmp_path / "patient", tmp_path / "hasty"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, at_the_end(number, number))
        assert train.main(tiny_run(patient, *SHORT)) == 0
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith(("finished: 4 updates", "warning: after 4 updates"))
        patch.setattr(interrupt, "REPEAT_S", -1.0)  # any second signal is a later one
        assert train.main(tiny_run(hasty, *SHORT)) == 130
    line = f"the last checkpoint is {hasty}/checkpoints/update_{saved:08d}.pt: continue with "
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"fastgn.train: stopped; {line}--resume {hasty}"
    )
    assert half_written(tmp_path) == [] and last_state(hasty)["update"] == saved
    assert train.main(tiny_run(hasty, *SHORT, "--resume", "auto")) == 0
    for folder in (patient, hasty):
        assert differences(trained_state(folder), trained_state(unbroken)) == []
        assert {p.name for p in folder.iterdir()} == {p.name for p in unbroken.iterdir()}


@NUMBERS
def test_a_signal_to_the_other_programs(
    number: int,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path / "out")
    cases: list[tuple[Any, str, str, list[str], str]] = [
        (evaluate, "evaluate", "run", ["--checkpoint", str(unbroken), "--output", out], CONTINUE),
        (pack, "data.pack", "run", [str(unbroken), out], CONTINUE),
        (check, "data.check", "inspect", [str(unbroken)], "run the same command again"),
        (
            export,
            "export",
            "run",
            ["--checkpoint", str(unbroken), "--robustbench", out],
            "run the same command again",
        ),
    ]
    for module, name, function, args, how in cases:
        with monkeypatch.context() as patch:
            patch.setattr(module, function, signalled(getattr(module, function), number))
            assert module.main(args) == 130
        assert capsys.readouterr().err == f"fastgn.{name}: stopped; {how}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_it_stops_is_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a second; a later one ends the process at once, whatever it is in."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(KeyboardInterrupt), extras.stop_on_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            assert not ended
            monkeypatch.setattr(extras, "REPEAT_S", -1.0)
            signal.raise_signal(signal.SIGINT)
            assert ended == [128 + signal.SIGINT]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_the_parent_ignores_stays_ignored(number: int) -> None:
    """As `nohup` and a shell's background jobs have it."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with extras.stop_on_signals():
            signal.raise_signal(number)
            with interrupt.Interrupt() as noted:
                signal.raise_signal(number)
        # a run in the background of a shell, which ignores SIGINT, can be asked to stop
        assert noted.signal == (None if number == signal.SIGHUP else number)
    finally:
        signal.signal(number, before)


@pytest.mark.slow
def test_a_terminal_that_is_closed_stops_a_run(tmp_path: Path) -> None:
    """Whose every further write to it fails."""
    folder = tmp_path / "run"
    code = (
        "import fcntl, os, sys, termios; fcntl.ioctl(2, termios.TIOCSCTTY); "
        "os.execv(sys.executable, [sys.executable, '-m', 'fastgn.train', *sys.argv[1:]])"
    )
    endless = ("--epochs", "1000", "--log-interval", "1", "--eval-images", "0")
    master, slave = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *tiny_run(folder, *endless)],
        **{"stdin": slave, "stdout": slave, "stderr": slave, "start_new_session": True},
    )
    os.close(slave)
    try:
        said, deadline = b"", time.monotonic() + 400
        while len(read_rows(folder / "metrics.csv")) < 3:
            assert process.poll() is None and time.monotonic() < deadline, said.decode()
            said += os.read(master, 65536)
        os.close(master)
        assert process.wait(400) == interrupt.STOPPED, said.decode()
    finally:
        process.kill()
    assert last_state(folder)["update"] == read_rows(folder / "metrics.csv")[-1]["update"] >= 3
