"""An update that runs out of memory is repeated with smaller micro-batches, and loses nothing."""

import pytest
import torch
from support.networks import classifier, objective, relative, resnet, vit
from support.steps import batches_for, gradients
from torch import Tensor, nn

from fastgn.step.options import StepOptions
from fastgn.step.retry import RetryingStep
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step


class TooLarge(nn.Module):
    """A network without room for more than `limit` images: it fails behind its layers, when
    statistics have moved and random numbers are drawn."""

    def __init__(self, backbone: nn.Module, limit: int, error: Exception | None = None):
        super().__init__()
        self.backbone = backbone
        self.limit = limit
        self.error = error or torch.OutOfMemoryError("CUDA out of memory.")
        self.failures = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.backbone(x)
        if len(x) > self.limit:
            self.failures += 1
            raise self.error
        return y


@pytest.mark.parametrize("method", ["gradnorm", "pgd_at"])
def test_running_out_of_memory_halves_the_micro_batch_and_loses_nothing(method: str) -> None:
    """Gradients, BatchNorm's statistics and the losses are bitwise those of a run that began with
    the smaller micro-batch, the random start of the attack included; two batches are accumulated,
    of which the first may have left gradients."""
    ends, losses, said = [], [], []
    for limit, micro_batch in ((2, None), (4, 2)):
        model = classifier(resnet)
        model.backbone = TooLarge(model.backbone, limit)
        step = Step(
            model, objective(method=method), StepOptions(compile=False, micro_batch=micro_batch)
        )
        torch.manual_seed(2)
        compute = RetryingStep(step, report=said.append)
        losses.append(compute(batches_for(resnet, 2), torch.tensor(1.0)))
        ends.append([gradients(model), *model.buffers(), torch.get_rng_state()])
        assert step.micro_batch == 2
        assert model.backbone.failures == (limit == 2)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert all(torch.equal(a, b) or a.isnan() for a, b in zip(*losses, strict=True))
    line = "out of memory with 4 images at a time: going on with 2 at a time"
    assert said == [f"{line}, with the same number of images per update"]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_memory_that_runs_out_beside_the_allocator_is_no_other(message: str) -> None:
    model = classifier(vit)
    model.backbone = TooLarge(model.backbone, 2, RuntimeError(message))
    step = Step(model, objective(), StepOptions(compile=False))
    compute = RetryingStep(step, report=lambda line: None)
    compute(batches_for(vit, 1), torch.tensor(1.0))
    assert step.micro_batch == 2
    model.backbone = TooLarge(model.backbone.backbone, 1, RuntimeError("CUDA error: misaligned"))
    model.zero_grad()
    with pytest.raises(RuntimeError, match="misaligned"):
        compute(batches_for(vit, 1), torch.tensor(1.0))
    assert step.micro_batch == 2


def test_a_subset_is_a_whole_number_of_images() -> None:
    """Also where the micro-batch is halved: 0.25 of 4 images is one, and of 2 there is none."""
    assert [Schedule("subset", subset_fraction=p).divisor for p in (1, 0.5, 0.75, 0.3333)] == [
        *(1, 2, 4, 3)
    ]
    assert 0.99e9 < Schedule("subset", subset_fraction=1e-9).divisor <= 1e9
    model = classifier(vit)
    model.backbone = TooLarge(model.backbone, 2)
    step = Step(
        model,
        objective(),
        StepOptions(schedule=Schedule("subset", subset_fraction=0.25), compile=False),
    )
    with pytest.raises(torch.OutOfMemoryError):
        RetryingStep(step)(batches_for(vit, 1), torch.tensor(1.0))
    model = classifier(vit)
    step = Step(
        model,
        objective(),
        StepOptions(schedule=Schedule("subset", subset_fraction=0.3), compile=False),
    )
    with pytest.raises(ValueError, match="4 images at a time, but this must be a multiple of 10"):
        step(batches_for(vit, 1), torch.tensor(1.0))


def test_gradients_of_before_are_never_lost() -> None:
    """A step adds to .grad: what another call has put there cannot be made again."""
    model = classifier(vit)
    step = Step(model, objective(), StepOptions(compile=False))
    compute = RetryingStep(step)
    compute(batches_for(vit, 1), torch.tensor(1.0))
    before = gradients(model).clone()
    model.backbone = TooLarge(model.backbone, 2)
    with pytest.raises(torch.OutOfMemoryError):
        compute(batches_for(vit, 1), torch.tensor(1.0))
    assert relative(gradients(model), before) < 1e-6


def test_one_image_that_does_not_fit_raises() -> None:
    model = classifier(vit)
    model.backbone = TooLarge(model.backbone, 0)
    step = Step(model, objective(), StepOptions(compile=False))
    compute = RetryingStep(step, report=lambda line: None)
    with pytest.raises(torch.OutOfMemoryError):
        compute(batches_for(vit, 1), torch.tensor(1.0))
    assert model.backbone.failures == 3, "4, 2 and 1 images were tried"


def test_an_update_leaves_room_for_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the optimizer allocates after the first update counts as part of this update."""
    held: list[int] = []
    empty = torch.empty

    def allocate(*size: int, **options: object) -> Tensor:
        if options.get("dtype") == torch.uint8:
            held.append(size[0])
            if size[0] and len(held) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return empty(*size, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty", allocate)
    model = classifier(vit)
    step = Step(model, objective(), StepOptions(compile=False))
    compute = RetryingStep(step, lambda line: None, reserve_bytes=1000)
    compute(batches_for(vit, 1), torch.tensor(1.0))
    assert step.micro_batch == 2 and held == [1000, 1000]
    model.zero_grad()
    compute(batches_for(vit, 1), torch.tensor(1.0))
    assert held == [1000, 1000, 0], "the optimizer has allocated it"
