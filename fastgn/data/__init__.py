"""Data sets, and loaders that all yield the same `Batch` (see batch.py).

This module imports nothing, so that fastgn.data.pack and fastgn.data.check report a user's mistake
before imports that take seconds.
"""
