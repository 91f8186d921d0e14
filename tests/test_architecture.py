"""The arrows between rooms (docs/architecture.md): who may import whom."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from fastgn.extras import TRAIN

PACKAGE = ROOT / "fastgn"
TESTS = ROOT / "tests"
KERNELS = ROOT / "kernels" / "fastgn_kernels"

MAY_IMPORT = {
    "__init__": {"step"},
    "errors": set(),
    "fields": {"errors"},
    "config": {"config", "errors", "fields", "files", "listing", "objectives"},
    "listing": {"config", "errors", "models", "objectives"},
    "extras": {"config", "errors"},
    "search_space": {"config", "errors"},
    "seeding": set(),
    "trouble": {"errors", "metrics"},
    "loss_scale": set(),
    "attacks": {"loss_scale"},
    "validation": {"attacks", "data", "distributed", "seeding", "step"},
    "objectives": {"attacks", "errors", "fields", "loss_scale", "objectives"},
    "step": {"attacks", "config", "errors", "loss_scale", "objectives", "step"},
    "models": {"archive", "config", "errors", "files", "models"},
    "hub": {"config", "errors", "files", "models"},
    "files": {"errors"},
    "archive": {"errors", "files"},
    "optim": {"config", "errors"},
    "distributed": {"errors", "heartbeat"},
    "heartbeat": {"errors"},
    "slow_ranks": {"distributed", "step"},
    "lock": {"errors", "files"},
    "interrupt": {"extras"},
    "updating": {"config", "loss_scale", "optim", "step"},
    "state": {"config", "data", "errors", "loss_scale"},
    "checkpoint": {"archive", "config", "errors", "files", "state"},
    "trained": {"checkpoint", "config", "errors", "files", "models", "state"},
    "folder": {"checkpoint", "config", "distributed", "errors", "files", "lock", "state"},
    "progress": {"errors"},
    "metrics": {"config", "errors", "files", "progress"},
    "data": {"config", "data", "errors", "extras", "files", "lock", "seeding"},
    "analysis": {
        *("analysis", "attacks", "config", "data", "distributed", "errors", "fields", "files"),
        *("metrics", "objectives", "progress", "seeding", "trained"),
    },
}
"""Module or subpackage of fastgn -> siblings that it may import; those of COMPOSE are not in it."""

COMPOSE: dict[str, set[str]] = {
    "resolved": set(),
    "resume": {"resolved"},
    "run": {"resolved"},
    "failures": {"run"},
    "finish": {"run"},
    "setup": {"finish", "resolved", "resume", "run"},
    "train": {"failures", "finish", "run", "setup"},
    "sweep": {"run", "setup", "train"},
    "evaluate": set(),
    "export": set(),
}
"""Modules that put the others together -> which of one another they may import. They may import all
of MAY_IMPORT."""

ONLY_IN = {
    "fastgn_kernels": {"models/network.py"},
    "timm": {
        "hub.py",
        "listing.py",
        "models/activations.py",
        "models/create.py",
        "models/network.py",
        "models/sync_batch_norm.py",
        "models/weights.py",
        "optim.py",
        "data/augment.py",
        "data/dali/draws.py",
        "data/transform.py",
        "data/torch.py",
    },
    "nvidia": {"data/dali/operations.py"},
    "matplotlib": {"analysis/canvas.py", "analysis/figures.py", "analysis/pareto.py"},
    "jinja2": {"analysis/report.py"},
    "optuna": {"sweep.py"},
    "tyro": {"config/__init__.py", "config/cli.py", "config/programs.py"},
    "pyautoattack": {"attacks.py"},
    "apex": set(),
    "wandb": {"metrics.py"},
    "benchmarks": set(),
    "tests": set(),
}


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            if node.module == "fastgn":
                found |= {f"fastgn.{alias.name}" for alias in node.names}
    return found - {"fastgn"}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def kernel_files() -> list[Path]:
    return sorted(KERNELS.rglob("*.py"))


def files_of_tests() -> list[Path]:
    return sorted(TESTS.rglob("*.py"))


def packages(path: Path) -> set[str]:
    """What a file imports, the standard library left out."""
    return {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {
        ".".join(("fastgn", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): p
        for p in files()
    }
    arrows = {name: (imports(path) & names.keys()) - {name} for name, path in names.items()}
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_between_siblings(path: Path) -> None:
    if room(path) in COMPOSE:
        others = set(COMPOSE) - {room(path)} - COMPOSE[room(path)]
        assert not {f"fastgn.{o}" for o in others} & {
            ".".join(i.split(".")[:2]) for i in imports(path)
        }
        return
    allowed = MAY_IMPORT[room(path)]
    used = {name.split(".")[1] for name in imports(path) if name.startswith("fastgn.")}
    used.discard("compile_double_backward")
    assert used <= allowed, (
        f"{path.name} may import {sorted(allowed)}, not {sorted(used - allowed)}"
    )


@pytest.mark.parametrize("package", ONLY_IN)
def test_outside_packages_are_known_in_one_place(package: str) -> None:
    users = {str(p.relative_to(PACKAGE)) for p in files() if package in packages(p)}
    assert users <= ONLY_IN[package]


def test_every_room_is_listed() -> None:
    assert {room(p) for p in files()} == set(MAY_IMPORT) | set(COMPOSE)


def imported_tests(path: Path) -> set[str]:
    """Returns the test files, conftest.py included, that a file imports."""
    parts = {part for name in imports(path) for part in name.split(".")}
    return {part for part in parts if part.startswith("test_") or part == "conftest"}


@pytest.mark.parametrize("path", files_of_tests(), ids=lambda p: str(p.relative_to(TESTS)))
def test_tests_share_helpers_through_support_alone(path: Path) -> None:
    assert not imported_tests(path), "move what they share to tests/support"


def test_the_rule_of_helpers_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "test_x.py"
    path.write_text("from test_y import helper\nimport tests.data.test_z\nfrom conftest import a\n")
    assert imported_tests(path) == {"test_y", "test_z", "conftest"}


FORKS = {"os.fork()", "multiprocessing.get_context('fork')", "get_context('fork')"}


def test_no_test_forks_its_own_process() -> None:
    """An exception in the fork would let it go on with the tests. See support.processes."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
        assert FORKS.isdisjoint(map(ast.unparse, calls)), path


def test_loop_fits_one_screen() -> None:
    tree = ast.parse((PACKAGE / "train.py").read_text())
    loop = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert loop.end_lineno - loop.lineno < 45


@pytest.mark.parametrize("path", kernel_files(), ids=lambda p: p.name)
def test_the_kernels_need_torch_and_triton_alone(path: Path) -> None:
    """But for numpy under Triton's interpreter, which needs it itself."""
    interpreted = {"numpy"} if path.name == "maths.py" else set()
    assert packages(path) <= {"fastgn_kernels", "torch", "triton"} | interpreted


@pytest.mark.parametrize(
    "path", [*files(), *kernel_files()], ids=lambda p: f"{p.parent.name}.{p.stem}"
)
def test_public_functions_and_classes_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


# --------------------------------------------------------------------- limits, and language


LONGEST_FILE = 450
LONGEST_TEST_FILE = 650
LONGEST_FUNCTION = 80


def too_long(path: Path) -> set[str]:
    """Returns the file if it has too many lines, and its functions that have."""
    text, name = path.read_text(), path.relative_to(ROOT).as_posix()
    found = {name} if text.count("\n") > LONGEST_FILE else set()
    for function in functions(ast.parse(text)):
        assert function.end_lineno is not None
        if function.end_lineno - function.lineno >= LONGEST_FUNCTION:
            found.add(f"{name}:{function.name}")
    return found


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Returns all functions and methods of a module, nested ones included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def test_files_of_tests_are_short() -> None:
    lines = {path.relative_to(ROOT).as_posix(): path.read_text() for path in files_of_tests()}
    assert not [name for name, text in lines.items() if text.count("\n") > LONGEST_TEST_FILE]


def test_files_and_functions_are_short() -> None:
    assert not set().union(*(too_long(path) for path in [*files(), *kernel_files()]))


NOUNS = {"Epochs", "Options", "Rows", "Versions"}
"""First words of phrases without a verb that end in s, as a verb in the third person does."""


def begins_with_verb(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Returns whether a docstring begins like "Returns ..."; true if there is none.

    A property may name what it is, as a field does. The docstring of `__init__` may begin with an
    argument, as in "rate: ...".
    """
    text = ast.get_docstring(function)
    if text is None or any("property" in ast.unparse(d) for d in function.decorator_list):
        return True
    first = text.split()[0].rstrip(",.")
    if function.name == "__init__" and ":" in text.split("\n")[0]:
        return True
    return re.fullmatch(r"[A-Z][a-z]*[^s\W]s", first) is not None and first not in NOUNS


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    unclear = {
        f"{path.relative_to(ROOT).as_posix()}:{function.name}"
        for path in [*files(), *kernel_files()]
        for function in functions(ast.parse(path.read_text()))
        if not begins_with_verb(function)
    }
    assert not unclear


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Returns the images.", True),
        ("Whether it is so.", False),
        ("The images.", False),
        ("Of each image.", False),
        ("Rows as CSV.", False),
        ("images: of the split.", False),
        ("Less of it.", False),
    ],
)
def test_the_rule_of_docstrings_can_fail(text: str, right: bool) -> None:
    (function,) = functions(ast.parse(f'def f():\n    """{text}"""'))
    assert begins_with_verb(function) == right


# ------------------------------------------------------------------- without the extra `train`


OPTIONAL = {"apex", "huggingface_hub", "nvidia", "wandb"}
"""Imported where they are used; huggingface_hub comes with timm."""


def test_the_extra_is_what_is_imported() -> None:
    used = set().union(*(packages(p) for p in files()))
    present = {"torch", "fastgn", "fastgn_kernels", "jinja2"}  # torch requires jinja2
    assert used - present - OPTIONAL == set(TRAIN) - {"tensorboard"}
    assert "torch.utils.tensorboard" in imports(PACKAGE / "metrics.py")


def run_without_extra(code: str) -> subprocess.CompletedProcess[str]:
    """Python with all that `pip install fastgn` alone does not bring hidden."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({[*TRAIN, *OPTIONAL]}))"
    return subprocess.run(
        [sys.executable, "-c", f"{hide}\n{code}"], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize(
    "statement",
    [
        "from fastgn import compile_double_backward",
        "from fastgn.objectives import gradnorm",
        "import fastgn_kernels.swap",
    ],
)
def test_what_torch_alone_is_enough_for(statement: str) -> None:
    done = run_without_extra(f"{statement}\nprint('imported')")
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr


@pytest.mark.parametrize(
    "program", ["fastgn.train", "fastgn.evaluate", "fastgn.export", "fastgn.data.pack"]
)
def test_the_programs_name_the_extra_in_one_line(program: str) -> None:
    run = f"import runpy; runpy.run_module('{program}', run_name='__main__')"
    done = run_without_extra(f"sys.argv[0] = '-m'; {run}")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]  # torch itself warns where there is no numpy
    assert line.startswith(f"{program}: error: not installed: matplotlib, numpy, ")
    assert line.endswith(": run pip install 'fastgn[train]'")
