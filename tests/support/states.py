"""Contents of checkpoints: made small, read by name, compared to the last bit."""

from pathlib import Path
from typing import Any

import torch

from fastgn.checkpoint import FORMAT, find_checkpoint, load_checkpoint
from fastgn.config import Config
from fastgn.state import TrainState, keys_of


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
        "evaluation_pending": False,
        "sums": torch.zeros(2, 5),
        "summed": 0,
        "bad_images": [],
        "model": weights,
        "ema": None,
        "loss_scale": None,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"params": [0]}]},
        "global_batch": 8,
        "ranks": 1,
        "config": Config().to_toml(),
        "classes": ["a", "b"],
        "data": {"training": {"images": 8}},
    }
    return state | values


def last_state(folder: Path) -> dict[str, Any]:
    """Returns the content of a run's last checkpoint by name."""
    return read_state(find_checkpoint(folder))


def trained_state(folder: Path) -> dict[str, Any]:
    """Returns the values of a run's last checkpoint that depend on neither stops nor restarts."""
    state = last_state(folder)
    return {k: state[k] for k in ("update", "model", "ema", "optimizer")}


CHECKPOINT = keys_of(TrainState)
