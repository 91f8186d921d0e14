"""A trained network on disk, read from an export or from a checkpoint."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fastgn.checkpoint import load_checkpoint, read_config
from fastgn.config import Config
from fastgn.errors import check
from fastgn.files import METADATA, parse_json, read_safetensors, write_safetensors
from fastgn.state import ExportHeader, TrainState, as_dict, read_fields


def export_weights(path: Path, weights: Mapping[str, Tensor], header: ExportHeader) -> None:
    """Writes weights as a .safetensors file that carries the header."""
    write_safetensors(path, weights, as_dict(header))


@dataclasses.dataclass(frozen=True)
class Saved:
    """A trained network as a checkpoint or an export holds it."""

    config: Config
    classes: tuple[str, ...]
    weights: dict[str, Tensor]
    """The averaged weights if the run kept an average, otherwise the weights. The keys are those of
    the timm network in an export, and those of a Classifier in a checkpoint."""
    update: int | None
    """Number of updates that the weights have had. None if an older version did not say."""
    unfinished: str | None
    """A line that says how far the run had come, if the file is a checkpoint from before its end.
    None for an export, which a run writes at its end."""


def read_saved(path: Path) -> Saved:
    """Returns the network that an export (.safetensors) or a checkpoint holds. Raises UserError."""
    if path.suffix == ".safetensors":
        weights, metadata = read_safetensors(path)
        check(
            METADATA in metadata,
            f"{path} was not exported by fastgn.train: it carries no config; name its network by "
            "--model",
        )
        where = f"the header of {path}"
        header = read_fields(parse_json(metadata[METADATA], where), ExportHeader, where)
        config = read_config(header.config, path)
        return Saved(config, tuple(header.classes), weights, header.update, unfinished=None)
    state = load_checkpoint(path)
    return Saved(
        config := state.saved_config(),
        tuple(state.classes),
        state.ema or state.model,
        state.update,
        describe_unfinished(state, config),
    )


def describe_unfinished(state: TrainState, config: Config) -> str | None:
    """Returns a line that says how far a checkpoint's run had come. None means to its end."""
    epoch, epochs, limit = state.epoch, config.optimizer.epochs, config.run.max_updates
    if (epoch is not None and epoch >= epochs) or (limit is not None and state.update >= limit):
        return None
    of = f" (epoch {epoch:.3g} of {epochs})" if epoch is not None else ""
    return f"these are the weights of update {state.update}{of}, before the run's end"
