"""Writes and reads trained networks, and makes them ready for attacks."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastgn.checkpoint import Checkpoints, find_checkpoint, load_checkpoint, read_config
from fastgn.config import Config, run_folder
from fastgn.config.inputs import check_checkpoints
from fastgn.config.programs import BareWeightsConfig
from fastgn.errors import UserError, check, escape, print_line
from fastgn.files import METADATA, parse_json, read_safetensors, write_safetensors
from fastgn.models.network import Classifier, build_model
from fastgn.models.weights import load_weights, read_weights
from fastgn.state import ExportHeader, TrainState, as_dict, read_fields


def export_weights(path: Path, weights: Mapping[str, Tensor], header: ExportHeader) -> None:
    """Writes weights as a .safetensors file. The file's header contains `header`."""
    write_safetensors(path, weights, as_dict(header))


@dataclasses.dataclass(frozen=True)
class Saved:
    """A trained network and its configuration, as read from a checkpoint or an export."""

    config: Config
    classes: tuple[str, ...]
    weights: dict[str, Tensor]
    """The moving average of the weights if the run kept one, otherwise the weights. In an export
    the keys are those of the timm network, and in a checkpoint those of a Classifier."""
    update: int | None
    """Number of updates for which the weights were trained. None if an older version of fastgn
    wrote the file without this number."""
    unfinished: str | None
    """A line that says how far the run had come. None if the run had ended, and for all
    exports."""


def read_saved(path: Path) -> Saved:
    """Returns the network that an export (.safetensors) or a checkpoint holds.

    Raises UserError if the file is missing or damaged, or if it is neither an export nor a
    checkpoint.
    """
    if path.suffix == ".safetensors":
        weights, metadata = read_safetensors(path)
        check(
            METADATA in metadata,
            f"{path} was not exported by fastgn.train, so it holds no config: name its network "
            "with --model",
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
    """Returns a line that says how far a checkpoint's run had come, or None if the run had
    ended."""
    epoch, epochs, limit = state.epoch, config.optimizer.epochs, config.run.max_updates
    if (epoch is not None and epoch >= epochs) or (limit is not None and state.update >= limit):
        return None
    of = f" (epoch {epoch:.3g} of {epochs})" if epoch is not None else ""
    return f"these are the weights of update {state.update}{of}, before the run's end"


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network, ready for attacks, and the configuration that it was trained with."""

    name: str
    """Name of the run or of the file of weights, with unprintable characters escaped."""
    model: Classifier
    """The network in evaluation mode. Its weights require no gradient."""
    cfg: Config
    classes: tuple[str, ...]
    update: int | None = None
    """Number of updates for which the weights were trained. None if the file does not say."""
    unfinished: str | None = None
    """A line that says how far the run had come. None if the weights are from the run's end."""


def load_trained(where: str, device: torch.device) -> Trained:
    """Returns the network that a run's folder, a checkpoint or an export holds.

    where: path of the folder, checkpoint or export. If a folder holds an export, the export is used
    instead of the last checkpoint. Raises UserError if there is no such network.
    """
    path = Path(where)
    check_checkpoints([where])
    if path.is_dir() and (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    saved = read_saved(
        path if path.suffix == ".safetensors" else find_checkpoint(path, "--checkpoint")
    )
    try:
        model, _ = build_model(saved.config.architecture.started(), len(saved.classes))
    except UserError as error:
        raise UserError(f"--checkpoint {where}: {error}") from None
    load_weights(model, saved.weights, f"--checkpoint {where}")
    model.crop_pct = saved.config.augmentation.crop_pct or model.crop_pct
    model.to(device).eval().requires_grad_(False)
    name = escape(run_folder(Path(where)).name)
    update, unfinished = saved.update, saved.unfinished
    last = Checkpoints(Path(where), 1).last() if Path(where).is_dir() else None
    if last is not None and update is not None and int(last.stem.split("_")[1]) > update:
        unfinished = f"these are the weights of update {update}; the run has gone on to {last}"
    return Trained(name, model, saved.config, saved.classes, update, unfinished)


def load_bare_weights(
    where: str, cfg: BareWeightsConfig, classes: tuple[str, ...], device: torch.device
) -> Trained:
    """Returns the network that --model names, with the weights of a file that holds only weights.

    The keys of the weights are those of the timm network. Raises UserError if the weights do not
    fit the network. where: path of the file. classes: names of the classes.
    """
    assert cfg.model is not None
    path = Path(where)
    check(path.is_file(), f"--checkpoint {where}: there is no such file")
    config = Config().replace(model=cfg.model)
    given = {k: getattr(cfg, k) for k in ("activation", "img_size", "mean", "std", "model_kwargs")}
    config = config.replace(**{k: v for k, v in given.items() if v is not None})
    weights = read_weights(path, paper=cfg.from_paper)
    model, _ = build_model(config.architecture, len(classes))
    adapted = load_weights(model, weights, f"--checkpoint {where}", adapt=cfg.adapt_weights)
    check(
        not adapted.anew,
        f"--checkpoint {where} has another number of classes than the data: {adapted}",
    )
    if adapted:
        print_line(f"{where}: {adapted}")
    model.to(device).eval().requires_grad_(False)
    model.crop_pct = cfg.crop_pct or model.crop_pct
    config = config.replace(crop_pct=model.crop_pct)
    return Trained(escape(path.stem), model, config, classes)


def hash_weights(model: torch.nn.Module) -> str:
    """Returns the SHA-256 of the names and values in a network's state dict, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
