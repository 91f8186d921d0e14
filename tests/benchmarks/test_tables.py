"""The tables of the pages are those of benchmarks/results, and every program has a help text."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from benchmarks import tables

RESULTS_PAGE = ROOT / "docs" / "results.md"


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_the_results(page: Path) -> None:
    text = page.read_text()
    assert tables.render(page, text) == text, "python benchmarks/tables.py rewrites them"


@pytest.mark.parametrize(
    "page, table", [(ROOT / "README.md", "cost_summary"), (RESULTS_PAGE, "quickstart")]
)
def test_a_changed_result_changes_its_page(
    page: Path, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tables.TABLES, table, lambda: "| other |")
    text = page.read_text()
    assert tables.render(page, text) == re.sub(
        f"(<!-- table:{table} -->\n).*?\n(<!-- /table -->)", r"\1| other |\n\2", text, flags=re.S
    )
    assert "| other |" not in text


def test_a_table_without_results_needs_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    text = RESULTS_PAGE.read_text()
    monkeypatch.setitem(tables.TABLES, "unheard_of", lambda: "")
    assert tables.render(RESULTS_PAGE, text) == text
    monkeypatch.setitem(tables.TABLES, "unheard_of", lambda: "| measured |")
    with pytest.raises(AssertionError, match="results.md lacks <!-- table:unheard_of -->"):
        tables.render(RESULTS_PAGE, text)


def test_every_record_has_a_table() -> None:
    """A file in benchmarks/results is named on one of the pages."""
    text = "".join(page.read_text() for page in tables.PAGES)
    for path in tables.RESULTS.glob("*.json"):
        assert path.name in text, path.name


def programs() -> list[list[str]]:
    """Returns how to start each program: a module, or one of the two files that run as they are."""
    found = [["benchmarks/cost.py"], ["benchmarks/tables.py"]]
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if '__name__ == "__main__"' in path.read_text() and [name] not in found:
            found.append(["-m", name.removesuffix(".py").replace("/", ".")])
    return found


def start(program: list[str]) -> None:
    """Starts a program in this process, as Python does for a file or for -m."""
    if program[0] == "-m":
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / program[0]), run_name="__main__")


@pytest.mark.parametrize("program", programs(), ids=lambda words: words[-1])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_programs_say_what_they_do(
    program: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [program[-1], "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as end:
        start(program)
    assert end.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_starts_from_another_folder(tmp_path: Path) -> None:
    out = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"],
        cwd=tmp_path, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
