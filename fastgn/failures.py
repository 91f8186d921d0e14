"""Messages for a run that cannot go on, which say what happened and what the user can do."""

from fastgn.config import Config
from fastgn.data.batch import explain_worker_death
from fastgn.errors import UserError
from fastgn.run import Run
from fastgn.step.diagnosis import find_missing_derivative
from fastgn.step.retry import out_of_memory


def explain(error: RuntimeError, run: Run | None) -> UserError | str | None:
    """Returns a message about an error of PyTorch if the user can act on it, otherwise None.

    run: the run that failed, or None if the error came before the run was built.
    """
    if out_of_memory(error):
        return too_large(run)
    operator = find_missing_derivative(error)
    if run is not None and operator is not None:
        return not_differentiable(run.cfg, operator)
    # if a worker process has died, PyTorch may raise an error anywhere in the main process
    return explain_worker_death(error)


def too_large(run: Run | None) -> str:
    """Returns the message for an update that needs too much memory even with the smallest
    micro-batch."""
    if run is None:
        return (
            "out of memory before the first update: the weights and the state of the optimizer do "
            "not fit: use a smaller --model"
        )
    tries = ["--schedule auto"]
    if run.resolved.compiled:
        tries.append("--activation-memory-budget 0.5")
    # with --grad-sync flat, the update would have been repeated in smaller micro-batches
    if run.resolved.grad_sync == "overlap":
        tries.insert(0, "--grad-sync flat")
    return (
        f"out of memory at update {run.update + 1} with {run.images_at_a_time} images at a time; "
        f"{run.last_checkpoint('the last checkpoint')}; try {' or '.join(tries)}"
    )


def not_differentiable(cfg: Config, operator: str) -> str:
    """Returns the message for a network with an operator that has no second derivative."""
    method = cfg.objective.method
    tries = ["another --model"]
    if cfg.objective.allows_differences:
        tries.insert(0, "--schedule finite-difference")
    return (
        f"--model {cfg.architecture.model} calls {operator}, which has no second derivative, but "
        f"--method {method} with --schedule {cfg.step.schedule} needs one: try "
        f"{' or '.join(tries)}"
    )


def how_to_go_on(run: Run | None) -> str:
    """Returns a line about how to continue after a signal that left no time for a checkpoint."""
    if run is None:
        return "run the same command again"
    ways = f"continue with --resume {run.folder}", "run the same command again"
    return f"{run.last_checkpoint('the last checkpoint')}: {ways[run.checkpoints.last() is None]}"
