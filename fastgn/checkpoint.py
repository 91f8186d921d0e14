"""A run's checkpoints and exports: what they hold, declared once and checked at each reading."""

import dataclasses
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgn.config import Config, run_folder
from fastgn.errors import UserError, check
from fastgn.files import (
    METADATA,
    atomic_open,
    check_regular,
    parse_json,
    read_archive,
    read_safetensors,
    remove_file,
    write_safetensors,
)

FORMAT = 1
"""Version of the checkpoint's content. It goes up if an older reader could not use the
new content."""

REQUIRED = object()
"""Default of a key that a file must have."""


@dataclasses.dataclass(frozen=True)
class Key:
    """The value that a file may hold under a key."""

    what: str
    """Expected content, for the error message 'X should be <what>'."""
    fits: Callable[[Any], bool]
    default: Any = REQUIRED
    """The value that stands in for the key in a file of an older version."""


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold exactly, and no truth value."""
    return type(value) in (int, float) and abs(value) < 2**53


def whole(least: int, default: Any = REQUIRED) -> Key:
    return Key(
        f"a whole number of at least {least}",
        lambda v: type(v) is int and least <= v < 2**53,
        default,
    )


def is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def is_optimizer(value: Any) -> bool:
    """Whether a value is shaped as an optimizer's state_dict: moments by the number of their
    parameter, and groups that list these numbers."""
    if not isinstance(value, dict) or not value.keys() >= {"state", "param_groups"}:
        return False
    state, groups = value["state"], value["param_groups"]
    return (
        isinstance(state, dict)
        and all(type(k) is int and isinstance(v, dict) for k, v in state.items())
        and isinstance(groups, list)
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
        and all(type(number) is int for g in groups for number in g["params"])
    )


def is_identity(value: Any) -> bool:
    """Whether a value has the form that data/identity.py gives: per split, numbers and digests."""
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(split, dict)
        and all(isinstance(k, str) and type(v) in (int, str) for k, v in split.items())
        for name, split in value.items()
    )


TEXTS = "a list of different texts"

CONFIG = Key("a recipe's text", lambda v: isinstance(v, str))
CLASSES = Key(
    f"{TEXTS}, at least 2",
    lambda v: isinstance(v, list) and is_texts(v) and len(set(v)) == len(v) > 1,
)
CHECKPOINT = {
    "format": whole(1),
    "update": whole(0),
    "epoch": Key("a finite number", is_number, None),
    "best": Key("a finite number", is_number),
    "accuracy": Key(
        "finite numbers by name",
        lambda v: (
            isinstance(v, dict) and all(isinstance(k, str) and is_number(x) for k, x in v.items())
        ),
    ),
    "sums": Key("a tensor of numbers", lambda v: isinstance(v, Tensor) and v.is_floating_point()),
    "summed": whole(0),
    "bad_images": Key("a list of texts", lambda v: isinstance(v, list) and is_texts(v), []),
    "model": Key("tensors by name", is_state_dict),
    "ema": Key("tensors by name, or None", lambda v: v is None or is_state_dict(v)),
    "optimizer": Key("an optimizer's state", is_optimizer),
    "global_batch": whole(1),
    "ranks": whole(1, None),
    "config": CONFIG,
    "classes": CLASSES,
    "data": Key("what is known of each split's images", is_identity, None),
}
"""All that a checkpoint holds: a key that is not here can be neither written nor read."""
EXPORT = {"config": CONFIG, "classes": CLASSES, "update": whole(0, None)}
"""All that the header of an export holds."""


def is_texts(values: list[Any]) -> bool:
    return all(isinstance(v, str) for v in values)


def checked(content: Any, keys: Mapping[str, Key], where: str) -> dict[str, Any]:
    """Returns what a file holds, with the defaults of keys that an older version did not write.

    Raises UserError, which begins with `where`: a key that is missing, of another kind, or of a
    newer version.
    """
    check(isinstance(content, dict), f"{where} holds a {type(content).__name__}, not named values")
    unknown = next((k for k in content if k not in keys), None)
    check(
        unknown is None,
        f"{where} holds {str(unknown)[:80]!r}, which this version of fastgn does not know: a newer "
        "one has written it; update fastgn",
    )
    out = {}
    for name, key in keys.items():
        value = content.get(name, key.default)
        check(value is not REQUIRED, f"{where} is damaged: it lacks {name!r}")
        fits = (name not in content and value is key.default) or key.fits(value)
        check(fits, f"{where} is damaged: {name!r} should be {key.what}")
        out[name] = value
    return out


class Checkpoints:
    """A run's checkpoints/: the last few, best.pt, and the epochs that are kept for good."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder / "checkpoints"
        self.keep = keep

    def path(self, update: int) -> Path:
        return self.folder / f"update_{update:08d}.pt"

    def epoch_path(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch:04d}.pt"

    def all(self) -> list[Path]:
        """Returns update_*.pt, oldest first. Folders of such a name are left out."""
        found = (
            p
            for p in self.folder.glob("update_*.pt")
            if re.fullmatch(r"update_\d+\.pt", p.name) and p.is_file()
        )
        return sorted(found, key=lambda p: int(p.stem.split("_")[1]))

    def last(self) -> Path | None:
        paths = self.all()
        return paths[-1] if paths else None

    def save(
        self,
        state: Mapping[str, Any],
        update: int,
        *,
        best: bool = False,
        keep_epoch: int | None = None,
    ) -> Path:
        """Writes update_N.pt, with best.pt and epoch_M.pt as further names of the same file if
        asked for. Removes the oldest update_*.pt, and those of a continuation given up for an
        earlier checkpoint.
        """
        assert state.keys() <= CHECKPOINT.keys(), "a new key is declared in CHECKPOINT"
        path = self.path(update)
        names = [self.folder / "best.pt"] if best else []
        names += [] if keep_epoch is None else [self.epoch_path(keep_epoch)]
        # update_N.pt last: a kill between two names replays the update that they belong to
        first, *others = [*names, path]
        with atomic_open(first) as file:
            torch.save({"format": FORMAT, **state}, file)
        for other in others:
            self._link(first, other)
        there = self.all()
        end = there.index(path) + 1
        for old in there[: max(end - self.keep, 0)] + there[end:]:
            remove_file(old)
        return path

    def remove_leftovers(self) -> None:
        """Removes what kills have left half-written. Only the holder of the run's lock may."""
        for left in self.folder.glob(".*.tmp"):
            remove_file(left)

    @staticmethod
    def _link(path: Path, name: Path) -> None:
        check_regular(name)
        temporary = name.with_name(f".{name.name}.{secrets.token_hex(8)}.tmp")
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            with open(path, "rb") as source, atomic_open(name) as file:
                shutil.copyfileobj(source, file)
            return
        os.replace(temporary, name)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Returns a checkpoint's content, on the CPU, with all of CHECKPOINT's keys. Runs no code from
    the file.

    Raises UserError: absent, cut short, flipped bits (every checksum in the file is verified),
    objects besides tensors and plain values, another version's, or not a checkpoint of this
    program.
    """
    check(path.is_file(), f"{path}: there is no such checkpoint")
    try:
        content = read_archive(path)
    except UserError as error:
        others = ", ".join(p.name for p in sorted(path.parent.glob("*.pt")) if p != path)
        raise UserError(f"{error}{f'; others there: {others}' if others else ''}") from None
    found = content.get("format") if isinstance(content, dict) else None
    check(
        type(found) is int and found >= 1,
        f"{path} is not a checkpoint of fastgn.train, format {FORMAT}",
    )
    check(
        found == FORMAT,
        f"{path} is of format {found}, and this version of fastgn reads format {FORMAT}: update "
        "fastgn",
    )
    state = checked(content, CHECKPOINT, str(path))
    config_of(state, path)
    return state


def find_checkpoint(where: Path, flag: str = "--resume") -> Path:
    """Returns the checkpoint that a flag names: a file, or the last one of a run's folder."""
    if where.is_file():
        return where
    check(where.is_dir(), f"{flag} {where}: there is no such run or checkpoint")
    last = Checkpoints(run_folder(where / "config.toml"), 1).last()
    if last is None:
        raise UserError(f"{flag} {where}: no checkpoint below it")
    return last


def export_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes weights as safetensors, with EXPORT's keys in the header."""
    assert metadata.keys() <= EXPORT.keys(), "a new key is declared in EXPORT"
    write_safetensors(path, weights, metadata)


@dataclasses.dataclass(frozen=True)
class Saved:
    """A trained network as a checkpoint or an export has it."""

    config: Config
    classes: tuple[str, ...]
    weights: dict[str, Tensor]
    """Averaged weights if the run kept them, otherwise the weights. Keys are timm's, or those of a
    Classifier."""
    update: int | None
    """Updates of the run that the weights have; None if an older version did not say."""
    unfinished: str | None
    """How far the run had come, in a line, if the file is a checkpoint; None for an export, which a
    run writes at its end."""


def read_saved(path: Path) -> Saved:
    """Returns the network that an export (.safetensors) or a checkpoint holds. Raises UserError."""
    exported = path.suffix == ".safetensors"
    if exported:
        weights, metadata = read_safetensors(path)
        check(
            METADATA in metadata,
            f"{path} was not exported by fastgn.train: it carries no config; name its network by "
            "--model",
        )
        where = f"the header of {path}"
        header = checked(parse_json(metadata[METADATA], where), EXPORT, where)
    else:
        header = load_checkpoint(path)
        weights = header["ema"] or header["model"]
    config = config_of(header, path)
    unfinished = None if exported else position(header, config)
    return Saved(config, tuple(header["classes"]), weights, header["update"], unfinished)


def position(state: Mapping[str, Any], config: Config) -> str | None:
    """Returns a line that says where in its run a checkpoint was made; None if at the end."""
    epoch, epochs, limit = state["epoch"], config.optimizer.epochs, config.run.max_updates
    if (epoch is not None and epoch >= epochs) or (limit is not None and state["update"] >= limit):
        return None
    of = f" (epoch {epoch:.3g} of {epochs})" if epoch is not None else ""
    return f"these are the weights of update {state['update']}{of}, before the run's end"


def config_of(header: Mapping[str, Any], path: Path) -> Config:
    """Returns the config that a checkpoint or an export was made with. Raises UserError."""
    try:
        return Config.from_toml(header["config"])
    except UserError as error:
        raise UserError(f"{path}: its config: {error}") from None
