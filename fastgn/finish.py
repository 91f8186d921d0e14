"""Ends a run, by writing the exported weights, the summary and the curves."""

from fastgn import optim
from fastgn.analysis.figures import draw_curves
from fastgn.errors import UserError, check, tolerate_failure
from fastgn.files import write_bytes, write_json
from fastgn.hub import make_timm_config
from fastgn.metrics import environment
from fastgn.run import Run
from fastgn.state import ExportHeader
from fastgn.trained import export_weights

LISTED = ("model.safetensors", "config.json", "summary.json", "curves.png", "metrics.csv")
"""Files of a run that the last line of its output lists, if they exist."""


def finish(run: Run) -> None:
    """Writes the exported weights, the summary and the curves of a run, on the first rank only.

    Raises UserError if all updates were skipped in fp16, because the weights are the initial ones.
    """
    scale = run.step.loss_scale
    check(
        scale is None or not scale.has_skipped_all(run.update),
        f"all {run.update} updates were skipped, because their gradients overflowed in "
        f"{run.cfg.step.precision}, so the weights have not changed: raise --epochs or "
        "--max-updates, because the loss scale halves with each skipped update, or use "
        "--precision fp32",
    )
    if not run.world.is_main:
        return
    run.checkpoints.wait()
    weights = run.evaluated_model.backbone.state_dict()
    header = ExportHeader(run.cfg.to_toml(), list(run.classes), run.update)
    export_weights(run.folder / "model.safetensors", weights, header)
    # making config.json may fail, for example if a second copy of the network does not fit
    with tolerate_failure("config.json for timm", run.print):
        try:
            config = make_timm_config(
                run.cfg.architecture, weights, run.classes, run.model.crop_pct
            )
            write_json(run.folder / "config.json", config)
        except UserError as reason:
            run.print(f"config.json for timm was not written: {reason}")
    summary = {"updates": run.update, "global_batch": run.resolved.global_batch, "best": run.best}
    if run.ema is not None:
        share = optim.compute_initial_share(run.cfg.optimizer, run.update)
        summary["initial_weights_in_average"] = share
    write_json(run.folder / "summary.json", summary | run.accuracy | environment())
    if run.metrics is not None:
        with tolerate_failure("curves.png", run.print):
            picture = draw_curves(run.metrics.rows, title=run.folder.name)
            write_bytes(run.folder / "curves.png", picture)
        run.metrics.close()
    if not (run.folder / "config.toml").is_file():
        run.print(f"{run.folder / 'config.toml'} was removed, so it is written again")
        write_bytes(run.folder / "config.toml", run.cfg.to_toml())
    accuracy = ", ".join(f"{k.replace('_', ' ')} {v:.1%}" for k, v in run.accuracy.items())
    written = [name for name in LISTED if (run.folder / name).is_file()]
    run.print(
        f"finished: {run.update} updates, {accuracy or 'not evaluated'} -> {run.folder}: "
        f"{', '.join(written)}"
    )
    warn_of_initial_weights(run, "holds", run.update)


def warn_of_initial_weights(run: Run, holds: str, updates: int) -> None:
    """Prints a warning if the moving average of the weights still contains a large share of the
    initial weights.

    Such an average is less accurate. updates: number of updates for which the share is computed.
    holds: verb of the message, "holds" or "will hold".
    """
    if run.ema is None:
        return
    share = optim.compute_initial_share(run.cfg.optimizer, updates)
    if share > 0.03:
        run.print(
            f"warning: after {updates} updates the moving average of the weights, which is "
            f"evaluated and exported, {holds} {share:.0%} of the initial weights: use "
            "--model-ema-warmup or a lower --model-ema-decay"
        )
