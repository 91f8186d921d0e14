"""bf16, fp16 and TF32: close to fp32, refused by devices that lack them, and restored
afterwards."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.marks import first_is_quick, pretend_card
from support.networks import IMAGES, classifier, objective, relative, resnet, swin, vit
from support.steps import batches_for, gradients, model_and_batch, scheduled
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgn.config.groups import StepConfig
from fastgn.errors import UserError
from fastgn.loss_scale import differentiate_images
from fastgn.objectives import Loss
from fastgn.objectives.base import find_loss_scale
from fastgn.resolved import check_device
from fastgn.step.double_backward import count_graphs
from fastgn.step.options import Quirks, StepOptions
from fastgn.step.precision import PRECISIONS, explain_unsupported, matmul_precision
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step


@pytest.mark.parametrize("compile", first_is_quick([False, True]))
def test_bf16_autocast_is_near_fp32(compile: bool, no_codegen) -> None:
    """COMPILE.md measured a relative error of 0.020 at cosine 0.9998; a wrong derivative is far
    off."""
    grads = []
    for precision in ("fp32", "bf16"):
        model = classifier(swin)
        step = Step(model, objective(), StepOptions(compile=compile, precision=precision))
        loss = step(batches_for(swin, 1), torch.tensor(1.0))
        assert loss.total.dtype == torch.float32
        grads.append(gradients(model))
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    assert 1e-6 < relative(grads[1], grads[0]) < 0.1
    assert F.cosine_similarity(grads[0], grads[1], dim=0) > 0.995


@pytest.mark.parametrize("build", [swin, vit, resnet])
@pytest.mark.parametrize("compile", first_is_quick([False, True]))
def test_bf16_pure_is_near_fp32(build, compile: bool, no_codegen) -> None:
    """Weights, gradients and BatchNorm's statistics stay fp32; what differs is the step's rounding:
    cosine .998 to .9999 on these networks, and a wrong derivative is far off."""
    exact, _ = scheduled("exact", build, torch.float32)
    model, batch = model_and_batch(build, torch.float32)
    before = [b.clone() for b in model.buffers()]
    step = Step(model, objective(), StepOptions(compile=compile, precision="bf16-pure"))
    loss = step([batch], torch.tensor(1.0))
    assert loss.total.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert all(b.dtype == c.dtype for b, c in zip(before, model.buffers(), strict=True))
    moved = [not torch.equal(b, c) for b, c in zip(before, model.buffers(), strict=True)]
    assert any(moved) is (build is resnet)
    assert 1e-4 < relative(gradients(model), exact) < 0.1
    assert F.cosine_similarity(gradients(model), exact, dim=0) > 0.995


class MatrixDtypes(TorchDispatchMode):
    """Dtypes of the matrix products, of the images and of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.norms: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "convolution"):
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor)}
        if name == "native_layer_norm":
            self.norms.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-pure", torch.bfloat16), ("fp16-pure", torch.float16)]
)
@pytest.mark.parametrize("method", ["gradnorm", "pgd_at"])
def test_pure_precisions_multiply_in_16_bits_alone(
    method: str, precision: str, dtype: torch.dtype
) -> None:
    model, batch = model_and_batch(swin, torch.float32)
    step = Step(model, objective(method=method), StepOptions(compile=False, precision=precision))
    with MatrixDtypes() as seen:
        step([batch], torch.tensor(1.0))
    assert seen.dtypes == {dtype}
    # in fp16, the second derivative of PyTorch's LayerNorm would overflow
    assert seen.norms == {torch.float32 if precision == "fp16-pure" else dtype}


# ---------------------------------------------------------------------------- fp16


def fp16_step(model: Any, precision: str, scale: float | None = None, **values: Any) -> Step:
    """values: options of the objective and, under "options", of the step."""
    options = values.pop("options", {})
    options = {"compile": False, "precision": precision} | options
    step = Step(model, objective(**values), StepOptions(**options))
    assert step.loss_scale is not None
    if scale is not None:
        step.loss_scale.scale.fill_(scale)
    return step


def in_float64(build) -> Tensor:
    """The exact gradient of the network and images that tests in lower precisions use."""
    model, (images, targets) = model_and_batch(build, torch.float32)
    batch = (images.double(), targets.double())
    Step(model.double(), objective(), StepOptions(compile=False))([batch], torch.tensor(1.0))
    return gradients(model)


@pytest.mark.parametrize("build", [swin, vit, resnet])
@pytest.mark.parametrize("precision", ["fp16", "fp16-pure"])
def test_fp16_is_nearer_to_float64_than_bf16(build, precision: str) -> None:
    """fp16 keeps 3 bits more than bf16."""
    exact, errors = in_float64(build), {}
    for name in (precision, precision.replace("fp16", "bf16")):
        model, batch = model_and_batch(build, torch.float32)
        step = Step(model, objective(), StepOptions(compile=False, precision=name))
        if step.loss_scale is not None:  # the weights of these networks are large
            step.loss_scale.scale.fill_(2.0**6)
        loss = step([batch], torch.tensor(1.0))
        assert loss.total.dtype == torch.float32
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        errors[name] = relative(gradients(model).double(), exact)
    assert errors[precision] < 0.02
    assert errors[precision] < 0.4 * errors[precision.replace("fp16", "bf16")]


def groups() -> nn.Module:
    """A network with all normalisations but LayerNorm and BatchNorm, for 5 classes."""
    layers: list[nn.Module] = []
    for norm in (nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True, track_running_stats=True)):
        layers += [nn.Conv2d(8 if layers else 3, 8, 3, 2), norm, nn.GELU()]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.RMSNorm(8), nn.Linear(8, 5))
    return nn.Sequential(*layers, *head)


SMALL = {
    resnet: ("conv", 0.1),
    groups: ("0. 3.", 0.02),
    vit: ("patch_embed.proj pos_embed cls_token", 0.02),
    swin: ("patch_embed.proj", 0.02),
}
"""Network -> weights in front of a normalisation, and the factor that makes them small."""


@pytest.mark.parametrize("precision", ["fp16", "fp16-pure"])
@pytest.mark.parametrize("build", SMALL)
@pytest.mark.parametrize("compile", first_is_quick([False, True]))
def test_normalisations_of_small_values_have_finite_derivatives(
    compile: bool, build: Any, precision: str, no_codegen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third power of the inverse standard deviation would overflow in fp16."""
    monkeypatch.setitem(IMAGES, groups, 16)
    names, factor = SMALL[build]
    found = []
    for name in ("fp32", precision):
        model = classifier(build)
        with torch.no_grad():
            for key, weight in model.backbone.named_parameters():  # type: ignore[operator]
                if any(part in key for part in names.split()):
                    weight.mul_(factor)
        step = Step(model, objective(), StepOptions(compile=compile, precision=name))
        if step.loss_scale is not None:  # small weights make the gradients in front of them large
            step.loss_scale.scale.fill_(1.0)
        step(batches_for(build, 1), torch.tensor(1.0))
        found.append(gradients(model).clone())
    assert relative(found[1], found[0]) < 0.03


def test_the_number_of_micro_batches_does_not_matter() -> None:
    """At a scale with which a loss divided by their number would underflow."""
    exact, errors = in_float64(vit), []
    for count in (1, 64):
        model, batch = model_and_batch(vit, torch.float32)
        fp16_step(model, "fp16", 2.0)([batch] * count, torch.tensor(1.0))
        errors.append(relative(gradients(model).double(), exact))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def tiny_loss(model: Any, images_BCHW: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
    """gradnorm's loss with a cross-entropy that is a millionth of its value."""
    images_BCHW = model.normalize(images_BCHW)
    ce = 1e-6 * F.cross_entropy(model.backbone(images_BCHW), targets)
    scale = find_loss_scale(model)
    grad_BCHW = differentiate_images(ce, images_BCHW, scale, create_graph=True)
    penalty = ramp * grad_BCHW.abs().sum()
    return Loss(ce + penalty, ce, penalty, penalty)


@pytest.mark.parametrize("precision", ["fp16", "fp16-pure"])
def test_the_first_derivative_is_scaled_too(precision: str) -> None:
    """Here it would underflow without its own scale."""
    found = []
    for name in ("fp32", precision):
        model, (images, targets) = model_and_batch(vit, torch.float32)
        made = dataclasses.replace(objective(), loss=tiny_loss)
        step = Step(model, made, StepOptions(compile=False, precision=name))
        step([(images, targets)], torch.tensor(1.0))
        found.append(gradients(model))
    assert relative(found[1], found[0]) < 0.05


METHODS = (
    *("natural", "gradnorm", "pgd_at", "fgsm_rs", "n_fgsm", "trades", "edge", "pag"),
    "gradnorm+fgsm",
)
EVERY_WAY: list[tuple[str, str, dict[str, Any]]] = [
    *((method, "exact", {}) for method in METHODS),
    *(
        ("gradnorm", kind, {})
        for kind in ("finite-difference", "central-difference", "lazy", "subset", "exact-eager")
    ),
    *(
        ("gradnorm", "exact", values)
        for values in (
            {"gn_norm": "l2"},
            {"gn_norm": "l2_squared"},
            {"gn_of": "logit"},
            {"gn_attacked": True},
        )
    ),
    ("pgd_at", "exact", {"attack_weight_grads": True}),
]


@pytest.mark.parametrize("precision", ["fp16", "fp16-pure"])
@pytest.mark.parametrize(("method", "schedule", "values"), EVERY_WAY)
def test_every_method_and_schedule_is_near_fp32(
    method: str, schedule: str, values: dict[str, Any], precision: str
) -> None:
    """With the same random draws, in two micro-batches, at the scale with which a run begins."""
    found = []
    quirks = Quirks(attack_weight_grads=values.get("attack_weight_grads", False))
    for name in ("fp32", precision):
        model, batch = model_and_batch(vit, torch.float32)
        options = StepOptions(Schedule(schedule), name, compile=False, micro_batch=2, quirks=quirks)
        # one attack step, because the later ones would begin at other images
        step = Step(model, objective(method=method, attack_it=1, **values), options)
        torch.manual_seed(3)
        step([batch], torch.tensor(1.0))
        found.append(gradients(model))
    assert relative(found[1], found[0]) < 0.1
    assert F.cosine_similarity(*found, dim=0) > 0.995


@pytest.mark.parametrize("compile", first_is_quick([False, True]))
def test_the_scale_hardly_matters_and_compiles_nothing(compile: bool, no_codegen) -> None:
    exact = in_float64(swin)
    model, batch = model_and_batch(swin, torch.float32)
    step = fp16_step(model, "fp16", options={"compile": compile})
    before = count_graphs()
    for power in (2, 8, 12, 14):
        model.zero_grad()
        step.loss_scale.scale.fill_(2.0**power)
        step([batch], torch.tensor(1.0))
        assert relative(gradients(model).double(), exact) < 0.01
    assert count_graphs() - before == compile


def fitted(build, ce: float) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A network that was trained on 4 images until its cross-entropy was below `ce`, and these
    images with their labels."""
    model, (images, _) = model_and_batch(build, torch.float32)
    model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    labels = torch.tensor([0, 1, 2, 3])
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=3e-3), 1.0
    while found > ce:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        found = float(loss.detach())
    return model, (images, labels)


@pytest.mark.slow
def test_gradients_of_a_fitted_network_are_not_lost() -> None:
    """At a cross-entropy below 1e-3, without the scale, a part of the gradient underflows.

    The penalty's gradient depends on the signs of the input gradient. Rounding turns some of them,
    so that the error of gradnorm's gradient is larger, with every scale and without one.
    """
    model, (images, labels) = fitted(swin, 5e-4)
    arms = (("fp64", 1.0), ("bf16", 1.0), ("fp16", 1.0), ("fp16", 2.0**13), ("fp16", 2.0**20))
    for method, bound in (("natural", 0.02), ("gradnorm", 0.2)):
        found = {}
        for precision, scale in arms:
            copied, batch = copy.deepcopy(model), (images, labels)
            if precision == "fp64":
                copied, batch = copied.double(), (images.double(), labels)
            name = "fp32" if precision == "fp64" else precision
            options = StepOptions(compile=False, precision=name)
            step = Step(copied, objective(method=method), options)
            if step.loss_scale is not None:
                step.loss_scale.scale.fill_(scale)
            loss = step([batch], torch.tensor(1.0))
            assert float(loss.ce) < 1e-3
            found[precision, scale] = gradients(copied).double()
        exact = found.pop(("fp64", 1.0))
        errors = {key: relative(value, exact) for key, value in found.items()}
        print(errors)
        for scale in (2.0**13, 2.0**20):
            assert errors["fp16", scale] < bound
            assert method == "gradnorm" or errors["fp16", scale] < errors["fp16", 1.0] / 3
        assert errors["fp16", 2.0**13] < errors["bf16", 1.0] / (3 if method == "natural" else 1)


@pytest.mark.slow
def test_an_attack_keeps_small_gradients() -> None:
    """Their signs are all that a step uses, but 0 has none."""
    model, (images, labels) = fitted(vit, 1e-4)
    lost = []
    for scale in (1.0, 2.0**13):
        step = fp16_step(model, "fp16", scale, method="pgd_at")
        grad_BCHW = step.attack_gradient(model, images, labels).images_BCHW
        lost.append(float((grad_BCHW == 0).float().mean()))
    print(lost)
    assert lost[1] < 0.02 and 0.1 < lost[0]


def test_existing_gradients_are_not_unscaled() -> None:
    """A second batch adds to the gradient of the first one, as in fp32."""
    model, batch = model_and_batch(vit, torch.float32)
    step = fp16_step(model, "fp16")
    step([batch], torch.tensor(1.0))
    once = gradients(model).clone()
    step([batch], torch.tensor(1.0))
    assert relative(gradients(model), 2 * once) < 1e-6


def test_matrix_precision_is_the_steps_alone() -> None:
    def now() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = now()
    for precision, expected in (("tf32", ("high", True)), ("fp32", ("highest", False))):
        with matmul_precision(precision):
            assert now() == expected
        assert now() == before


def test_matrix_precision_beside_the_newer_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a program uses them, PyTorch refuses to read the older ones."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        matmul.fp32_precision, conv.fp32_precision = "tf32", "ieee"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        for precision, expected in (("fp32", "ieee"), ("tf32", "tf32")):
            with matmul_precision(precision):
                assert (matmul.fp32_precision, conv.fp32_precision) == (expected, expected)
            assert (matmul.fp32_precision, conv.fp32_precision) == ("tf32", "ieee")
    finally:
        matmul.fp32_precision, conv.fp32_precision = before
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True


def test_what_a_cpu_cannot_compute_in() -> None:
    cpu = torch.device("cpu")
    assert explain_unsupported("tf32", cpu) == "tf32 needs a CUDA device, not cpu"
    assert all(explain_unsupported(name, cpu) is None for name in PRECISIONS if name != "tf32")


def test_what_a_volta_card_cannot_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = pretend_card(monkeypatch, "Tesla V100", (7, 0))
    for precision in ("fp32", "fp16", "fp16-pure"):
        assert explain_unsupported(precision, cuda) is None
    for precision in ("tf32", "bf16", "bf16-pure"):
        reason = explain_unsupported(precision, cuda)
        assert reason == f"{precision} needs compute capability 8.0, but Tesla V100 has only 7.0"
        with pytest.raises(UserError, match=f"--precision {precision} .*: use --precision fp16"):
            check_device(StepConfig(precision=precision), cuda)  # type: ignore[arg-type]
