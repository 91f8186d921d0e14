"""benchmarks/step/predict.py: a tiny Swin lowered for cards that are not here."""

import functools
import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastgn.objectives import ObjectiveConfig, build_objective, gradnorm
from fastgn.step.options import StepOptions
from fastgn.step.step import Step

pytest.importorskip("triton")  # Linux alone

from benchmarks.common import arguments  # noqa: E402
from benchmarks.step import predict, pretend  # noqa: E402

RATIO = 2.33
"""The most that gradnorm's bytes may be of natural's here: 2.29, and 2.37 with the
cotangents of attention's qkv summed outside its operator."""
KWARGS = ("patch_size=2", "embed_dim=32", "depths=(1,)", "num_heads=(2,)", "window_size=4")


@pytest.fixture(scope="module", autouse=True)
def compiled_here():
    """PyTorch has looked for this machine's devices, as in a process that trained before."""
    torch.compile(torch.sin)(torch.ones(2))


def network() -> Any:
    return predict.Network("swin_t", 16, 8, 10, KWARGS)


OPERATORS: dict[tuple[str, str], set[str]] = {}
"""Card and precision -> names of the operators that the kernels of an update call."""


@functools.cache
def cost(method: str, gpu: str = "h200", kernels: str = "triton", precision: str = "bf16-pure"):
    """Returns the cost of an update of one block with 8 images of 16 pixels.

    Also notes the operators in OPERATORS.
    """
    arm = predict.Arm(method, precision, compile=True, kernels=kernels)
    kernels_of, names = predict.kernels_of, OPERATORS.setdefault((gpu, precision), set())

    def noting(*args: Any) -> Iterator[Any]:
        for kernel, *rest in kernels_of(*args):
            names.add(str(getattr(kernel.node, "op_overload", "")))
            yield kernel, *rest

    with mock.patch.object(predict, "kernels_of", noting):
        return predict.predict(network(), arm, predict.GPUS[gpu])


def weights() -> int:
    return sum(p.numel() for p in network().build("reference").parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "precision", "attention"),
    [
        *(("h200", "bf16", True), ("a100", "bf16-pure", True)),
        *(("v100", "fp32", False), ("v100", "fp16", False)),
    ],
)
def test_each_card_launches_its_own_kernels_and_moves_at_least_weights_and_activations(
    gpu, precision, attention
):
    """On a V100, as in fp32, window attention is left to PyTorch's operators."""
    found = cost("natural", gpu, precision=precision)
    assert found.generated > 10 and found.extern > 10
    # weights are read forward and backward, gradients written; what is kept is written and read
    assert found.bytes > 4 * (2 + 1) * weights() + 2 * found.kept_bytes
    assert found.kept_bytes > 8 * 64 * 32 * 2 * 5  # five times the tokens, at 16 bits
    names = " ".join(OPERATORS[gpu, precision])
    assert ("window_attention_bwd" in names) == attention
    assert "layer_norm_bwd" in names
    gpu = predict.GPUS[gpu]
    slowest = max(found.bytes / gpu.bytes_per_s, found.flops / gpu.flop_per_s[precision])
    assert slowest <= found.seconds < 2 * slowest


def counted_flops(method: str) -> int:
    """FlopCounterMode on an eager step on the CPU."""
    model = network().build("reference")
    step = Step(model, build_objective(ObjectiveConfig(method=method)), StepOptions(compile=False))
    images, targets = torch.rand(8, 3, 16, 16), torch.rand(8, 10).softmax(1)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = mock.MagicMock(parents={"Global"})  # its hooks refuse autograd.grad
    with counter:
        step([(images, targets)], torch.tensor(1.0))
    return counter.get_total_flops()


@pytest.mark.slow
def test_flops_are_those_of_an_eager_step_and_gradnorm_has_twice_naturals():
    found = {m: cost(m, kernels="reference").flops for m in ("natural", "gradnorm")}
    assert found["natural"] == counted_flops("natural")
    # compiled, the first convolution has its derivatives once more
    assert found["gradnorm"] == pytest.approx(counted_flops("gradnorm"), rel=0.01)
    # beside one block the patches' embedding weighs, whose input gradient natural does not have
    assert found["gradnorm"] / found["natural"] == pytest.approx(2, rel=0.1)


@pytest.mark.slow
def test_gradnorm_moves_a_bounded_multiple_of_naturals_bytes():
    """A change that loses a fusion, or saves more than it must, moves more."""
    natural, exact = cost("natural"), cost("gradnorm")
    assert natural.bytes < cost("natural", kernels="reference").bytes
    assert 1.5 < exact.bytes / natural.bytes < RATIO
    assert exact.bytes < cost("gradnorm", kernels="reference").bytes


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_the_engine_in_python_gives_what_pytorchs_gives(kernels, accumulate):
    model = network().build(kernels).double()
    for parameter in model.parameters():  # none zero by the initialisation
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    images, targets = torch.randn(2, 3, 16, 16).double(), torch.tensor([1, 2])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        total = gradnorm(model.backbone, images, targets).total
        if not accumulate:
            return list(torch.autograd.grad(total, list(model.parameters())))
        for _ in range(2):
            torch.autograd.backward(total, inputs=list(model.parameters()), retain_graph=True)
        return [p.grad for p in model.parameters()]

    exact = gradients()
    from fastgn_kernels import dispatch

    with (
        mock.patch.object(torch.autograd, "_engine_run_backward", pretend.run_backward),
        mock.patch.object(dispatch, "_engine_will_run", lambda node: node in pretend._RUNNING[-1]),
    ):
        ours = gradients()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_deep_swins_are_the_shallow_ones_and_so_many_pairs():
    assert predict.shallower((2, 2, 2, 2)) is None
    assert predict.shallower((2, 2, 7, 2)) is None  # the seventh has no partner
    few, more, times = predict.shallower((2, 2, 18, 2))
    assert (few, more, times) == ((2, 2, 2, 2), (2, 2, 4, 2), 8)
    low, high = predict.Cost(generated=5, bytes=100), predict.Cost(generated=8, bytes=130)
    deep = low.plus(high.plus(low, -1), times)
    assert (deep.generated, deep.bytes) == (29, 340)


@pytest.mark.slow
def test_the_record_and_its_table_say_that_they_predict(tmp_path, capsys):
    output = tmp_path / "predict_tiny.json"
    argv = ["--model", "swin_t", "--img-size", "16", "--classes", "10", "--batch-size", "8"]
    argv += ["--gpus", "v100", "--methods", "natural", "--precision", "bf16", "bf16-pure"]
    argv += ["--kernels", "reference", "--model-kwargs", *KWARGS, "--output", str(output)]
    assert predict.main(argv) == 0
    assert capsys.readouterr().out.startswith("prediction, v100, natural, fp32, reference: ")
    record = json.loads(output.read_text())
    (row,) = record["rows"]  # no bf16 on a V100: one row, in fp32
    assert record["prediction"] and row["prediction"] and row["precision"] == "fp32"
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]

    table = predict.table
    assert "Predictions" in table(record, []) and "measured images/s" not in table(record, [])
    assert "| over natural |" in table(record, []) and "| 1.00 |" in table(record, [])
    measured = {
        "device": "Tesla V100-SXM2-32GB",
        "model": "swin_t",
        "img_size": 16,
        "batch": 8,
        "kernels": "reference",
        "rows": [{"arm": "natural", "precision": "fp32", "compiled": True, "images_per_s": 4321.0}],
    }
    assert "| 4321 |" in table(record, [measured])
    assert "4321" not in table(record, [measured | {"device": "Tesla V100-PCIE-16GB"}])


def test_rows_that_are_there_are_kept_and_a_trial_leaves_them_alone(tmp_path, monkeypatch):
    row = {"gpu": "a100", "arm": "natural", "precision": "bf16", "kernels": "triton"}
    row |= {"method": "natural", "bytes_an_image": 5.0}
    monkeypatch.setattr(
        predict, "predict_deep", lambda *_: (predict.Cost(bytes=8, seconds=1, kept_bytes=8), None)
    )
    monkeypatch.setattr(predict, "table", lambda *_: "")
    for name in ("ROOT", "RESULTS"):
        monkeypatch.setattr(arguments, name, tmp_path)
    argv = ["--gpus", "h200", "--methods", "natural", "--kernels", "triton", "--precision", "bf16"]
    assert predict.main(argv) == 0
    file = tmp_path / "predict_swin_b.json"
    record = json.loads(file.read_text())
    record["rows"].append(row)
    file.write_text(json.dumps(record))
    assert predict.main(argv) == 0  # its own row again, the other one kept
    assert [r["gpu"] for r in json.loads(file.read_text())["rows"]] == ["h200", "a100"]
    file.write_text(json.dumps(record | {"versions": {"torch": "2.0"}}))
    assert predict.main(argv) == 0
    assert [r["gpu"] for r in json.loads(file.read_text())["rows"]] == ["h200"]
    assert predict.main([*argv, "--batch-size", "8"]) == 0
    assert json.loads((tmp_path / "runs" / file.name).read_text())["batch"] == 8


def test_a_wrong_batch_size_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        predict.main(["--batch-size", "0"])
    assert capsys.readouterr().err.endswith("--batch-size: 0 must be positive and finite\n")
