"""Fixtures for the tests that build networks."""

import pytest
from timm.layers import set_fused_attn


@pytest.fixture(autouse=True)
def timm_as_it_was():
    """build_model switches timm's fused attention off for the process: each test starts with it
    on."""
    set_fused_attn(True, experimental=True)
    yield
    set_fused_attn(True)
