"""Trains an image classifier, robustly by default (gradient-norm regularisation, arXiv 2409.20139).

    python -m fastgn.train --recipe quickstart_gradnorm
    torchrun --nproc-per-node 8 -m fastgn.train --recipe swin_b_gradnorm --data-dir IMAGENET
    python -m fastgn.train --resume runs/NAME

`train` is the training loop. setup.py builds the Run, which holds everything that the loop needs.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # report a mistake of the user before imports that take seconds
    from fastgn.extras import check_start

    check_start("fastgn.train")

import torch

from fastgn import optim
from fastgn.config.cli import parse_config
from fastgn.distributed import is_under_torchrun, session
from fastgn.errors import UserError, print_error, print_stopped
from fastgn.extras import stop_on_signals
from fastgn.failures import explain, how_to_go_on
from fastgn.finish import finish
from fastgn.interrupt import STOPPED, Interrupt
from fastgn.run import Run
from fastgn.seeding import Stream, seed_all
from fastgn.setup import build


def train(run: Run) -> None:
    """Trains until the run ends or is asked to stop.

    The host waits for the device only in `log`, `evaluate` and `save`, and after the first update.
    """
    cfg, world = run.cfg, run.world
    last_update, per_epoch = run.resolved.last_update, run.resolved.updates_per_epoch
    with Interrupt() as interrupt:
        # a signal may have ended the evaluation after the last update of an earlier process
        stopped = run.evaluation_pending and evaluate_and_save(run, interrupt)
        while run.update < last_update and not stopped:
            epoch = run.update // per_epoch
            for batches in run.updates_of(epoch):
                seed_all(Stream.STEP, cfg.run.seed, run.update, world.rank)
                lr = optim.compute_lr(cfg.optimizer, run.update, per_epoch, run.resolved.lr)
                at = cfg, run.update, per_epoch
                ramp, attack_ramp = optim.compute_ramp(*at), optim.compute_attack_ramp(*at)

                run.ramp.fill_(ramp)
                run.attack_ramp.fill_(attack_ramp)
                loss = run.compute_gradients(batches, run.ramp, run.update, run.attack_ramp)
                if not run.updater.has_moved:
                    run.check_first(batches)
                grad_norm = run.apply_gradients(lr)
                run.update += 1
                run.accumulate(torch.stack([*loss, grad_norm]))

                if run.at_border() or run.update % cfg.run.log_interval == 0:
                    run.log(lr, ramp if cfg.objective.has_penalty else attack_ramp)
                run.evaluation_pending = run.evaluation_due()
                stopped = evaluate_and_save(run, interrupt)
                if stopped or run.update == last_update:
                    break
        if run.is_done():
            finish(run)
            return
        run.checkpoints.wait()
        when = ", before its evaluation" if run.evaluation_pending else ""
        run.print(f"stopped at update {run.update}{when}; continue with --resume {run.folder}")


def evaluate_and_save(run: Run, interrupt: Interrupt) -> bool:
    """Evaluates the network and saves a checkpoint, if they are due after the last update.

    Returns whether a signal has asked any rank to stop. In this case a checkpoint is always saved,
    and an evaluation that is not complete is left to the process that continues the run.
    """
    if run.evaluation_pending:
        run.evaluate(interrupt.is_signalled)
    # the checkpoint is saved after the evaluation, so that it includes the accuracies
    stopped = run.world.any(interrupt.is_signalled())
    if stopped or run.checkpoint_due():
        run.save()
    return stopped


def keep_compiled() -> None:
    """Makes torch.compile keep its compiled code in the user's cache folder, for later runs.

    Otherwise PyTorch would keep the code in the folder for temporary files.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = root / "fastgn" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # fails if another user owns the folder, whose code must not be run
    except (OSError, RuntimeError):  # no home folder, or no permission to write there
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def main(args: list[str] | None = None) -> int:
    """Runs the program and returns its exit status.

    0 means that the run is done, and 2 that it cannot go on. STOPPED or 130 means that a signal has
    ended the run early. Under torchrun, the status is 0 instead of STOPPED, because torchrun
    restarts ranks that end with another status.
    """
    run: Run | None = None
    keep_compiled()
    try:
        cfg = parse_config(args)
        with stop_on_signals(), session(cfg.run.device, rank_timeout=cfg.run.rank_timeout) as world:
            run = build(cfg, world)
            train(run)
    except (UserError, RuntimeError) as error:
        line = error if isinstance(error, UserError) else explain(error, run)
        if line is None:
            raise
        if run is not None and run.metrics is not None:
            run.metrics.close()
        print_error(f"fastgn.train: error: {line}")
        return 2
    except KeyboardInterrupt:  # a signal came before the first update, or a second signal came
        if run is not None and run.metrics is not None:
            run.metrics.close()
        print_stopped("fastgn.train", how_to_go_on(run))
        return 130
    if run.metrics is not None:
        run.metrics.close()
    return 0 if run.is_done() or is_under_torchrun() else STOPPED


if __name__ == "__main__":
    sys.exit(main())
