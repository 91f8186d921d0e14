"""Fixtures for the tests that compile an update."""

from functools import partial

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_codegen(monkeypatch):
    """Traces, differentiates and partitions as Inductor does, but runs ATen: seconds and not
    minutes for what code generation has no part in."""
    backend = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", backend)
