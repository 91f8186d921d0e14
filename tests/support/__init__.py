"""Helpers that several test files share."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""

SHARED = ROOT.parent / "shared" / "data"
"""Data sets that are not part of the repository, so a test skips if its own is not there."""
