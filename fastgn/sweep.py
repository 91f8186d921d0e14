"""Tunes a recipe's fields with Optuna (extra `sweep`), by fastgn.train's own runs.

    python -m fastgn.sweep --recipe quickstart_gradnorm --study runs/sweep.db --trials 30 \\
        --space gn_weight=0.1:10:log lr=1e-3:1e-2:log

The two accuracies of a trial are those that the run itself watches on its validation subset: clean,
and under PGD-10. Say the same again to go on, or start several processes on one study.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

if __name__ == "__main__":  # a mistake is answered before the imports that take seconds
    from fastgn.extras import begin

    begin("fastgn.sweep")

from fastgn.analysis.pareto import draw_pareto, front_of
from fastgn.config import FIELDS, Config, load_recipe
from fastgn.config.cli import parse_cli
from fastgn.config.programs import SweepConfig
from fastgn.distributed import World, session
from fastgn.errors import (
    UserError,
    check,
    escaped,
    first_line,
    nearest,
    parse_number,
    passed_over,
    print_line,
    say_error,
)
from fastgn.files import check_target, write_bytes, write_json
from fastgn.lock import HeldError
from fastgn.metrics import environment, open_bar
from fastgn.run import Run
from fastgn.setup import build
from fastgn.train import train

HEARTBEAT_S = 60
"""A trial whose process has said nothing for three of them was killed: its values are tried
again."""
NOT_SWEPT = ("recipe", "output", "resume", "device", "data", "data_dir", "log_wandb")


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A field and what it may be."""

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()

    def suggest(self, trial: Any) -> Any:
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)


class Interrupted(Exception):  # noqa: N818 - no error
    """Ctrl-C or SIGTERM: the run has saved."""


def find_optuna() -> Any:
    """The package. Raises UserError where it is not installed."""
    check(
        importlib.util.find_spec("optuna") is not None,
        "fastgn.sweep needs the package optuna: pip install 'fastgn[sweep]'",
    )
    return importlib.import_module("optuna")


def key_value(flag: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    name = name.replace("-", "_")
    check(bool(equals and value), f"{flag} {text!r} should be FIELD=...")
    check(name in FIELDS, f"{flag} {text}: unknown field {name!r}, {nearest(name, FIELDS)}")
    check(
        flag != "--space" or name not in NOT_SWEPT,
        f"{flag} {text}: {name} is no field to tune",
    )
    return name, value


def literal(text: str) -> Any:
    """A recipe's value as TOML writes it, without a string's quotes."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def check_value(base: Config, name: str, value: Any) -> None:
    """Raises UserError where config refuses the value."""
    try:
        base.replace(**{name: value})
    except UserError as error:
        raise UserError(f"--space {name}={value}: {error}") from None


def base_config(cfg: SweepConfig) -> Config:
    """What all trials share. Raises UserError."""
    base = load_recipe(cfg.recipe)
    pairs = [key_value("--set", text) for text in cfg.set]
    try:
        base = base.replace(**{name: literal(value) for name, value in pairs})
    except UserError as error:
        raise UserError(f"--set {' '.join(cfg.set)}: {error}") from None
    base = base.replace_group("run", {"output": None, "resume": None})
    check(base.run.eval_images > 0, "a trial is judged by --eval-images, and the recipe has 0")
    return base


def dimension(text: str, base: Config) -> Dimension:
    """A --space. Raises UserError: unknown field, a range that config refuses."""
    name, value = key_value("--space", text)
    if ":" not in value:
        choices = tuple(literal(v) for v in value.split(","))
        check(
            len(set(choices)) == len(choices) > 1,
            f"--space {text}: write FIELD=LOW:HIGH, or at least 2 different choices A,B",
        )
        for choice in choices:
            check_value(base, name, choice)
        return Dimension(name, choices=choices)
    low, high, *rest = value.split(":")
    check(rest in ([], ["log"]), f"--space {text}: write FIELD=LOW:HIGH or FIELD=LOW:HIGH:log")
    try:
        ends = parse_number(low), parse_number(high)
    except UserError as error:
        raise UserError(f"--space {text}: {error}") from None
    check(
        ends[0] < ends[1] and all(map(math.isfinite, ends)),
        f"--space {text}: {low} must be below {high}",
    )
    check(not rest or ends[0] > 0, f"--space {text}: a logarithmic range begins above 0, not {low}")
    numbers = [int(e) if e.is_integer() else e for e in ends]
    whole = is_whole_field(base, name)
    check(not whole or all(isinstance(n, int) for n in numbers), f"--space {text}: {name} is whole")
    for end in numbers:
        check_value(base, name, end)
    return Dimension(name, *ends, log=bool(rest), whole=whole)


def is_whole_field(base: Config, name: str) -> bool:
    """Whether a field takes whole numbers alone."""
    try:
        base.replace(**{name: 1.5})
    except UserError as error:
        return "of type int" in str(error)
    return False


def space_of(cfg: SweepConfig, base: Config) -> list[Dimension]:
    """Raises UserError, also where trials could not be compared."""
    space = [dimension(text, base) for text in cfg.space]
    names = [d.name for d in space]
    check(len(set(names)) == len(names), "--space names a field twice")
    judge = {"eval_images", "eval_eps", "eval_interval"} & set(names)
    check(not judge, f"--space {' '.join(judge)}: by it trials are judged, it has to be the same")
    radii = {"eps", "attack_eps", "method"} & set(names)
    check(
        not radii or base.run.eval_eps is not None,
        f"--space {' '.join(sorted(radii))} moves the radius that trials are judged at: add --set "
        "eval_eps=0.0157",
    )
    return space


def score(clean: float, robust: float, floor: float) -> float:
    """What `robust` maximises: below the floor a negative number."""
    return robust if clean >= floor else clean - floor


def run_trial(trial: Any, cfg: SweepConfig, base: Config, space: list[Dimension]) -> Any:
    """A training; its objective's value or values. Raises optuna.TrialPruned, Interrupted,
    UserError."""
    optuna = find_optuna()
    values = {d.name: d.suggest(trial) for d in space}
    config = base.replace(**values)
    # of the values: what was interrupted goes on when they are tried again
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
            run = build_when_free(config, world, watcher(trial, cfg, optuna))
            train(run)
    except KeyboardInterrupt:  # before the first update
        raise Interrupted from None
    finally:
        if run is not None and run.metrics is not None:
            run.metrics.close()
    if run.update < run.resolved.last_update:
        raise Interrupted
    clean, robust = run.accuracy["clean_accuracy"], run.accuracy["pgd10_accuracy"]
    trial.set_user_attr("clean", clean)
    trial.set_user_attr("robust", robust)
    return (clean, robust) if cfg.objective == "pareto" else score(clean, robust, cfg.clean_floor)


def build_when_free(
    config: Config, world: World, on_evaluation: Callable[[Run], None] | None
) -> Run:
    """Returns a trial's run, as soon as no other process of the study tries the same values.

    The run then continues from what the other process has left.
    """
    while True:
        try:
            return build(config, world, on_evaluation)
        except HeldError:
            time.sleep(1)


def watcher(trial: Any, cfg: SweepConfig, optuna: Any) -> Callable[[Run], None] | None:
    """Returns what reports each evaluation of a run to Optuna, and ends a run that is worse than
    the others; None if no run is to be ended."""
    if cfg.objective == "pareto" or not cfg.prune:
        return None

    def report(run: Run) -> None:
        epoch = run.update // run.resolved.updates_per_epoch
        clean, robust = run.accuracy["clean_accuracy"], run.accuracy["pgd10_accuracy"]
        with warnings.catch_warnings():  # of an epoch that an interrupted process had reported
            warnings.simplefilter("ignore")
            trial.report(score(clean, robust, cfg.clean_floor), epoch)
        if run.update < run.resolved.last_update and trial.should_prune():
            trial.set_user_attr("clean", clean)
            trial.set_user_attr("robust", robust)
            raise optuna.TrialPruned

    return report


def open_study(cfg: SweepConfig, base: Config, optuna: Any) -> Any:
    """The study, begun or gone on with. Raises UserError where it is another one's."""
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
    what = {
        "recipe": base.to_toml(),
        "space": " ".join(sorted(cfg.space)),
        "objective": f"{cfg.objective}, clean floor {cfg.clean_floor:g}",
    }
    for key, value in what.items():
        there = study.user_attrs.get(key)
        check(
            there in (None, value),
            f"--study {path} was begun with another {key}"
            + (f" ({there})" if key != "recipe" else "")
            + ": name another file",
        )
        study.set_user_attr(key, value)
    # the same seed would draw the same again, and so would another process on the study
    begun = len(study.get_trials(deepcopy=False))
    seed = (cfg.seed if begun == 0 else cfg.seed + begun + os.getpid()) % 2**32  # numpy's range
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=cfg.startup_trials)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=cfg.startup_trials)
    return study


def storage_errors() -> tuple[type[Exception], ...]:
    """Of a file that is no database, or cannot be written."""
    optuna = find_optuna()
    sqlalchemy = importlib.import_module("sqlalchemy.exc")
    known = sqlalchemy.SQLAlchemyError, optuna.exceptions.StorageInternalError
    return (OSError, ValueError, RuntimeError, *known)


def finished(study: Any) -> list[Any]:
    """Trials that count: not those that an interrupt or a kill has ended."""
    return [
        t
        for t in study.get_trials(deepcopy=False)
        if t.state.name in ("COMPLETE", "PRUNED") or "failed" in t.user_attrs
    ]


def sweep(cfg: SweepConfig) -> int:
    """The trials that are left, and what came out. Raises UserError."""
    optuna = find_optuna()
    base = base_config(cfg)
    space = space_of(cfg, base)
    path = cfg.database
    for target in cfg.written:
        check_target(target)
        check(
            path.exists() or not target.exists(),
            f"--study {path} would overwrite {target}, which is no file of this study: choose "
            "another name",
        )
    runs = path.with_suffix("")
    check(
        runs.is_dir() or not os.path.lexists(runs),
        f"--study {path}: {runs}, where its runs should go, is no folder: choose another name",
    )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    study = open_study(cfg, base, optuna)
    done = len(finished(study))
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
            except UserError as error:  # such as a loss that is not finite: a trial like others
                trial.set_user_attr("failed", str(error))
                raise
            finally:
                trial.set_user_attr("seconds", time.perf_counter() - began)

        def said(study: Any, trial: Any) -> None:
            if "failed" in trial.user_attrs or trial.state.name != "FAIL":
                bar.update()
                bar.write(escaped(line_of(trial)), file=sys.stderr)
            with passed_over("the report"):
                report(study, cfg, base)

        def enough(study: Any, trial: Any) -> None:
            if len(finished(study)) >= cfg.trials:  # with those of other processes
                study.stop()

        if done < cfg.trials:
            study.optimize(
                objective,
                n_trials=cfg.trials - done,
                catch=(Interrupted, UserError),
                callbacks=[said, enough],
            )
    best = report(study, cfg, base)
    print_line(best, sys.stdout)
    if interrupted:
        print("stopped; run the same command again to continue")
    return 0


def line_of(trial: Any) -> str:
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


def best_of(rows: Sequence[dict[str, Any]], cfg: SweepConfig) -> dict[str, Any] | None:
    """Of the complete trials above the floor: the most robust; with two objectives, the largest sum
    of both among those that none surpasses."""
    there = [r for r in rows if r["state"] == "complete" and r["clean"] >= cfg.clean_floor]
    if not there:
        return None
    if cfg.objective == "robust":
        return max(there, key=lambda r: (r["robust"], r["clean"]))
    front = [there[i] for i in front_of([(r["clean"], r["robust"]) for r in there])]
    return max(front, key=lambda r: r["clean"] + r["robust"])


def report(study: Any, cfg: SweepConfig, base: Config) -> str:
    """Writes the trials, the picture and the best recipe; what is best, in a line."""
    rows = []
    for trial in finished(study):
        attrs = trial.user_attrs
        row = {"number": trial.number, "state": trial.state.name.lower(), "values": trial.params}
        rows.append(row | {k: attrs.get(k) for k in ("clean", "robust", "seconds", "failed")})
    best = best_of(rows, cfg)
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
    with passed_over("the picture"):
        picture = draw_pareto(complete, record["best"], f"{path.stem}: {len(complete)} trials")
        write_bytes(path.with_suffix(".png"), picture)
    if best is None:
        return f"no trial is complete yet with clean accuracy of at least {cfg.clean_floor:.0%}"
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
    """The program; returns its exit status: 2 for a mistake of the user's, said in one line."""
    try:
        cfg = parse_cli(SweepConfig, sys.argv[1:] if args is None else args, "fastgn.sweep")
        return sweep(cfg)
    except UserError as error:
        say_error(f"fastgn.sweep: error: {error}")
        return 2
    except KeyboardInterrupt:  # between trials
        say_error("fastgn.sweep: stopped; run the same command again to continue")
        return 130


if __name__ == "__main__":
    sys.exit(main())
