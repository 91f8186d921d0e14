"""Fixtures, command lines and helpers that several test files share."""

import os

# threads that spin against the machine's other work made a tiny step 15 times slower than one alone
os.environ["OMP_NUM_THREADS"] = "1"

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgn.checkpoint import FORMAT, load_checkpoint
from fastgn.config import Config
from fastgn.state import TrainState

torch.set_num_threads(1)

TINY_SWIN = (
    *("--model", "swin_t", "--img-size", "16", "--model-kwargs", "patch_size=4", "embed_dim=8"),
    *("depths=(1, 1)", "num_heads=(1, 2)", "window_size=2", "--data", "digits"),
)
"""Arguments for a Swin with about 5,000 weights, whose first stage has shifted windows."""


def tiny_run(output: Path, *more: str) -> list[str]:
    """Returns arguments for fastgn.train that train on digits for a few seconds.

    One epoch has 29 updates of 48 images.
    """
    fixed = ("--batch-size", "48", "--epochs", "1", "--warmup-epochs", "0", "--eval-images", "48")
    swin = without(TINY_SWIN, "--model-kwargs") if "--model-kwargs" in more else TINY_SWIN
    return [*swin, *fixed, "--lr", "0.003", "--output", str(output), *more]


def without(args: Sequence[str], flag: str) -> list[str]:
    """Returns a command line without a flag and its values: a list may be given once alone."""
    start = args.index(flag)
    rest = itertools.dropwhile(lambda arg: not arg.startswith("--"), args[start + 1 :])
    return [*args[:start], *rest]


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Returns the places at which two nested values are not bitwise equal, or [] if there are none.

    where: path of the values, for the result.
    """
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__}, {type(b).__name__}"]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for k in a for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} long"]
        return [
            d
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in differences(x, y, f"{where}/{i}")
        ]
    return [] if a == b else [f"{where}: {a!r}, {b!r}"]


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


def read_state(path: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint by name, as torch.save receives it."""
    return {"format": FORMAT, **vars(load_checkpoint(path))}


def small_state(update: int, /, **values: Any) -> TrainState:
    """Returns the content of a checkpoint of a network with one weight.

    values: fields that differ from the defaults of `small_values`.
    """
    return TrainState(**small_values(update, **values))


def small_values(update: int, /, **values: Any) -> dict[str, Any]:
    """Returns the content of such a checkpoint by name. It is not checked, so it may be invalid."""
    weights = {"weight": torch.full((3,), float(update))}
    state = {
        "update": update,
        "epoch": update / 10,
        "best": 0.5,
        "accuracy": {"clean_accuracy": 0.5},
        "sums": torch.zeros(2, 5),
        "summed": 0,
        "bad_images": [],
        "model": weights,
        "ema": None,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"params": [0]}]},
        "global_batch": 8,
        "ranks": 1,
        "config": Config().to_toml(),
        "classes": ["a", "b"],
        "data": {"training": {"images": 8}},
    }
    return state | values
