"""Chooses and locks the folder of a run, and finds the checkpoint that the run continues from."""

import time
from pathlib import Path

from fastgn.checkpoint import Checkpoints, find_checkpoint, load_checkpoint
from fastgn.config import Config
from fastgn.config.outputs import RUN_FILES, check_outside_data, check_replaced
from fastgn.distributed import World, count_restarts, has_agent_store, share_across_restarts
from fastgn.errors import check
from fastgn.files import check_target
from fastgn.lock import lock_folder, remove_leftovers
from fastgn.state import TrainState


def open_run(cfg: Config, world: World) -> tuple[Path, Path | None, TrainState | None]:
    """Returns the run's folder, the checkpoint to continue from, and that checkpoint's content.

    Also locks the folder, so that no other process can write into it. For a new run, the checkpoint
    and its content are None.

    Raises UserError if another process has locked the folder, or if the folder holds another run.
    """
    # only the first rank looks for a checkpoint, because another rank could find a newer one
    found = choose_folder(cfg, world) if world.is_main else None
    folder, path = world.share(found)
    return folder, path, load_checkpoint(path) if path is not None else None


def choose_folder(cfg: Config, world: World) -> tuple[Path, Path | None]:
    """Locks the run's folder. Returns the folder, and the path of the checkpoint to continue from.

    The checkpoint is None if the run is new.
    """
    folder = name_folder(cfg)
    flag = "--output" if cfg.run.resume in (None, "auto") else "--resume"
    splits = cfg.dataset.train_split, cfg.dataset.val_split
    check_outside_data({flag: folder}, cfg.dataset.data_dir, splits)
    world.held.enter_context(lock_folder(folder, f"{flag} {folder}"))
    for file in (*RUN_FILES, "checkpoints/best.pt"):
        check_target(folder / file)
    checkpoints = Checkpoints(folder, 1)
    remove_leftovers(folder, RUN_FILES)
    checkpoints.remove_leftovers()
    last = found = checkpoints.last()
    continues = count_restarts() > 0
    if cfg.run.resume == "auto":
        check(cfg.run.output is not None, "--resume auto needs --output with the run's folder")
        continues = True
    elif cfg.run.resume is not None:
        found = find_checkpoint(Path(cfg.run.resume))
        continues |= folder.resolve() in found.resolve().parents
    check(
        continues or (last is None and not (folder / "model.safetensors").exists()),
        f"--output {folder} holds a run already: use --resume {folder} to continue this run, or "
        "another --output to start a new run",
    )
    # every run writes environment.json first, so a folder with this file belongs to a run
    made = last is not None or (folder / "environment.json").exists()
    check_replaced(flag, folder, (*RUN_FILES, "checkpoints/best.pt"), made, "run")
    return folder, found


def name_folder(cfg: Config) -> Path:
    """Returns the path of the run's folder. A rank that torchrun restarts gets the same path."""
    check(
        count_restarts() == 0 or cfg.run.output is not None or has_agent_store(),
        "torchrun has restarted a rank, which cannot find the folder of its run: add --output with "
        "this folder",
    )
    if cfg.run.resume not in (None, "auto"):
        find_checkpoint(Path(cfg.run.resume))  # may raise UserError, before a folder is created
    if cfg.run.output is not None:
        return Path(cfg.run.output)
    started = time.strftime("%Y%m%d-%H%M%S")
    name = f"runs/{started}-{cfg.architecture.model}-{cfg.objective.method}"
    return Path(share_across_restarts("output", name))
