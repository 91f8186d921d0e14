"""What ptxas makes of every kernel of `kernel_builds.LAUNCHES`, for cards that are not here."""

import itertools
import json
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from fastgn_kernels import (
    ACTIVATIONS,
    activation,
    layer_norm_kernels,
    window_attention_qkvpacked,
)
from fastgn_kernels.dispatch import LAUNCH
from support import ROOT

from benchmarks.kernels import builds as kernel_builds
from benchmarks.kernels.builds import DTYPES, LAUNCHES, SHARED_LIMIT, builds_of, compile_only

NARROW = {"_window_attention_products_kernel": "rows of 49 numbers begin at odd addresses"}
"""Kernel -> why it has no 16-byte access where its arguments are aligned."""

ONE_NUMBER_A_ROW = {"_cross_entropy_fwd_kernel", "_gradient_norm_reduce_kernel"}
"""Kernels that have nothing else to store."""


QUICK = {(op, 90) for op in LAUNCHES} | {("activation gelu", 70)}
"""Ops and compute capabilities that are built in each test run."""


@pytest.mark.parametrize(
    ("op", "capability"),
    [
        pytest.param(*row, marks=[] if row in QUICK else pytest.mark.slow)
        for row in itertools.product(LAUNCHES, SHARED_LIMIT)
    ],
)
def test_builds(op: str, capability: int) -> None:
    launches = LAUNCHES[op]
    if op.startswith("layer_norm"):
        # of ten widths: all of them take ptxas a quarter of an hour, and the script builds them
        launches = [x for x in launches if x.shapes[0][1] in (128, 1024, 4096)]
    builds = list(builds_of(launches, capability))
    count = Counter(build["dtype"] for build in builds)
    for dtype in DTYPES[capability]:
        built = count.pop(str(dtype).removeprefix("torch."), 0)
        if op.startswith("window_attention") and capability >= 80 and dtype == torch.float32:
            assert built == 0, "Triton's products spill there"
        else:
            assert built >= 3, "fewer than three orders"
    assert not count
    for build in builds:
        assert build["registers"] > 0, build
        assert build["spills"] == 0, build
        assert build["shared"] <= SHARED_LIMIT[capability], build
        assert build["load_bytes"] == 16 or build["kernel"] in NARROW, build
        wide_stores = build["store_bytes"] == 16 or build["kernel"] in ONE_NUMBER_A_ROW
        assert wide_stores or build["kernel"] in NARROW, build


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_an_unaligned_argument_is_read_by_narrower_loads(capability: int) -> None:
    x = torch.empty(4097, dtype=torch.float16)
    with compile_only(capability) as builds:
        activation(x[:-1], "gelu")
        activation(x[1:], "gelu")
    aligned, unaligned = builds
    assert (aligned.load_bytes, aligned.store_bytes) == (16, 16)
    assert (unaligned.load_bytes, unaligned.store_bytes) == (2, 16)


@pytest.mark.parametrize(
    "capability, dtype, built",
    [
        (70, torch.float16, 1),
        (70, torch.float32, 1),
        (70, torch.float64, 1),
        (70, torch.bfloat16, 0),  # such a card has no instructions for bfloat16
        (75, torch.float16, 1),
        (80, torch.float16, 1),
        (80, torch.bfloat16, 1),
        (90, torch.float16, 1),
        (90, torch.float32, 0),
        (90, torch.float64, 0),
    ],
)
def test_where_window_attention_is_a_kernel(
    capability: int, dtype: torch.dtype, built: int
) -> None:
    """Elsewhere PyTorch's operators give the result."""
    qkv = torch.zeros(3, 2, 1, 49, 32, dtype=dtype)
    with compile_only(capability) as builds:
        o = window_attention_qkvpacked(qkv)
    assert len(builds) == built
    assert built or torch.equal(o, qkv[2])


@pytest.mark.parametrize("dtype", DTYPES[70], ids=str)
def test_window_attention_moves_half_of_the_bytes(dtype: torch.dtype) -> None:
    """On sm_70, second order moves at most half as many bytes as PyTorch's operators."""
    row = kernel_builds.count_bytes(1, dtype)
    assert row["ratio"]["second"] < 0.5
    assert max(row["ratio"].values()) < 0.75
    record = json.loads(kernel_builds.RESULT.read_text())
    assert row in record["bytes"], "run python -m benchmarks.kernels.builds --ops window_attention"


def test_traffic_counts_what_is_read_and_written() -> None:
    x, y, z = (torch.empty(2, 4, 4, device="meta") for _ in range(3))  # 128 bytes each
    for tensors, run in (
        (3, lambda: x @ y),
        (3, lambda: torch.add(x, y, out=z)),
        (3, lambda: z.baddbmm_(x, y, beta=0)),
        (4, lambda: z.baddbmm_(x, y)),
        (2, lambda: x.copy_(y)),
        (1.5, lambda: x[:, :, :2].mT.contiguous().unbind() and x.new_zeros(2, 4, 2)),
        (0, lambda: torch.empty_like(x.flatten(1).unbind()[0].view(4, 4))),
    ):
        with kernel_builds.Traffic() as traffic:
            run()
        assert traffic.nbytes == 128 * tensors
    traffic.count([x, None], 1)
    assert traffic.nbytes == 128 * (tensors + 1)


def test_every_op_has_its_row() -> None:
    assert {f"activation {kind}" for kind in ACTIVATIONS} <= LAUNCHES.keys()
    names = " ".join(torch._C._dispatch_get_all_op_names())
    ops = set(re.findall(r"\bfastgn::(\w+)_bwd_bwd\b", names))
    assert {row.split()[0] for row in LAUNCHES} == ops


def test_layer_norms_tiles_are_all_built() -> None:
    """Every tile that a width from 65 to 1024 takes, and the widest."""
    largest = sys.modules["fastgn_kernels.layer_norm"].LARGEST  # the attribute is the function
    built = [layer_norm_kernels.choose_tile(columns) for columns in kernel_builds.LAYER_NORMS]
    widths = (*range(65, 1025), largest)
    assert all(layer_norm_kernels.choose_tile(columns) in built for columns in widths)


@triton.jit
def _hungry_kernel(x_ptr, BLOCK: tl.constexpr):
    """A whole table in registers: 256 of them for a thread of one warp."""
    offsets = tl.arange(0, 2 * BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offsets)
    tl.store(x_ptr + offsets, x / tl.sum(x, axis=0)[None, :] + tl.sum(x, axis=1)[:, None])


def test_spills_are_seen() -> None:
    with compile_only(80) as builds:
        _hungry_kernel[(1,)](torch.empty(128 * 64), BLOCK=64, num_warps=1, **LAUNCH)
        _hungry_kernel[(1,)](torch.empty(128 * 64), BLOCK=64, num_warps=4, **LAUNCH)
    assert builds[0].spills > 0 and builds[1].spills == 0
    assert 0 < builds[1].shared <= SHARED_LIMIT[80]


def test_the_recorded_table_is_of_these_rows() -> None:
    record = json.loads(kernel_builds.RESULT.read_text())
    assert {row["op"] for row in record["builds"]} == LAUNCHES.keys()
    assert all(row["spills"] == 0 for row in record["builds"])
    assert re.fullmatch(r"\d+\.\d+.*", record["versions"]["triton"])


@pytest.mark.slow
def test_the_script_says_what_it_does() -> None:
    command = [sys.executable, "-m", "benchmarks.kernels.builds", "--help"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert out.returncode == 0 and "usage" in out.stdout
