"""A record is whole or absent, and an incomplete one never replaces a complete one."""

import argparse
import ast
import json
import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from benchmarks.common import records
from benchmarks.common.arguments import open_record
from fastgn.errors import UserError


def writes(tree: ast.AST, inside: bool = False) -> Iterator[int]:
    """Lines that call write_json in a loop or in a function within a function: as a run goes."""
    for node in ast.iter_child_nodes(tree):
        loop = isinstance(node, (ast.For, ast.While))
        nested = isinstance(tree, ast.FunctionDef) and isinstance(node, ast.FunctionDef)
        if inside and isinstance(node, ast.Call) and getattr(node.func, "id", "") == "write_json":
            yield node.lineno
        yield from writes(node, inside or loop or nested)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda p: p.stem)
def test_what_is_written_as_a_run_goes_is_a_record(path: Path) -> None:
    """By records.write_record, which leaves a complete record alone until there is another."""
    assert not list(writes(ast.parse(path.read_text())))


def test_an_incomplete_record_replaces_only_an_incomplete_one(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    beside = records.unfinished(path)
    for complete, value, where in (
        (False, 1, path),
        (False, 2, path),
        (True, 3, path),
        (False, 4, beside),
        (False, 5, beside),
    ):
        assert records.write_record(path, {"complete": complete, "value": value}) == where
        assert records.earlier(path)["value"] == value
    assert json.loads(path.read_text())["value"] == 3
    records.write_record(path, {"complete": True, "value": 6})
    assert json.loads(path.read_text())["value"] == 6 and [*tmp_path.glob("[!.]*")] == [path]
    path.write_text('{"made": "before records said whether they are complete"}')
    assert records.write_record(path, {"complete": False}) == beside
    path.write_text("{cut short")
    assert records.write_record(path, {"complete": False}) == path


def measure_beside(path: Path, ready: Any, end: Any) -> None:
    """Holds a record as a script does while it measures."""
    records.write_record(path, {"complete": False, "value": 1})
    ready.set()
    end.wait(400)


def test_two_scripts_do_not_write_one_record(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    server = multiprocessing.get_context("forkserver")
    ready, end = server.Event(), server.Event()
    other = server.Process(target=measure_beside, args=(path, ready, end))
    other.start()
    try:
        assert ready.wait(400)
        args = argparse.Namespace(output=path, defaults={})
        for write in (
            lambda: records.write_record(path, {"complete": True, "value": 2}),
            lambda: open_record(args, "r.json"),
        ):
            line = f"--output {path} is in use by process {other.pid} on host"
            with pytest.raises(UserError, match=re.escape(line)):
                write()
        assert records.read_json(path)["value"] == 1
    finally:
        end.set()
        other.join()
    records.write_record(path, {"complete": True, "value": 3})
    assert (
        records.taken_over(path, {"complete": False}) == {}
        and records.read_json(path)["value"] == 3
    )


def test_a_call_takes_over_a_record_of_the_same_options(tmp_path: Path) -> None:
    path, head = tmp_path / "r.json", {"device": "cpu", "seeds": 3}
    assert records.taken_over(path, head) == {}
    records.write_record(path, head | {"complete": True, "rows": [1]})
    records.write_record(path, head | {"complete": False, "rows": [1, 2]})
    assert records.taken_over(path, head)["rows"] == [1, 2]
    assert records.taken_over(path, head | {"seeds": 2}) == {}
    assert records.taken_over(path, head | {"complete": True}) == {}
