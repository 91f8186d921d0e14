"""What ptxas makes of every kernel of `kernel_builds.LAUNCHES`, for cards that are not here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import checks
import pytest
import torch
import triton
import triton.language as tl
from fastgn_kernels import ACTIVATIONS, activation
from fastgn_kernels.dispatch import LAUNCH

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kernel_builds  # noqa: E402
from kernel_builds import DTYPES, LAUNCHES, SHARED_LIMIT, builds_of, compile_only  # noqa: E402

pytestmark = checks.not_interpreted

NARROW: dict[str, str] = {}
"""Op -> why a kernel of its has no 16-byte access where its arguments are aligned."""

ONE_NUMBER_A_ROW = {"_cross_entropy_fwd_kernel", "_gradient_norm_reduce_kernel"}
"""Kernels that have nothing else to store."""


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("op", LAUNCHES)
def test_builds(op: str, capability: int) -> None:
    builds = list(builds_of(LAUNCHES[op], capability))
    assert len(builds) >= 3 * len(DTYPES[capability]), "fewer than three orders"
    for build in builds:
        assert build["registers"] > 0, build
        assert build["spills"] == 0, build
        assert build["shared"] <= SHARED_LIMIT[capability], build
        assert build["load_bytes"] == 16 or op in NARROW, build
        wide_stores = build["store_bytes"] == 16 or build["kernel"] in ONE_NUMBER_A_ROW
        assert wide_stores or op in NARROW, build


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_an_unaligned_argument_is_read_by_narrower_loads(capability: int) -> None:
    x = torch.empty(4097, dtype=torch.float16)
    with compile_only(capability) as builds:
        activation(x[:-1], "gelu")
        activation(x[1:], "gelu")
    aligned, unaligned = builds
    assert (aligned.load_bytes, aligned.store_bytes) == (16, 16)
    assert (unaligned.load_bytes, unaligned.store_bytes) == (2, 16)


def test_every_kind_has_its_row() -> None:
    assert {f"activation {kind}" for kind in ACTIVATIONS} <= LAUNCHES.keys()


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


def test_the_script_says_what_it_does() -> None:
    script = ROOT / "benchmarks" / "kernel_builds.py"
    command = [sys.executable, str(script), "--help"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and "usage" in out.stdout
