"""bf16 and TF32: close to fp32, refused by devices that lack them, and restored afterwards."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.marks import first_is_quick
from support.networks import classifier, objective, relative, resnet, swin, vit
from support.steps import batches_for, gradients, model_and_batch, scheduled
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgn.step.options import StepOptions
from fastgn.step.precision import explain_unsupported, matmul_precision
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


@pytest.mark.parametrize("method", ["gradnorm", "pgd_at"])
def test_bf16_pure_multiplies_and_normalises_in_bf16_alone(method: str) -> None:
    model, batch = model_and_batch(swin, torch.float32)
    step = Step(model, objective(method=method), StepOptions(compile=False, precision="bf16-pure"))
    with MatrixDtypes() as seen:
        step([batch], torch.tensor(1.0))
    assert seen.dtypes == seen.norms == {torch.bfloat16}


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
    assert all(explain_unsupported(name, cpu) is None for name in ("fp32", "bf16", "bf16-pure"))


def test_what_a_volta_card_cannot_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    cuda = torch.device("cuda", 0)
    assert explain_unsupported("fp32", cuda) is None
    for precision in ("tf32", "bf16", "bf16-pure"):
        reason = explain_unsupported(precision, cuda)
        assert reason == f"{precision} needs compute capability 8.0, but Tesla V100 has only 7.0"
