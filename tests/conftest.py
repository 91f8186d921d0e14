"""Fixtures that several test files share, and what the mark `interpreter` means."""

import os

# threads that spin against the machine's other work made a tiny step 15 times slower than one alone
os.environ["OMP_NUM_THREADS"] = "1"

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
pytest.register_assert_rewrite("support")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps only tests with a mark `interpreter` if TRITON_INTERPRET=1 is set."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        left = [item for item in items if not is_interpreted(item)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if is_interpreted(item)]


def is_interpreted(item: pytest.Item) -> bool:
    """Returns whether a mark `interpreter` of the test allows the values of its parameters."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return any(
        all(parameters[name] in values for name, values in mark.kwargs.items())
        for mark in item.iter_markers("interpreter")
    )


DRAWN: list[bytes] = []
"""The picture of the first run of this process, or nothing."""


@pytest.fixture(autouse=True)
def curves_drawn_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Gives all runs of a process the same curves.png, because drawing it takes half of a tiny run.

    A test with the mark `curves` draws its own.
    """
    finish = sys.modules.get("fastgn.finish")
    if finish is None or request.node.get_closest_marker("curves"):
        yield
        return
    draw = finish.draw_curves

    def draw_once(*args: Any, **options: Any) -> bytes:
        if not DRAWN:
            DRAWN.append(draw(*args, **options))
        return DRAWN[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "draw_curves", draw_once)
        yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder for training runs that several tests read and none changes."""
    return tmp_path_factory.mktemp("shared")
