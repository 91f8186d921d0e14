"""Tests fastgn_kernels as a distribution: what it requires, and that its wheel works alone."""

import contextlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
from support import ROOT


def read_project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def requirements(lines: list[str]) -> set[str]:
    """Returns the names of the distributions that requirement lines such as "torch>=2" name."""
    return {re.match(r"[\w-]+", line)[0] for line in lines}


def test_the_package_requires_torch_and_triton_alone() -> None:
    project = read_project(ROOT)["project"]
    assert requirements(project["dependencies"]) == {"torch", "triton"}
    assert {"timm", "torchvision"} <= requirements(project["optional-dependencies"]["train"])


def test_both_distributions_say_the_same() -> None:
    whole, alone = (read_project(folder)["project"] for folder in (ROOT, ROOT / "kernels"))
    for key in ("version", "requires-python", "dependencies", "license"):
        assert alone[key] == whole[key], key


def test_the_main_distribution_holds_both_packages() -> None:
    tools = read_project(ROOT)["tool"]["setuptools"]
    find = tools["packages"]["find"]
    found = {
        package
        for where in find["where"]
        for package in setuptools.find_packages(str(ROOT / where), include=find["include"])
    }
    assert {"fastgn", "fastgn_kernels"} <= found
    assert all("py.typed" in tools["package-data"][p] for p in ("fastgn", "fastgn_kernels"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel from a copy of kernels/, and returns the folder that it is unpacked to."""
    folder = tmp_path_factory.mktemp("wheel")
    clean = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "kernels", folder / "source", ignore=clean)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    options = ["--disable-pip-version-check", "--wheel-dir", str(folder), str(folder / "source")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    sources = {p.name for p in (ROOT / "kernels" / "fastgn_kernels").iterdir()} - {"__pycache__"}
    assert {p.name for p in (wheel / "fastgn_kernels").iterdir()} == sources
    (information,) = (p for p in wheel.iterdir() if p.name != "fastgn_kernels")
    assert re.fullmatch(r"fastgn_kernels-[\d.]+\.dist-info", information.name)
    assert (information / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def closure(distribution: str, seen: set[str]) -> set[str]:
    """Returns `distribution` and all that it requires, as far as they are installed."""
    name = re.sub(r"[-_.]+", "-", distribution).lower()
    if name not in seen:
        seen.add(name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for line in importlib.metadata.requires(name) or []:
                if "extra ==" not in line:
                    closure(re.match(r"[\w.-]+", line)[0], seen)
    return seen


ALONE = """
import importlib.metadata
import sys

before = set(sys.modules)  # what a site's own start-up has imported
version = importlib.metadata.version

def hidden_version(name):  # torch asks so for optree, which DALI brings
    if name in {hidden!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = hidden_version

class Hide:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *more):
        if name.split(".")[0] not in {hidden!r} and name != "nvidia.dali":
            return self.finder.find_spec(name, *more)

sys.meta_path[:] = map(Hide, sys.meta_path)
sys.path.insert(0, {wheel!r})
import torch
import fastgn_kernels
from fastgn_kernels.swap import swap_modules

model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.GELU())
print(swap_modules(model).counts)
x = torch.ones(4, 2, requires_grad=True)
(grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
fastgn_kernels.gradient_norm(grad).sum().backward()
print(bool(model[0].weight.grad.any()))
print(fastgn_kernels.__file__.startswith({wheel!r}))
print([name for name in {hidden!r} if name in set(sys.modules) - before])
"""


@pytest.mark.slow
def test_the_wheel_runs_with_torch_and_triton_alone(wheel: Path) -> None:
    """Nothing else that is installed can be imported, such as numpy, timm or the trainer."""
    allowed = closure("torch", set()) | closure("triton", set())
    hidden = {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", d).lower() for d in distributions} & allowed
    }
    hidden = (hidden | {"fastgn"}) - {"fastgn_kernels"} - set(sys.stdlib_module_names)
    assert {"timm", "torchvision", "tyro", "numpy", "fastgn"} <= hidden
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE.format(hidden=hidden, wheel=str(wheel))],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "{'layer_norm': 1, 'gelu': 1}\nTrue\nTrue\n[]\n", done.stderr
