"""The compiled gradnorm step against eager double backprop, in one run.

    python -m benchmarks.step.compiled_step  # the quickstart's network
    python -m benchmarks.step.compiled_step --recipe paper_swin_b_gradnorm --batch-size 2 --rounds 3

Writes benchmarks/results/compiled_step_<recipe>_<device>.json. On a CPU only ratios mean something:
its seconds depend on the machine and what else runs there.
"""

import argparse
import dataclasses
import statistics
import time

import torch

from benchmarks.common.arguments import RESULTS
from benchmarks.common.records import hold
from benchmarks.common.timing import interleaved
from fastgn.config import load_recipe
from fastgn.files import write_json
from fastgn.metrics import environment
from fastgn.models.network import build_model
from fastgn.objectives import build_objective
from fastgn.step.double_backward import count_graphs
from fastgn.step.options import Quirks, StepOptions
from fastgn.step.step import Step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="quickstart_gradnorm")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=1, help="steps a round")
    args = parser.parse_args()

    cfg = load_recipe(args.recipe)
    batch_size = args.batch_size or cfg.dataset.batch_size or 32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = RESULTS / f"compiled_step_{args.recipe}_{device.type}.json"
    hold(path)
    start_fresh = {"pretrained": False, "initial_checkpoint": None}
    architecture = dataclasses.replace(cfg.architecture, **start_fresh)
    num_classes = 1000 if cfg.dataset.data == "imagefolder" else 10

    steps, models = {}, {}
    for name in ("eager", "compiled"):
        torch.manual_seed(0)
        models[name] = build_model(architecture, num_classes)[0].to(device)
        steps[name] = Step(
            models[name],
            build_objective(cfg.objective),
            StepOptions(
                compile=name == "compiled",
                precision=cfg.step.precision,
                quirks=Quirks(train_in_eval_mode=cfg.step.train_in_eval_mode),
            ),
        )
    side = models["eager"].img_size
    images = torch.rand(batch_size, 3, side, side, device=device)
    targets = torch.rand(batch_size, num_classes, device=device).softmax(1)
    ramp = torch.tensor(1.0, device=device)

    def run(name: str) -> None:
        models[name].zero_grad()
        steps[name]([(images, targets)], ramp)

    start = time.perf_counter()
    run("compiled")
    compile_s = time.perf_counter() - start
    run("eager")
    pairs = list(zip(models["compiled"].parameters(), models["eager"].parameters(), strict=True))
    difference = torch.cat([(a.grad - b.grad).flatten() for a, b in pairs])
    error = float(difference.norm() / torch.cat([b.grad.flatten() for _, b in pairs]).norm())
    timings = interleaved(
        {name: lambda name=name: run(name) for name in steps}, rounds=args.rounds, calls=args.calls
    )
    ramp.fill_(0.5)
    run("compiled")  # a changed ramp must not recompile

    eager, compiled = timings["eager"], timings["compiled"]
    paired = [e / c for e, c in zip(eager.rounds, compiled.rounds, strict=True)]
    result = {
        "recipe": args.recipe,
        "method": cfg.objective.method,
        "batch_size": batch_size,
        "img_size": side,
        "precision": cfg.step.precision,
        "device": str(device),
        "rounds": args.rounds,
        "calls_per_round": args.calls,
        "speedup_median": statistics.median(paired),
        "speedup_min": min(paired),
        "speedup_max": max(paired),
        "eager_step_s": dataclasses.asdict(eager),
        "compiled_step_s": dataclasses.asdict(compiled),
        "first_compiled_step_s": compile_s,
        "graphs": count_graphs(),
        "relative_gradient_error": error,
        **environment(),
    }
    write_json(path, result)
    print(
        f"{args.recipe}, batch {batch_size} at {side} px on {device}: compiled is "
        f"{result['speedup_median']:.2f}x eager ({result['speedup_min']:.2f} to "
        f"{result['speedup_max']:.2f} over {args.rounds} rounds), {result['graphs']} graph, "
        "relative "
        f"gradient error {error:.1e}, first step {compile_s:.0f} s -> {path}"
    )


if __name__ == "__main__":
    main()
