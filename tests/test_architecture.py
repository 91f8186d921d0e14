"""The arrows between rooms (README, architecture): who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastgn"

MAY_IMPORT = {
    "__init__": {"schedule"},
    "config": set(),
    "seeding": set(),
    "attacks": set(),
    "preact_resnet": set(),
    "objectives": {"attacks", "config"},
    "schedule": {"attacks", "objectives"},
    "models": {"config", "preact_resnet"},
    "optim": {"config"},
    "ema": set(),
    "distributed": {"config"},
    "checkpoint": {"config"},
    "metrics": {"checkpoint", "config"},
    "data": {"config", "seeding", "data"},
    "analysis": set(),
}
"""Module or subpackage of fastgn -> siblings that it may import; train and evaluate compose all."""

ONLY_IN = {
    "timm": {"models.py", "data/augment.py", "data/torch.py"},
    "nvidia": {"data/dali.py"},
    "matplotlib": {"analysis/figures.py"},
    "tyro": {"config.py"},
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


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_between_siblings(path: Path) -> None:
    if room(path) in ("train", "evaluate"):
        others = {"train", "evaluate"} - {room(path)}
        assert not {f"fastgn.{o}" for o in others} & imports(path)
        return
    allowed = MAY_IMPORT[room(path)]
    used = {name.split(".")[1] for name in imports(path) if name.startswith("fastgn.")}
    used.discard("compile_double_backward")
    assert used <= allowed, (
        f"{path.name} may import {sorted(allowed)}, not {sorted(used - allowed)}"
    )


@pytest.mark.parametrize("package", ONLY_IN)
def test_outside_packages_are_known_in_one_place(package: str) -> None:
    users = {
        str(p.relative_to(PACKAGE))
        for p in files()
        if package in {i.split(".")[0] for i in imports(p)}
    }
    assert users <= ONLY_IN[package]


def test_every_room_is_listed() -> None:
    assert {room(p) for p in files()} == set(MAY_IMPORT) | {"train", "evaluate"}


def test_loop_fits_one_screen() -> None:
    tree = ast.parse((PACKAGE / "train.py").read_text())
    loop = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert loop.end_lineno - loop.lineno < 45


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_functions_and_classes_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
