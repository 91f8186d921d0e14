"""The compiled update against eager double backprop, for every method."""

from functools import partial
from typing import Any

import pytest
import torch
from support.marks import first_is_quick
from support.networks import classifier, objective, relative, resnet, swin, vit
from support.steps import batches_for, gradients, scheduled
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from fastgn.objectives import ObjectiveConfig, Representatives, build_objective
from fastgn.step.double_backward import count_graphs
from fastgn.step.options import Quirks, StepOptions
from fastgn.step.step import Step


@pytest.mark.parametrize("build", first_is_quick([swin, vit, resnet]))
def test_compiled_step_equals_eager_with_one_graph(build) -> None:
    """Three steps with a growing ramp, soft targets and an evaluation in between: gradients, losses
    and BatchNorm's statistics as in eager, and never a second graph."""
    eager, compiled = classifier(build), classifier(build)
    steps = [
        Step(model, objective(gn_weight=3.0), StepOptions(compile=flag))
        for model, flag in ((eager, False), (compiled, True))
    ]
    for index, batch in enumerate(batches_for(build, 3)):
        ramp = torch.tensor(index / 2)
        losses = [step([batch], ramp) for step in steps]
        for name in ("total", "ce", "penalty", "grad_l1"):
            assert torch.isclose(getattr(losses[0], name), getattr(losses[1], name), rtol=1e-5)
        assert relative(gradients(compiled), gradients(eager)) < 1e-5
        for model in (eager, compiled):
            model.zero_grad()
            with torch.no_grad():
                model.eval()(batch[0])
    assert count_graphs() == 1
    for mine, theirs in zip(compiled.buffers(), eager.buffers(), strict=True):
        assert relative(mine.float(), theirs.float()) < 1e-5


@pytest.mark.slow
def test_compiled_penalty_changes_the_weight_gradients(no_codegen) -> None:
    """A compiler that dropped the second-order terms would train plain cross-entropy without a
    word."""
    grads = []
    for weight in (0.0, 3.0):
        model = classifier(vit)
        Step(model, objective(gn_weight=weight), StepOptions(compile=True))(
            batches_for(vit, 1), torch.tensor(1.0)
        )
        grads.append(gradients(model))
    assert relative(grads[1], grads[0]) > 0.01


@pytest.mark.slow
def test_compiled_attack_is_one_graph_and_equals_eager(no_codegen) -> None:
    models = [classifier(swin), classifier(swin)]
    for model, flag in zip(models, (False, True), strict=True):
        step = Step(model, objective(method="pgd_at", attack_eps=0.02), StepOptions(compile=flag))
        torch.manual_seed(5)
        step(batches_for(swin, 1), torch.tensor(1.0))
        assert model.training
    assert relative(gradients(models[1]), gradients(models[0])) < 1e-5
    assert count_graphs() == 2, "the attack's step, called three times, and the loss"


@pytest.mark.slow
def test_activation_memory_budget_leaves_the_gradient_alone(no_codegen) -> None:
    grads = []
    for budget in (1.0, 0.5):
        torch._dynamo.reset()
        model = classifier(vit)
        step = Step(model, objective(), StepOptions(compile=True, activation_memory_budget=budget))
        step(batches_for(vit, 1), torch.tensor(1.0))
        grads.append(gradients(model))
    assert relative(grads[1], grads[0]) < 1e-5


@pytest.mark.parametrize("accumulation", ["mean", "sum"])
def test_accumulation(accumulation: str) -> None:
    """The mean over micro-batches is the whole batch's gradient; the paper's sum is that many times
    it."""
    parts = batches_for(vit, 2, torch.float64)
    whole = [(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))]
    ramp = torch.tensor(1.0, dtype=torch.float64)
    models = [classifier(vit, torch.float64), classifier(vit, torch.float64)]
    one = Step(models[0], objective(), StepOptions(compile=False))(whole, ramp)
    two = Step(
        models[1], objective(), StepOptions(compile=False, quirks=Quirks(accumulation=accumulation))
    )(parts, ramp)
    factor = 2 if accumulation == "sum" else 1
    assert relative(gradients(models[1]), factor * gradients(models[0])) < 1e-10
    assert torch.isclose(one.total, two.total, rtol=1e-10), "what is logged is the mean either way"


@pytest.mark.parametrize(("quirk", "training"), [(False, True), (True, False)])
def test_train_in_eval_mode(quirk: bool, training: bool) -> None:
    model = classifier(resnet)
    before = [b.clone() for b in model.buffers()]
    step = Step(
        model, objective(), StepOptions(compile=False, quirks=Quirks(train_in_eval_mode=quirk))
    )
    step(batches_for(resnet, 1), torch.tensor(1.0))
    same = all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert model.training is training
    assert same is quirk, "eval mode freezes BatchNorm's statistics, train mode moves them"


def test_the_attack_leaves_batchnorm_and_weight_gradients_alone() -> None:
    """Attacked in eval mode: one update of the statistics, by the training forward."""
    model = classifier(resnet)
    counter = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).num_batches_tracked
    step = Step(model, objective(method="pgd_at"), StepOptions(compile=False))
    images, targets = batches_for(resnet, 1)[0]
    attacked = step.objective.perturb(
        model.eval(), images, targets, torch.tensor(1.0), gradient=step.attack_gradient
    )
    assert all(p.grad is None for p in model.parameters())
    assert counter.item() == 0
    assert (attacked - images).abs().max() <= 4 / 255 + 1e-6
    step([(images, targets)], torch.tensor(1.0))
    assert counter.item() == 1


NEW = {
    "edge": {"method": "edge"},
    "edge, relaxed saliency": {
        **{"method": "edge", "edge_sampling": "relaxed", "edge_map": "saliency"},
    },
    "edge of the loss, an rms per image": {
        **{"method": "edge", "edge_of": "loss", "edge_rms": "image"},
    },
    "pag": {"method": "pag"},
    "n_fgsm": {"method": "n_fgsm", "attack_eps": 0.1},
    "trades": {"method": "trades", "attack_eps": 0.1},
    "gradnorm at attacked images": {"gn_attacked": True, "attack_eps": 0.1, "gn_weight": 50.0},
    "l2 of the logit": {"gn_norm": "l2", "gn_of": "logit", "gn_weight": 50.0},
    "all options": {
        **{"gn_norm": "l2_squared", "gn_channel_weights": (1.0, 2.0, 0.5), "gn_threshold": 1e-3},
        **{"gn_start": 0.1, "gn_weight": 50.0},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_compiled_methods_equal_eager_with_one_graph(name: str, no_codegen) -> None:
    """With the same draws: this backend's are eager's. Another seed trains on another class, target
    or start."""
    found = {}
    for flag, seed in ((False, 3), (True, 3), (False, 4)):
        model = classifier(vit)
        step = Step(model, objective(**NEW[name]), StepOptions(compile=flag))
        batches = batches_for(vit, 1)
        torch.manual_seed(seed)
        loss = step(batches, torch.tensor(0.7))
        found[flag, seed] = gradients(model), loss
    (eager, there), (compiled, here) = found[False, 3], found[True, 3]
    assert relative(compiled, eager) < 1e-4
    assert torch.isclose(here.total, there.total, rtol=1e-5)
    assert torch.isclose(here.penalty, there.penalty, rtol=1e-4)
    attacks = name in ("n_fgsm", "trades", "gradnorm at attacked images")
    assert count_graphs() == (2 if attacks else 1), "the attack's step, and the loss"
    drawn = name not in ("l2 of the logit", "edge of the loss, an rms per image")
    assert torch.equal(eager, found[False, 4][0]) is not drawn


@pytest.mark.slow
def test_compiled_nearest_neighbours_equal_eager(no_codegen) -> None:
    among = Representatives(torch.rand(20, 3, 16, 16), torch.arange(20) % 5)
    found = []
    for flag in (False, True):
        model = classifier(vit)
        step = Step(
            model, build_objective(ObjectiveConfig(method="pag"), among), StepOptions(compile=flag)
        )
        batches = batches_for(vit, 1)
        torch.manual_seed(3)
        step(batches, torch.tensor(0.7))
        found.append(gradients(model))
    assert relative(found[1], found[0]) < 1e-4


@pytest.mark.parametrize("compile", first_is_quick([False, True]))
def test_gradnorm_and_fgsm_take_turns(compile: bool, no_codegen) -> None:
    """Each update is the one method's or the other's to the last digits, also where compiled;
    turns depend on the update's number alone, and the attacked updates have no penalty to log."""
    values = {"gn_weight": 3.0, "attack_eps": 0.05}
    both = objective(method="gradnorm+fgsm", gn_share=0.4, **values)
    turns = [both.has_turn(u) for u in range(20)]
    assert turns[:5] == [True, False, True, False, False] and sum(turns) == 8
    model = classifier(vit)
    step = Step(model, both, StepOptions(compile=compile))
    batches = batches_for(vit, 1)
    for update in range(4):
        alone = classifier(vit)
        method = "gradnorm" if turns[update] else "fgsm_rs"
        for stepped, steps in (
            (model, step),
            (alone, Step(alone, objective(method=method, **values), StepOptions(compile=False))),
        ):
            stepped.zero_grad()
            torch.manual_seed(update)
            loss = steps(batches, torch.tensor(0.5), update)
            if stepped is model:
                assert bool(loss.penalty.isnan()) is not turns[update]
        assert relative(gradients(model), gradients(alone)) < 1e-5


def test_the_turns_of_a_share_of_1_are_gradnorms() -> None:
    assert objective(method="gradnorm+fgsm", gn_share=1.0).rest is None


@pytest.mark.slow
def test_the_compiled_step_returns_no_gradient_of_the_images(monkeypatch) -> None:
    """But for what the patch embedding's convolution_backward, one operator with that of its
    weights, forms and drops."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    scheduled("exact", dtype=torch.float32, compile=True)
    shapes = [
        [tuple(x.meta["val"].shape) for x in graph.graph.output_node().args[0] if x is not None]
        for graph in graphs
    ]
    weights = [tuple(p.shape) for p in classifier(vit).parameters()]
    assert len(shapes) == 2 and sorted(shapes[1]) == sorted(weights)


def test_micro_batches_have_the_gradient_of_the_batch() -> None:
    whole, loss = scheduled("exact")
    parts, there = scheduled("exact", micro_batch=2)
    assert relative(parts, whole) < 1e-10
    assert torch.isclose(loss.total, there.total, rtol=1e-10)
    with pytest.raises(ValueError, match="micro_batch=3 does not divide a batch of 4 images"):
        scheduled("exact", micro_batch=3)


def test_the_papers_sum_is_over_batches_not_over_micro_batches() -> None:
    ends = []
    for micro_batch in (None, 2):
        model = classifier(vit, torch.float64)
        step = Step(
            model,
            objective(),
            StepOptions(compile=False, micro_batch=micro_batch, quirks=Quirks(accumulation="sum")),
        )
        step(batches_for(vit, 2, torch.float64), torch.tensor(1.0, dtype=torch.float64))
        ends.append(gradients(model))
    assert relative(ends[1], ends[0]) < 1e-10
