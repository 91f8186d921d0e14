"""README.md and docs/: links resolve, commands have flags that exist, and code blocks run."""

import ast
import dataclasses
import functools
import importlib.util
import re
import shlex
import sys
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import ROOT

import fastgn
from fastgn.config import FIELDS, load_recipe, recipe_names
from fastgn.config.cli import PROGRAMS, parse_cli, parse_config
from fastgn.config.groups import StepConfig
from fastgn.objectives import METHODS

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md"]
PAGES += [ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"]
PAGES += [ROOT / "examples" / "launch" / "README.md"]
TORCHRUN = {"nproc-per-node", "nnodes", "max-restarts", "signals-to-handle", "shutdown-timeout"}
OTHERS = {"help", "list", "signal", *TORCHRUN}
"""Flags that are no field: --help, torchrun's, and the --list of fastgn.train."""
PACKAGE = ROOT / "fastgn"
ROOMS = {p.stem for p in (*PACKAGE.glob("*.py"), *PACKAGE.glob("*/"))} - {"__init__", "__pycache__"}
ENDINGS = {"csv", "db", "json", "png", "py", "toml", "txt"}
"""Endings of files that are named like a module."""
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """Returns the contents of the code blocks in one language; "" is a block without a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def prose(page: Path) -> str:
    """Returns the text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


def flags_of(program: str) -> set[str]:
    """Returns the names of all flags of a program, or of a benchmark by its source."""
    if program == "fastgn.train":
        fields = {name.replace("_", "-") for name in FIELDS}
        return fields | {f"no-{name}" for name in fields} | OTHERS
    if program in PROGRAMS:
        names = {f.name.replace("_", "-") for f in dataclasses.fields(PROGRAMS[program])}
        return names | {f"no-{name}" for name in names} | OTHERS
    sources, left = set(), {program}
    while left:  # a benchmark's flags may be declared by benchmarks that it imports
        path = ROOT / (left.pop().replace(".", "/") + ".py")
        if path.exists() and path not in sources:
            sources.add(path)
            for module, names in re.findall(
                r"^from (benchmarks[\w.]*) import (.*)$", path.read_text(), re.MULTILINE
            ):
                left |= {module, *(f"{module}.{name.strip()}" for name in names.split(","))}
    return OTHERS.union(*(re.findall(r'"--([\w-]+)"', s.read_text()) for s in sources))


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the program and the arguments of every command in the page's code blocks."""
    for line in "".join(blocks(page, "")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "-m" in words and words[0] in ("python", "python3", "torchrun"):
            start = words.index("-m") + 1
            yield words[start], words[start + 1 :]
        elif words[:1] == ["python"]:
            yield words[1].removesuffix(".py").replace("/", "."), words[2:]


def test_the_readme_has_at_most_150_lines() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_the_picture_is_a_small_png() -> None:
    (picture,) = re.findall(r"^!\[.+\]\((.+)\)$", README.read_text(), re.MULTILINE)
    content = (ROOT / picture).read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 150_000


@every_page
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_reached_from_the_readme() -> None:
    links = set(re.findall(r"\]\(([^)#\s]+)", README.read_text()))
    assert {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")} <= links


@every_page
def test_commands_have_flags_that_exist(page: Path) -> None:
    for program, args in commands(page):
        assert importlib.util.find_spec(program), program
        given = {a[2:].partition("=")[0] for a in args if a.startswith("--")}
        assert given <= flags_of(program), program


def test_commands_of_the_pages_are_accepted() -> None:
    """Not --resume and --list, which need a run or print at once."""
    parsed = 0
    for page in PAGES:
        for program, args in commands(page):
            if {"--resume", "--list", "--help"} & set(args) or not program.startswith("fastgn."):
                continue
            if program == "fastgn.train":
                parse_config(args)
            else:
                parse_cli(PROGRAMS[program], args, program)
            parsed += 1
    assert parsed >= 12


def test_commands_of_the_makefile_are_accepted() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    found = re.findall(r"-m (fastgn\.\w+) (.*)", text)
    assert len(found) >= 4
    for program, line in found:
        args = [a for a in shlex.split(line) if a != "--resume" and a != "auto"]
        parse_config(args) if program == "fastgn.train" else parse_cli(
            PROGRAMS[program], args, program
        )


def test_a_flag_that_does_not_exist_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```\ntorchrun -m fastgn.train --recipe swin_b_pag \\\n    --epoch 3\n```\n")
    assert list(commands(page)) == [("fastgn.train", ["--recipe", "swin_b_pag", "--epoch", "3"])]
    with pytest.raises(AssertionError, match="fastgn.train"):
        test_commands_have_flags_that_exist(page)


@every_page
def test_flags_in_the_text_exist(page: Path) -> None:
    programs = ["fastgn.train", *PROGRAMS]
    programs += [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in (ROOT / "benchmarks").rglob("*.py")
    ]
    known = set().union(*map(flags_of, programs))
    spans = re.findall(r"`([^`]+)`", prose(page))
    given = {f for span in spans for f in re.findall(r"(?<!\S)--([\w-]+)", span)}
    pip, sbatch = {"editable"}, {"gpus-per-node", "gpus-per-task"}
    assert given <= known | pip | sbatch


@every_page
def test_extras_that_pip_is_to_install_exist(page: Path) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extras in re.findall(r"pip install (?:-e )?'?[.\w]*\[([\w,-]+)\]", page.read_text()):
        assert set(extras.split(",")) <= known.keys()


@every_page
def test_modules_and_files_in_the_text_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(
        r"(?<![\w./-])(?:fastgn|fastgn_kernels|benchmarks)(?:\.[a-z_]\w*)+", text
    ):
        if name.endswith(".py"):
            continue
        parent, _, last = name.rpartition(".")
        found = importlib.util.find_spec(parent)
        assert found, name
        module = importlib.import_module(parent)
        assert hasattr(module, last) or importlib.util.find_spec(name), name
    for span in re.findall(r"`((?:fastgn|tests|benchmarks|kernels|docs)/[\w./-]*)`", text):
        assert (ROOT / span).exists(), span


@every_page
def test_names_of_rooms_in_the_text_exist(page: Path) -> None:
    """Such as `files.atomic_open`, which is fastgn.files.atomic_open."""
    for room, name in re.findall(r"`(\w+)\.(\w+)(?:\(.*?\))?`", prose(page)):
        if room in ROOMS and name not in ENDINGS:
            assert hasattr(importlib.import_module(f"fastgn.{room}"), name), f"{room}.{name}"


def architecture() -> Iterator[tuple[list[str], list[str]]]:
    """Yields each row of the tables of docs/architecture.md: the rooms or folders in its first
    cell, and the files and folders that its second cell names."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    for first, second in re.findall(r"^\| (`.*?) \| (.*) \|$", text, re.MULTILINE):
        names = re.findall(r"`([\w/.]+)`", second)
        yield (
            [name.rstrip("/") for name in re.findall(r"`([\w/.]+)`", first)],
            [name for name in names if name.endswith((".py", "/"))],
        )


def test_every_room_is_in_the_architecture() -> None:
    rooms = {name.removesuffix(".py") for names, _ in architecture() for name in names}
    assert rooms >= ROOMS


def test_the_files_of_the_architecture_exist() -> None:
    for names, inside in architecture():
        folders = [folder for name in names for folder in (PACKAGE / name, ROOT / name)]
        assert sum(folder.exists() for folder in folders) == len(names), names
        for file in inside:
            assert any((folder / file).exists() for folder in folders) or (ROOT / file).exists(), (
                names,
                file,
            )


def test_methods_schedules_and_recipes_have_their_place() -> None:
    methods = (ROOT / "docs" / "methods.md").read_text()
    rows = re.findall(r"^\| `([^`]+)`", methods, re.MULTILINE)
    schedules = typing.get_args(typing.get_type_hints(StepConfig)["schedule"])
    assert set(METHODS) | set(schedules) <= set(rows)
    training = (ROOT / "docs" / "training.md").read_text()
    assert {n for n in recipe_names() if not n.startswith(("paper_", "_"))} <= set(
        re.findall(r"`(\w+)`", training)
    )


def test_the_recipe_of_the_training_page_is_one(tmp_path: Path) -> None:
    (text,) = blocks(ROOT / "docs" / "training.md", "toml")
    (tmp_path / "mine.toml").write_text(text)
    cfg = load_recipe(str(tmp_path / "mine.toml"))
    assert (cfg.optimizer.epochs, cfg.objective.gradnorm.eps, cfg.step.precision) == (
        30,
        2 / 255,
        "bf16",
    )


@every_page
def test_python_blocks_are_python(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize(
    "page, index", [("README.md", 0), ("docs/kernels.md", 0), ("docs/kernels.md", 1)]
)
def test_a_block_runs(page: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled loss is traced and differentiated, without the compiler's generated code."""
    traced = functools.partial(fastgn.compile_double_backward, backend="aot_eager")
    monkeypatch.setattr(fastgn, "compile_double_backward", traced, raising=False)
    module = types.ModuleType("page")  # which Dynamo imports by its name
    monkeypatch.setitem(sys.modules, "page", module)
    torch.manual_seed(0)
    exec(blocks(ROOT / page, "python")[index], module.__dict__)
    critic = module.__dict__["critic"]
    if (page, index) != ("docs/kernels.md", 0):  # which only swaps
        assert all(p.grad is not None for p in critic[0].parameters())
        assert critic[0].weight.grad.norm() > 0
