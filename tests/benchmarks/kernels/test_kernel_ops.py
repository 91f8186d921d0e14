"""ops.py: bytes that an op moves, targets, and a run at toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="what the script does without a GPU")
def test_kernels_runs_on_a_cpu_and_counts_bytes(tmp_path: Path) -> None:
    ops = ["--ops", "layer_norm", "cross_entropy_index"]
    options = ["--stage", "4", "--batch-size", "2", "--rounds", "2"]
    lines, record, rows = run_kernels(tmp_path, *ops, *options)
    assert lines[0] == lines[-1] == kernels.NO_MEANING
    assert record["meaningful_times"] is False and record["complete"] is True
    assert record["device"] == "cpu" and record["failed"] == []
    assert {"versions", "commit", "hardware"} <= record.keys()
    assert len(rows) == len(record["rows"]) == 2 * 3
    for row in rows.values():
        assert row["ms"].keys() >= {"ours", "eager", "copy"}
        for ms in row["ms"].values():
            assert ms.keys() >= {"mean", "std", "median", "n"}
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
    assert "(1.50)" in kernels.table(record)


MOVES = {
    **dict.fromkeys(
        kernels.ACTIVATIONS, "hidden -> y; gy hidden -> ghidden; v gy hidden -> ggy ghidden"
    ),
    "bias_gelu": (
        "hidden hidden_bias -> y; gy hidden hidden_bias -> ghidden ghidden_bias; "
        "v gy hidden hidden_bias -> ggy ghidden ghidden_bias"
    ),
    "layer_norm": (
        "x weight bias -> y; gy x weight -> gx gweight gbias; v gy x weight -> ggy gx gweight"
    ),
    # both inputs have the same gradient gx, and the gradient of gsum is v: neither is written twice
    "add_layer_norm": (
        "x residual weight bias -> y sum; gy gsum sum weight -> gx gweight gbias; "
        "v gy sum weight -> ggy gx gweight"
    ),
    "window_attention": (
        "qkv score_bias -> y; gy qkv score_bias -> gqkv gscore_bias; "
        "v gy qkv score_bias -> ggy gqkv gscore_bias"
    ),
    "shifted_window_attention": (
        "qkv score_bias mask -> y; gy qkv score_bias mask -> gqkv gscore_bias; "
        "v gy qkv score_bias mask -> ggy gqkv gscore_bias"
    ),
    **dict.fromkeys(
        ("cross_entropy_index", "cross_entropy_soft"),
        "logits targets -> y; gy logits targets -> glogits; v gy logits targets -> ggy glogits",
    ),
    # the second derivative of L1 with respect to the pixels is zero, so it is not written
    "gradient_norm_l1": "pixels -> y; gy pixels -> gpixels; v gy pixels -> ggy",
    "gradient_norm_l2": "pixels -> y; gy pixels y -> gpixels; v gy pixels y -> ggy gpixels",
}
"""Op -> tensors read and written: in the forward; in the backward; in the second order.

v is the cotangent of the first input's gradient. A g before a tensor's name means its gradient.
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", kernels.OPS)
def test_bytes_are_those_of_what_an_op_takes_and_returns(op: str, dtype: torch.dtype) -> None:
    _, functions, leaves = kernels.build(op, 3, 1, torch.device("cpu"), dtype)
    ours, inputs = functions["ours"], list(leaves.values())
    ys = kernels.listed(ours(*inputs))
    gys = [torch.randn_like(y).requires_grad_() for y in ys]
    v = torch.randn_like(inputs[0])
    asked = kernels.requests(ours, inputs, gys, v)
    sizes = {**leaves, **ours.keywords, "v": v, **dict(zip(("y", "sum"), ys, strict=False))}

    def nbytes(name: str) -> int:
        while name not in sizes:
            assert name.startswith("g"), name
            name = name[1:]
        return sizes[name].nbytes

    for order, moved in zip(kernels.ORDERS, MOVES[op].split(";"), strict=True):
        expected = sum(map(nbytes, moved.replace("->", "").split()))
        assert kernels.bytes_moved(asked[order]) == expected, order


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_gpu(tmp_path: Path) -> None:
    options = ["--ops", "gelu", "--stage", "1", "--rounds", "5"]
    _, record, rows = run_kernels(tmp_path, *options)
    assert record["meaningful_times"] is True and not record["failed"]
    for row in rows.values():
        assert row["order"] != "second" or row["peak_bytes"]["ours"] > 0
        assert 0 < row["share_of_copy"] < 2
