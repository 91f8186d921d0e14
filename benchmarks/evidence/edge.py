"""Measures the accuracy of edge regularisation and of natural training on attacked digits.

An arm is one way of training. For each seed, all arms start from the same naturally trained weights
and train for the same number of epochs. Then PGD-20 and AutoAttack's APGD-CE and APGD-T attack all
held-out images. APGD-CE+T counts an image as right only if it is right after APGD-CE and APGD-T.

    python -m benchmarks.evidence.edge  # the same command continues an interrupted one

Writes benchmarks/results/edge_digits_<device>.json.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.tables import Record, accuracy_columns, make_table, over_seeds, with_notes
from benchmarks.evidence.robustness import digits
from benchmarks.evidence.study import Arm, Study, study_program
from benchmarks.evidence.trials import Trial

ARMS: dict[str, dict[str, Any]] = {
    "natural": {"method": "natural"},
    "edge": {"method": "edge"},
    "edge, an RMS per image": {"method": "edge", "edge_rms": "image"},
    "edge, its largest weight at once": {"method": "edge", "ramp_epochs": 0.0},
}
"""Name of each training that is compared -> options of fastgn.train in which it differs."""
START_EPOCHS, EPOCHS, EPS = 30, 15, 0.025
TRAINING = {
    **{"smoothing": 0.1, "eval_eps": EPS, "eval_interval": EPOCHS, "warmup_epochs": 1.0},
    **{"ramp_start": 1 / 19, "ramp_epochs": 200.0},  # the paper's weight: 1 + 0.09 * epoch
}
"""Options of fastgn.train that all compared trainings share."""
FLAGS = (
    *("--attacks", "clean", "pgd-20", "apgd-ce", "apgd-t", "apgd-ce+t"),
    *("--eps", repr(EPS), "--num-images", "360"),
)
"""Command-line flags of fastgn.evaluate that all evaluations share."""


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record."""
    rows = record["rows"]
    columns = {"arm": [row["arm"] for row in rows]} | accuracy_columns(rows)
    epochs, training = record["epochs"], record["training"]
    weight = 19  # value of --edge-weight, which the JSON record does not hold
    start = weight * training["ramp_start"]
    growth = (weight - start) / training["ramp_epochs"]
    return with_notes(
        make_table(rows, columns),
        record,
        f"{record['data']}, a Swin of 16 pixels, {over_seeds(record['seeds'])}",
        f"{record['images']} held-out images",
        f"{epochs['start']} natural epochs, then {epochs['arm']} of each arm",
        f"weight of the edges: {start:.3g} + {growth:.3g} per epoch, or {weight} from the first "
        "epoch on",
        "APGD-CE+T: images that are right after APGD-CE and after targeted APGD",
    )


@study_program(data=("digits",), seeds=3)
def main(args: argparse.Namespace, work: Path) -> Study:
    """Returns the study that the command line asks for. work: folder for the trainings."""
    setting = digits()
    (network,) = setting.networks.values()
    base = setting.base.replace(**network, **TRAINING)
    epochs, flags = {"start": START_EPOCHS, "arm": EPOCHS}, FLAGS
    if args.smoke:
        base, epochs = base.replace(eval_images=16), {"start": 2, "arm": 2}
        flags = (*FLAGS[:-1], "8")
    natural = base.replace(method="natural", epochs=epochs["start"])
    starts = [Trial(f"start_s{s}", natural.replace(seed=s)) for s in range(args.seeds)]
    arms = []
    for index, (arm, values) in enumerate(ARMS.items()):
        cfg = base.replace(**values, epochs=epochs["arm"])
        runs = [
            Trial(f"arm{index}_s{seed}", cfg.replace(seed=seed), (flags,), start)
            for seed, start in enumerate(starts)
        ]
        arms.append(Arm({"arm": arm}, runs))
    head = {
        **{"network": network, "eps": EPS, "epochs": epochs, "training": TRAINING, "arms": ARMS},
        "images": int(flags[-1]),
    }
    return Study(arms, head)


if __name__ == "__main__":
    sys.exit(main())
