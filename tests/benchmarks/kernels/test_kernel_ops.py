"""ops.py: bytes that an op moves, targets, and a run at toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels import ops as kernels


def run_kernels(folder: Path, *options: str) -> tuple[list[str], dict, dict]:
    """The script's lines, its JSON, and its rows by op, dtype and order."""
    output = folder / "kernels_card.json"
    files = ["--output", str(output)]
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.ops", *files, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    record = json.loads(output.read_text())
    rows = {(row["op"], row["dtype"], row["order"]): row for row in record["rows"]}
    return out.stdout.strip().splitlines(), record, rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="what the script does without a GPU")
def test_kernels_runs_on_a_cpu_and_counts_bytes(tmp_path: Path) -> None:
    ops = ["--ops", "layer_norm", "cross_entropy_index"]
    options = ["--stages", "4", "--batch-size", "2", "--rounds", "2"]
    lines, record, rows = run_kernels(tmp_path, *ops, *options)
    assert lines[0] == lines[-1] == kernels.NO_MEANING
    assert record["meaningful_times"] is False and record["complete"] is True
    assert record["device"] == "cpu" and record["failed"] == record["skipped"] == []
    assert {"versions", "commit", "hardware", "large_copy"} <= record.keys()
    assert len(rows) == len(record["rows"]) == 2 * 2 * 3
    for row in rows.values():
        assert row["agrees"] and row["targets"] == []
        assert row["ms"].keys() >= {"ours", "eager", "copy"}
        for ms in row["ms"].values():
            assert ms.keys() == {"mean", "std", "median", "n"}
            assert ms["n"] == 2 and ms["mean"] > 0
        seconds = row["ms"]["ours"]["median"] / 1e3
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / seconds)

    # 2 images of 7 x 7 tokens, 1024 channels of 2 bytes
    x, c = 2 * 49 * 1024 * 2, 1024 * 2
    layer_norm = [rows["layer_norm", "bfloat16", order]["bytes"] for order in kernels.ORDERS]
    assert layer_norm == [
        (x + 2 * c) + x,  # x, weight, bias; y
        (2 * x + c) + (x + 2 * c),  # gy, x, weight; gx, gweight, gbias
        (3 * x + c) + (2 * x + c),  # v, gy, x, weight; ggy, gx, gweight
    ]
    z, t, loss = 2 * 1000 * 4, 2 * 8, 2 * 4
    assert [rows["cross_entropy_index", "float32", o]["bytes"] for o in kernels.ORDERS] == [
        z + t + loss,
        (loss + z + t) + z,  # gy, logits, targets; glogits
        (z + loss + z + t) + (loss + z),  # v, gy, logits, targets; ggy, glogits
    ]

    record["file"] = "kernels_card.json"
    with pytest.raises(KeyError):
        kernels.table(record)  # no memory was measured: not a result to show
    for row in record["rows"]:
        row["times_less_memory_than"] = {"eager": 1.5}
        row["targets"] = [{"met": row["dtype"] == "bfloat16"}]
    assert "(1.50)" in kernels.table(record) and "| 3 of 6 |" in kernels.table(record)


class Seen(TorchDispatchMode):
    """Names and tensor arguments of the ops of ours that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Tensor]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastgn":
            name = function.name().removeprefix("fastgn::")
            self.calls.append((name, [x for x in args if isinstance(x, Tensor)]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", kernels.OPS)
def test_bytes_are_those_of_what_an_op_takes_and_returns(op: str) -> None:
    case = kernels.build(kernels.choose_cases([op], [3])[0], 1, torch.device("cpu"))
    ours, inputs = case.ours, list(case.inputs.values())
    gys = [torch.randn_like(y).requires_grad_() for y in kernels.listed(ours(*inputs))]
    asked = kernels.requests(ours, inputs, gys, torch.randn_like(inputs[0]))
    sizes = kernels.sizes(case)
    for order, suffix in zip(kernels.ORDERS, ("", "_bwd", "_bwd_bwd"), strict=True):
        with Seen() as seen:
            results = asked[order]()
        ((name, taken),) = seen.calls  # one op an order
        assert name.endswith(suffix)
        if (op, order) == ("gradient_norm_l1", "second"):
            # handed on and not read: the derivative does not depend on it
            taken = [x for x in taken if x.data_ptr() != gys[0].data_ptr()]
        # what is passed on as it came is not written, and one tensor returned twice is written once
        given = {x.data_ptr() for x in taken}
        written = {
            x.data_ptr(): x.nbytes
            for x in results
            if x is not None and x.data_ptr() not in given and x.numel()
        }
        read = sum(x.nbytes for x in taken)
        assert kernels.bytes_moved(op, order, sizes) == read + sum(written.values()), order


def test_targets_are_judged() -> None:
    def met(*args) -> list[bool]:
        return [target["met"] for target in kernels.targets(*args)]

    # share of copy bandwidth, time and memory of eager over ours
    assert met("gelu", "forward", 0.9, 1.1, 1.0) == [True, True]
    assert met("mish", "second", 0.89, 2.5, 1.0) == [False, True, True]
    assert met("bias_gelu", "second", 0.9, 2.4, 1.0) == [True, False, True]
    assert met("layer_norm", "backward", 0.8, 0.9, 0.9) == [True, False]
    assert met("add_layer_norm", "second", 0.79, 3.9, 1.0) == [False, False, True]
    assert met("window_attention", "second", 0.1, 5.0, 3.9) == [True, False, True]
    assert met("shifted_window_attention", "second", 0.1, 4.9, 4.0) == [False, True, True]
    assert met("window_attention", "forward", 0.1, 0.9, 1.1) == [True]
    assert met("cross_entropy_soft", "second", 0.1, 0.9, 1.0) == [False]
    assert met("gradient_norm_l1", "forward", 0.1, 0.9, 0.9) == [False]


def test_a_wrong_result_is_not_a_fast_one() -> None:
    right = [torch.ones(3), None, torch.zeros(2)]
    assert kernels.difference(right, right) == 0
    assert kernels.difference([torch.ones(3), torch.zeros(2), None], right) == 0
    assert kernels.difference([torch.ones(3), None, torch.ones(2)], right) > 1
    assert kernels.difference([None, None, None], right) == 1
    nan = [torch.full((3,), torch.nan), None, torch.zeros(2)]
    assert not kernels.difference(nan, right) <= 1e9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_gpu(tmp_path: Path) -> None:
    options = ["--ops", "gelu", "--stages", "1", "--rounds", "5"]
    _, record, rows = run_kernels(tmp_path, *options)
    assert record["meaningful_times"] is True and not record["failed"]
    for row in rows.values():
        assert row["agrees"] and row["targets"]
        assert row["peak_bytes"]["ours"] > 0 and 0 < row["share_of_copy"] < 2
