"""The communication that an update waits for, computed from the schedule of its backward."""

import pytest

from benchmarks.step.overlap import schedule
from benchmarks.step.predict import Network
from benchmarks.step.pretend import GPUS
from benchmarks.step.scaling import Links, exposed_seconds


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
    for factor in (1.0, 2.1):
        exposed = exposed_seconds(8, factor * kernels_s, sums, links)
        assert exposed <= 0.18 * sum(links.all_reduce_seconds(8, s.nbytes) for s in sums)
