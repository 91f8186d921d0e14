"""Fixtures that several test files share, and what the mark `interpreter` means."""

import os

# threads that spin against the machine's other work made a tiny step 15 times slower than one alone
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

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


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder for training runs that several tests read and none changes."""
    return tmp_path_factory.mktemp("shared")
