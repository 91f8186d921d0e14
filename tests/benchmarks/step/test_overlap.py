"""The communication that an update waits for, computed from the schedule of its backward."""

from typing import Any
from unittest import mock

import pytest

from benchmarks.step.overlap import schedule
from benchmarks.step.predict import Network
from benchmarks.step.pretend import GPUS, Gpu
from benchmarks.step.scaling import Links, Sum, exposed_seconds


@pytest.mark.slow
@pytest.mark.parametrize("grad_dtype", ["fp32", "bf16"])
def test_little_is_exposed_within_a_machine(grad_dtype: str) -> None:
    """A Swin-B with one block per stage on eight H200, at the roofline and as slow as measured."""
    gpu = GPUS["h200"]
    network = Network("swin_b", 224, 64).with_depths((1, 1, 1, 1))
    kernels_s, sums = schedule(network, gpu, grad_dtype)
    weights = sum(p.numel() for p in network.build("triton").parameters())
    assert sum(s.nbytes for s in sums) == weights * (4 if grad_dtype == "fp32" else 2)
    assert all(0 < s.begin <= 1 for s in sums) and sums == sorted(sums)
    links = Links(gpu.link_bytes_per_s, 50e9)
    for factor in (1.0, 1.76):
        exposed = exposed_seconds(8, factor * kernels_s, sums, links)
        assert exposed <= 0.18 * sum(links.all_reduce_seconds(8, s.nbytes) for s in sums)


@pytest.mark.slow
def test_cuda_graphs_hold_no_all_reduce() -> None:
    """Each all-reduce of a small Swin stands between two pieces that can be CUDA graphs."""
    pieces: list[tuple[int, bool]] = []  # all-reduces, and whether the piece is a CUDA graph

    def look(lowering: Any, gpu: Gpu) -> tuple[float, list[Sum]]:
        for nodes, signature in zip(*lowering.scheduler.graph_partition(), strict=True):
            ops = [str(getattr(node.node, "op_overload", "")) for node in nodes]
            sums = sum("all_reduce" in op for op in ops)
            pieces.append((sums, not signature.skip_cudagraph))
        return 0.0, []

    network = Network("swin_b", 224, 2).with_depths((1, 1, 1, 1))
    with mock.patch("benchmarks.step.overlap.schedule_of", look):
        schedule(network, GPUS["h200"], "fp32", cuda_graphs=True)
    assert sum(sums for sums, _ in pieces) == 5
    assert all(is_graph == (sums == 0) for sums, is_graph in pieces)
    assert len(pieces) >= 8, "graphs and all-reduces take turns"
