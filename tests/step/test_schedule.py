"""The schedules against their formulas, compiled against eager, and what they refuse."""

import pytest
import torch
from support.networks import REPRESENTATIVES, classifier, objective, relative, vit
from support.steps import gradients, model_and_batch, scheduled
from torch import Tensor, nn

from fastgn.attacks import pgd
from fastgn.objectives import ObjectiveConfig, Representatives, build_objective, gradnorm, natural
from fastgn.step.options import StepOptions
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step


def by_hand(kind: str, h: float, ce_weight: float, gn_weight: float) -> tuple[Tensor, Tensor]:
    """The gradient of a difference with its points held fixed, and the difference itself."""
    model, (images, targets) = model_and_batch()

    def ce(x: Tensor) -> Tensor:
        return -(targets * model.backbone(x).log_softmax(1)).sum(1).mean()

    x = model.normalize(images).requires_grad_()
    here = ce(x)
    (grad,) = torch.autograd.grad(here, x, retain_graph=True)
    ahead, behind = ce(x.detach() + h * grad.sign()), ce(x.detach() - h * grad.sign())
    slope = (ahead - here) / h if kind == "finite-difference" else (ahead - behind) / (2 * h)
    (ce_weight * here + gn_weight * (4 / 255) / 0.225 * slope).backward()
    return gradients(model), slope.detach()


@pytest.mark.parametrize("kind", ["finite-difference", "central-difference"])
@pytest.mark.parametrize("gn_weight", [1.2, 0.01])
def test_differences_are_those_of_the_formula(kind: str, gn_weight: float) -> None:
    """Also where the cross-entropy's coefficient is negative, which turns the images' gradient."""
    values = {"ce_weight": 0.8, "gn_weight": gn_weight}
    assert (0.8 < 1.2 * (4 / 255) / 0.225 / 0.05) and (0.8 > 0.01 * (4 / 255) / 0.225 / 0.05)
    expected, slope = by_hand(kind, 0.05, **values)
    found, loss = scheduled(kind, fd_step=0.05, **values)
    assert relative(found, expected) < 1e-9
    assert torch.isclose(loss.grad_l1, slope, rtol=1e-9)
    assert torch.isclose(loss.total, 0.8 * loss.ce + gn_weight * loss.penalty, rtol=1e-9)


def test_differences_approach_the_exact_penalty() -> None:
    """One-sided errors fall with h, central ones with its square."""
    exact, loss = scheduled("exact", gn_weight=5.0)
    errors = {}
    for kind in ("finite-difference", "central-difference"):
        for h in (1e-3, 1e-4):
            found, there = scheduled(kind, gn_weight=5.0, fd_step=h)
            errors[kind, h] = relative(found, exact)
            assert torch.isclose(there.grad_l1, loss.grad_l1, rtol=100 * h)
    one = errors["finite-difference", 1e-3] / errors["finite-difference", 1e-4]
    two = errors["central-difference", 1e-3] / errors["central-difference", 1e-4]
    assert 7 < one < 13 and two > 50, errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lazy", "subset", "finite-difference", "central-difference"])
def test_compiled_schedules_equal_eager(kind: str, no_codegen) -> None:
    found, loss = scheduled(kind, dtype=torch.float32, compile=True, gn_weight=3.0)
    expected, there = scheduled(kind, dtype=torch.float32, gn_weight=3.0)
    assert relative(found, expected) < 1e-4
    assert torch.isclose(loss.total, there.total, rtol=1e-4)


def test_a_difference_draws_the_same_dropout_at_each_point() -> None:
    """Other masks would make a difference of order 1 over h."""
    slopes = []
    for h in (1e-4, 1e-5):
        model, batch = model_and_batch()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        torch.manual_seed(3)
        step = Step(
            model,
            objective(),
            StepOptions(schedule=Schedule("finite-difference", h), compile=False),
        )
        slopes.append(step([batch], torch.tensor(1.0, dtype=torch.float64)).grad_l1)
    assert torch.isclose(slopes[0], slopes[1], rtol=1e-2)
    exact = Step(model, objective(), StepOptions(compile=False))
    torch.manual_seed(3)
    assert torch.isclose(exact([batch], slopes[0] * 0 + 1).grad_l1, slopes[1], rtol=1e-3)


def test_lazy_penalties_add_up_to_the_exact_ones() -> None:
    """At the same weights, the updates of one interval have the gradient of that many exact ones;
    three of the four are plain cross-entropy."""
    exact, _ = scheduled("exact", gn_weight=3.0)
    parts = [scheduled("lazy", update=u, gn_weight=3.0, lazy_interval=4) for u in range(8, 12)]
    assert relative(sum(part for part, _ in parts), 4 * exact) < 1e-9
    plain, _ = scheduled("exact", method="natural")
    assert all(relative(part, 0.8 * plain) < 1e-9 for part, _ in parts[1:])
    for name in ("grad_l1", "penalty"):
        assert [bool(getattr(x, name).isnan()) for _, x in parts] == [False, True, True, True]


def test_a_subset_has_its_own_penalty_and_all_images_the_cross_entropy() -> None:
    model, (images, targets) = model_and_batch()
    part = gradnorm(
        model.backbone, model.normalize(images[:3]), targets[:3], ce_weight=0.0, gn_weight=3.0
    )
    (0.8 * natural(model, images, targets).total + part.total).backward()
    found, loss = scheduled("subset", gn_weight=3.0, subset_fraction=0.75)
    assert relative(found, gradients(model)) < 1e-9
    assert torch.isclose(loss.grad_l1, part.grad_l1)
    assert torch.isclose(loss.total, 0.8 * loss.ce + 3.0 * loss.penalty)
    whole, _ = scheduled("subset", gn_weight=3.0, subset_fraction=1.0)
    exact, _ = scheduled("exact", gn_weight=3.0)
    assert relative(whole, exact) < 1e-12


@pytest.mark.parametrize("method", ["edge", "pag"])
@pytest.mark.parametrize("kind", ["lazy", "subset"])
def test_other_penalties_can_be_lazy_or_partial(method: str, kind: str) -> None:
    """lazy: an update with the penalty has it k times, by that much further from plain training;
    subset: the penalty of the first images alone."""
    torch.manual_seed(0)
    plain, _ = scheduled("exact", method="natural")
    model, (images, targets) = model_and_batch()
    built = build_objective(
        ObjectiveConfig(method=method), Representatives(REPRESENTATIVES.images_NCHW.double())
    )
    steps = {
        "exact": Step(model, built, StepOptions(compile=False)),
        "lazy": Step(model, built, StepOptions(schedule=Schedule("lazy"), compile=False)),
        "subset": Step(model, built, StepOptions(schedule=Schedule("subset"), compile=False)),
    }

    def run(name: str, batch: tuple, update: int = 0) -> Tensor:
        model.zero_grad()
        torch.manual_seed(5)
        steps[name]([batch], torch.tensor(0.5, dtype=torch.float64), update)
        return gradients(model)

    exact = run("exact", (images, targets))
    if kind == "lazy":
        assert relative(run("lazy", (images, targets)) - plain, 4 * (exact - plain)) < 1e-9
        assert relative(run("lazy", (images, targets), 1), plain) < 1e-12
        return
    half = run("exact", (images[:2], targets[:2]))
    model.zero_grad()
    natural(model, images[:2], targets[:2]).total.backward()
    penalty = half - gradients(model)
    assert relative(run("subset", (images, targets)) - plain, penalty) < 1e-9


ATTACKED = {"gn_attacked": True, "attack_eps": 0.1, "attack_it": 2, "gn_weight": 50.0}


@pytest.mark.parametrize("kind", ["exact", "finite-difference", "lazy", "subset"])
def test_every_schedule_is_at_the_attacked_images(kind: str) -> None:
    """As without an attack on the images that the attack has made, in all of a lazy schedule's
    updates. The attack's step has a ramp of its own."""
    model, (images, targets) = model_and_batch()
    attacked, plain = objective(**ATTACKED), objective(gn_weight=50.0)
    half = torch.tensor(0.5, dtype=torch.float64)
    attack_ramp = torch.tensor(0.25, dtype=torch.float64)
    torch.manual_seed(5)
    there = pgd(*(model.eval(), images, targets), eps=0.1, step_size=0.25 * 0.1, steps=2)
    assert (there - images).abs().max() > 0.02
    for update in (0, 1):
        found = []
        for built, batch in ((attacked, (images, targets)), (plain, (there, targets))):
            model.zero_grad()
            step = Step(model, built, StepOptions(schedule=Schedule(kind), compile=False))
            torch.manual_seed(5)
            step([batch], half, update, attack_ramp)
            found.append(gradients(model))
        assert relative(found[0], found[1]) < 1e-9
        model.zero_grad()
        torch.manual_seed(5)
        Step(model, attacked, StepOptions(schedule=Schedule(kind), compile=False))(
            [(images, targets)], half, update
        )
        assert relative(gradients(model), found[0]) > 1e-4, "the attack's own ramp counts"


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"method": "edge"}, "finite-difference", "only the L1 norm of the loss's gradient"),
        ({"gn_threshold": 0.1}, "central-difference", "only the L1 norm of the loss's gradient"),
        ({"method": "gradnorm+fgsm"}, "lazy", "only some updates of this objective have"),
        ({"method": "trades"}, "subset", "this objective has no penalty"),
        ({"ce_weight": 0.0}, "central-difference", "of at least 1e-7, or finite-difference"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(values: dict, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"schedule {kind} .*{message}"):
        Step(
            classifier(vit),
            objective(**values),
            StepOptions(schedule=Schedule(kind), compile=False),
        )


@pytest.mark.parametrize("kind", ["finite-difference", "lazy", "subset"])
def test_a_schedule_needs_a_penalty(kind: str) -> None:
    with pytest.raises(ValueError, match=f"schedule {kind} .*this objective has no penalty"):
        Step(
            classifier(vit),
            objective(method="pgd_at"),
            StepOptions(schedule=Schedule(kind), compile=False),
        )


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'exakt' should be one of exact, exact-eager"):
        Schedule("exakt")
    with pytest.raises(ValueError, match="'fp8' should be one of fp32, tf32"):
        Step(classifier(vit), objective(), StepOptions(precision="fp8", compile=False))
    with pytest.raises(
        ValueError, match="takes its direction from the weighted gradient of the cross"
    ):
        Step(
            classifier(vit),
            objective(ce_weight=0.0),
            StepOptions(schedule=Schedule("central-difference"), compile=False),
        )


def test_a_lazy_penalty_at_every_update_has_one_loss() -> None:
    """Several processes wait for an update of each before they trust DDP with the collectives."""
    step = Step(
        classifier(vit), objective(), StepOptions(schedule=Schedule("lazy", lazy_interval=1))
    )
    assert list(step.losses) == ["penalty"]
