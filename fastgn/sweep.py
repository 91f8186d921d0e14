"""Tunes fields of a recipe with Optuna, which `pip install 'fastgn[sweep]'` installs.

    python -m fastgn.sweep --recipe quickstart_gradnorm --study runs/sweep.db --trials 30 \\
        --space gn_weight=0.1:10:log lr=1e-3:1e-2:log

A study consists of trials. A trial is a run of fastgn.train with its own values of the fields. It
is judged by two accuracies, without an attack and under PGD-10. The run itself measures them on its
validation images. The same command continues a study, and several processes may work on one study
at once.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

if __name__ == "__main__":  # report a mistake of the user before imports that take seconds
    from fastgn.extras import check_start

    check_start("fastgn.sweep")

from fastgn.analysis.pareto import draw_pareto, find_front
from fastgn.config import Config
from fastgn.config.cli import parse_cli
from fastgn.config.programs import SweepConfig
from fastgn.distributed import World, session
from fastgn.errors import (
    UserError,
    check,
    escape,
    first_line,
    print_error,
    print_line,
    print_stopped,
    tolerate_failure,
)
from fastgn.extras import stop_on_signals
from fastgn.files import check_target, write_bytes, write_json
from fastgn.lock import HeldError
from fastgn.metrics import environment
from fastgn.progress import open_bar
from fastgn.run import Run
from fastgn.search_space import Dimension, make_base_config, parse_space
from fastgn.setup import build
from fastgn.train import train

HEARTBEAT_S = 60
"""Seconds between two heartbeats of a trial. If none comes for three times as long, the trial's
process counts as killed, and the trial's values are tried again."""


class Interrupted(Exception):  # noqa: N818 - no error
    """Raised when a signal has ended a trial, after the trial's run has saved a checkpoint."""


def find_optuna() -> Any:
    """Returns the package Optuna. Raises UserError if it is not installed."""
    check(
        importlib.util.find_spec("optuna") is not None,
        "fastgn.sweep needs the package optuna: run pip install 'fastgn[sweep]'",
    )
    return importlib.import_module("optuna")


def score(clean: float, robust: float, floor: float) -> float:
    """Returns the value that --objective robust maximises.

    This value is the accuracy under attack. But if the clean accuracy is below the floor, the value
    is the clean accuracy minus the floor, which is negative. floor: value of --clean-floor.
    """
    return robust if clean >= floor else clean - floor


def run_trial(trial: Any, cfg: SweepConfig, base: Config, space: list[Dimension]) -> Any:
    """Trains one trial, and returns the value or the two values that Optuna maximises.

    trial: Optuna's trial. base: configuration that all trials share. space: fields in which the
    trials differ.

    Raises optuna.TrialPruned if the trial is stopped because it is worse than other trials. Raises
    Interrupted after Ctrl-C or another signal, and UserError if the run cannot begin or fails.
    """
    optuna = find_optuna()
    values = {d.name: d.suggest(trial) for d in space}
    config = base.replace(**values)
    # equal values give the same folder, so that a second try continues an interrupted run
    name = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
    folder = cfg.database.with_suffix("") / name
    trial.set_user_attr("folder", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    config = config.replace_group("run", {"output": str(folder), "resume": "auto"})
    run: Run | None = None
    try:
        with (
            open(folder / "log.txt", "a") as log,
            contextlib.redirect_stderr(log),
            session(config.run.device) as world,
        ):
            run = build_when_free(config, world, make_reporter(trial, cfg, optuna))
            train(run)
    except KeyboardInterrupt:  # a signal came before training, or a second signal came during it
        raise Interrupted from None
    finally:
        if run is not None and run.metrics is not None:
            run.metrics.close()
    if not run.is_done():
        raise Interrupted
    clean, robust = run.accuracy["clean_accuracy"], run.accuracy["pgd10_accuracy"]
    trial.set_user_attr("clean", clean)
    trial.set_user_attr("robust", robust)
    return (clean, robust) if cfg.objective == "pareto" else score(clean, robust, cfg.clean_floor)


def build_when_free(
    config: Config, world: World, on_evaluation: Callable[[Run], None] | None
) -> Run:
    """Returns the run of a trial.

    If another process trains with the same values, first waits until that process ends. The run
    then continues from the other process's checkpoint. on_evaluation: function that is called after
    each evaluation.
    """
    while True:
        try:
            return build(config, world, on_evaluation)
        except HeldError:
            time.sleep(1)


def make_reporter(trial: Any, cfg: SweepConfig, optuna: Any) -> Callable[[Run], None] | None:
    """Returns a function that reports an evaluation of a run to Optuna.

    The function stops the run if it is worse than the runs of other trials. Returns None if the
    options do not allow runs to be stopped.
    """
    if cfg.objective == "pareto" or not cfg.prune:
        return None

    def report(run: Run) -> None:
        epoch = run.update // run.resolved.updates_per_epoch
        clean, robust = run.accuracy["clean_accuracy"], run.accuracy["pgd10_accuracy"]
        # ignore Optuna's warning about evaluations that an interrupted process has reported before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial.report(score(clean, robust, cfg.clean_floor), epoch)
        if run.update < run.resolved.last_update and trial.should_prune():
            trial.set_user_attr("clean", clean)
            trial.set_user_attr("robust", robust)
            raise optuna.TrialPruned

    return report


def open_study(cfg: SweepConfig, base: Config, optuna: Any) -> Any:
    """Returns the Optuna study in the file of --study, and creates it if it does not exist.

    Raises UserError if the study was begun with other settings. base: configuration that all trials
    share.
    """
    path = cfg.database
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{path}",
            heartbeat_interval=HEARTBEAT_S,
            grace_period=3 * HEARTBEAT_S,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        )
        pareto = cfg.objective == "pareto"
        study = optuna.create_study(
            study_name="fastgn",
            storage=storage,
            load_if_exists=True,
            directions=["maximize"] * (2 if pareto else 1),
        )
    except storage_errors() as error:
        raise UserError(f"--study {path} cannot be opened: {first_line(error)}") from None
    settings = {
        "recipe": base.to_toml(),
        "space": " ".join(sorted(cfg.space)),
        "objective": f"{cfg.objective}, clean floor {cfg.clean_floor:g}",
    }
    for key, value in settings.items():
        saved = study.user_attrs.get(key)
        if saved not in (None, value):
            changes = describe_recipe_changes(base, saved) if key == "recipe" else saved
            check(
                not changes,
                f"--study {path} was started with another {key} ({changes}): name another file",
            )
        study.set_user_attr(key, value)
    # give a second process another seed, because with the same one it would draw the same values
    begun = len(study.get_trials(deepcopy=False))
    seed = (cfg.seed if begun == 0 else cfg.seed + begun + os.getpid()) % 2**32  # numpy's limit
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=cfg.startup_trials)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=cfg.startup_trials)
    return study


def describe_recipe_changes(base: Config, saved: str) -> str:
    """Returns which options of a study's recipe have changed, such as 'epochs: 5, not 10'.

    The text is empty if none has changed. base: configuration that all trials share. saved: text of
    the recipe that the study was started with.
    """
    try:
        earlier = Config.from_toml(saved)
    except UserError:  # another version of fastgn wrote the recipe
        return "of another version of fastgn"
    groups = [field.name for field in dataclasses.fields(Config)]
    return "; ".join(change for group in groups for change in base.changed(earlier, group))


def storage_errors() -> tuple[type[Exception], ...]:
    """Returns the classes of errors that Optuna raises if a file is not a database or cannot be
    written."""
    optuna = find_optuna()
    sqlalchemy = importlib.import_module("sqlalchemy.exc")
    known = sqlalchemy.SQLAlchemyError, optuna.exceptions.StorageInternalError
    return (OSError, ValueError, RuntimeError, *known)


def list_finished(study: Any) -> list[Any]:
    """Returns the trials that are complete, pruned or failed.

    Trials that a signal has ended are left out, because their values are tried again.
    """
    return [
        t
        for t in study.get_trials(deepcopy=False)
        if t.state.name in ("COMPLETE", "PRUNED") or "failed" in t.user_attrs
    ]


def check_targets(cfg: SweepConfig) -> None:
    """Raises UserError if the study's files cannot be written, or would replace other files."""
    path = cfg.database
    for target in cfg.written:
        check_target(target)
        check(
            path.exists() or not target.exists(),
            f"--study {path} would overwrite {target}, which does not belong to this study: "
            "choose another name",
        )
    runs = path.with_suffix("")
    check(
        runs.is_dir() or not os.path.lexists(runs),
        f"--study {path}: {runs}, where its runs would go, is not a folder: choose another name",
    )


def sweep(cfg: SweepConfig) -> int:
    """Runs the trials that are left, writes the results, and returns the exit status.

    Raises UserError if the options are invalid, or if the study's files cannot be used.
    """
    optuna = find_optuna()
    base = make_base_config(cfg)
    space = parse_space(cfg, base)
    check_targets(cfg)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    study = open_study(cfg, base, optuna)
    done = len(list_finished(study))
    interrupted = False
    with open_bar(total=cfg.trials, initial=done, unit="trial") as bar:

        def objective(trial: Any) -> Any:
            began = time.perf_counter()
            try:
                return run_trial(trial, cfg, base, space)
            except Interrupted:
                nonlocal interrupted
                interrupted = True
                study.enqueue_trial(trial.params)
                study.stop()
                raise
            except UserError as error:  # the trial has failed, for example because of infinities
                trial.set_user_attr("failed", str(error))
                raise
            finally:
                trial.set_user_attr("seconds", time.perf_counter() - began)

        def report_trial(study: Any, trial: Any) -> None:
            if "failed" in trial.user_attrs or trial.state.name != "FAIL":
                bar.update()
                bar.write(escape(describe_trial(trial)), file=sys.stderr)
            with tolerate_failure("the report of the trials"):
                write_results(study, cfg, base)

        def stop_if_enough(study: Any, trial: Any) -> None:
            if len(list_finished(study)) >= cfg.trials:  # trials of other processes count too
                study.stop()

        if done < cfg.trials:
            study.optimize(
                objective,
                n_trials=cfg.trials - done,
                catch=(Interrupted, UserError),
                callbacks=[report_trial, stop_if_enough],
            )
    print_line(write_results(study, cfg, base), sys.stdout)
    if interrupted:
        print("stopped; run the same command again to continue")
    return 0


def describe_trial(trial: Any) -> str:
    """Returns a line with the number, values and accuracies of a trial, or with its error."""
    values = ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items()
    )
    attrs = trial.user_attrs
    if "failed" in attrs:
        return f"trial {trial.number}: {values}: failed: {attrs['failed']}"
    pruned = " (pruned)" if trial.state.name == "PRUNED" else ""
    return (
        f"trial {trial.number}: {values}: clean {attrs['clean']:.1%}, PGD-10 "
        f"{attrs['robust']:.1%}{pruned}"
    )


def choose_best(rows: Sequence[dict[str, Any]], cfg: SweepConfig) -> dict[str, Any] | None:
    """Returns the best of the complete trials whose clean accuracy is at least --clean-floor.

    With --objective robust it is the trial with the highest accuracy under attack. With --objective
    pareto it is the trial with the largest sum of clean and attacked accuracy. None means that
    there is no such trial. rows: one dict per trial.
    """
    complete = [r for r in rows if r["state"] == "complete" and r["clean"] >= cfg.clean_floor]
    if not complete:
        return None
    if cfg.objective == "robust":
        return max(complete, key=lambda r: (r["robust"], r["clean"]))
    front = [complete[i] for i in find_front([(r["clean"], r["robust"]) for r in complete])]
    return max(front, key=lambda r: r["clean"] + r["robust"])


def write_results(study: Any, cfg: SweepConfig, base: Config) -> str:
    """Writes all trials of a study as JSON, their accuracies as a PNG, and the best trial as a
    recipe.

    Returns a line about the best trial. base: configuration that all trials share.
    """
    rows = []
    for trial in list_finished(study):
        attrs = trial.user_attrs
        row = {"number": trial.number, "state": trial.state.name.lower(), "values": trial.params}
        rows.append(row | {k: attrs.get(k) for k in ("clean", "robust", "seconds", "failed")})
    best = choose_best(rows, cfg)
    path = cfg.database
    record = {
        "recipe": cfg.recipe,
        "set": list(cfg.set),
        "space": list(cfg.space),
        "objective": cfg.objective,
        "clean_floor": cfg.clean_floor,
        "judged_by": f"{base.run.eval_images} validation images at most, PGD-10 at eps "
        f"{base.eval_eps:.4g}",
        "best": None if best is None else best["number"],
        "trials": rows,
        **environment(),
    }
    write_json(path.with_suffix(".json"), record)
    complete = [r for r in rows if r["state"] == "complete"]
    with tolerate_failure("the picture"):
        picture = draw_pareto(complete, record["best"], f"{path.stem}: {len(complete)} trials")
        write_bytes(path.with_suffix(".png"), picture)
    if best is None:
        return f"no trial is complete yet with a clean accuracy of at least {cfg.clean_floor:.0%}"
    recipe = path.with_name(f"{path.stem}_best.toml")
    head = (
        f"# Trial {best['number']} of {path.name}: clean {best['clean']:.1%}, PGD-10 "
        f"{best['robust']:.1%}, on {record['judged_by']}\n"
    )
    write_bytes(recipe, head + base.replace(**best["values"]).to_toml())
    return (
        f"best: trial {best['number']}, clean {best['clean']:.1%}, PGD-10 {best['robust']:.1%} "
        f"-> {recipe}, {path.with_suffix('.json')}, {path.with_suffix('.png')}"
    )


def main(args: list[str] | None = None) -> int:
    """Runs the program and returns its exit status, which is 2 after a mistake of the user."""
    try:
        cfg = parse_cli(SweepConfig, sys.argv[1:] if args is None else args, "fastgn.sweep")
        with stop_on_signals():
            return sweep(cfg)
    except UserError as error:
        print_error(f"fastgn.sweep: error: {error}")
        return 2
    except KeyboardInterrupt:  # a signal, such as Ctrl-C, came between two trials
        print_stopped("fastgn.sweep")
        return 130


if __name__ == "__main__":
    sys.exit(main())
