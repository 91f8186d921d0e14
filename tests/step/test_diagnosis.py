"""Which layer is named where a loss, or one of its derivatives, stops being finite."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.runs import tiny_run
from torch import Tensor, nn

from fastgn import train
from fastgn.config import Config
from fastgn.models import network
from fastgn.models.network import Classifier
from fastgn.objectives import build_objective
from fastgn.step.diagnosis import Diagnosis
from fastgn.step.options import StepOptions
from fastgn.step.step import Step


class Normalized(nn.Module):
    """Two of its rows are exactly 0, where F.normalize has no finite second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(F.pad(x, (0, 0, 0, 2)), dim=-1)


class Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x - x)


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x * 0)


class Masked(nn.Module):
    """An infinity inside, as in a mask of attention, is no fault."""

    def forward(self, x: Tensor) -> Tensor:
        return x.masked_fill(x < x.mean(1, keepdim=True), -torch.inf).softmax(1)


def diagnosed(layer: nn.Module) -> str | None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Tanh(), layer)
    network = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 1))

    def penalised() -> Tensor:
        x = torch.randn(3, 4, requires_grad=True)
        loss = network(x).square().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + grad.abs().sum()

    before = [p.grad for p in network.parameters()]
    found = Diagnosis().run(network, penalised)
    assert [p.grad for p in network.parameters()] == before
    assert not any(m._forward_hooks for m in network.modules())
    return found


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Normalized, "the second derivative of layer 1.1 (Normalized) is not finite (in Div"),
        (Logarithm, "layer 1.1 (Logarithm) gives a value that is not finite"),
        (Root, "the derivative of layer 1.1 (Root) is not finite (in SqrtBackward0)"),
        (Masked, None),
        (nn.GELU, None),
    ],
)
def test_the_first_fault_is_named(layer: type[nn.Module], expected: str | None) -> None:
    found = diagnosed(layer())
    assert found is None if expected is None else str(found).startswith(expected), found


def test_a_first_update_that_is_not_finite_names_the_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swin V2 with padded windows and PyTorch's own normalisation: its zeros have no second
    derivative, and no learning rate helps."""
    monkeypatch.setattr(network, "replace_operators", lambda finder: {})
    swin = ["--model", "swinv2_tiny_window8_256", "--img-size", "72", "--model-kwargs"]
    swin += ["embed_dim=8", "depths=(1, 1)", "num_heads=(1, 2)"]
    line = tiny_run(tmp_path / "run", "--max-updates", "2", "--batch-size", "4", *swin)
    assert train.main(line) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the gradient of update 1, the first one since the start of this process, is" in said
    assert (
        "of layer backbone.layers." in said
        and "Attention)" in said
        and "--schedule finite-difference" in said
    )
    assert "--lr" not in said
    assert not list(tmp_path.rglob("*.pt"))


def test_every_micro_batch_is_diagnosed() -> None:
    """With --sync-bn another process may wait in one whose predecessor is at fault here alone."""
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), Logarithm())
    model = Classifier(backbone, (0.5,) * 3, (0.2,) * 3, 2)
    step = Step(
        model,
        build_objective(Config().replace(method="natural").objective),
        StepOptions(compile=False, micro_batch=2),
    )
    seen = []
    backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    batches = [(torch.rand(6, 3, 2, 2), torch.zeros(6, dtype=torch.int64))]
    found = step.diagnose(batches, torch.ones(()), 0, torch.ones(()))
    assert found == "layer backbone.2 (Logarithm) gives a value that is not finite"
    assert seen == [2, 2, 2]
